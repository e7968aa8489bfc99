"""What the manifest should say of inputs: an oracle that knows the safetensors format and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def stored_hashes(file: Path | bytes) -> dict[str, str]:
    """The SHA-256 of each tensor's bytes in a safetensors file."""
    data = file if isinstance(file, bytes) else file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = {name: about["data_offsets"] for name, about in json.loads(data[8:start]).items() if name[0] != "_"}
    return {name: hashlib.sha256(data[start + a : start + b]).hexdigest() for name, (a, b) in places.items()}


def tensors_read(manifest: Any) -> list[dict[str, str]]:
    """For every model the hashes of its tensors, of all its files."""
    models = (entry["files"].values() for entry in manifest["inputs"])
    return [{name: sum for file in files for name, sum in file.get("tensors", {}).items()} for files in models]
