"""Networks out of checkpoint folders, with the head of a task; code that a folder names is never loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from acemerge.checkpoints import files
from acemerge.checkpoints.config import CONFIG
from acemerge.checkpoints.folder import Checkpoint, open_checkpoint
from acemerge.checkpoints.hub import in_words, locate
from acemerge.checkpoints.lora import is_adapter
from acemerge.checkpoints.tokenizer import lists_tokens
from acemerge.checkpoints.weight_files import is_model_file
from acemerge.errors import CheckpointError
from acemerge.models.quiet import need_transformers, quiet_transformers
from acemerge.shapes import Float, Tensor
from acemerge.tasks.heads import Heads

_BYTES = 256  # a tokenizer without a list of tokens has all bytes
Inputs = Mapping[str, Tensor]
Logits = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Scorer:
    """What gives a batch's scores (N, rows), where its head is from, and the network behind it."""

    logits: Logits
    rows: int
    head_from: str
    network: nn.Module


@dataclass(frozen=True)
class Model:
    """A checkpoint folder and where its networks are to run."""

    name: str
    checkpoint: Checkpoint
    device: torch.device

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def dtype(self) -> torch.dtype | str:
        """As stored on an accelerator; half precision is slow on a CPU."""
        return torch.float32 if self.device.type == "cpu" else "auto"

    @cached_property
    def config(self) -> Any:
        return load("AutoConfig", self.path)

    def tokenizer(self) -> Any:
        """With the end of a text for padding where it has none, as GPT-2's: the mask tells them apart."""
        listed = lists_tokens(self.checkpoint)
        try:
            tokenizer = load("AutoTokenizer", self.path)
        except CheckpointError:
            if listed:
                raise
            tokenizer = ()
        # transformers makes one of special tokens alone where a folder has none: scores would mean nothing.
        if not listed and len(tokenizer) < _BYTES:
            cure = "put its base's tokenizer files beside its weights, or name a model of text"
            raise CheckpointError(self.name, "has no tokenizer", cure)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def on_device(self, network: nn.Module) -> Any:
        return network.eval().to(self.device)


# Most rules are for several experts, and leave of a single update a part.
MERGE_ALONE = "merge it into its base alone by --method average, which keeps all of it, and name that folder"


def open_model(name: str, device: torch.device, quiet: bool = True) -> Model:
    """A folder or Hub id, its headers checked. CheckpointError for an adapter or for what is no model."""
    path = locate(name, allow_pickle=False, quiet=quiet, heads=True).path
    # transformers would follow an adapter to whatever base its file names.
    if is_adapter(path):
        raise CheckpointError(name, "is an adapter", MERGE_ALONE)
    checkpoint = open_checkpoint(path)
    if CONFIG not in checkpoint.assets:
        raise CheckpointError(name, f"has no {CONFIG}", "name a folder that from_pretrained loads, or add its base's")
    return Model(name, checkpoint, device)


_OTHER_HEAD = "name another head by the task's `expert:`"
SEQUENCES = "AutoModelForSequenceClassification"


def classifier(model: Model, auto_class: str, heads: Heads) -> Scorer:
    """A transformers model whose head is the task's.

    Head is all outside of the model's backbone, and what of the backbone the checkpoint lacks (a pooler).
    """
    rows = _head_rows(model, auto_class, heads)
    network, info = load(
        auto_class, model.path, num_labels=rows, ignore_mismatched_sizes=True, output_loading_info=True,
        use_safetensors=True, dtype=model.dtype,
    )  # fmt: skip
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    backbone = f"{network.base_model_prefix}."
    state = network.state_dict()
    found = {name: heads.need(name) for name in state if name in lacking or not name.startswith(backbone)}
    for name, (value, place) in found.items():
        if value.shape != state[name].shape:
            what = f"tensor {name!r} of {place} is {tuple(value.shape)}, not {tuple(state[name].shape)}"
            raise CheckpointError(f"task {heads.task}", what, "name the task's `expert:`, whose head it is")
    network.load_state_dict({name: value for name, (value, _) in found.items()}, strict=False)
    if auto_class == SEQUENCES and network.config.pad_token_id is None:
        network.config.pad_token_id = model.tokenizer().pad_token_id
    network = model.on_device(network)

    def logits(inputs: Inputs) -> Tensor:
        pixels = {key: value.to(network.dtype) for key, value in inputs.items() if value.is_floating_point()}
        result: Tensor = network(**{**inputs, **pixels}).logits
        return result

    places = dict.fromkeys(place for _, place in found.values())
    return Scorer(logits, rows, ", ".join(places), network)


