"""Models from the Hub, against a server on this machine that speaks the Hub's HTTP calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_checkpoint, write_sharded
from commands import failed, run
from hub_server import ASSETS, JUNK, TOKEN, FakeHub, Repository, contents, put
from huggingface_hub import constants

import acemerge
from acemerge import api
from acemerge.checkpoints.hub import HubId, hub_id, locate, parse_id
from acemerge.engine.opening import RunOptions
from acemerge.errors import CheckpointError
from acemerge.extract import extract_lora
from acemerge.output.verify import verify
from acemerge.recipes.recipe import load_recipe, make_recipe

# --- what is asked for --------------------------------------------------------------------------------------


def test_only_what_a_merge_needs_is_fetched(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    code, _, errors = run(capsys, "merge", *words, "-o", "out")
    assert (code, errors) == (0, "")
    assert hub.fetched == {"model.safetensors", *ASSETS}
    acemerge.merge(plain.root / "base", [plain.root / f"e{i}" for i in (1, 2, 3)], out="local")
    assert Path("out/model.safetensors").read_bytes() == Path("local/model.safetensors").read_bytes()
    assert contents(Path("out")).keys() == {"model.safetensors", "README.md", "merge.svg", "acemerge.json", *ASSETS}


def test_the_manifest_names_the_commits(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    assert run(capsys, "merge", *words, "-o", "out", "--quiet") == (0, "", "")
    manifest = verify("out")
    names = ("org/base", "org/e1", "org/e2", "org/e3")
    assert [entry["path"] for entry in manifest["inputs"]] == [
        f"{name}@{hub.repositories[name].refs['main']}" for name in names
    ]
    assert all(entry["files"].keys() == {"model.safetensors"} for entry in manifest["inputs"])
    assert manifest["recipe"]["base"] == "org/base"
    assert manifest["experts"] == ["e1", "e2", "e3"]


def test_heads_are_fetched_where_a_model_is_evaluated(plain: PlainModel, hub: FakeHub) -> None:
    put(hub, plain)
    heads = {"heads/tone.safetensors": b"tone", "heads/deep/er.safetensors": b"", "heads/run.py": b""}
    commit = hub.repositories["org/base"].commit(hub.repositories["org/base"].head | heads)
    locate("org/base", allow_pickle=False, quiet=True)
    assert not any(name.startswith("heads/") for name in hub.fetched)
    for model in ("org/base", f"org/base@{commit}"):
        path = locate(model, allow_pickle=False, quiet=True, heads=True).path
        assert (path / "heads/tone.safetensors").read_bytes() == b"tone"
    assert {name for name in hub.fetched if name.startswith("heads/")} == {"heads/tone.safetensors"}


def test_shards_are_those_of_the_index(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    items = list(plain.base.items())
    folder = write_sharded(plain.root / "sharded", [dict(items[:3]), dict(items[3:])])
    hub.repositories["org/base"].commit(contents(folder) | JUNK | {"model-00001-of-00009.safetensors": b"stray"})
    code, _, errors = run(capsys, "plan", *words)
    assert (code, errors) == (0, "")
    assert {name for name in hub.fetched if name.startswith("model") and name != "model.safetensors"} == {
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    }  # fmt: skip


def test_pickled_weights_are_fetched_only_when_allowed(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    torch.save(plain.base, "pytorch_model.bin")
    pickled = {"pytorch_model.bin": Path("pytorch_model.bin").read_bytes()}
    hub.repositories["org/base"].commit(ASSETS | pickled | {"modeling.py": b""})
    failed(run(capsys, "plan", *words), 3, "org/base: has only pickled weights.*add --allow-pickle")
    assert hub.fetched == set()
    code, printed, _ = run(capsys, "plan", *words, "--allow-pickle")
    assert code == 0
    assert "6 tensors" in printed
    assert {"pytorch_model.bin", "modeling.py"} & hub.fetched == {"pytorch_model.bin"}


def test_an_adapter_is_fetched_whole(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is then made of it."""
    put(hub, plain)
    hub.repositories["org/lora"] = Repository()
    hub.repositories["org/lora"].commit({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "a.py": b""})
    run(capsys, "plan", "--base", "org/lora", "--expert", plain.root / "e1")
    assert hub.fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_model_in_a_folder_of_its_repository(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an index and shards there, by branch or commit, and offline; nothing else of the repository is fetched."""
    put(hub, plain)
    items = list(plain.tuned[0].items())
    sharded = contents(write_sharded(plain.root / "sharded", [dict(items[:3]), dict(items[3:])])) | ASSETS
    hub.repositories["org/many"] = Repository()
    held = {f"a/b-1/{name}": data for name, data in sharded.items()}
    commit = hub.repositories["org/many"].commit(held | {"a/c/model.safetensors": b"another"} | JUNK | ASSETS)
    hub.repositories["org/base"].commit(contents(plain.root / "base") | ASSETS)
    words = ["merge", "--base", "org/base", "--expert", "org/many:a/b-1", "--set", "eps=1e-4"]
    code, _, errors = run(capsys, *words, "-o", "out", "--quiet")
    assert (code, errors) == (0, "")
    asked = {line.split("/resolve/")[1].split("/", 1)[1] for line in hub.asked if "/org/many/resolve" in line}
    assert asked == held.keys()
    assert verify("out")["inputs"][1]["path"] == f"org/many@{commit}:a/b-1"
    assert verify("out")["experts"] == ["b-1"]
    acemerge.merge(plain.root / "base", [plain.root / "e1"], out="local", eps=1e-4)
    assert Path("out/model.safetensors").read_bytes() == Path("local/model.safetensors").read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    for revision in ("main", commit):
        code, _, errors = run(capsys, "plan", "--base", "org/base", "--expert", f"org/many@{revision}:a/b-1")
        assert (code, errors, hub.asked) == (0, "", [])
    words = ["plan", "--base", "org/base", "--expert", "org/many:a/d"]
    failed(run(capsys, *words), 3, r"org/many:a/d: .*\(in the cache\), and HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    failed(run(capsys, *words), 3, r"org/many:a/d: has neither model\.safetensors nor")


def test_a_cached_commit_asks_nobody(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, plain)
    words = ["--base", f"org/base@{hub.repositories['org/base'].refs['main']}", "--expert", plain.root / "e1"]
    assert run(capsys, "plan", *words)[0] == 0
    assert hub.fetched
    hub.asked.clear()
    assert run(capsys, "plan", *words)[0] == 0
    assert not [line for line in hub.asked if "org/base" in line]


def test_a_branch(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, plain)
    other = write_checkpoint(plain.root / "other", {"layers.0.up.weight": plain.base["layers.0.up.weight"]})
    sha = hub.repositories["org/base"].commit(contents(other), "refs/pr/1")
    words = ["--base", "org/base@refs/pr/1", "--expert", plain.root / "e1"]
    assert run(capsys, "merge", *words, "-o", "out", "--quiet")[0] == 0
    assert list(load_folder(Path("out"))) == ["layers.0.up.weight"]
    assert verify("out")["inputs"][0]["path"] == f"org/base@{sha}"


# --- without the network ------------------------------------------------------------------------------------


def test_offline_a_complete_cache_is_enough(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = put(hub, plain)
    assert run(capsys, "plan", *words)[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert run(capsys, "merge", *words, "-o", "out", "--quiet") == (0, "", "")
    assert hub.asked == []
    sha = hub.repositories["org/base"].refs["main"]
    assert verify("out")["inputs"][0]["path"] == f"org/base@{sha}"
    Path(f"cache/models--org--base/snapshots/{sha}/tokenizer.json").unlink()
    failed(
        run(capsys, "plan", *words), 3, "org/base: is in the cache without tokenizer.json, and HF_HUB_OFFLINE is set"
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
    assert run(capsys, "plan", *words)[0] == 0
    Path(f"cache/models--org--base/snapshots/{sha}/model-00002-of-00002.safetensors").unlink()
    failed(run(capsys, "plan", *words), 3, "in the cache without model-00002-of-00002.safetensors, .*; fetch it once")
    Path(f"cache/models--org--base/snapshots/{sha}/model.safetensors.index.json").unlink()
    failed(run(capsys, "plan", *words), 3, "has shards but no model.safetensors.index.json .in the cache.")


def test_offline_without_a_cache(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", "--base", "org/base", "--expert", "org/e1"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(run(capsys, *words), 3, "org/base: is not in the cache, and HF_HUB_OFFLINE is set; fetch it once")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    failed(run(capsys, *words), 3, "org/base: is not in the cache, and the Hub cannot be reached .*refused")


def test_a_hub_that_fails_is_as_none(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    hub.refuse["/api/models/"] = 500
    failed(run(capsys, "plan", *words), 3, "org/base: is not in the cache, and the Hub cannot be reached .*500")
    hub.refuse.clear()
    assert run(capsys, "plan", *words)[0] == 0
    hub.refuse["/api/models/"] = 500
    assert run(capsys, "plan", *words)[0] == 0


def test_a_download_that_breaks_off_is_gone_on_with(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = put(hub, plain)
    hub.refuse["model.safetensors"] = 410
    failed(run(capsys, "plan", *words), 3, "org/base: could not be fetched .*; run again: what was fetched is kept")
    hub.refuse.clear()
    hub.asked.clear()
    assert run(capsys, "plan", *words)[0] == 0
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
    failed(run(capsys, "plan", *words), 3, "org/base: .*set HF_TOKEN")


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


# --- ids and paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("Org-1/na.me_2", HubId("Org-1/na.me_2")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/name:task/lr1e-05", HubId("org/name", None, "task/lr1e-05")),
        ("org/name@refs/pr/3:task", HubId("org/name", "refs/pr/3", "task")),
    ],
)
def test_ids(text: str, expected: HubId) -> None:
    assert parse_id(text) == expected
    assert str(expected) == text


NOT_IDS = (
    *("name", "/org/name", "./org/name", "../name", "~/name", "org/../name", "org/name/more", "org/name@", "org/na me"),
    *("org/name:", "org/name:/a", "org/name:a//b", "org/name:../a", "org/name:a/..", "org/name:a@v1", ":a"),
    *("org/name@a..b", "org/name@/a", "org/name\n", "org/name@v\x001", "org/na--me", "org/name.git", "orgé/name"),
    *("org/" + "n" * 300, ""),
)


@pytest.mark.parametrize("text", NOT_IDS)
def test_what_is_no_id_is_a_path(text: str) -> None:
    assert parse_id(text) is None


def test_a_folder_comes_before_an_id(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    write_checkpoint(Path("org/base"), plain.base)
    assert hub_id("org/base") is None
    assert run(capsys, "plan", *words)[0] == 0
    assert not [line for line in hub.asked if "org/base" in line]


def test_a_recipe_keeps_ids_and_finds_folders_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    write_checkpoint(folder / "org/here", {"a": torch.ones(1)})
    recipe = folder / "recipe.yaml"
    recipe.write_text("base: org/name@v1\nexperts: [org/here, {model: org/there}, ./org/name, a/b/c]\n")
    read = load_recipe(recipe, {})
    expected = ["org/name@v1", str(folder / "org/here"), "org/there", str(folder / "org/name"), str(folder / "a/b/c")]
    assert read.models == expected


# --- going on -----------------------------------------------------------------------------------------------


def test_going_on_keeps_to_the_commit(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = put(hub, plain)
    recipe = make_recipe({"base": "org/base", "experts": ["org/e1", "org/e2", "org/e3"]})

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run_recipe(recipe, Path("out"), RunOptions(), interrupt)
    before = hub.repositories["org/base"].refs["main"]
    plain.base["layers.0.up.weight"] += 1
    changed = write_checkpoint(plain.root / "changed", plain.base)
    hub.repositories["org/base"].commit(contents(changed) | ASSETS)
    failed(
        run(capsys, "merge", *words, "-o", "out", "--resume"), 2, f"cannot go on: recipe base was .org/base@{before}"
    )
    words[1] = f"org/base@{before}"
    assert run(capsys, "merge", *words, "-o", "out", "--resume", "--quiet") == (0, "", "")
    assert verify("out")["inputs"][0]["path"] == f"org/base@{before}"


# --- the environment ----------------------------------------------------------------------------------------


def test_the_environment_is_huggingface_hubs_own(plain: PlainModel, hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, in a process of its own; a pipe gets no progress."""
    words = put(hub, plain)
    hub.repositories["org/base"].private = True
    command = [sys.executable, "-m", "acemerge", "plan", *words]
    given = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    for more in ({"HF_TOKEN": TOKEN}, {"HF_HUB_OFFLINE": "1"}):
        hub.asked.clear()
        done = subprocess.run(command, env=os.environ | given | more, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert bool(hub.fetched) == ("HF_TOKEN" in more)
    (config,) = Path("home").glob("hub/models--org--base/snapshots/*/config.json")
    assert config.read_bytes() == ASSETS["config.json"]


@pytest.mark.parametrize("model", ["org/e1", "folder"])
@pytest.mark.parametrize("base", ["org/base", "folder"])
def test_adapters_are_extracted_of_ids(
    model: str, base: str, plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    put(hub, plain)
    words = [plain.root / "e1" if model == "folder" else model, "--base", "base" if base == "folder" else base]
    code, _, errors = run(capsys, "extract-lora", *words, "--rank", "2", "-o", "out")
    assert (code, errors) == (0, "")
    local = extract_lora(plain.root / "e1", plain.root / "base", 2, "local")
    found = verify("out")
    for name in local.manifest["outputs"].keys() - {"README.md", "adapter_config.json"}:
        assert Path("out", name).read_bytes() == Path("local", name).read_bytes()
    shas = {name: hub.repositories[name].refs["main"] for name in ("org/base", "org/e1")}
    paths = [given if given not in shas else f"{given}@{shas[given]}" for given in (str(words[2]), str(words[0]))]
    assert [entry["path"] for entry in found["inputs"]] == paths
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == str(words[2])
    assert ("base_model: org/base" in Path("out/README.md").read_text()) == (base == "org/base")
    wrong = ["--rank", "2", "-o", "other"]
    failed(run(capsys, "extract-lora", "org/nobody", "--base", words[2], *wrong), 3, "org/nobody: .*no such model")
    failed(run(capsys, "extract-lora", words[0], "--base", "org/base@v9", *wrong), 3, "org/base@v9: has no such rev")
    assert not Path("other").exists()


def test_python_takes_ids(plain: PlainModel, hub: FakeHub) -> None:
    put(hub, plain)
    report = acemerge.merge("org/base", ["org/e1", plain.root / "e2"], "average", "out")
    assert report.manifest["experts"] == ["e1", "e2"]
    with pytest.raises(CheckpointError, match="no such model on the Hub"):
        acemerge.merge("org/base", ["org/nobody"])
