"""The tokens of a checkpoint by their strings, and a tokenizer file with some more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acemerge.checkpoints import files
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import parse_json
from acemerge.checkpoints.links import contained
from acemerge.errors import CheckpointError, fetching

TOKENIZER = "tokenizer.json"
_LISTS = (TOKENIZER, "vocab.json", "added_tokens.json", "vocab.txt")
_TOKENS = re.compile(
    r"(tokenizer|vocab|vocab_\w+|encoder|entity_vocab|tekken)\.json|vocab\.(txt|bpe)|bpe\.codes|\S+\.(model|spm)"
)
# As large as those of half a million tokens with all their merges.
_MAX_BYTES = 256 << 20
_MAX_PARTS = 20_000_000
_CURE = fetching("the file again")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def same_tokenizer(models: Sequence[Checkpoint]) -> bool:
    """Whether all have the same files of tokens, to the byte."""
    return len({tuple(_digests(checkpoint)) for checkpoint in models}) == 1


def _digests(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    for name in _LISTS:
        if name in checkpoint.assets:
            yield name, files.sha256(contained(files.resolve(checkpoint.path), name))


def lists_tokens(checkpoint: Checkpoint) -> bool:
    """Whether there is a file with tokens: only those of bytes or characters need none."""
    return any(_TOKENS.fullmatch(name) for name in checkpoint.assets)


def read_tokens(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """Token string -> row of the embedding; None where the folder has no tokenizer that lists its tokens."""
    if TOKENIZER in checkpoint.assets:
        return _tokens_of(_read_json(checkpoint, TOKENIZER), checkpoint.path / TOKENIZER)
    if "vocab.json" in checkpoint.assets:
        listed = [name for name in ("vocab.json", "added_tokens.json") if name in checkpoint.assets]
        found = [_read_json(checkpoint, name) for name in listed]
        return _checked({k: v for table in found for k, v in table.items()}, checkpoint.path / listed[0])
    if "vocab.txt" in checkpoint.assets:
        path = contained(files.resolve(checkpoint.path), "vocab.txt")
        lines = files.read_small(path, _MAX_BYTES).decode(errors="replace").split("\n")
        return {token.rstrip("\r"): i for i, token in enumerate(lines) if token}
    return None


def with_added(checkpoint: Checkpoint, added: Mapping[str, int], others: Sequence[Checkpoint]) -> bytes:
    """The checkpoint's `tokenizer.json` with more tokens: each is found in a text before anything else is.

    What the first of the `others` that added a token itself says of it is kept, as that it is special.
    """
    content = _read_json(checkpoint, TOKENIZER)
    known: dict[str, Mapping[str, Any]] = {}
    for other in others:
        if TOKENIZER in other.assets:
            listed = _read_json(other, TOKENIZER).get("added_tokens") or []
            known |= {token["content"]: token for token in listed if token["content"] not in known}
    told = {token: {flag: bool(known.get(token, {}).get(flag)) for flag in _FLAGS} for token in added}
    more = [{"id": i, "content": token, **told[token]} for token, i in added.items()]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *more]
    return spelled(content)


def spelled(content: object) -> bytes:
    """JSON for people; where a text holds half a character, as some tokens do, all in ASCII with its escape."""
    try:
        return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(content, indent=2).encode() + b"\n"


def _read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    path = checkpoint.path / name
    text = files.read_small(contained(files.resolve(checkpoint.path), name), _MAX_BYTES)
    content = parse_json(text, path, _CURE, parts=_MAX_PARTS)
    if not isinstance(content, dict):
        raise CheckpointError(path, "is no JSON object", _CURE)
    return content


def _tokens_of(content: Mapping[str, Any], path: Path) -> Mapping[str, int]:
    """Of `tokenizer.json`: the model's table, or a list of pairs in the order of their ids; and the added ones."""
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, list):
        pairs = [item[0] if isinstance(item, list) and item else None for item in listed]
        listed = {token: i for i, token in enumerate(pairs)}
    if not isinstance(listed, dict):
        raise CheckpointError(path, "lists no tokens", _CURE)
    added = content.get("added_tokens") or []
    if not isinstance(added, Sequence) or not all(isinstance(token, dict) for token in added):
        raise CheckpointError(path, "its added tokens are no list", _CURE)
    return _checked({**listed, **{token.get("content"): token.get("id") for token in added}}, path)


def _checked(tokens: Mapping[Any, Any], path: Path) -> Mapping[str, int]:
    for token, row in tokens.items():
        if not isinstance(token, str) or not isinstance(row, int) or row < 0:
            raise CheckpointError(path, f"token {token!r:.80} has the id {row!r:.80}", _CURE)
    if len(set(tokens.values())) < len(tokens):
        raise CheckpointError(path, "two tokens have one id", _CURE)
    return tokens
