"""Images: with a classifier's head, and with CLIP's sentences; folders, columns and what cannot be read."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from builders import make_model
from PIL import Image
from safetensors.torch import load_file
from task_builders import save_model, sharpened, write_tasks

from acemerge.errors import CheckpointError, UsageError
from acemerge.evaluation.evaluate import Run, evaluate
from acemerge.tasks.data import DataSource
from acemerge.tasks.images import open_images
from acemerge.tasks.networks import open_model
from acemerge.tasks.task_file import load_tasks
from acemerge.tasks.zero_shot import text_heads, zero_shot

CPU = torch.device("cpu")
CLASSES = ("cat", "old_dog", "red_bird")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four noisy pictures of each class, of a size that the processor must change."""
    random = np.random.default_rng(0)
    for i, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for j in range(4):
            values = random.integers(0, 256, (10, 14, 3)) * [i == 0, i == 1, i == 2] + random.integers(
                0, 40, (10, 14, 3)
            )
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(tmp_path / "pictures" / name / f"{j}.png")
    return tmp_path / "pictures"


def processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor, CLIPImageProcessor

    if not (folder / "preprocessor_config.json").exists():
        square = {"height": 8, "width": 8}
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=square).save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)


def each(pictures: Path, folder: Path) -> torch.Tensor:
    """Every picture by itself through the processor: (12, 3, 8, 8)."""
    found = [Image.open(file).convert("RGB") for name in CLASSES for file in sorted((pictures / name).iterdir())]
    return torch.cat([processor(folder)(images=[image], return_tensors="pt")["pixel_values"] for image in found])


def test_a_classifier_with_the_experts_head(pictures: Path, tmp_path: Path) -> None:
    base = make_model("vit", num_labels=7)
    expert = sharpened(make_model("vit", 1, num_labels=3), 1)
    for folder, model in ((tmp_path / "base", base), (tmp_path / "expert", expert)):
        save_model(folder, model)
        processor(folder)
    task = {"kind": "images", "name": "pets", "data": "pictures", "expert": "expert", "batch_size": 5}
    experts, row = evaluate({"base": str(tmp_path / "base")}, Run(load_tasks(write_tasks(tmp_path, task)), CPU)).rows
    labels = np.repeat([0, 1, 2], 4)
    network = make_model("vit", num_labels=3)
    for body, found in ((expert, experts), (base, row)):
        state = {k: v for k, v in body.state_dict().items() if not k.startswith("classifier.")}
        network.load_state_dict(state | {k: v for k, v in expert.state_dict().items() if k.startswith("classifier.")})
        with torch.no_grad():
            predictions = network(pixel_values=each(pictures, tmp_path / "base")).logits.argmax(1).numpy()
        (score,) = found.known()
        assert score.score == np.mean(predictions == labels)
        assert score.about["head"] == "expert expert"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "clip", sharpened(make_model("clip"), 2))
    processor(folder)
    return folder


def _oracle(network: Any, tokenizer: Any, templates: list[str], images: torch.Tensor) -> torch.Tensor:
    """Cosines by the model's own forward, a sentence at a time."""
    heads = []
    for name in CLASSES:
        sentences = [template.format(name.replace("_", " ")) for template in templates]
        outputs = [network(**tokenizer(s, return_tensors="pt"), pixel_values=images).text_embeds[0] for s in sentences]
        heads.append(torch.stack(outputs).mean(0))
    embeds = network(**tokenizer("cat", return_tensors="pt"), pixel_values=images).image_embeds
    return torch.nn.functional.cosine_similarity(embeds[:, None], torch.stack(heads)[None], dim=-1)


def test_zero_shot_classes_are_cosines_with_sentences(pictures: Path, clip: Path, tmp_path: Path) -> None:
    templates = ["the {}", "the young {} and here"]
    model = open_model(str(clip), CPU)
    scorer, owner = zero_shot(model, None, templates, CLASSES)
    images = each(pictures, clip)
    from transformers import CLIPModel

    with torch.no_grad():
        expected = _oracle(CLIPModel.from_pretrained(clip), model.tokenizer(), templates, images)
        assert torch.allclose(scorer.logits({"pixel_values": images}), expected, atol=1e-5)
    assert owner is model
    task = {"kind": "zero_shot", "name": "pets", "data": "pictures", "templates": templates}
    (row,) = evaluate({"clip": str(clip)}, Run(load_tasks(write_tasks(tmp_path, task)), CPU)).rows
    assert row.known()[0].score == np.mean(expected.argmax(1).numpy() == np.repeat([0, 1, 2], 4))


