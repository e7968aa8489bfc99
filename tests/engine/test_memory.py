"""A model's total size never decides the memory: the high-water mark of a process of its own."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import write_checkpoint
from crossed import spread
from memory_probe import added_by, allocated_by

from acemerge.checkpoints.folder import open_checkpoint
from acemerge.checkpoints.header import TensorSpec
from acemerge.engine.foreseen import expected_memory
from acemerge.engine.opening import open_recipe
from acemerge.engine.run_options import RunOptions
from acemerge.methods import METHODS, make
from acemerge.output.writer import header_bytes, tensor_bytes
from acemerge.planning.costs import _KEPT_OF_EACH, peak_memory
from acemerge.recipes.recipe import make_recipe

# The import of torch is resident before the merge starts; what counts is what the merge adds.
_MEASURE = """
import json, resource, sys
import acemerge
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
# A dry run on one small model, to warm the libraries up. The models are not related.
acemerge.merge(sys.argv[2], sys.argv[2:4], sys.argv[1], force=True)
before = peak()
limit, out = sys.argv[-2:]
acemerge.merge(sys.argv[4], sys.argv[5:-2], sys.argv[1], out, max_shard_size="64MB", force=True, max_memory=limit)
print(json.dumps(peak() - before))
"""
SIDE, LAYERS, EXPERTS = 1024, 48, 3


def _write_model(folder: Path, seed: int, layers: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layers.{i}.weight": torch.randn(SIDE, SIDE, generator=generator).bfloat16() * 0.02 for i in range(layers)
    }
    return write_checkpoint(folder, tensors)


@pytest.mark.parametrize("method", [pytest.param("ace", marks=pytest.mark.torture), "average"])
def test_memory_is_bounded_by_the_largest_tensor(method: str, tmp_path: Path) -> None:
    """In the least memory that the plan allows: how much is in flight is then no matter of who is slow."""
    small = [_write_model(tmp_path / f"s{i}", i, 1) for i in range(2)]
    models = [_write_model(tmp_path / f"m{i}", i, LAYERS) for i in range(EXPERTS + 1)]
    recipe = make_recipe({"base": str(models[0]), "experts": [str(m) for m in models[1:]], "method": method})
    limit = peak_memory(open_recipe(recipe, None, RunOptions()).plan)
    words = [method, *map(str, small), *map(str, models), str(limit), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", _MEASURE, *words], capture_output=True, text=True, check=True)
    added = json.loads(done.stdout)
    tensor = SIDE * SIDE * 4  # in the compute type
    model = LAYERS * SIDE * SIDE * 2
    assert added < (EXPERTS + 4) * tensor + 20_000_000  # well under the promised 500 MB beside the tensors
    assert added < model / 2


# The command line, then the process's own high-water mark.
_WHOLE_RUN = """
import atexit
def tell():
    print(next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024)
