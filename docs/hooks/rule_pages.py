"""A page for every rule in `acemerge.METHODS`, from its docstring, its parameters and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from markdown_text import from_docstring, prose, row
from pydantic.fields import FieldInfo

from acemerge import METHODS, Method
from acemerge.methods import make
from acemerge.methods.about import docstring, first_sentence, parameters

INDEX = "rules/index.md"
_BOUNDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "{} at most"}


def rule_pages() -> dict[str, str]:
    """Path under docs/ -> Markdown, for every rule and the list of all."""
    return {INDEX: _index(METHODS)} | {f"rules/{name}.md": rule_page(rule) for name, rule in METHODS.items()}


def rule_page(rule: type[Method]) -> str:
    """What a rule says of itself, and how to ask for it."""
    ready = make(rule.name, {})
    params = {name: getattr(ready, name) for name, _, _ in parameters(rule)}
    own = {name: value for name, value in params.items() if name != "scale" and value is not None}
    experts = ["./math"] if ready.needs.most_experts == 1 else ["./math", "./code"]
    recipe = {"method": {"name": rule.name, **own}, "base": "./base", "experts": experts, "scale": ready.scale}
    settings = [f"--set {name}={_value(value)}" for name, value in own.items() if isinstance(value, int | float | str)]
    words = ["acemerge merge --base ./base", *(f"--expert {expert}" for expert in experts)]
    command = " ".join([*words, f"--method {rule.name}", *settings, "-o ./merged"])
    return "\n".join(
        [
            f"# {rule.name}",
            "",
            from_docstring(docstring(rule)),
            "",
            "## Parameters",
            "",
            "| parameter | default | values | meaning |",
            "|---|---|---|---|",
            *(row(f"`{name}`", f"`{_value(default)}`", _values(rule, name), prose(about))
              for name, default, about in parameters(rule)),
            "",
            "## What it asks",
            "",
            *(f"- {line}" for line in _needs(ready)),
            "",
            "## How to ask for it",
            "",
            "All parameters at their defaults, as a recipe:",
            "",
            "```yaml",
            yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100).strip(),
            "```",
            "",
            "and on the command line:",
            "",
            "```sh",
            command,
            "```",
            "",
        ]
    )  # fmt: skip


def _index(rules: Mapping[str, type[Method]]) -> str:
    rows = (
        row(f"[`{name}`]({name}.md)", prose(first_sentence(rule)), prose(rule.source)) for name, rule in rules.items()
    )
    return "\n".join(
        [
            "# The rules",
            "",
            "Every rule takes the task vectors of one tensor and gives the merged one. `acemerge methods` prints this",
            "list, `acemerge methods NAME` what the page of a rule says.",
            "",
            "| rule | what it does | source |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _needs(rule: Method) -> list[str]:
    """What the rule asks of its input and does with it, for people."""
    needs = rule.needs
    said = [
        (needs.matrix, "Weights of linear layers only; the [policy](../concepts/policies.md) averages other tensors."),
        (not needs.matrix, "Tensors of any shape."),
        (needs.base, "The base's weights, not only the task vectors."),
        (needs.keep is not None, "Thresholds over the whole model: the checkpoints are read twice before the merge."),
        (needs.most_experts is not None, f"At most {needs.most_experts} experts."),
        (needs.experts is not None, f"Exactly {needs.experts} experts."),
        (needs.weights == "not negative", "Weights of experts that are not negative."),
        (needs.weights == "not cancelling", "Weights of experts whose sum is not zero."),
        (needs.entrywise, "Nothing beside one entry at a time: large tensors are merged in pieces."),
        (needs.factors != "full", "Updates of low rank stay so: those of LoRA adapters are merged from their factors."),
        (
            needs.input_side,
            "Updates whose rows tell of their inputs: where adapters share A, the output side is taken.",
        ),
        (needs.masks, "Room for masks, one for each expert, which are written beside the model."),
        (needs.moves_equals, "Care: where no expert has an update, the result still is not the base's."),
    ]
    return [line for true, line in said if true]


def _value(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) or default is None else str(default)


def _values(rule: type[Method], name: str) -> str:
    """The values that a parameter may have, as far as its type says so."""
    hint = get_type_hints(rule, include_extras=True)[name]
    fields = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, FieldInfo)]
    bounds = [
        text.format(getattr(limit, sign))
        for field in fields
        for limit in field.metadata
        for sign, text in _BOUNDS.items()
        if getattr(limit, sign, None) is not None
    ]
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(kind) is Literal:
        return ", ".join(f"`{_value(choice)}`" for choice in get_args(kind))
    return ", ".join(bounds) or {bool: "`true`, `false`", float: "a number", int: "a whole number"}.get(kind, "")
