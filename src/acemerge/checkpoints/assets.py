"""What a model's folder holds beside its weights: configuration, tokenizer, templates and processor files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from acemerge.checkpoints import files

# Templates beside the one that a tokenizer uses when it is not told which.
TEMPLATES = "additional_chat_templates"
# Never code, never pickles.
_ASSET = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|vocab_\w+"
    r"|preprocessor_config|processor_config|image_processor_config|video_preprocessor_config|chat_template"
    r"|config_sentence_transformers|sentence_bert_config|normalizer|encoder|entity_vocab|tekken)\.json"
    r"|vocab\.txt|merges\.txt|bpe\.codes|vocab\.bpe|chat_template\.jinja"
    rf"|{TEMPLATES}/[\w-][\w.-]*\.jinja"
    r"|tokenizer\.model|spiece\.model|spm\.model|sentencepiece(\.bpe)?\.model|source\.spm|target\.spm"
)


def is_asset(name: str) -> bool:
    """Whether a file of this name, in a folder or in that of its templates, is one that a model needs."""
    return _ASSET.fullmatch(name) is not None


def with_templates(root: Path, names: Sequence[str]) -> list[str]:
    """The names in a folder, and of its templates by their paths. A link to other templates is not followed."""
    if TEMPLATES not in names or files.kind(root / TEMPLATES) != "folder":
        return list(names)
    return [*names, *(f"{TEMPLATES}/{name}" for name in files.list_folder(root / TEMPLATES))]
