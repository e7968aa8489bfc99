"""Folders that are named as outputs by mistake: an input under another name, the user's own files, no folder at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import failed, run

import acemerge
from acemerge.checkpoints.named import output_path
from acemerge.errors import UsageError, WriteError
from attacks.faulty import faulty
from attacks.merging import Case, snapshot


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, "average")


@pytest.fixture
def words(case: Case) -> list[str]:
    return ["merge", "--base", str(case.base), "--expert", str(case.experts[0]), "--method", "average", "--quiet"]


NO_FOLDERS = {
    "": "output: no folder is named; name one, or . for this one",
    "  ": "output: no folder is named",
    "ftp://bucket/out": "ftp://bucket/out: is an address, and only folders and object stores are written to; name a fo",
    "s3:///o": "s3:///o: is no address of a store",
    "hf://org/name": "is an address",
    "file:///tmp/x": "is an address",
    "https://user:word@host/x": "is an address",
    "\udcff/out": r"\\udcff/out: lies in a folder whose name is no text in UTF-8; name another folder",
}


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_what_names_no_folder(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"]):
        failed(run(capsys, *words, "-o", name, *more), 2, NO_FOLDERS[name])
    failed(run(capsys, "convert", words[2], name), 2, NO_FOLDERS[name])
    with pytest.raises(UsageError):
        acemerge.merge(words[2], [words[4]], "average", name)
    if name.strip():
        with pytest.raises(UsageError, match=r"is (an|no) address|is no text"):  # as a Path has it
            acemerge.merge(words[2], [words[4]], "average", Path(name))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["analyse", "evaluate", "compare", "reproduce", "extract-lora", "report"])
def test_no_command_takes_an_empty_name_for_this_folder(
    command: str, case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.folder)
    before = snapshot(case.folder)
    for name in ("", " ", "https://host/out" if command == "extract-lora" else "s3://bucket/out"):
        message = "is an address, and only folders" if name.strip() else "output: no folder is named"
        failed(run(capsys, command, "-o", name), 2, message)
    assert snapshot(case.folder) == before


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "b", "a\0b"])
def test_a_name_that_no_disk_takes(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    failed(
        run(capsys, *words, "-o", name),
        5,
        "(file ?name too long|null (byte|character)).*; choose another",
    )


def test_a_folder_may_have_a_colon_and_be_this_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_path("a:b") == Path("a:b")
    (case.folder / "here").mkdir()
    monkeypatch.chdir(case.folder / "here")
    case.merge(Path("."))
    case.check_output(case.folder / "here")


def _seen_as(path: Path, other: Path) -> Any:
    """The system's answer where `path` is a bind mount of `other`: the same device and inode."""

    def stat(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if call in (os.stat, os.lstat) and Path(arguments[0]) == path:
            return os.stat(other)
        return call(*arguments, **options)

    return faulty(1, stat, lasting=True)


@pytest.mark.parametrize(
    ("place", "out"),
    [
        *(("inputs/base", "mounted"), ("inputs/two", "mounted"), ("inputs", "mounted")),
        *(("inputs/base", "mounted/inside"), ("inputs/base/original/deep", "mounted")),
    ],
)
def test_a_bind_mount_of_an_input(case: Case, place: str, out: str) -> None:
    (case.folder / out).mkdir(parents=True)
    (case.folder / place).mkdir(parents=True, exist_ok=True)
    before = snapshot(case.folder)
    with (
        _seen_as(case.folder / "mounted", case.folder / place),
        pytest.raises(UsageError, match="is the same folder as, inside or around the input"),
    ):
        case.merge(case.folder / out, overwrite=True)
    assert snapshot(case.folder) == before


@pytest.mark.parametrize("place", ["inputs/base", "inputs/two/heads"])
def test_a_bind_mount_of_an_input_in_the_output(case: Case, place: str) -> None:
    (case.folder / "out/heads").mkdir(parents=True)
    (case.folder / place).mkdir(exist_ok=True)
    with (
        _seen_as(case.folder / "out/heads", case.folder / place),
        pytest.raises(UsageError, match="is the same folder as, inside or around the input"),
    ):
        case.merge(case.folder / "out", overwrite=True)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_an_inputs_files_are_not_written_through(case: Case, link: Callable[[Path, Path], None]) -> None:
    out, inputs = case.folder / "out", snapshot(case.folder / "inputs")
    out.mkdir()
    for path in case.base.iterdir():
        link(path, out / path.name)
    with pytest.raises(UsageError, match="which no merge has written"):
        case.merge(out, overwrite=True)
    assert snapshot(case.folder / "inputs") == inputs


def test_a_begun_file_with_another_name_is_not_gone_on_with(case: Case) -> None:
    from acemerge.checkpoints import files

    (case.folder / "a").write_bytes(b"precious")
    os.link(case.folder / "a", case.folder / "b")
    with pytest.raises(WriteError, match="another file is linked to it"):
        files.reopen(case.folder / "b", 0)
    assert (case.folder / "a").read_bytes() == b"precious"


OWN = (
    "model.safetensors.old",
    "acemerge.json.old",
    "model.safetensors.partial",
    "README.md.old",
    "notes.txt",
    "a/b.txt",
)
REPLACED = ("README.md", "model.safetensors", "config.json", "tokenizer.json", "heads/mine.safetensors", "report.html")


def _put(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"my own {name}".encode())
    return {name: (folder / name).read_bytes() for name in names}


def _kept(out: Path, own: dict[str, bytes]) -> bool:
    return snapshot(out).items() >= own.items()


def test_files_of_the_user_beside_an_output_stay(case: Case) -> None:
    out = case.folder / "out"
    own = _put(out, OWN)
    with pytest.raises(UsageError, match="is not empty"):
        case.merge(out)
    case.merge(out, overwrite=True)
    assert _kept(out, own)
    case.merge(out, resume=True)  # finished: it is verified, and no more
    case.merge(out, overwrite=True)
    assert _kept(out, own)
    for name in OWN:
        (out / name).unlink()
    shutil.rmtree(out / "a")
    case.check_output(out)


@pytest.mark.parametrize("name", REPLACED)
def test_files_that_would_be_replaced_are_those_of_a_merge(case: Case, name: str) -> None:
    out = case.folder / "out"
    own = _put(out, (name,))
    for options in ({"overwrite": True}, {}, {"resume": True}):
        with pytest.raises(UsageError, match=r"which no merge has written|is not empty"):
            case.merge(out, **options)
        assert _kept(out, own)
