"""The model card `README.md` of an output folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from acemerge.checkpoints.hub import parse_id
from acemerge.methods import METHODS
from acemerge.output.loading import load_adapter_code, load_code
from acemerge.output.markdown import code, fenced
from acemerge.output.names import PICTURE
from acemerge.output.origin import Origin, common_license
from acemerge.output.records import TensorRecord, share_lost
from acemerge.output.shares import total_energies
from acemerge.planning.jobs import Plan


def model_card(
    plan: Plan,
    records: Mapping[str, TensorRecord],
    config: Mapping[str, Any],
    names: Collection[str],
    origins: Sequence[Origin] = (),
    picture: bool = False,
) -> str:
    """Markdown with the Hub's metadata, what was done, how to load it, the recipe and what to cite.

    `config` is the base's, and `names` are the files to load: the output's own, or of an adapter's base. `origins`
    are those of the base and then every expert; with `picture` the card shows the one beside it.
    """
    load = load_adapter_code(config, names, _base(plan)) if plan.is_adapter else load_code(config, names)
    how = ["## Load", "", *fenced("python", "\n".join(load)), ""]
    if not plan.experts:
        return _conversion_card(plan, how)
    method = plan.recipe.method.model_dump(mode="json")
    recipe = {"method": method, **plan.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"method"})}
    lines = [
        "---",
        yaml.safe_dump(_metadata(plan, origins), sort_keys=False).strip(),
        "---",
        "",
        f"# {_title(plan)}",
        "",
        *_done(plan, records),
        "",
        *([f"![Share of the update's energy, by layer and expert]({PICTURE})", ""] if picture else []),
        *how,
        "## Recipe",
        "",
        *fenced("yaml", yaml.safe_dump(recipe, sort_keys=False).strip()),
        "",
        *_citations(records),
    ]
    return "\n".join(lines)


def _metadata(plan: Plan, origins: Sequence[Origin]) -> dict[str, Any]:
    """What the Hub reads: only what is known, and a licence only where all have it."""
    metadata: dict[str, Any] = {"tags": ["merge", "acemerge"], "base_model_relation": "merge"}
    repos = list(dict.fromkeys(origin.repo for origin in origins if origin.repo))
    if plan.is_adapter:
        metadata |= {"library_name": "peft", "base_model_relation": "adapter"}
        metadata |= {"base_model": origins[0].repo} if origins and origins[0].repo else {}
    elif repos:
        metadata["base_model"] = repos
    found = common_license(origins)
    return metadata | ({"license": found} if found else {})


def _done(plan: Plan, records: Mapping[str, TensorRecord]) -> list[str]:
    """What was done, and what lies beside the model."""
    counts = Counter(record.rule for record in records.values())
    done = ", ".join(f"{count} tensors by `{rule}`" for rule, count in counts.most_common())
    energies = dict(zip(plan.experts, total_energies(plan.experts, records), strict=True))
    total, largest = sum(energies.values()), max(energies, key=lambda label: energies[label])
    heads = [label for label, kept in zip(plan.experts, plan.heads, strict=True) if kept]
    masked = any(job.makes_masks for job in plan.jobs)
    several = len(plan.experts) > 1 and total > 0
    share = f"Of the updates' energy, {energies[largest] / total:.0%} are `{largest}`'s." if several else ""
    tasks = ", ".join(f"`{name}`" for names in plan.calibration.values() for name in names)
    data = f"with examples of {tasks}" if tasks else "without data"
    return [
        f"Made with acemerge, {data}, from the base {code(_base(plan))} and the experts "
        + ", ".join(f"`{label}`{_about(plan, label)}" for label in plan.experts)
        + ".",
        f"{done[0].upper()}{done[1:]}; `acemerge.json` says for each tensor which and why.",
        *([share] if share else []),
        *([f"It lacks {share_lost(records.values()):.2%} of the merged update's energy."] if plan.is_adapter else []),
        *(["Each expert's masks lie in `masks/`; `acemerge.expert_weights` gives it back."] if masked else []),
        *([f"Task heads of {', '.join(f'`{h}`' for h in heads)} lie unmerged in `heads/`."] if heads else []),
    ]


def _citations(records: Mapping[str, TensorRecord]) -> list[str]:
    """The sources of the rules that made a tensor."""
    used = sorted({record.rule for record in records.values()} & METHODS.keys())
    if not used:
        return []
    return ["## Cite", "", *(f"- `{rule}`: {_source(METHODS[rule].source)}" for rule in used), ""]


def _source(source: str) -> str:
    """With a link where it is on arXiv."""
    number = source.removeprefix("arXiv ")
    return source if number == source else f"[{source}](https://arxiv.org/abs/{number})"


def _title(plan: Plan) -> str:
    merged = f"erged from {len(plan.experts)} experts by {plan.recipe.method.name}"
    if not plan.is_adapter:
        return f"M{merged}"
    about = f"m{merged}" if len(plan.experts) > 1 else f"of {plan.experts[0]}"
    return f"LoRA adapter of rank {plan.recipe.as_lora}, {about}"


def _conversion_card(plan: Plan, how: Sequence[str]) -> str:
    source, values = code(_base(plan)), "The dequantised values of" if plan.dequantized else "The very values of"
    lines = [
        f"# {source} as safetensors",
        "",
        f"{values} {source}, written anew by acemerge; `acemerge.json` holds the hashes.",
        "",
        *how,
    ]
    return "\n".join(lines)


def _base(plan: Plan) -> str:
    """A Hub id as it is, the last part of a path."""
    return plan.recipe.base if parse_id(plan.recipe.base) else Path(plan.recipe.base).name


def _about(plan: Plan, label: str) -> str:
    return f" ({plan.adapters[label]})" if label in plan.adapters else ""
