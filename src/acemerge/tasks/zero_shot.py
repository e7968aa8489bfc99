"""CLIP's zero-shot classes: the head's rows are the directions of sentences about the classes (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from acemerge.errors import CheckpointError
from acemerge.shapes import Float, Tensor
from acemerge.tasks.networks import Inputs, Model, Scorer, load_whole, open_model


def zero_shot(model: Model, clip: str | None, templates: Sequence[str], names: Sequence[str]) -> tuple[Scorer, Model]:
    """Cosines of images with the classes, (N, K), and the model whose tokenizer and processor are used.

    `model` is a CLIP, or the vision half of one; `clip` lends the text half and the projections.
    """
    whole = model if clip is None else open_model(clip, model.device)
    if whole.config.model_type != "clip":
        what = f"is a {whole.config.model_type}, no whole CLIP"
        raise CheckpointError(whole.name, what, "name the CLIP that it comes from by the task's `clip:`")
    network = load_whole("CLIPModel", whole)
    if whole is not model:
        _put_vision(network, model)
    network = model.on_device(network)
    heads = text_heads(network, whole.tokenizer(), templates, names)

    def logits(inputs: Inputs) -> Tensor:
        pooled = network.vision_model(pixel_values=inputs["pixel_values"].to(network.dtype)).pooler_output
        images = _unit(network.visual_projection(pooled).float())
        return images @ heads.T

    return Scorer(logits, len(names), f"the text half of {whole.path.name}", network), whole


def _put_vision(network: Any, model: Model) -> None:
    """The vision half of `model`, a CLIP or a CLIP vision model, in the place of the network's own."""
    kind = model.config.model_type
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(model.name, f"is a {kind}, no CLIP", "zero_shot is for CLIP and its vision models")
    class_name = "CLIPModel" if kind == "clip" else "CLIPVisionModel"
    given = load_whole(class_name, model)
    prefix = "vision_model."
    values = given.vision_model.state_dict() if hasattr(given, "vision_model") else given.state_dict()
    try:
        network.vision_model.load_state_dict({name.removeprefix(prefix): value for name, value in values.items()})
    except RuntimeError as failure:
        what = "its vision half does not fit the CLIP of the task's `clip:`"
        raise CheckpointError(model.name, what, "name the CLIP that it was fine-tuned from") from failure


def text_heads(network: Any, tokenizer: Any, templates: Sequence[str], names: Sequence[str]) -> Float[Tensor, "K D"]:
    """For each class the mean direction of its sentences, of length one; `_` in a class's name is read as a blank."""
    rows = []
    with torch.no_grad():
        for name in names:
            sentences = [template.replace("{}", name.replace("_", " ")) for template in templates]
            tokens = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(network.device)
            pooled = network.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            directions = _unit(network.text_projection(pooled).float())  # (templates, D)
            rows.append(_unit(directions.mean(0)))
    return torch.stack(rows)


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit
