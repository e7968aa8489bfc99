"""Where the Hub cannot be reached, or refuses: against a server on this machine that speaks its HTTP calls."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
import torch
from builders import PlainModel, write_checkpoint, write_sharded
from commands import failed, run
from hub_server import ASSETS, TOKEN, FakeHub, Repository, contents, put
from huggingface_hub import constants

from acemerge.output.verify import verify

# --- without the network ------------------------------------------------------------------------------------


def test_offline_a_complete_cache_is_enough(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = put(hub, plain)
    assert run(capsys, "inspect", *words)[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert run(capsys, "merge", *words, "-o", "out", "--quiet") == (0, "", "")
    assert hub.asked == []
    sha = hub.repositories["org/base"].refs["main"]
    assert verify("out")["inputs"][0]["path"] == f"org/base@{sha}"
    Path(f"cache/models--org--base/snapshots/{sha}/tokenizer.json").unlink()
    failed(
        run(capsys, "inspect", *words), 3, "org/base: is in the cache without tokenizer.json, and HF_HUB_OFFLINE is set"
    )


def test_offline_a_prepared_cache(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other tools leave it: links, no list of what the commit holds; with shards, complete or not."""
    items = list(plain.base.items())
    folder = write_sharded(plain.root / "sharded", [dict(items[:3]), dict(items[3:])])
    plain.save()
    sha = "0123456789" * 4
    for name in ("blobs", "refs", f"snapshots/{sha}"):
        Path("cache/models--org--base", name).mkdir(parents=True)
    Path("cache/models--org--base/refs/main").write_text(sha)
    for i, (name, data) in enumerate(contents(folder).items()):
        Path(f"cache/models--org--base/blobs/{i}").write_bytes(data)
        Path(f"cache/models--org--base/snapshots/{sha}/{name}").symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ["--base", "org/base", "--expert", plain.root / "e1"]
    assert run(capsys, "inspect", *words)[0] == 0
    Path(f"cache/models--org--base/snapshots/{sha}/model-00002-of-00002.safetensors").unlink()
    failed(
        run(capsys, "inspect", *words), 3, "in the cache without model-00002-of-00002.safetensors, .*; fetch it once"
    )
    Path(f"cache/models--org--base/snapshots/{sha}/model.safetensors.index.json").unlink()
    failed(run(capsys, "inspect", *words), 3, "has shards but no model.safetensors.index.json .in the cache.")


