"""Parts that write to a store: the bytes of a folder's, no lock, and one line for whatever does not go together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import FaultyClient, obeyed

import acemerge.engine.shared_counts
import acemerge.engine.thresholds
from acemerge.checkpoints.lora import open_expert
from acemerge.errors import CheckpointError, UsageError, WriteError
from acemerge.output.counts import COUNTS
from acemerge.output.verify import verify
from attacks.merging import Case

OUT = "s3://bucket/out"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, "average")


def in_parts(case: Case, *numbers: int, **options: Any) -> None:
    for number in numbers:
        case.merge(OUT, shard=f"{number}/3", **options)


def held(memory: FaultyClient) -> dict[str, bytes]:
    keys = [about["path"] for batch in memory.held.list("out/") for about in batch]
    return {key.removeprefix("out/"): bytes(memory.held.get(key).bytes()) for key in keys}


def check_output(case: Case, memory: FaultyClient) -> None:
    """Nothing but the output is there, and it is that of one process."""
    assert verify(OUT)["run"] == verify(case.folder / "reference")["run"]
    fetched = Path(tempfile.mkdtemp(dir=case.folder))
    for name, data in held(memory).items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(data)
    case.check_output(fetched)


def killed_after(memory: FaultyClient, puts: int) -> None:
    """The store answers with the end of the process when so many objects are written."""
    done = []

    def ending(call: str, key: str, do: Callable[[], Any]) -> Any:
        if call == "put":
            done.append(key)
            if len(done) > puts:
                raise KeyboardInterrupt
        return do()

    memory.fault = ending


@pytest.mark.parametrize("method", ["average", "ties", "emr"])
def test_parts_in_any_order_are_the_whole(
    method: str, tmp_path: Path, memory: FaultyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come later take the thresholds that the first has found."""
    case = Case(tmp_path, method)
    in_parts(case, 2)
    monkeypatch.setattr(acemerge.engine.thresholds, "_counts", None)
    in_parts(case, 3, 1)
    assert "acemerge.json" not in held(memory)
    case.merge(OUT, finish=True)
    check_output(case, memory)


def test_a_part_that_was_killed_at_any_write_goes_on(case: Case, memory: FaultyClient) -> None:
    in_parts(case, 1, 3)
    before = held(memory)
    for puts in range(4):
        killed_after(memory, puts)
        with pytest.raises(KeyboardInterrupt):
            in_parts(case, 2)
        memory.fault = obeyed
        with pytest.raises(UsageError, match=r"part 2/3 is (missing|not finished)"):
            case.merge(OUT, finish=True)
        assert before.items() <= held(memory).items()
    in_parts(case, 2)
    assert in_parts(case, 2) is None
    case.merge(OUT, finish=True)
    check_output(case, memory)


