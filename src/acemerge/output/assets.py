"""What a model has beside its weights: the output's configuration, tokenizer, template and processor files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.config import CONFIG, read_config
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.template import TEMPLATE_FILES, commonest_template, template_file
from acemerge.checkpoints.tokenizer import TOKENIZER, with_added
from acemerge.output.protocol import Output
from acemerge.planning.jobs import Plan


def write_assets(plan: Plan, base: Checkpoint, owner: Checkpoint, models: Sequence[Checkpoint], output: Output) -> None:
    """The base's configuration, which follows a forced output type; tokenizer, template and processor files of
    `owner`, the model that the recipe names. Both know of tokens that were added. `models` are all, the base's first.
    """
    vocabulary = plan.vocabulary
    for folder in sorted({name.split("/")[0] for name in owner.assets if "/" in name}):
        files.make_folder(output.path / folder)
    template = _template(plan, owner, models)
    for name in owner.assets:
        if name == TOKENIZER and vocabulary and vocabulary.added:
            output.write_bytes(name, with_added(owner, vocabulary.added, models[1:]))
        elif name != CONFIG and name not in template and name not in output.written:  # as a module's weights are
            output.write_chunks(name, files.read_chunks(contained(files.resolve(owner.path), name)))
    for name, text in template.items():
        if text is not None:
            output.write_bytes(name, text)
    if CONFIG in base.assets:
        config, stored = _configuration(plan, base), files.resolve(base.path) / CONFIG
        same = config == read_config(stored)
        source = files.read_chunks(contained(stored.parent, CONFIG))
        output.write_chunks(CONFIG, source if same else [json.dumps(config, indent=2).encode() + b"\n"])


def _template(plan: Plan, owner: Checkpoint, models: Sequence[Checkpoint]) -> Mapping[str, bytes | None]:
    """Files that the recipe's chat template takes the place of, and what it writes there, if it has one."""
    asked = plan.recipe.chat_template
    template = commonest_template(models) if asked == "auto" else asked
    if not template:
        return {}
    name, text = template_file(owner, template)
    return {**dict.fromkeys(TEMPLATE_FILES), name: text}


def _configuration(plan: Plan, base: Checkpoint) -> Mapping[str, Any]:
    """The base's, with the output's type where one is forced and the output's vocabulary."""
    config, dtype, vocabulary = dict(base.config), plan.recipe.dtype, plan.vocabulary
    if dtype != "auto":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | {key: dtype}
    if vocabulary is not None:
        text = config.get("text_config")
        if "vocab_size" not in config and isinstance(text, dict):
            config["text_config"] = text | {"vocab_size": vocabulary.rows}
        else:
            config["vocab_size"] = vocabulary.rows
    return config