def _head_rows(model: Model, auto_class: str, heads: Heads) -> int:
    """The rows of the task's head: the size that a model without values has where the number of labels changes it."""
    shapes = []
    for rows in (2, 3):
        config = load("AutoConfig", model.path, num_labels=rows)
        try:
            with quiet_transformers() as transformers, torch.device("meta"):
                empty = getattr(transformers, auto_class).from_config(config, trust_remote_code=False)
        except Exception as failure:
            what = f"cannot be made by {auto_class} ({in_words(failure)})"
            raise CheckpointError(model.name, what, "evaluate a model of the kind that the task needs") from failure
        shapes.append({name: tuple(value.shape) for name, value in empty.state_dict().items()})
    name = next(name for name, shape in shapes[0].items() if shape != shapes[1][name])
    axis = next(i for i, (a, b) in enumerate(zip(shapes[0][name], shapes[1][name], strict=True)) if a != b)
    value, _ = heads.need(name)
    if value.ndim != len(shapes[0][name]):
        raise CheckpointError(f"task {heads.task}", f"tensor {name!r} is {tuple(value.shape)}", _OTHER_HEAD)
    return value.shape[axis]


def pooled(model: Model, pooling: Literal["mean", "cls"], heads: Heads) -> Scorer:
    """An encoder, its last hidden states pooled, and a linear head `classifier.weight` (K, H), `classifier.bias` (K).

    `mean` is over the tokens that are not padding, `cls` takes the first.
    """
    encoder = load_whole("AutoModel", model, unused="pooler.")
    (weight, place), (bias, _) = heads.need("classifier.weight"), heads.need("classifier.bias")
    encoder = model.on_device(encoder)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != encoder.config.hidden_size:
        what = f"its head is {tuple(weight.shape)} over states of {encoder.config.hidden_size}"
        raise CheckpointError(f"task {heads.task}", what, _OTHER_HEAD)
    head.load_state_dict({"weight": weight, "bias": bias})
    head = model.on_device(head)

    def logits(inputs: Inputs) -> Tensor:
        states = encoder(**inputs).last_hidden_state.float()  # (N, L, H)
        features = states[:, 0] if pooling == "cls" else mean_of_tokens(states, inputs["attention_mask"])
        result: Tensor = head(features)
        return result

    return Scorer(logits, len(weight), place, encoder)


def mean_of_tokens(states: Float[Tensor, "N L H"], mask: Tensor) -> Float[Tensor, "N H"]:
    """The mean of each row's states where `mask` (N, L) is 1."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def load_whole(auto_class: str, model: Model, unused: str | None = None) -> Any:
    """A network all of whose tensors the checkpoint has, but for those whose names begin with `unused`."""
    network, info = load(auto_class, model.path, output_loading_info=True, use_safetensors=True, dtype=model.dtype)
    lacking = sorted(key for key in info["missing_keys"] if unused is None or not key.startswith(unused))
    if lacking:
        raise CheckpointError(
            model.name, f"lacks tensor {lacking[0]!r}", "evaluate a model that is whole for this task"
        )
    return network


_CURE = "check that the folder is complete and of a kind that the task needs"
_CURES = {"AutoImageProcessor": "put its base's preprocessor_config.json beside its weights"}


def load(auto_class: str, path: Path, **options: Any) -> Any:
    """`transformers.AUTO_CLASS.from_pretrained` of a folder here, silent, never with the folder's own code."""
    need_transformers()
    root = files.resolve(files.local_copy(path, is_model_file))  # transformers reads no store
    try:
        with quiet_transformers() as transformers:
            return getattr(transformers, auto_class).from_pretrained(str(root), trust_remote_code=False, **options)
    except Exception as failure:  # of whichever part of it could not make sense of the folder
        what = f"cannot be loaded by {auto_class} ({in_words(failure)})"
        raise CheckpointError(path, what, _CURES.get(auto_class, _CURE)) from failure
