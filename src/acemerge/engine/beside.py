"""What an output has beside its weights: index, heads, configuration, tokenizer, card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from acemerge.checkpoints import files
from acemerge.checkpoints.assets import with_asset_folders
from acemerge.checkpoints.folder import Checkpoint
from acemerge.checkpoints.hashes import known_sha256
from acemerge.checkpoints.lora import ADAPTER_CONFIG
from acemerge.checkpoints.reader import Reader
from acemerge.checkpoints.weight_files import INDEX
from acemerge.engine.execute import Records, write_heads
from acemerge.engine.opening import Opened
from acemerge.output.assets import write_assets
from acemerge.output.card import model_card
from acemerge.output.manifest import InputFile
from acemerge.output.names import CARD, PICTURE
from acemerge.output.origin import Origin, origin_of
from acemerge.output.picture import shares_picture
from acemerge.output.protocol import Output
from acemerge.output.shares import layer_shares
from acemerge.output.writer import index_bytes
from acemerge.planning.as_lora import adapter_config

_AT_ONCE = 4  # files that are hashed


def origins_of(opened: Opened) -> list[Origin]:
    """Where the card says that each model is from."""
    models = opened.plan.recipe.models
    return [origin_of(model, found.path) for model, found in zip(models, opened.checkpoints, strict=True)]


def write_beside(
    opened: Opened, records: Records, readers: Sequence[Reader], origins: Sequence[Origin], output: Output
) -> None:
    """Write everything but the weights and the manifest."""
    plan, shards = opened.plan, opened.layout.shards
    if len(shards) > 1:
        output.write_bytes(INDEX, index_bytes(shards))
    write_heads(plan, readers, output)
    if plan.is_adapter:
        output.write_bytes(ADAPTER_CONFIG, adapter_config(plan, opened.roles, opened.base.config))
    else:
        write_assets(plan, opened.base, opened.assets_from, opened.models, output)
    _write_card(opened, records, origins, output)


def _write_card(opened: Opened, records: Records, origins: Sequence[Origin], output: Output) -> None:
    plan = opened.plan
    shares = layer_shares(plan.experts, records) if len(plan.experts) > 1 else {}
    if shares:
        output.write_bytes(PICTURE, shares_picture(plan.experts, shares).encode())
    names = opened.base.assets if plan.is_adapter else output.written
    card = model_card(plan, records, opened.base.config, names, origins, bool(shares))
    output.write_bytes(CARD, card.encode(errors="replace"))


def inputs_of(
    opened: Opened, tensors: Mapping[Path, Mapping[str, str]], sums: Mapping[Path, str]
) -> list[tuple[str, dict[str, InputFile]]]:
    """Every model's origin, and of its weight files, under the names that its folder calls them by, the hashes of
    `tensors` and of whole files, as far as these are there.
    """

    def about(model: Checkpoint, path: Path) -> InputFile:
        return InputFile(model.fingerprints[path][0], sums.get(path), tensors.get(path, {}))

    return [
        (origin, {names.get(path, path.name): about(model, path) for path in model.weight_files})
        for origin, names, model in zip(opened.origins, map(_names, opened.models), opened.models, strict=True)
    ]


def whole_sums(opened: Opened, hash_files: bool, known: Mapping[Path, str]) -> dict[Path, str]:
    """The hashes of whole weight files: those `known`, those that the Hub tells, and with `hash_files` all others."""
    paths = [path for model in opened.models for path in model.weight_files]
    found = {path: known.get(path) or known_sha256(path) for path in dict.fromkeys(paths)}
    missing = [path for path, sha256 in found.items() if sha256 is None and hash_files]
    return {path: sha256 for path, sha256 in found.items() if sha256} | sums_of(missing)


def sums_of(paths: Sequence[Path]) -> dict[Path, str]:
    """The hashes of whole files, a few read at once."""
    with ThreadPoolExecutor(_AT_ONCE, "acemerge-hash") as threads:
        return dict(zip(paths, threads.map(files.sha256, paths), strict=True))


def _names(checkpoint: Checkpoint) -> dict[Path, str]:
    """What the folder calls its files: in a Hub cache those are links to files that are named by their hash."""
    root = files.resolve(checkpoint.path)
    if files.kind(root) != "folder":
        return {}
    return {files.resolve(root / name): name for name in with_asset_folders(root, files.list_folder(root))}
