"""What is there where no model was found: one level down, under another name, or almost under this one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.address import scheme_of
from acemerge.errors import Cure, fetching

_MOST = 1000  # names of a folder that are looked at
_WEIGHTS = r"(model\.safetensors(\.index\.json)?|adapter_model\.safetensors|model-\d{5}-of-\d{5}\.safetensors)"

# A pattern of the paths in a folder; what is said, of the folder's name and what the pattern found, and the cure.
_Say = Callable[[str, list[str]], tuple[str, str | Cure]]
_KNOWN: tuple[tuple[str, _Say], ...] = (
    (
        rf"(checkpoint-\d+)/{_WEIGHTS}",
        lambda root, found: (
            f"is a trainer's folder: it has {_some(found)}, and no weights of its own",
            f"name one of them, as {root}{found[-1]}",
        ),
    ),
    (
        r"(snapshots/[0-9a-f]{40})/.*",
        lambda root, found: (
            "is a model's folder in the Hub's cache, with a folder for each revision",
            f"name the model by its id, or {root}{found[-1]}",
        ),
    ),
    (
        r"([\w.-]+)/adapter_config\.json",
        lambda root, found: (
            f"has no adapter of its own, but {_some(found)} in folders",
            f"name one of them, as {root}{found[0]}",
        ),
    ),
    (
        r"(?:([\w.-]+)/)?[\w.-]+\.distcp",
        lambda root, found: (
            "has the shards of a distributed checkpoint (.distcp), each a part of every weight",
            f"put them together: accelerate merge-weights {root}{found[0]} NEW_FOLDER",
        ),
    ),
    (
        r"(zero_to_fp32\.py|global_step\d+)(?:/.*)?",
        lambda root, found: (
            "has the shards of a DeepSpeed checkpoint, each a part of every weight",
            "put them together with deepspeed's zero_to_fp32.py --safe_serialization, and name the new folder",
        ),
    ),
    (
        r"(model_index\.json)",
        lambda root, found: (
            "is a diffusers pipeline, with a model in each of its folders",
            f"fetch it whole, with hf download {root.rstrip(':/')} --local-dir FOLDER, and name that folder",
        ),
    ),
    (
        r"([\w.-]+-\d{5}-of-\d{5}\.safetensors)",
        lambda root, found: (
            f"has {_some(found)}, and no index of shards of these names",
            "load it with the program that wrote it, save it with save_pretrained, and name that folder",
        ),
    ),
    (
        r"(adapter_model\.(?:safetensors|bin))",
        lambda root, found: (
            f"has {_some(found)}, and no adapter_config.json",
            fetching("its adapter_config.json too, which says how it is applied"),
        ),
    ),
    (
        r"([\w.-]+\.safetensors)",
        lambda root, found: (f"has {_some(found)}, and no model.safetensors", f"name the file, as {root}{found[0]}"),
    ),
    (
        r"([\w.-]+\.gguf)",
        lambda root, found: (
            f"has {_some(found)}, whose weights are quantised",
            "name the folder of the checkpoint that it was made of",
        ),
    ),
    (
        r"(tf_model\.h5|flax_model\.msgpack)",
        lambda root, found: (
            f"has {_some(found)}, and no weights of PyTorch",
            "choose a revision with model.safetensors, or save it again from PyTorch",
        ),
    ),
    (
        rf"([\w.-]+)/{_WEIGHTS}",
        lambda root, found: (f"has a model in {_some(found)}", f"name that folder, as {root}{found[0]}"),
    ),
)


def what_is_there(where: object, paths: Sequence[str], within: str = "/") -> tuple[str, str | Cure] | None:
    """What a folder with these paths is, and what to name instead; None where nothing is known of it.

    `within` stands between the folder and what is in it: a colon in a Hub id.
    """
    for pattern, say in _KNOWN:
        matches = (re.fullmatch(pattern, path) for path in paths)
        found = sorted({match[1] or "" for match in matches if match}, key=_by_number)
        if found:
            return say(f"{where}{within}", found)
    return None


def paths_in(root: Path) -> list[str]:
    """What lies in a folder, in its folders, and in those of a cache's snapshots. Links to folders are not followed."""
    found = []
    for name in files.list_folder(root)[:_MOST]:
        found.append(name)
        if files.kind(root / name) == "folder":
            inner = files.list_folder(root / name)[:_MOST]
            found += [f"{name}/{each}" for each in inner]
            found += [f"{name}/{each}/" for each in inner if name == "snapshots"]
    return found


def almost(path: Path) -> str:
    """`did you mean X?` of a path that is not there and one that is, if there is one; else empty."""
    parts = path.parts if scheme_of(path) is None else ()
    for i in range(len(parts)):
        folder = Path(*parts[:i])
        if files.kind(files.resolve(folder / parts[i])) != "nothing":
            continue
        if files.kind(files.resolve(folder)) != "folder":
            return ""
        close = difflib.get_close_matches(parts[i], files.list_folder(folder), n=1)
        meant = Path(folder, *close, *parts[i + 1 :])
        return f"did you mean {meant}?" if close and files.kind(files.resolve(meant)) != "nothing" else ""
    return ""


def _some(found: Sequence[str]) -> str:
    return f"{', '.join(found[:3])}{' and others' if len(found) > 3 else ''}"


def _by_number(name: str) -> tuple[str, int]:
    digits = re.search(r"\d+$", name)
    return (name[: digits.start()], int(digits[0])) if digits else (name, 0)