def test_a_vision_model_with_the_other_half_of_its_clip(pictures: Path, clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPVisionModel

    vision = sharpened(CLIPVisionModel.from_pretrained(clip), 3)
    vision.save_pretrained(tmp_path / "vision")
    whole = CLIPModel.from_pretrained(clip)
    names = {name.removeprefix("vision_model."): value for name, value in vision.state_dict().items()}
    whole.vision_model.load_state_dict(names)
    model = open_model(str(tmp_path / "vision"), CPU)
    scorer, owner = zero_shot(model, str(clip), ["the {}"], CLASSES)
    images = each(pictures, clip)
    with torch.no_grad():
        expected = _oracle(whole, owner.tokenizer(), ["the {}"], images)
        assert torch.allclose(scorer.logits({"pixel_values": images}), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="no whole CLIP; name the CLIP that it comes from"):
        zero_shot(model, None, ["the {}"], CLASSES)
    other = save_model(tmp_path / "vit", make_model("vit"))
    with pytest.raises(CheckpointError, match="is a vit, no CLIP"):
        zero_shot(open_model(str(other), CPU), str(clip), ["the {}"], CLASSES)
    assert load_file(tmp_path / "vision/model.safetensors")  # still what it was


def test_a_part_of_the_images_is_of_every_class(pictures: Path) -> None:
    assert open_images(DataSource(str(pictures), limit=3), "image", "label", None).classes.tolist() == [0, 1, 2]


def test_heads_have_length_one(clip: Path) -> None:
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(clip).eval()
    heads = text_heads(network, open_model(str(clip), CPU).tokenizer(), ["a {}", "the {}"], CLASSES)
    assert torch.allclose(heads.norm(dim=1), torch.ones(3))


def test_folders_and_columns_of_images(pictures: Path, tmp_path: Path) -> None:
    import datasets

    found = open_images(DataSource(str(pictures)), "image", "label", None)
    assert found.names == CLASSES
    assert found.classes.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    turned = open_images(DataSource(str(pictures)), "image", "label", CLASSES[::-1])
    assert turned.classes.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    table = datasets.Dataset.from_dict({"image": [found.image(5)], "label": [1]})
    table.to_parquet(tmp_path / "one.parquet")
    column = open_images(DataSource(str(tmp_path / "one.parquet")), "image", "label", None)
    assert np.array_equal(np.asarray(column.image(0)), np.asarray(found.image(5)))
    with pytest.raises(UsageError, match=r"old_dog: is no class of `labels:`"):
        open_images(DataSource(str(pictures)), "image", "label", ["cat", "red_bird"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no folders with images"):
        open_images(DataSource(str(tmp_path / "empty")), "image", "label", None)


def test_what_is_no_image_is_named(pictures: Path, tmp_path: Path) -> None:
    (pictures / "cat" / "0.png").write_bytes(b"GIF89a, or so it says")
    (pictures / "cat" / "1.png").unlink()
    (pictures / "cat" / "1.png").symlink_to("/etc/hostname")
    found = open_images(DataSource(str(pictures)), "image", "label", None)
    with pytest.raises(UsageError, match=r"0\.png: cannot be read as an image"):
        found.image(0)
    (pictures / "cat" / "2.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\nshowpage\n%%EOF\n")
    (pictures / "cat" / "3.png").unlink()
    os.mkfifo(pictures / "cat" / "3.png")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        found.image(1)
    with pytest.raises(UsageError, match=r"2\.png: cannot be read as an image \(of no format that is read here\)"):
        found.image(2)  # nobody hands it to Ghostscript
    with pytest.raises(CheckpointError, match=r"3\.png: not a regular file"):
        found.image(3)  # nobody waits for it


def test_what_a_column_of_images_names_is_not_opened(pictures: Path, tmp_path: Path) -> None:
    """A value is the image itself; a path, to a picture or to anything else, is not followed."""
    import datasets

    inside, whole = pictures / "cat" / "0.png", (pictures / "cat" / "1.png").read_bytes()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    values = [{"bytes": None, "path": str(inside)}, {"bytes": whole, "path": str(inside)}]
    table = pyarrow.table({"image": values, "label": [0, 1]}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = open_images(DataSource(str(tmp_path / "a.parquet")), "image", "label", None)
    with pytest.raises(UsageError, match=r"image 1: the column holds only the path of an image; use a folder, or"):
        found.image(0)
    assert np.array_equal(np.asarray(found.image(1)), np.asarray(Image.open(io.BytesIO(whole))))