atexit.register(tell)
from acemerge.__main__ import main
main()
"""
ROWS, COLUMNS, FILLED = 8192, 128, 512


def _write_sparse_model(folder: Path, nbytes: int, seed: int | None) -> Path:
    """Layers of zeros, as holes in the file; with a seed, each with some rows of numbers."""
    folder.mkdir()
    layers = nbytes // (2 * ROWS * COLUMNS)
    specs = [TensorSpec(f"layers.{i}.weight", torch.bfloat16, (ROWS, COLUMNS)) for i in range(layers)]
    header = header_bytes(specs)
    rows = 0.02 * torch.randn(FILLED, COLUMNS, generator=torch.Generator().manual_seed(seed or 0))
    block = tensor_bytes(rows.bfloat16())
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + layers * specs[0].nbytes)
        for i in range(layers if seed else 0):
            file.seek(len(header) + i * specs[0].nbytes)
            file.write(block)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("method", "times"),
    [("ace", 0.5), *(pytest.param(method, 10, marks=pytest.mark.torture) for method in ("ace", "ties"))],
)
def test_models_larger_than_the_bound(method: str, times: float, tmp_path: Path) -> None:
    """The promise of DESIGN: `(largest tensor) (T + 4)` in the compute type and 500 MB, all of the process counted.

    Each of the three models is so many times as large as that.
    """
    experts, out = 2, tmp_path / "out"
    bound = (experts + 4) * 4 * ROWS * COLUMNS + 500_000_000
    nbytes = int(times * bound)
    base, *tuned = (_write_sparse_model(tmp_path / f"m{i}", nbytes, seed=i or None) for i in range(experts + 1))
    assert (base / "model.safetensors").stat().st_size >= 0.99 * nbytes
    words = ["merge", "--base", base, *(w for e in tuned for w in ("--expert", e)), "--method", method, "-o", out]
    done = subprocess.run(
        [sys.executable, "-c", _WHOLE_RUN, *map(str, words), "--quiet"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < bound
    assert open_checkpoint(out).read("layers.7.weight")[:FILLED].count_nonzero() > 0.1 * FILLED * COLUMNS


@pytest.mark.torture  # writes and reads a GB
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_inspection_stays_within_the_bound_of_a_merge(tmp_path: Path) -> None:
    experts, nbytes = 2, 310_000_000
    bound = (experts + 4) * 4 * ROWS * COLUMNS + 500_000_000
    base, *tuned = (_write_sparse_model(tmp_path / f"m{i}", nbytes, seed=i or None) for i in range(experts + 1))
    words = ["inspect", "--base", base, *(w for e in tuned for w in ("--expert", e)), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", _WHOLE_RUN, *map(str, words)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < bound < 0.6 * (experts + 1) * nbytes  # it cannot have held all of them


def _update(shape: tuple[int, ...], seed: int, graded: bool) -> torch.Tensor:
    """With `graded`, one whose faint directions float32 does not tell apart: rules that see matrices repeat their work
    in float64 then, for which the plan must have room, and which is the most that they take.
    """
    generator = torch.Generator().manual_seed(seed)
    faint = 0.002 * torch.randn(shape, generator=generator)
    if not graded:
        return faint
    left, right = (torch.randn(size, 4, generator=generator) for size in shape)
    return 0.02 * left @ right.T + 0.1 * faint


def _along_one_input(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The same where a ridge as large as the mean diagonal keeps float32's word for all others: it is the energy of one
    direction, which all experts share, and rounding elsewhere counts for as much as there are inputs.
    """
    left = torch.randn(shape[0], 1, generator=torch.Generator().manual_seed(seed))
    right = torch.randn(shape[1], 1, generator=torch.Generator().manual_seed(shape[1]))
    return 0.02 * left @ right.T


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@spread(
    name=["ties", "emr", "ace", "tact", "kron", "kron_auto", "swudi_a", "tsv_m", "svc", "iso_cts"],
    sides=[(768, 768), (384, 1536)],
)
def test_a_rule_works_in_the_memory_that_the_plan_counts(name: str, sides: tuple[int, int], two_threads: None) -> None:
    counted = make(name, {}).needs.work.entries(3, *sides) * 4 + _KEPT_OF_EACH
    assert added_by(name, 3, sides) < counted + 30_000_000  # threads and blocks; the plan allows 500 MB


@spread(
    name=["ace", "actmat", "tact", "ace_auto", "anchored", "cauchy", "swudi_a", "kron", "kron_auto"],
    experts=[8, 3],
    sides=[(640, 640), (1280, 640), (1920, 480), (2560, 160), (640, 2560), (320, 2560), (520, 1040)],
    unlike=[False, True],
)
def test_a_rule_allocates_what_the_plan_counts(name: str, experts: int, sides: tuple[int, int], unlike: bool) -> None:
    """For updates that are repeated in float64, of one length or of very different ones. For two sides and three
    experts no more by a quarter, for eight by three tenths.
    """
    counted = make(name, {}).needs.work.entries(experts, *sides) * 4
    lengths = [0.05**seed if unlike else 1 for seed in range(experts)]
    deltas = torch.stack([x * _update(sides, seed + 1, graded=True) for seed, x in enumerate(lengths)])
    taken = allocated_by(name, deltas)
    assert taken <= counted
    if name.startswith("kron"):
        assert counted <= (1.25 if experts == 3 else 1.3) * taken


