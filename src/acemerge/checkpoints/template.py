"""The chat template of a checkpoint: text that is read and written, never rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from acemerge.checkpoints import files
from acemerge.checkpoints.config import MAX_CONFIG
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.header import MAX_PARTS, parse_json
from acemerge.checkpoints.links import contained
from acemerge.checkpoints.tokenizer import spelled
from acemerge.errors import CheckpointError, fetching

TEMPLATE = "chat_template.jinja"
TEMPLATE_FILES = (TEMPLATE, "chat_template.json")
_SETTINGS = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_CURE = fetching("the file again")


def read_template(checkpoint: Checkpoint) -> str | None:
    """The template of a folder, the default one where it has several; None where it has none."""
    if TEMPLATE in checkpoint.assets:
        return _read(checkpoint, TEMPLATE).decode(errors="replace")
    for name in (_SETTINGS, "chat_template.json"):
        if name in checkpoint.assets:
            found = _settings(checkpoint, name).get("chat_template")
            if isinstance(found, list):
                by_name = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
                found = by_name.get("default")
            if isinstance(found, str):
                return found
    return None


def commonest_template(checkpoints: Sequence[Checkpoint]) -> str | None:
    """The template that most of the models have, the first of several such; None where none has one."""
    models = {files.resolve(checkpoint.path): checkpoint for checkpoint in checkpoints}
    found = [template.strip() for model in models.values() if (template := read_template(model))]
    return Counter(found).most_common(1)[0][0] if found else None


def template_file(checkpoint: Checkpoint, template: str) -> tuple[str, bytes]:
    """The file, by its name, that gives the checkpoint's tokenizer a template in the place of any other."""
    if _SETTINGS not in checkpoint.assets:
        return TEMPLATE, template.encode(errors="replace")
    settings = _settings(checkpoint, _SETTINGS) | {"chat_template": template}
    return _SETTINGS, spelled(settings)


def end_of_text(checkpoint: Checkpoint) -> dict[str, object]:
    """What ends a text, of those keys that say it: `eos_token` of the tokenizer, `eos_token_id` in generating."""
    found: dict[str, object] = {}
    if _SETTINGS in checkpoint.assets:
        token = _settings(checkpoint, _SETTINGS).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        found |= {"eos_token": token} if isinstance(token, str) else {}
    if _GENERATION in checkpoint.assets:
        ids = _settings(checkpoint, _GENERATION).get("eos_token_id")
        found |= {} if ids is None else {"eos_token_id": ids}
    return found


def _settings(checkpoint: Checkpoint, name: str) -> dict[str, object]:
    path = checkpoint.path / name
    content = parse_json(_read(checkpoint, name), path, _CURE, constants=True, parts=MAX_PARTS)
    if not isinstance(content, dict):
        raise CheckpointError(path, "is no JSON object", _CURE)
    return content


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    return files.read_small(contained(files.resolve(checkpoint.path), name), MAX_CONFIG)
