"""Synthetic checkpoints in the layout of real models: a base and experts that are it plus noise, in bfloat16.

    .venv/bin/python benchmarks/checkpoints.py llama-3.2-3b FOLDER             # 4 x 6.4 GB
    .venv/bin/python benchmarks/checkpoints.py llama-3.2-3b/8 FOLDER --experts 3
    .venv/bin/python benchmarks/checkpoints.py moe-3600 FOLDER                 # or moe-14400: many tiny tensors

Writes FOLDER/LAYOUT/base, expert-1, ...; what is complete already is left as it is. Memory is bounded by a piece of
a million entries, whatever the model's size. All values are windows of one block of normal values, at an offset
and of a size that follow from the model and the tensor's name alone: fast to make, of full rank, and any one tensor
can be made again by itself (`pieces`). `compare` is for what two tools made of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

VERSION = "1"  # to be raised with every change of the values, so that older files are written anew
SHARD = 5_000_000_000  # bytes, as on the Hub
PERIOD = 4_194_301  # a prime: the rows of no matrix begin at the same place of the block again
PIECE = 1 << 20  # entries made at once
UPDATES = (0.01, 0.02, 0.03)  # of the experts in turn, relative to the base's values
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """`config.json`, and every tensor's shape in the order of the model's state dict."""

    config: dict[str, Any]
    shapes: dict[str, Shape]


def llama(divisor: int, blocks: int = 28) -> Layout:
    """meta-llama/Llama-3.2-3B, its widths divided: 254 tensors, the output head tied to the embedding; or fewer
    blocks of it.
    """
    head, heads, narrow = 128, 24 // divisor, 8 // divisor
    width, wide, words = 3072 // divisor, 8192 // divisor, 128256 // divisor
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (words, width)}
    for i in range(blocks):
        block: dict[str, Shape] = {**attention(width, heads * head, narrow * head), **mlp("mlp", width, wide)}
        block |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,))
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    config = (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
        | {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": blocks, "vocab_size": words}
        | {"num_attention_heads": heads, "num_key_value_heads": narrow, "head_dim": head, "hidden_act": "silu"}
        | {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "attention_dropout": 0.0}
        | {"rope_scaling": {**scaling, "original_max_position_embeddings": 8192}, "initializer_range": 0.02}
        | {"bos_token_id": 128000 // divisor, "eos_token_id": 128000 // divisor + 1, "use_cache": True}
        | {"tie_word_embeddings": True, "torch_dtype": "bfloat16", "pretraining_tp": 1}
    )
    return Layout(config, shapes)


def afmoe(blocks: int, experts: int = 100, width: int = 16) -> Layout:
    """A mixture of tiny experts, each a tensor of its own: the one such architecture that mergekit does not fuse."""
    head, words = width // 2, 16 * width
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (words, width)}
    for i in range(blocks):
        block: dict[str, Shape] = {**attention(width, width, head), "self_attn.gate_proj": (width, width)}
        block |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        norms = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
        block |= dict.fromkeys(norms, (width,))
        block |= {"mlp.router.gate": (experts, width), **mlp("mlp.shared_experts", width, width)}
        for expert in range(experts):
            block |= mlp(f"mlp.experts.{expert}", width, width)
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        shapes[f"model.layers.{i}.mlp.expert_bias"] = (experts,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    config = (
        {"architectures": ["AfmoeForCausalLM"], "model_type": "afmoe", "torch_dtype": "bfloat16"}
        | {"hidden_size": width, "intermediate_size": width, "moe_intermediate_size": width, "vocab_size": words}
        | {"num_hidden_layers": blocks, "num_dense_layers": 0, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"head_dim": head, "num_experts": experts, "num_experts_per_tok": 8, "num_shared_experts": 1}
        | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    )
    return Layout(config, shapes)


def attention(width: int, queries: int, keys: int) -> dict[str, Shape]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    shapes = ((queries, width), (keys, width), (keys, width), (width, queries))
    return {f"self_attn.{name}": shape for name, shape in zip(names, shapes, strict=True)}


def mlp(prefix: str, width: int, wide: int) -> dict[str, Shape]:
    up, down = (wide, width), (width, wide)
    return {f"{prefix}.gate_proj": up, f"{prefix}.up_proj": up, f"{prefix}.down_proj": down}


LAYOUTS = {
    "llama-3.2-3b": lambda: llama(1),
    "llama-3.2-3b@1": lambda: llama(1, 1),
    "llama-3.2-3b@4": lambda: llama(1, 4),
    "llama-3.2-3b/2": lambda: llama(2),
    "llama-3.2-3b/4": lambda: llama(4),
    "llama-3.2-3b/8": lambda: llama(8),
    "moe-3600": lambda: afmoe(12),
    "moe-14400": lambda: afmoe(48),
}


def pieces(model: str, name: str, shape: Shape) -> Iterator[Tensor]:
    """The entries of one tensor of `base` or `expert-N`, in order, in bfloat16."""
    centre, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.02 * 4 ** (_fraction("size", name) - 0.5))
    update = 0.0 if model == "base" else UPDATES[(int(model.removeprefix("expert-")) - 1) % 3] * max(centre, spread)
    count = math.prod(shape)
    for first in range(0, count, PIECE):
        length = min(PIECE, count - first)
        values = (centre + spread * _window("base", name, first, length)).bfloat16()
        if update:
            values = values.float().add_(_window(model, name, first, length), alpha=update).bfloat16()
        yield values


def _window(model: str, name: str, first: int, length: int) -> Tensor:
    """`length` normal values from the block, which repeats for ever."""
    start = (int(_fraction(model, name) * PERIOD) + first) % PERIOD
    return _block()[start : start + length]


@cache
def _block() -> Tensor:
    """PERIOD normal values, and as many of them again behind as a window may need."""
    values = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
    return torch.cat([values, values[:PIECE]])


def _fraction(*words: str) -> float:
    """A number in [0, 1) that looks random and follows from the words."""
    digest = hashlib.blake2b("/".join(words).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def write_all(root: Path, name: str, experts: int = 3) -> dict[str, Path]:
    """Write the base and the experts of a layout, say so on stderr, and return their folders by their names."""
    if name not in LAYOUTS:
        raise SystemExit(f"no layout {name}; there are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]()
    models = ["base", *(f"expert-{number}" for number in range(1, experts + 1))]
    folders = {model: root / name.replace("/", "-") / model for model in models}
    for model, folder in folders.items():
        started = time.perf_counter()
        new = write_model(layout, model, folder)
        size = sum(file.stat().st_size for file in weight_files(folder))
        took = f"written in {time.perf_counter() - started:.1f} s" if new else "complete"
        print(f"{folder}: {len(layout.shapes)} tensors, {size / 1e9:.2f} GB, {took}", file=sys.stderr)
    return folders


def write_model(layout: Layout, model: str, folder: Path) -> bool:
    """Write what is not complete of one model; whether there was anything."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(layout.shapes)
    written = [_write_shard(folder / file, model, shapes) for file, shapes in shards.items()]
    if len(shards) > 1:
        weight_map = {name: file for file, shapes in shards.items() for name in shapes}
        total = sum(map(_nbytes, layout.shapes.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2) + "\n")
    return any(written)