@spread(
    name=["dc_merge", "cart", "tsv_m", "iso_c", "iso_cts", "svc", "core_space", "knots"],
    experts=[8, 2, 3],
    sides=[(320, 320), (640, 320), (240, 960)],
    kind=["alike", "unlike", "faint"],
)
def test_a_spectral_rule_allocates_what_the_plan_counts(
    name: str, experts: int, sides: tuple[int, int], kind: str
) -> None:
    """With one thread, so one decomposition at a time. Only dc_merge holds square matrices of each expert."""
    counted = make(name, {}).needs.work.entries(experts, *sides) * 4
    lengths = [0.05**seed if kind == "unlike" else 1 for seed in range(experts)]
    deltas = torch.stack([x * _update(sides, i + 1, kind != "faint") for i, x in enumerate(lengths)])
    taken = allocated_by(name, deltas)
    assert taken <= counted
    if name in ("dc_merge", "iso_cts", "tsv_m"):
        assert counted <= 1.3 * taken


@spread(
    name=[name for name in sorted(METHODS) if not (make(name, {}).needs.matrix or make(name, {}).needs.calibration)],
    experts=[8, 2],
    sides=[(1000, 1000), (400, 800)],
    even=[True, False],
)
def test_a_rule_of_entries_allocates_what_the_plan_counts(
    name: str, experts: int, sides: tuple[int, int], even: bool
) -> None:
    """`even`: magnitudes are equal, where a rank is not found by a sample, and votes are even."""
    needs = make(name, {}).needs
    deltas = torch.stack([_update(sides, seed, graded=False) for seed in range(min(experts, needs.most_experts or 99))])
    if even:
        deltas = 0.01 * deltas.sign()
        deltas[1::2] = -deltas[: 2 * (len(deltas) // 2) : 2]
    assert allocated_by(name, deltas) <= needs.work.entries(len(deltas), *sides) * 4


def test_the_rule_inside_counts() -> None:
    """Also where it takes more than what it is turned or calibrated with."""
    for name in ("knots", "core_space", "svc", "trust"):
        inside, alone = make(name, {"over": "kron_auto"}).needs.work, make("kron_auto", {}).needs.work
        assert inside.entries(8, 640, 640) >= alone.entries(8, 640, 640)


@spread(
    trim=["none", "largest", "random", "middle", "by_rank"],
    vote=[True, False],
    arithmetic=["float32", "bfloat16"],
    even=[True, False],
)
def test_what_trimming_allocates_is_counted(trim: str, vote: bool, arithmetic: str, even: bool) -> None:
    params = {"trim": trim, "density": 0.5, "vote": vote, "arithmetic": arithmetic}
    deltas = torch.stack([_update((1000, 800), seed, graded=False) for seed in range(4)])
    deltas = 0.01 * deltas.sign() if even else deltas
    counted = make("mergekit_sum", params).needs.work.entries(4, 1000, 800) * 4
    assert allocated_by("mergekit_sum", deltas, **params) <= counted


def test_what_runs_beside_is_counted_where_it_can(two_threads: None) -> None:
    two = make("cart", {}).needs.work.entries(3, 100, 200)
    torch.set_num_threads(1)
    assert two - make("cart", {}).needs.work.entries(3, 100, 200) == 4 * 100 * 200 + 13 * 100**2


@pytest.mark.parametrize("eps", [1e-5, 0.0], ids=["float64", "pseudo-inverse"])
@pytest.mark.parametrize("sides", [(640, 640), (1920, 480), (520, 1040), (200, 2000)], ids=str)
def test_ace_refines_in_float64_in_what_the_plan_counts(sides: tuple[int, int], eps: float) -> None:
    """The most that it ever takes: a heterogeneous layer that float32 neither solves nor decomposes."""
    deltas = torch.stack([_update(sides, seed, graded=True) for seed in range(2, 4)])
    deltas[..., -50:] *= bool(eps)  # inputs that nobody has seen
    taken = allocated_by("ace", deltas, tau=-1.0, eps=eps)
    assert taken <= make("ace", {"eps": eps}).needs.work.entries(2, *sides) * 4 <= 1.25 * taken


# --- what the plan says --------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {f"layers.{i}.weight": (64, 96) for i in range(200)},
    "llama": {
        **{f"model.layers.{i}.mlp.{name}_proj.weight": (2048, 768) for i in range(4) for name in ("gate", "up")},
        **{f"model.layers.{i}.self_attn.q_proj.weight": (768, 768) for i in range(4)},
        **{f"model.layers.{i}.input_layernorm.weight": (768,) for i in range(4)},
        "model.embed_tokens.weight": (8000, 768),
        "lm_head.weight": (8000, 768),
    },
    "one": {"model.layers.0.mlp.up_proj.weight": (2500, 2500)},
    "many": {f"model.layers.{i // 200}.mlp.experts.{i % 200}.up_proj.weight": (8, 16) for i in range(8000)},
}
_MANY_BATCHES = ("kron_auto", "small", 16)
_IN_SUITE = {("average", "llama", 3), ("ties", "llama", 3), ("average", "many", 2), _MANY_BATCHES}
_ALONG_ONE = ("anchored",)  # repeated in float64 for such updates alone
_UNLIKE = ("ace",)  # refined for updates of very different lengths alone
_CELLS = [
    pytest.param(*cell, marks=() if cell in _IN_SUITE else pytest.mark.torture, id="-".join(map(str, cell)))
    for cell in [*itertools.product(sorted(METHODS), LAYOUTS, (2, 3, 8)), _MANY_BATCHES]
    if make(cell[0], {}).needs.calibration is None and (make(cell[0], {}).needs.most_experts or 99) >= cell[2]
]


def _write_layout(folder: Path, layout: str, seed: int, method: str) -> Path:
    """A base for seed 0, else an expert, with the updates that a method takes most for."""
    graded, tensors = make(method, {}).needs.matrix, {}
    for i, (name, shape) in enumerate(LAYOUTS[layout].items()):
        base = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
        matrix, own = len(shape) == 2, 1000 * seed + i
        along_one = method in _ALONG_ONE and matrix
        moved = _along_one_input(shape, own) if along_one else _update(shape, own, graded and matrix)
        length = 0.05 ** (seed - 1) if method in _UNLIKE else 1
        tensors[name] = base + length * moved if seed else base
        tensors[name] = tensors[name] if graded else tensors[name].bfloat16()
    return write_checkpoint(folder, tensors)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(("method", "layout", "experts"), _CELLS)
def test_a_run_takes_what_the_plan_says(method: str, layout: str, experts: int, tmp_path: Path) -> None:
    """Never more, and for the updates that take most not much less: all of the process counted, imports and reader
    too. What the data spare is not known before they are read.
    """
    base, *tuned = (_write_layout(tmp_path / f"m{i}", layout, i, method) for i in range(experts + 1))
    recipe = make_recipe({"base": str(base), "experts": [str(m) for m in tuned], "method": method})
    expected = expected_memory(open_recipe(recipe, None, RunOptions()).plan)
    words = ["merge", "--base", base, *(w for e in tuned for w in ("--expert", e)), "--method", method]
    words += ["-o", tmp_path / "out", "--quiet", "--force"]
    done = subprocess.run(
        [sys.executable, "-c", _WHOLE_RUN, *map(str, words)], capture_output=True, text=True, check=True
    )
    measured = int(done.stdout)
    assert measured <= expected
    assert expected <= 1.25 * measured
