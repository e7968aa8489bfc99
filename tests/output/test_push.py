"""Outputs to the Hub: verified, in one commit, or not at all; the output stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import PlainModel
from commands import failed, run
from hub_server import TOKEN, FakeHub, Repository, contents, put
from huggingface_hub import constants

import acemerge
from acemerge import api
from acemerge.errors import CheckpointError, UsageError
from acemerge.output.verify import verify


@pytest.fixture
def token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.usefixtures("token")
def test_push(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    code, printed, errors = run(capsys, "merge", *words, "-o", "out", "--push", "org/new")
    assert (code, errors) == (0, "")
    assert f"\nuploaded to {hub.address}/org/new\n" in printed
    assert [(asked["name"], asked["visibility"]) for asked in hub.created] == [("new", "private")]
    assert len(hub.commits) == 1
    assert hub.repositories["org/new"].head == contents(Path("out"))
    report = acemerge.merge("org/new", ["org/e1"], "average", "again", quiet=True)
    assert report.out is not None


@pytest.mark.usefixtures("token")
def test_push_replaces_an_earlier_output_and_nothing_else(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "heads/a.safetensors")
    kept = {"LICENSE": b"ours", ".gitattributes": b"*", "images/a.png": b"x"}
    hub.repositories["org/old"] = Repository()
    hub.repositories["org/old"].commit(dict.fromkeys(stale, b"stale") | kept)
    Path("out").mkdir()
    Path("out/notes.txt").write_text("not ours to upload")
    options = ["-o", "out", "--overwrite", "--push", "org/old", "--quiet"]
    assert run(capsys, "merge", *words, *options) == (0, "", "")
    expected = {name: data for name, data in contents(Path("out")).items() if name != "notes.txt"}
    assert hub.repositories["org/old"].head == expected | kept
    assert len(hub.commits) == 1


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("/api/repos/create", 500, "the upload failed .*500"),
        ("/preupload/", 403, "the Hub refuses access .403.: HF_TOKEN must be"),
        ("/commit/main", 500, "the upload failed .*500"),
        ("/store/", 400, "the upload failed"),
    ],
)
def test_a_failed_upload_leaves_the_output(
    call: str, status: int, message: str, plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*put(hub, plain), "-o", "out", "--push", "org/new"]
    hub.refuse[call] = status
    failed(
        run(capsys, "merge", *words), 5, f"--push org/new: {message}.*; the output is complete at out: run .*--resume"
    )
    assert hub.commits == []
    before = contents(Path("out"))
    assert verify("out")
    hub.refuse.clear()
    assert run(capsys, "merge", *words, "--resume", "--quiet") == (0, "", "")
    assert contents(Path("out")) == before == hub.repositories["org/new"].head


@pytest.mark.usefixtures("token")
def test_a_failed_upload_of_parts_is_not_finished_again(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*put(hub, plain), "--max-shard-size", "300", "-o", "out", "--quiet"]
    for part in ("1/2", "2/2"):
        assert run(capsys, "merge", *words, "--shard", part) == (0, "", "")
    hub.refuse["/commit/main"] = 500
    again = "run the same command again with --resume in the place of --finish, which only uploads it"
    failed(run(capsys, "merge", *words, "--finish", "--push", "org/new"), 5, again)
    hub.refuse.clear()
    assert run(capsys, "merge", *words, "--resume", "--push", "org/new") == (0, "", "")
    assert contents(Path("out")) == hub.repositories["org/new"].head


@pytest.mark.usefixtures("token")
def test_nothing_is_uploaded_that_does_not_verify(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*put(hub, plain), "-o", "out"]
    assert run(capsys, "merge", *words, "--quiet")[0] == 0
    damaged = bytearray(Path("out/model.safetensors").read_bytes())
    damaged[-1] ^= 1
    Path("out/model.safetensors").write_bytes(damaged)
    failed(run(capsys, "merge", *words, "--resume", "--push", "org/new"), 3, "model.safetensors: was altered")
    assert not [line for line in hub.asked if line.startswith("POST")]


@pytest.mark.usefixtures("token")
def test_a_fresh_output_is_verified_too(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path) -> None:
        raise CheckpointError(folder, "was altered", "merge again")

    monkeypatch.setattr(api, "verify", damaged)
    failed(run(capsys, "merge", *put(hub, plain), "-o", "out", "--push", "org/new"), 3, "out: was altered")
    assert not [line for line in hub.asked if line.startswith("POST")]


@pytest.mark.parametrize("repo", ["new", "org/new@main", "../new", "org/a/b"])
def test_a_wrong_place_is_refused_before_the_work(
    repo: str, plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    failed(run(capsys, "merge", *words, "-o", "out", "--push", repo), 2, "not of the form org/name; name a repository")
    assert not Path("out").exists()


def test_a_push_that_cannot_be_is_refused_before_the_work(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*put(hub, plain), "-o", "out", "--push", "org/new"]
    failed(run(capsys, "merge", *words), 2, "--push org/new: there is no token; set HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(run(capsys, "merge", *words), 2, "--push org/new: HF_HUB_OFFLINE is set; unset it")
    assert not Path("out").exists()
    with pytest.raises(UsageError, match="no output to upload"):
        acemerge.merge("org/base", ["org/e1"], push="org/new")
