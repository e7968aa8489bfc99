"""Whose tokens, and in which template, a mergekit YAML gives to the merged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from acemerge.errors import UsageError
from acemerge.recipes.mergekit.models import MergekitMerge, check_keys, path_and_adapter

TOKENIZER_KEYS = ("tokenizer", "tokenizer_source", "chat_template")
_SHORTEST = 20  # characters of what can be a template


def read_tokenizer(
    content: Mapping[str, Any], merged: MergekitMerge, where: object, locate: Callable[[str], str]
) -> dict[str, Any]:
    """The keys of our recipe for `tokenizer_source`, or `tokenizer` with a `source`, and `chat_template`.

    Raises UsageError for a source that is none of the models, and for what is no template.
    """
    template = _template(content.get("chat_template"), where)
    return _source(content, merged, where, locate) | ({"chat_template": template} if template else {})


def _template(template: Any, where: object) -> str | None:
    if template in (None, "", "auto"):
        return template or None
    if not isinstance(template, str) or len(template) < _SHORTEST or "{" not in template:
        what = f"`chat_template: {template!r:.40}` is neither auto nor a template's text"
        raise UsageError(where, what, "write the Jinja text itself")
    return template


def _source(
    content: Mapping[str, Any], merged: MergekitMerge, where: object, locate: Callable[[str], str]
) -> dict[str, Any]:
    source = content.get("tokenizer_source")
    if content.get("tokenizer") is not None:
        if source is not None:
            raise UsageError(where, "has both `tokenizer` and `tokenizer_source`", "keep one of the two")
        source = _section(content["tokenizer"], f"{where}: tokenizer")
    if source is None:
        return {}
    missing = "mean" if content.get("base_model") is None else "base"
    if source in ("base", "union"):
        return {"vocabulary": source, "missing_tokens": missing}
    if source == merged.origin:
        return {"vocabulary": "base", "missing_tokens": missing}
    if source not in merged.experts:
        what = f"the tokenizer's source {source!r} is none of the models"
        raise UsageError(where, what, "use base, union or one of the models")
    return {"vocabulary": "assets", "missing_tokens": missing, "assets": locate(path_and_adapter(source)[0])}


def _section(table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise UsageError(where, "not a table of keys", "write for example `tokenizer: {source: union}`")
    check_keys(table, ("source",), where, ("tokens", "pad_to_multiple_of"))
    return table.get("source", "union")
