"""The command line: what it prints, its exit codes, and one line for every error."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from builders import PlainModel, load_folder

import acemerge
from acemerge.cli.app import main
from acemerge.methods import rule_name
from acemerge.output.verify import verify


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def arguments(plain: PlainModel) -> list[object]:
    base, experts = plain.save()
    return ["--base", base, *(word for folder in experts for word in ("--expert", folder))]


def failed(result: tuple[int, str, str], code: int, message: str) -> None:
    """One line on stderr in the form of the contract, nothing on stdout."""
    assert result[0] == code, result
    assert result[1] == ""
    assert re.fullmatch(r"acemerge: error: [^\n]+: [^\n]+; [^\n]+\n", result[2]), result[2]
    assert re.search(message, result[2]), result[2]


def test_merge_then_verify(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    out = plain.root / "out"
    code, printed, errors = run(capsys, "merge", *arguments(plain), "-o", out)
    assert (code, errors) == (0, "")
    assert "merged 6 tensors (3 by average, 2 by kron_auto, 1 by base)" in printed
    code, printed, _ = run(capsys, "verify", out)
    assert code == 0
    assert "6 tensors" in printed
    assert "all as written" in printed


def test_options_reach_the_recipe(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ace", "--set", "eps=2e-4", "--set", "tau=0.1", "--scale", "0.5", "--policy", "default"]
    more = ["--dtype", "bfloat16", "--compute-dtype", "float64", "--max-shard-size", "1MB", "--workers", "2"]
    rest = ["--seed", "3", "--device", "cpu", "--quiet", "--overwrite", "--nonfinite", "skip-expert"]
    code, printed, errors = run(capsys, "merge", *arguments(plain), *options, *more, *rest, "-o", plain.root / "out")
    assert (code, printed, errors) == (0, "", "")
    recipe = verify(plain.root / "out")["recipe"]
    assert recipe["method"] == {"name": "ace", "eps": "2e-4", "tau": "0.1"}
    kept = {key: recipe[key] for key in ("scale", "dtype", "compute_dtype", "seed", "nonfinite")}
    assert kept == {
        "scale": 0.5, "dtype": "bfloat16", "compute_dtype": "float64", "seed": 3, "nonfinite": "skip-expert"
    }  # fmt: skip
    assert load_folder(plain.root / "out")["layers.0.up.weight"].dtype == torch.bfloat16


def test_a_recipe_file_and_options_on_top(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain.save()
    recipe = plain.root / "recipe.yaml"
    recipe.write_text(
        "method: {name: ace, eps: 1e-3}\nbase: base\nexperts: [{model: e1, weight: 2.0}, ./e2]\n"
        "rules:\n  - {match: '*.down.*', method: average}\n  - {match: embed*, action: base}\n"
    )
    code, _, errors = run(capsys, "merge", recipe, "-o", plain.root / "out", "--set", "tau=0.5", "--quiet")
    assert (code, errors) == (0, "")
    manifest = verify(plain.root / "out")
    assert manifest["recipe"]["method"] == {"name": "ace", "eps": "1e-3", "tau": "0.5"}
    assert manifest["tensors"]["layers.0.down.weight"]["rule"] == "average"
    assert manifest["tensors"]["embed_tokens.weight"]["rule"] == "base"
    by_hand = acemerge.merge(
        plain.root / "base", [plain.root / "e1", plain.root / "e2"], "ace", plain.root / "hand",
        weights=[2.0, 1.0], eps=1e-3, tau=0.5,
    )  # fmt: skip
    assert by_hand.out is not None
    name = "layers.0.up.weight"
    assert torch.equal(load_folder(plain.root / "out")[name], load_folder(by_hand.out)[name])


def test_weights_in_either_place(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = plain.save()
    odd = (plain.root / "a=1").absolute()
    experts[2].rename(odd)  # a path that has a weight's looks
    pairs = [f"{experts[0]}=2", f"{experts[1]}", f"{odd}"]
    words = [word for pair in pairs for word in ("--expert", pair)]
    outs = [plain.root / name for name in ("one", "two", "three")]
    code = run(capsys, "merge", "--base", base, *words, "-o", outs[0], "--quiet")[0]
    words[1] = str(experts[0])
    assert run(capsys, "merge", "--base", base, *words, "--weights", "2,1,1", "-o", outs[1], "--quiet")[0] == code == 0
    (plain.root / "r.yaml").write_text("base: base\nexperts: [{model: e1, weight: 5}, e2, 'a=1']\n")
    assert run(capsys, "merge", plain.root / "r.yaml", "--weights", "2,1,1", "-o", outs[2], "--quiet")[0] == 0
    one, two, three = (verify(out)["outputs"]["model.safetensors"] for out in outs)
    assert one == two == three
    assert [expert["weight"] for expert in verify(outs[0])["recipe"]["experts"]] == [2, 1, 1]
    for wrong, message in (("1,2", "2 weights for 3 experts"), ("1,x,1", "'1,x,1' are no numbers")):
        failed(run(capsys, "plan", "--base", base, *words, "--weights", wrong), 2, f"--weights: {message}")
    words[1] = pairs[0]
    failed(run(capsys, "plan", "--base", base, *words, "--weights", "1,1,1"), 2, "an --expert has a weight, too")


def test_auto_is_the_rule_that_it_stands_for(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain.save()
    auto, named = plain.root / "auto", plain.root / "named"
    assert run(capsys, "merge", *arguments(plain), "--method", "auto", "--set", "lam=2", "-o", auto, "--quiet")[0] == 0
    options = ("--method", "kron_auto", "--set", "lam=2", "-o", named, "--quiet")
    assert run(capsys, "merge", *arguments(plain), *options)[0] == 0
    manifest = verify(auto)
    assert manifest["recipe"]["method"] == {"name": "kron_auto", "lam": "2"}
    assert manifest["tensors"]["layers.0.up.weight"]["rule"] == "kron_auto"
    assert manifest["outputs"] == verify(named)["outputs"]
    layer = torch.randn(2, 8, 6)
    assert torch.equal(acemerge.merge_deltas(layer, "auto").delta, acemerge.merge_deltas(layer, "kron_auto").delta)
    assert run(capsys, "methods", "auto")[1] == run(capsys, "methods", "kron_auto")[1]


def test_plan_reads_headers_only(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    plain.tuned[0]["layers.0.up.weight"][:] = float("nan")
    plain.tuned[1]["score.weight"] = torch.ones(3, 6)
    code, printed, _ = run(capsys, "plan", *arguments(plain), "-o", plain.root / "out")
    assert code == 0
    assert re.search(
        r"^kron_auto \(linear\): a linear layer's weight\n +1 layers\.0\.down.*\n +1 layers\.0\.up\.weight +8x6$",
        printed,
        re.M,
    )
    assert "heads/e2: score.weight (missing in the base)" in printed
    assert "roles from names and shapes" in printed
    assert re.search(r"6 tensors; read [\d.]+ kB, write [\d.]+ k?B; [\d.]+ GFLOP; peak memory", printed)
    assert not (plain.root / "out").exists()


def test_methods_lists_rules_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "methods")
    assert code == 0
    assert all(name in printed for name in acemerge.METHODS)
    code, printed, _ = run(capsys, "methods", "ace")
    assert code == 0
    assert all(word in printed for word in ("eps", "1e-05", "arXiv 2603.02945", "k_frac", "ridge"))
    failed(run(capsys, "methods", "acee"), 2, "did you mean `ace`")


def test_the_list_of_rules_is_a_line_each_by_family(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "methods")[1]
    assert "Of other packages" not in printed, "a rule has no line in methods/about.py"
    lines = printed.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("* ")] == [rule_name("auto"), "recommended:"]
    assert {line[2:].split()[0] for line in lines if line[1:2] == " "} == {*acemerge.METHODS, "recommended:"}
    assert max(map(len, lines)) <= 80


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[0] == 0
    assert "Merge a base and its experts" in run(capsys, "--help")[1]
    assert run(capsys, "--version")[1].startswith("acemerge 0.")
    assert "--compute-dtype" in run(capsys, "merge", "--help")[1]


RECIPES = {
    "unknown key": ("bse: x", "unknown key 'bse'; did you mean `base`"),
    "unknown key of an expert": ("experts: [{model: a, wieght: 2}]", "did you mean `weight`"),
    "unknown key of a rule": ("rules: [{mtch: a}]", "did you mean `match`"),
    "unknown rule": ("method: acce", "did you mean `ace`"),
    "unknown parameter": ("method: {name: ace, epsilon: 1}", "did you mean `eps`"),
    "bad parameter": ("method: {name: ace, k_frac: 2}", "k_frac"),
    "bad policy": ("policy: strict", "policy"),
    "rule without verb": ("rules: [{match: a}]", "neither `method` nor `action`"),
    "no experts": ("experts: []", "at least one expert"),
    "not a table": ("- a", "not a table"),
    "not yaml": ("a: [", "not valid YAML"),
    "code": ("base: !!python/object/apply:os.system ['true']", "not valid YAML"),
    "infinite scale": ("scale: .inf", "scale"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_wrong_recipe(case: str, plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = RECIPES[case]
    plain.save()
    rest = "".join(f"{k}: {v}\n" for k, v in {"base": "base", "experts": "[e1]"}.items() if not text.startswith(k))
    (plain.root / "r.yaml").write_text(text if case in ("not a table", "not yaml") else rest + text)
    failed(run(capsys, "merge", plain.root / "r.yaml", "-o", plain.root / "out"), 2, message)
    assert not (plain.root / "out").exists()


def test_wrong_usage(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(plain)
    failed(run(capsys, "merge", *words), 2, "-o is missing")
    failed(run(capsys, "merge", "-o", "x"), 2, "--base is missing")
    failed(run(capsys, "merge", "--base", "x", "-o", "y"), 2, "--expert is missing")
    failed(run(capsys, "merge", "--bse", "x"), 2, "No such option")
    failed(run(capsys, "murge"), 2, "No such command")
    failed(run(capsys, "merge", *words, "--scale", "big", "-o", "y"), 2, "--scale")
    failed(run(capsys, "merge", *words, "--set", "eps", "-o", "y"), 2, "KEY=VALUE")
    failed(run(capsys, "merge", "no-such.yaml", "-o", "y"), 2, "no-such.yaml")
    failed(run(capsys, "merge", *words, "--device", "cuda:99", "-o", plain.root / "o"), 2, "--device")


def test_bad_checkpoints_exit_with_3(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(plain)
    failed(run(capsys, "merge", "--base", "nowhere", "--expert", "x", "-o", plain.root / "o"), 3, "no such folder")
    (plain.root / "e2" / "model.safetensors").write_bytes(b"damaged")
    failed(run(capsys, "merge", *words, "-o", plain.root / "o"), 3, "too few")
    failed(run(capsys, "plan", *words), 3, "too few")
    failed(run(capsys, "verify", plain.root / "base"), 3, "did not finish")


def test_numerical_failures_exit_with_4(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*arguments(plain), "--method", "task_arithmetic", "--scale", "1e30", "--dtype", "float16"]
    failed(run(capsys, "merge", *words, "-o", plain.root / "o"), 4, "overflows float16")


def test_failing_writes_exit_with_5(plain: PlainModel, capsys: pytest.CaptureFixture[str]) -> None:
    (plain.root / "file").write_text("x")
    failed(run(capsys, "merge", *arguments(plain), "-o", plain.root / "file" / "out"), 5, "not a directory")


def test_a_defect_is_one_line_and_debug_shows_the_traceback(
    plain: PlainModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("acemerge.engine.opening.make_plan", broken)
    failed(run(capsys, "merge", *arguments(plain), "-o", plain.root / "o"), 1, "internal: KeyError")
    with pytest.raises(KeyError):
        main([str(word) for word in ("merge", *arguments(plain), "-o", plain.root / "o", "--debug")])


def test_names_from_files_never_reach_the_terminal_as_markup(
    plain: PlainModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (plain.base, *plain.tuned):
        model["[red]x[/].weight"] = torch.randn(3, 3)
    assert "[red]x[/].weight" in run(capsys, "plan", *arguments(plain))[1]


def test_the_module_runs_as_a_program(plain: PlainModel) -> None:
    words = [str(word) for word in ("merge", *arguments(plain), "-o", plain.root / "out")]
    done = subprocess.run([sys.executable, "-m", "acemerge", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads((plain.root / "out" / "acemerge.json").read_text())["format"] == "acemerge-manifest-1"


@pytest.mark.parametrize(
    ("more", "code"),
    [([], 0), (["--log-format", "json"], 0), (["--method", "nosuch"], 2)],
    ids=["text", "json", "error"],
)
def test_a_full_disk_behind_stderr_changes_nothing(more: list[str], code: int, plain: PlainModel) -> None:
    out = plain.root / "out"
    words = [str(word) for word in ("merge", *arguments(plain), "-o", out, *more)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "acemerge", *words], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert done.returncode == code
    assert "Traceback" not in done.stdout
    if code == 0:
        assert len(verify(out)["tensors"]) == len(plain.base)
    else:
        assert not out.exists()
