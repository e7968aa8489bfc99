"""Models from the Hub, against a server on this machine that speaks the Hub's HTTP calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import PlainModel, load_folder, write_adapter, write_checkpoint, write_sharded
from commands import failed, run
from hub_server import ASSETS, JUNK, TOKEN, FakeHub, Repository, contents, put
from huggingface_hub import constants
from safetensors.torch import load_file

import acemerge
from acemerge import api
from acemerge.checkpoints.hub import locate
from acemerge.engine.run_options import RunOptions
from acemerge.errors import CheckpointError
from acemerge.extract import extract_lora
from acemerge.output.verify import verify
from acemerge.recipes.recipe import make_recipe

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
    run(capsys, "inspect", "--base", "org/lora", "--expert", plain.root / "e1")
    assert hub.fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_pickled_adapter_is_read_where_that_is_allowed(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the cache it is a link to a file of another name."""
    put(hub, plain)
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    adapter = write_adapter(plain.root / "lora", {"layers.0.up": (A, B)})
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    hub.repositories["org/lora"] = Repository()
    hub.repositories["org/lora"].commit(contents(adapter))
    words = ["merge", "--base", "org/base", "--expert", "org/lora", "--method", "average", "-o", "out", "--quiet"]
    failed(run(capsys, *words), 3, "org/lora: has only pickled weights.*add --allow-pickle")
    assert run(capsys, *words, "--allow-pickle") == (0, "", "")
    name = "layers.0.up.weight"
    torch.testing.assert_close(load_folder(Path("out"))[name], plain.base[name] + B @ A)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("model.gguf", b"x", "whose weights are quantised; name the folder of the checkpoint that it was made of"),
        ("tf_model.h5", b"x", "no weights of PyTorch; choose a revision with model.safetensors"),
        ("foo.safetensors", b"x", "; fetch foo.safetensors, as by hf download --local-dir FOLDER, and name FOLDER/foo"),
        ("adapter_config.json", b"{}", "but no adapter_model.safetensors; choose a revision that has it"),
        ("adapter_model.safetensors", b"x", "no adapter_config.json; fetch its adapter_config.json too"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
            "its index lists model-00001-of-00001.safetensors, which is not there; choose a revision that has it",
        ),
    ],
)
def test_what_a_repository_has_in_the_place_of_a_model(
    name: str, data: bytes, said: str, plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    put(hub, plain)
    hub.repositories["org/odd"] = Repository()
    hub.repositories["org/odd"].commit({name: data})
    failed(run(capsys, "plan", "--base", "org/base", "--expert", "org/odd"), 3, f"org/odd: .*{said}")


def test_an_address_of_the_hub_is_no_mistyped_path(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    said = "org/nothere: .*no such model on the Hub that you may see; check the name"
    failed(run(capsys, "plan", "--base", "hf://org/nothere", "--expert", "org/e"), 3, said)


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
    words = ["merge", "--base", "org/base", "--expert", "org/many:a/b-1", "--method", "ace", "--set", "eps=1e-4"]
    code, _, errors = run(capsys, *words, "-o", "out", "--quiet")
    assert (code, errors) == (0, "")
    asked = {line.split("/resolve/")[1].split("/", 1)[1] for line in hub.asked if "/org/many/resolve" in line}
    assert asked == held.keys()
    assert verify("out")["inputs"][1]["path"] == f"org/many@{commit}:a/b-1"
    assert verify("out")["experts"] == ["b-1"]
    acemerge.merge(plain.root / "base", [plain.root / "e1"], "ace", out="local", eps=1e-4)
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
    assert run(capsys, "inspect", *words)[0] == 0
    assert hub.fetched
    hub.asked.clear()
    assert run(capsys, "inspect", *words)[0] == 0
    assert not [line for line in hub.asked if "org/base" in line]


def test_a_branch(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, plain)
    other = write_checkpoint(plain.root / "other", {"layers.0.up.weight": plain.base["layers.0.up.weight"]})
    sha = hub.repositories["org/base"].commit(contents(other), "refs/pr/1")
    words = ["--base", "org/base@refs/pr/1", "--expert", plain.root / "e1"]
    assert run(capsys, "merge", *words, "-o", "out", "--quiet")[0] == 0
    assert list(load_folder(Path("out"))) == ["layers.0.up.weight"]
    assert verify("out")["inputs"][0]["path"] == f"org/base@{sha}"


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
    command = [sys.executable, "-m", "acemerge", "inspect", *words]
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


# --- by ranges ----------------------------------------------------------------------------------------------


def test_a_plan_reads_headers_and_keeps_nothing(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    big = {f"layers.{i}.up.weight": torch.ones(1024, 1024) for i in range(2)}
    files = contents(write_checkpoint(plain.root / "big", big)) | ASSETS | JUNK
    for name in ("org/base", "org/e1"):
        hub.repositories[name] = Repository()
        hub.repositories[name].commit(files)
    assert run(capsys, "plan", "--base", "org/base", "--expert", "hf://org/e1@main")[0] == 0
    assert hub.by_range < 2 << 20 < len(files["model.safetensors"])
    assert not [line for line in hub.asked if line.startswith("HEAD")]
    assert not list(Path("cache").rglob("*.safetensors"))


def test_a_merge_may_stream(plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    """With the same bytes as from the cache, and the cache where it has the model."""
    words = put(hub, plain)
    assert run(capsys, "merge", *words, "-o", "streamed", "--stream", "--quiet") == (0, "", "")
    assert not list(Path("cache").rglob("*.safetensors"))
    assert run(capsys, "merge", *words, "-o", "cached", "--quiet") == (0, "", "")
    hub.asked.clear()
    assert run(capsys, "merge", *words, "-o", "again", "--stream", "--quiet") == (0, "", "")
    assert hub.fetched == set()
    streamed, *others = (verify(out) for out in ("streamed", "cached", "again"))
    for other in others:
        assert (other["inputs"], other["outputs"]) == (streamed["inputs"], streamed["outputs"])


def test_a_stream_that_breaks_is_one_line(
    plain: PlainModel, hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acemerge.checkpoints.store.time.sleep", lambda seconds: None)
    words = put(hub, plain)
    hub.refuse["/resolve/"] = 503
    failed(run(capsys, "plan", *words), 3, "hf://org/base@[0-9a-f]{40}/.*: the Hub answers 503; check the address")
