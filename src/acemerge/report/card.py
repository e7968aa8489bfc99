"""The model card `README.md` of an output folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from acemerge.checkpoints.hub import parse_id
from acemerge.jobs import Plan

_LOAD = (
    "## Load",
    "",
    "```python",
    "from transformers import AutoModel",
    "",
    'model = AutoModel.from_pretrained("path/to/this/folder")',
    "```",
    "",
)


def model_card(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown with the Hub's metadata, the recipe, what was done and how to load it."""
    if not plan.experts:
        return _conversion_card(plan)
    method = plan.recipe.method.model_dump(mode="json")
    recipe = {"method": method, **plan.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"method"})}
    metadata = {"tags": ["merge", "acemerge"], "base_model_relation": "merge"}
    counts = Counter(record["rule"] for record in records.values())
    done = ", ".join(f"{count} tensors by `{rule}`" for rule, count in counts.most_common())
    heads = [label for label, kept in zip(plan.experts, plan.heads, strict=True) if kept]
    masked = any(job.method and job.method.needs.masks for job in plan.jobs)
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# Merged from {len(plan.experts)} experts by {plan.recipe.method.name}",
        "",
        f"Made with acemerge from the base `{_base(plan)}` and the experts "
        + ", ".join(f"`{label}`{_about(plan, label)}" for label in plan.experts)
        + ".",
        f"{done[0].upper()}{done[1:]}; `acemerge.json` says for each tensor which and why.",
        *(["Each expert's masks lie in `masks/`; `acemerge.expert_weights` gives it back."] if masked else []),
        *([f"Task heads of {', '.join(f'`{h}`' for h in heads)} lie unmerged in `heads/`."] if heads else []),
        "",
        *_LOAD,
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _conversion_card(plan: Plan) -> str:
    source, values = _base(plan), "The dequantised values of" if plan.dequantized else "The very values of"
    lines = [
        f"# {source} as safetensors",
        "",
        f"{values} `{source}`, written anew by acemerge; `acemerge.json` holds the hashes.",
        "",
        *_LOAD,
    ]
    return "\n".join(lines)


def _base(plan: Plan) -> str:
    """A Hub id as it is, the last part of a path."""
    return plan.recipe.base if parse_id(plan.recipe.base) else Path(plan.recipe.base).name


def _about(plan: Plan, label: str) -> str:
    return f" ({plan.adapters[label]})" if label in plan.adapters else ""