def _shards(shapes: dict[str, Shape]) -> dict[str, dict[str, Shape]]:
    """File -> its tensors: cut in the order of the state dict, then sorted by name, as safetensors' own writer does."""
    parts: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if parts[-1] and size + _nbytes(shape) > SHARD:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += _nbytes(shape)
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    files = names if len(parts) > 1 else ["model.safetensors"]
    return {file: dict(sorted(part.items())) for file, part in zip(files, parts, strict=True)}


def _nbytes(shape: Shape) -> int:
    return 2 * math.prod(shape)


def _write_shard(path: Path, model: str, shapes: dict[str, Shape]) -> bool:
    """Write one file, unless it is there in its full length and with this very header."""
    header, length = _header(shapes), sum(map(_nbytes, shapes.values()))
    if path.exists() and path.stat().st_size == len(header) + length:
        with path.open("rb") as file:
            if file.read(len(header)) == header:
                return False
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            for piece in pieces(model, name, shape):
                file.write(piece.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # only clean pages can be dropped before a measurement
    partial.rename(path)
    return True


def _header(shapes: dict[str, Shape]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "synthetic": VERSION}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + _nbytes(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@dataclass
class Difference:
    """How two merged models differ, entry by entry. `undecided` are the differing entries that the rule leaves open.

    The steps are those of the other entries. `tensors` holds the last four numbers of every tensor that differs.
    """

    entries: int = 0
    differing: int = 0
    undecided: int = 0
    most_steps: float = 0.0
    most_input_steps: float = 0.0
    tensors: dict[str, tuple[float, ...]] = field(default_factory=dict)


def compare(ours: Path, theirs: Path, inputs: Sequence[Path], records: Mapping[str, Any]) -> Difference:
    """Compare two outputs in steps of bfloat16, at the larger of the two values and at the largest of the inputs'.

    `inputs` are base and experts; `records`, of our manifest, hold the magnitudes at which `ties` trimmed each expert.
    """
    found, a, b, sources = Difference(), _readers(ours), _readers(theirs), [_readers(path) for path in inputs]
    if a.keys() != b.keys():
        raise SystemExit(f"{ours} and {theirs} hold tensors of different names")
    for name in a:
        x, y = a[name](name).flatten(), b[name](name).flatten()
        found.entries += len(x)
        where = (x != y).nonzero()[:, 0]
        if len(where):
            values = torch.stack([read[name](name).flatten()[where] for read in sources]).double()
            x, y, free = x[where].double(), y[where].double(), _undecided(values, records[name].get("thresholds"))
            distance = (x - y).abs().masked_fill(free, 0)
            steps = [float((distance / _spacing(at)).max()) for at in (torch.stack([x, y]), values)]
            found.tensors[name] = (len(where), int(free.sum()), *steps)
    if found.tensors:
        differing, undecided, most, most_of_inputs = zip(*found.tensors.values(), strict=True)
        found.differing, found.undecided = int(sum(differing)), int(sum(undecided))
        found.most_steps, found.most_input_steps = max(most), max(most_of_inputs)
    return found


def _spacing(values: Tensor) -> Tensor:
    """The step from one bfloat16 to the next, at the largest of several: eight significant bits."""
    return torch.exp2(torch.frexp(values.abs().amax(0)).exponent.double() - 8)


def _readers(folder: Path) -> dict[str, Callable[[str], Tensor]]:
    files = [safe_open(file, framework="pt") for file in weight_files(folder)]
    return {name: file.get_tensor for file in files for name in file.keys()}  # noqa: SIM118


def _undecided(values: Tensor, limits: Sequence[float] | None) -> Tensor:
    """Where `ties` may keep an entry or not, or has no sign to elect, given the entries of the base and the experts."""
    if not limits:
        return torch.zeros(values.shape[1], dtype=torch.bool)
    D, limit = values[1:] - values[0], torch.tensor(limits, dtype=torch.float64)[:, None]
    return (D.abs() == limit).any(0) | ((D * (D.abs() >= limit)).sum(0) == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("layout", help=", ".join(LAYOUTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=3)
    arguments = parser.parse_args()
    write_all(arguments.folder, arguments.layout, arguments.experts)


if __name__ == "__main__":
    main()