def test_offline_a_cache_of_pickled_weights(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there: nothing is missing but the leave to read them."""
    words = put(hub, plain)
    torch.save(plain.base, "pytorch_model.bin")
    hub.repositories["org/base"].commit(ASSETS | {"pytorch_model.bin": Path("pytorch_model.bin").read_bytes()})
    assert run(capsys, "inspect", *words, "--allow-pickle")[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(run(capsys, "inspect", *words), 3, "only pickled weights, .*in the cache.*; add --allow-pickle to read it")
    assert run(capsys, "inspect", *words, "--allow-pickle")[0] == 0


def test_offline_without_a_cache(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["inspect", "--base", "org/base", "--expert", "org/e1"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(run(capsys, *words), 3, "org/base: is not in the cache, and HF_HUB_OFFLINE is set; fetch it once")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    failed(run(capsys, *words), 3, "org/base: is not in the cache, and the Hub cannot be reached .*refused")


def test_a_hub_that_fails_is_as_none(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    hub.refuse["/api/models/"] = 500
    failed(run(capsys, "inspect", *words), 3, "org/base: is not in the cache, and the Hub cannot be reached .*500")
    hub.refuse.clear()
    assert run(capsys, "inspect", *words)[0] == 0
    hub.refuse["/api/models/"] = 500
    assert run(capsys, "inspect", *words)[0] == 0


def test_a_download_that_breaks_off_is_gone_on_with(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    hub.refuse["model.safetensors"], hub.refuse_after = 410, {*ASSETS}
    failed(run(capsys, "inspect", *words), 3, "org/base: could not be fetched .*; run again: what was fetched is kept")
    hub.refuse.clear()
    hub.asked.clear()
    assert run(capsys, "inspect", *words)[0] == 0
    base = [line for line in hub.asked if line.startswith("GET /org/base/resolve")]
    assert [line.rpartition("/")[2] for line in base] == ["model.safetensors"]


# --- refusals -----------------------------------------------------------------------------------------------

REFUSED = {
    "wrong name": ("org/bsae", "no such folder here, and no such model on the Hub that you may see; check the name"),
    "wrong revision": ("org/base@v9", "org/base@v9: has no such revision; name a branch, tag or commit of http"),
    "private": ("org/private", "no such model on the Hub that you may see; .*set HF_TOKEN"),
    "gated": ("org/gated", "org/gated: is gated; accept its terms at http://[^ ]+/org/gated and set HF_TOKEN"),
    "no weights": ("org/empty", "org/empty: has neither model.safetensors nor model.safetensors.index.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, plain)
    files = contents(plain.root / "base")
    hub.repositories |= {"org/private": Repository(private=True), "org/gated": Repository(gated=True)}
    hub.repositories["org/empty"] = Repository()
    for name in ("org/private", "org/gated"):
        hub.repositories[name].commit(files)
    hub.repositories["org/empty"].commit(ASSETS)
    name, message = REFUSED[case]
    failed(run(capsys, "merge", "--base", name, "--expert", "org/e1", "-o", "out"), 3, message)
    assert not Path("out").exists()


def test_a_mistyped_path_is_a_path_first(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, plain)
    for name in ("math", "code"):
        write_checkpoint(Path("llm") / name, plain.base)
    for typed in ("llm/maths", "lmm/math"):
        said = rf"{typed}: no such folder, and no such model on the Hub .*; did you mean llm/math\? Else check the name"
        failed(run(capsys, "plan", "--base", typed, "--expert", "org/e1"), 3, said)
    failed(
        run(capsys, "plan", "--base", "llm/zzz", "--expert", "org/e1"), 3, "llm/zzz: no such folder, and no such model"
    )
    failed(
        run(capsys, "plan", "--base", "./llm/maths", "--expert", "llm/code"),
        3,
        r"no such folder; did you mean llm/math\?",
    )


def test_a_repository_with_the_model_one_level_down(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["org/run"] = Repository()
    hub.repositories["org/run"].commit({"README.md": b"", "checkpoint-20/model.safetensors": b""})
    said = "org/run: is a trainer's folder.*name one of them, as org/run:checkpoint-20"
    failed(run(capsys, "plan", "--base", "org/run", "--expert", "org/e1"), 3, said)


@pytest.mark.parametrize("status", [401, 403])
def test_access_refused(status: int, plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    hub.refuse["/resolve/"] = status
    failed(run(capsys, "plan", *words), 3, "org/base.*set HF_TOKEN")


def test_a_token_opens_what_is_closed(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = put(hub, plain)
    hub.repositories["org/base"].private = hub.repositories["org/e1"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(capsys, "plan", *words)[0] == 0


def test_without_the_library(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = put(hub, plain)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    failed(run(capsys, "plan", *words), 2, r"huggingface_hub is not installed.*; pip install 'acemerge\[hub\]'")


# --- the cache ----------------------------------------------------------------------------------------------


def test_what_is_damaged_in_the_cache_is_not_fetched_again_before_it_is_removed(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    assert run(capsys, "inspect", *words)[0] == 0
    blob = next(Path("cache/models--org--base/snapshots").glob("*/model.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-4])
    failed(
        run(capsys, "inspect", *words), 3, rf"its header describes .*; remove {blob} and run again, to fetch it anew"
    )
    blob.unlink()
    assert run(capsys, "inspect", *words)[0] == 0
    damaged = contents(plain.root / "base") | {"model.safetensors": blob.read_bytes()[:-4]}
    hub.repositories["org/base"].commit(damaged)
    failed(run(capsys, "inspect", *words), 3, "its header describes .*; choose a revision that has it whole")


def test_a_cache_without_room(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = put(hub, plain)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", full)
        told = "cache: cannot keep what is fetched .No space left on device.; free space, or set HF_HUB_CACHE"
        failed(run(capsys, "inspect", *words), 5, told)
    assert run(capsys, "inspect", *words)[0] == 0
