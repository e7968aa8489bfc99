"""What a model's folder holds beside its weights: configuration, tokenizer, templates and processor files, the modules
that sentence-transformers puts behind a model, and the components of a diffusers pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from acemerge.checkpoints import files

HEADS = "heads"  # experts' task heads, beside a merged model
_HEAD = re.compile(rf"{HEADS}/[\w-][\w.-]*\.safetensors", re.ASCII)
# Templates beside the one that a tokenizer uses when it is not told which.
_TEMPLATES = "additional_chat_templates"
# What `modules.json` puts behind a transformer: 1_Pooling, 2_Dense, ...
_MODULE = (
    r"\d{1,2}_(Pooling|WeightedLayerPooling|SpladePooling|TokenPooling|Dense|Normalize|LayerNorm|Dropout"
    r"|SparseAutoEncoder|MultiVectorMask|LogitScore)"
)
_WEIGHTS = "model.safetensors"
# The components of a pipeline with weights, by who names these, and those without.
MODEL_INDEX = "model_index.json"
_COMPONENTS = {
    r"(unet|vae|vqvae|vqgan|movq|transformer|prior|controlnet)(_\d)?": "diffusion_pytorch_model.safetensors",
    r"(text_encoder|image_encoder|safety_checker)(_\d)?": _WEIGHTS,
}
_BESIDE = re.compile(r"(scheduler|tokenizer|feature_extractor|image_processor|processor)(_\d)?")
_SCHEDULER = "scheduler_config.json"
_MODULE_WEIGHTS = re.compile(rf"{_MODULE}/{re.escape(_WEIGHTS)}")
_MODULE_TENSOR = re.compile(rf"(?P<module>{_MODULE})/(?P<name>.+)")
_FOLDER = re.compile(rf"{_TEMPLATES}|{_MODULE}")
# Never code, never pickles.
_ASSET = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|vocab_\w+"
    r"|preprocessor_config|processor_config|image_processor_config|video_preprocessor_config|chat_template"
    r"|modules|config_sentence_transformers|sentence_bert_config|normalizer|encoder|entity_vocab|tekken)\.json"
    r"|vocab\.txt|merges\.txt|bpe\.codes|vocab\.bpe|chat_template\.jinja"
    rf"|{_TEMPLATES}/[\w-][\w.-]*\.jinja"
    rf"|{_MODULE}/(config\.json|model\.safetensors)"
    r"|tokenizer\.model|spiece\.model|spm\.model|sentencepiece(\.bpe)?\.model|source\.spm|target\.spm"
)


def is_asset(name: str) -> bool:
    """Whether a file of this name, in a model's folder or in a folder therein, is one that the model needs."""
    return _ASSET.fullmatch(name) is not None


def is_asset_folder(name: str) -> bool:
    """Whether a folder of this name in a model's own may hold such files."""
    return _FOLDER.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Whether a file of this name beside a merged model is that of an expert's task head."""
    return _HEAD.fullmatch(name) is not None


def with_asset_folders(root: Path, names: Sequence[str]) -> list[str]:
    """The names in a folder, and by their paths those in its folders of assets. Links to folders are not followed."""
    found = [name for name in names if is_asset_folder(name) and files.kind(root / name) == "folder"]
    return [*names, *(f"{folder}/{name}" for folder in found for name in files.list_folder(root / folder))]


def module_weights(names: Sequence[str]) -> list[str]:
    """Of files those with the weights of a module behind the transformer."""
    return [name for name in names if _MODULE_WEIGHTS.fullmatch(name)]


def in_module(tensor: str) -> tuple[str, str]:
    """The file of a module or component and the name there of one of its tensors, which are called
    `2_Dense/linear.weight` or `unet/conv_in.weight`; empty for the model's own.
    """
    found = _MODULE_TENSOR.fullmatch(tensor)
    if found:
        return f"{found['module']}/{_WEIGHTS}", found["name"]
    folder, slash, name = tensor.partition("/")
    weights = component_weights(folder) if slash else ""
    return (f"{folder}/{weights}", name) if weights else ("", "")


def component_weights(folder: str) -> str:
    """What the weights of a pipeline's component in a folder of this name are called; empty where it has none."""
    return next((weights for names, weights in _COMPONENTS.items() if re.fullmatch(names, folder)), "")


def is_component(folder: str) -> bool:
    """Whether a folder of this name in a pipeline's is one of its components, with weights or without."""
    return bool(component_weights(folder)) or _BESIDE.fullmatch(folder) is not None


def is_of_pipeline(name: str) -> bool:
    """Whether a file of this name in a pipeline's folder is one that the pipeline needs."""
    folder, slash, file = name.partition("/")
    if not slash:
        return name == MODEL_INDEX
    return is_component(folder) and (file in (_SCHEDULER, component_weights(folder)) or is_asset(file))
