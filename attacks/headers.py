"""Row 1: headers, indexes and configurations damaged at the level of their structure, and of their bytes.

What is refused must be refused cleanly; what is accepted must be right by an independent reading of the file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from acemerge.checkpoints.folder import open_checkpoint, open_file
from acemerge.models.roles import find_roles
from attacks import models
from attacks.harness import Tally, check, clean, in_child, main
from attacks.mutate import damage_bytes, mutate, parsed, written

ROW = 1
FULL = 200_000
_BATCH = 12_500
# Of twenty cases: the others are headers. A configuration is the dearest, as the architecture is built from it.
_INDEXES, _CONFIGS = 4, 1

_LENGTHS = (0, 1, 2, 7, 8, 2**24, 2**24 + 1, 2**31, 2**32, 2**47, 2**63 - 1, 2**63, 2**64 - 1)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 10,
    "max_position_embeddings": 16, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_scaling": None, "torch_dtype": "float32", "id2label": {"0": "a"}, "eos_token_id": [1, 2],
    "bos_token_id": 0, "hidden_act": "silu",
}  # fmt: skip
CONFIGS: tuple[dict[str, Any], ...] = (
    LLAMA,
    {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10, "max_position_embeddings": 8,
    },
    {"model_type": "nobody", "hidden_size": 4, "nested": {"list": [1, 2, {"deep": None}]}},
)  # fmt: skip


def attack(folder: Path, count: int, seed: int) -> Tally:
    total = Tally()
    for start in range(0, count, _BATCH):
        stop = min(start + _BATCH, count)
        total.add(in_child(batch, folder, start, stop, seed, timeout=120 + 0.05 * (stop - start)))
    return total


def batch(folder: Path, start: int, stop: int, seed: int) -> Tally:
    """The cases from `start` up to `stop`, each from a seed of its own."""
    tally = Tally()
    single, sharded = folder / "header.safetensors", models.write_sharded(folder / "sharded")
    alone = models.write_single(folder / "alone")
    for i in range(start, stop):
        rng = random.Random(f"{seed} {i}")
        kind = i % 20
        if kind < _INDEXES:
            clean(tally, f"index {i} of seed {seed}", _index_case(sharded, rng))
        elif kind < _INDEXES + _CONFIGS:
            clean(tally, f"config {i} of seed {seed}", _config_case(alone, rng))
        else:
            clean(tally, f"header {i} of seed {seed}", _header_case(single, rng))
    return tally


def _damaged(value: Any, rng: random.Random) -> bytes:
    """The JSON of `value` with one to three changes of its structure, or of its bytes."""
    tree = parsed(json.dumps(value).encode())
    if rng.random() < 0.15:
        text = written(tree)
        return damage_bytes(text, rng, len(text))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = mutate(tree, rng)
    return written(tree)


# --- headers ------------------------------------------------------------------------------------------------


def _header_case(path: Path, rng: random.Random) -> Callable[[], None]:
    names = rng.sample(sorted(models.TENSORS), rng.randint(1, len(models.TENSORS)))
    tensors = {name: models.TENSORS[name] for name in names}
    values = rng.randbytes(len(models.data(tensors)))
    content = models.framed(_damaged(models.entries(tensors), rng), values)
    what = rng.randrange(10)
    if what == 0:
        length = rng.choice(_LENGTHS) if rng.random() < 0.5 else len(content) + rng.randint(-40, 4)
        content = (length % 2**64).to_bytes(8, "little") + content[8:]
    elif what == 1:
        content = content[: -rng.randint(1, 8)] if rng.random() < 0.5 else content + bytes(rng.randint(1, 8))
    elif what == 2:
        content = damage_bytes(content, rng, len(content) - len(values))
    models.overwrite(path, content)
    return lambda: check_file(path)


def check_file(path: Path) -> None:
    """Open a safetensors file; what is accepted is read in full and compared with the file's own bytes."""
    checkpoint = open_file(path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    pairs = json.loads(content[8:start].decode(), object_pairs_hook=list)
    table = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
    check(len({name for name, _ in pairs}) == len(pairs), "a name stands twice and was accepted")
    check({name for name, _ in table} == checkpoint.tensors.keys(), "other tensors than the header names")
    position = 0
    for name, entry in sorted(table, key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        size = models.nbytes(entry["dtype"], entry["shape"])
        check(first == position and end - first == size, f"{name!r} was accepted at {first}..{end}, {size} bytes")
        position = end
        value = checkpoint.read(name)
        check(list(value.shape) == entry["shape"], f"{name!r} has another shape than its header says")
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        check(raw == content[start + first : start + end], f"{name!r} was read from elsewhere")
    check(start + position == len(content), "bytes are left over")


# --- indexes ------------------------------------------------------------------------------------------------


def _index_case(folder: Path, rng: random.Random) -> Callable[[], None]:
    right = models.weight_map(models.split(models.TENSORS, 2))
    index = folder / models.INDEX
    models.overwrite(index, _damaged({"metadata": {"total_size": 256}, "weight_map": right}, rng))

    def opened() -> None:
        checkpoint = open_checkpoint(folder)
        check(json.loads(index.read_bytes())["weight_map"] == right, "an index that is wrong was accepted")
        check(checkpoint.tensors.keys() == right.keys(), "other tensors than the index names")
        for name, info in checkpoint.places.items():
            check(info.file == folder / right[name], f"{name!r} is read from another shard than the index says")

    return opened


# --- configurations -----------------------------------------------------------------------------------------


def _config_case(folder: Path, rng: random.Random) -> Callable[[], None]:
    path = folder / "config.json"
    models.overwrite(path, _damaged(rng.choice(CONFIGS), rng))

    def opened() -> None:
        checkpoint = open_checkpoint(folder)
        pairs = json.loads(path.read_bytes(), object_pairs_hook=list)
        check(len({key for key, _ in pairs}) == len(pairs), "a key stands twice and was accepted")
        check(checkpoint.config.keys() == dict(pairs).keys(), "another configuration than the file holds")
        roles = find_roles(checkpoint.config, checkpoint.tensors)
        check(roles.by_name.keys() == checkpoint.tensors.keys(), "tensors without a role")

    return opened


if __name__ == "__main__":
    main(("headers",))
