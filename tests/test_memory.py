"""A model's total size never decides the memory: the high-water mark of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders import write_checkpoint

# The import of torch is resident before the merge starts; what counts is what the merge adds.
_MEASURE = """
import json, resource, sys
import acemerge
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
acemerge.merge(sys.argv[2], sys.argv[2:4], sys.argv[1])  # a dry run on one small model: libraries warmed up
before = peak()
acemerge.merge(sys.argv[4], sys.argv[5:-1], sys.argv[1], out=sys.argv[-1], max_shard_size="64MB")
print(json.dumps(peak() - before))
"""
SIDE, LAYERS, EXPERTS = 1024, 48, 3


def _write_model(folder: Path, seed: int, layers: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layers.{i}.weight": torch.randn(SIDE, SIDE, generator=generator).bfloat16() * 0.02 for i in range(layers)
    }
    return write_checkpoint(folder, tensors)


@pytest.mark.parametrize("method", ["ace", "average"])
def test_memory_is_bounded_by_the_largest_tensor(method: str, tmp_path: Path) -> None:
    small = [_write_model(tmp_path / f"s{i}", i, 1) for i in range(2)]
    models = [_write_model(tmp_path / f"m{i}", i, LAYERS) for i in range(EXPERTS + 1)]
    words = [method, *map(str, small), *map(str, models), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *words], capture_output=True, text=True, check=True)
    added = json.loads(done.stdout)
    tensor = SIDE * SIDE * 4  # in the compute type
    model = LAYERS * SIDE * SIDE * 2
    assert added < (EXPERTS + 4) * tensor + 20_000_000  # well under the promised 500 MB beside the tensors
    assert added < model / 2
