"""The Python that loads an output, for its card: what it is, its configuration says."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

FOLDER = "path/to/this/folder"

_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{0,79}")
_CAUSAL = re.compile(r"\w+(ForCausalLM|LMHeadModel)")
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model"})
_PROCESSORS = frozenset({"processor_config.json", "preprocessor_config.json"})
_GENERATE = (
    'tokens = tokenizer("Once upon a time", return_tensors="pt").input_ids',
    "print(tokenizer.decode(model.generate(input_ids=tokens, max_new_tokens=20)[0]))",
)


def load_code(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Of a model with this configuration and files of these `names`: lines of Python."""
    folder = f"folder = {json.dumps(FOLDER)}"
    if "modules.json" in names:
        loaded = ["model = SentenceTransformer(folder)", 'print(model.encode("Once upon a time").shape)']
        return ["from sentence_transformers import SentenceTransformer", "", folder, *loaded]
    if not config:
        lines = ["from pathlib import Path", "", "from safetensors.torch import load_file", "", folder, "tensors = {}"]
        return [*lines, 'for file in Path(folder).glob("*.safetensors"):', "    tensors |= load_file(file)"]
    name, helper = class_name(config), _helper(names)
    lines = [f"{helper.lower()} = Auto{helper}.from_pretrained(folder)"] if helper else []
    lines.append(f"model = {name}.from_pretrained(folder)")
    imported = ", ".join(sorted({name, *([f"Auto{helper}"] if helper else [])}))
    return [f"from transformers import {imported}", "", folder, *lines, *_generate(config, helper)]


def load_adapter_code(config: Mapping[str, Any], names: Collection[str], base: str) -> list[str]:
    """Of an adapter of `base`, a Hub id or a path, which has this configuration and files of these `names`."""
    name, helper = class_name(config), _helper(names)
    lines = [f"base = {json.dumps(base)}", f"folder = {json.dumps(FOLDER)}"]
    lines += [f"{helper.lower()} = Auto{helper}.from_pretrained(base)"] if helper else []
    lines.append(f"model = PeftModel.from_pretrained({name}.from_pretrained(base), folder)")
    imported = ", ".join(sorted({name, *([f"Auto{helper}"] if helper else [])}))
    heads = ["from peft import PeftModel", f"from transformers import {imported}"]
    return [*heads, "", *lines, *_generate(config, helper)]


def load_call(config: Mapping[str, Any], names: Collection[str], out: str, is_adapter: bool) -> str:
    """The one call that loads the output `out`; empty where it takes more than one."""
    folder = json.dumps(out)
    if is_adapter:
        return f"PeftModel.from_pretrained(base, {folder})"
    if "modules.json" in names:
        return f"SentenceTransformer({folder})"
    return f"{class_name(config)}.from_pretrained({folder})" if config else ""


def class_name(config: Mapping[str, Any]) -> str:
    """The class of transformers that the configuration names; AutoModelForCausalLM of any language model, AutoModel
    where none is named.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if not _CLASS.fullmatch(name):
        return "AutoModel"
    return "AutoModelForCausalLM" if _CAUSAL.fullmatch(name) else name


def _helper(names: Collection[str]) -> str:
    """What makes a model's inputs, as transformers' automatic classes call it."""
    if not _PROCESSORS.isdisjoint(names):
        return "Processor"
    return "" if _TOKENIZERS.isdisjoint(names) else "Tokenizer"


def _generate(config: Mapping[str, Any], helper: str) -> tuple[str, ...]:
    name = class_name(config)
    writes = name == "AutoModelForCausalLM" or (
        name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") is True
    )
    return _GENERATE if writes and helper == "Tokenizer" else ()