@pytest.mark.parametrize(("puts", "noted"), [(2, 0), (5, 2), (7, 3)])
def test_counts_that_a_killed_part_has_noted_are_taken(
    puts: int, noted: int, tmp_path: Path, memory: FaultyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes its claim, and for each share that it has begun to count it and then the counts."""
    case = Case(tmp_path, "ties")
    killed_after(memory, puts)
    with pytest.raises(KeyboardInterrupt):
        in_parts(case, 2)
    memory.fault = obeyed
    assert counted(memory, 2) == noted
    monkeypatch.setattr(acemerge.engine.shared_counts, "_PATIENCE", 0.0)
    in_parts(case, 3)
    assert counted(memory, 3) == 3 - noted
    in_parts(case, 1, 2)
    case.merge(OUT, finish=True)
    check_output(case, memory)


def counted(memory: FaultyClient, part: int) -> int:
    """The shares whose first pass a part has noted."""
    names = [name for name in held(memory) if name.startswith(COUNTS) and "-upper-" in name]
    return sum(name.endswith(f"-by-{part}-of-3") for name in names)


def test_a_part_that_starts_again_forgets_its_counts(tmp_path: Path, memory: FaultyClient) -> None:
    case = Case(tmp_path, "ties")
    in_parts(case, 2)
    assert [counted(memory, part) for part in (1, 2)] == [0, 3]
    calls = len(memory.calls)
    in_parts(case, 1, overwrite=True)  # which takes those of another
    assert [counted(memory, part) for part in (1, 2)] == [0, 3]
    in_parts(case, 2, overwrite=True)
    assert any(call.startswith(f"delete out/{COUNTS}/") for call in memory.calls[calls:])
    assert [counted(memory, part) for part in (1, 2)] == [0, 3]
    case.merge(OUT, overwrite=True)
    check_output(case, memory)


def test_one_process_continues_what_parts_have_begun(case: Case, memory: FaultyClient) -> None:
    in_parts(case, 2)
    with pytest.raises(UsageError, match="holds parts of an unfinished merge; continue with --resume"):
        case.merge(OUT)
    case.merge(OUT, resume=True)
    check_output(case, memory)
    assert case.merge(OUT, resume=True).was_complete


def test_a_finish_that_was_killed_is_run_again(case: Case, memory: FaultyClient) -> None:
    in_parts(case, 1, 2, 3)
    for puts in (0, 2):
        killed_after(memory, puts)
        with pytest.raises(KeyboardInterrupt):
            case.merge(OUT, finish=True)
        memory.fault = obeyed
        assert "acemerge.json" not in held(memory)
    case.merge(OUT, finish=True)
    check_output(case, memory)
    with pytest.raises(UsageError, match="holds a finished merge"):
        case.merge(OUT, finish=True)
    with pytest.raises(UsageError, match="holds a finished merge"):
        in_parts(case, 1)


def test_what_is_missing_altered_or_of_another_run_is_named(case: Case, memory: FaultyClient) -> None:
    with pytest.raises(UsageError, match="holds no part of a merge; run the merge with --shard"):
        case.merge(OUT, finish=True)
    in_parts(case, 2)
    with pytest.raises(UsageError, match="parts 1/3, 3/3 are missing"):
        case.merge(OUT, finish=True)
    with pytest.raises(UsageError, match=r"in part 2/3 recipe scale is null and not 0.5"):
        in_parts(case, 1, scale=0.5)
    in_parts(case, 1, 3)
    shard = next(name for name in held(memory) if name.startswith("model-00002"))
    memory.held.put(f"out/{shard}", b"another")
    with pytest.raises(UsageError, match=r"part ./3 is not finished"):
        case.merge(OUT, finish=True)
    in_parts(case, 1, 2, 3)
    case.merge(OUT, finish=True)
    check_output(case, memory)


@pytest.mark.parametrize("object", [".acemerge.journal", ".safetensors"])
def test_of_two_processes_with_one_part_the_later_has_it(object: str, case: Case, memory: FaultyClient) -> None:
    """There is no lock: a part that was lost must not keep its place. What both have written is the same."""
    begun = []

    def overtaken(call: str, key: str, do: Callable[[], Any]) -> Any:
        done = do()
        if call == "put" and key.endswith(object) and not begun:
            begun.append(key)
            in_parts(case, 2)
        return done

    memory.fault = overtaken
    with pytest.raises(WriteError, match=r"another run (has begun to write|is writing) here"):
        in_parts(case, 2)
    memory.fault = obeyed
    in_parts(case, 1, 3, 2)
    case.merge(OUT, finish=True)
    check_output(case, memory)


def test_an_output_that_parts_replace_is_none_until_the_finish(case: Case, memory: FaultyClient) -> None:
    case.merge(OUT, scale=0.25)
    memory.held.put("out/notes.txt", b"mine")
    in_parts(case, 1, 2, overwrite=True)
    assert "acemerge.json" not in held(memory)
    # It has an index, and shards of both.
    with pytest.raises(CheckpointError, match=r"out: is an unfinished output: it has no acemerge\.json"):
        open_expert(Path(OUT))
    in_parts(case, 3, overwrite=True)
    case.merge(OUT, finish=True, overwrite=True)
    assert held(memory)["notes.txt"] == b"mine"
    memory.held.delete("out/notes.txt")
    check_output(case, memory)


def test_inputs_that_change_between_parts_are_found(case: Case, memory: FaultyClient) -> None:
    in_parts(case, 1)
    weights = next(case.experts[0].glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises((UsageError, CheckpointError), match=rf"{weights.name} was written to"):
        in_parts(case, 2)
