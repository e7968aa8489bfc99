"""A page for every rule in `acemerge.METHODS`, from its docstring, its parameters and what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import yaml
from markdown_text import from_docstring, prose, row

from acemerge import METHODS, Method
from acemerge.methods import make, rule_name
from acemerge.methods.about import Parameter, families, parameters, summary

INDEX = "rules/index.md"

_LIST = """# The rules

Every rule takes the task vectors of one tensor and gives the merged one. `acemerge methods` prints this list,
`acemerge methods NAME` what the page of a rule says. The one recommended is [`{auto}`]({auto}.md): `auto` stands for
it, and is the default.

`scale` is a parameter of all of them: a factor on the merged update. The chance in `dare_linear`, `dare_ties` and
`della` comes from `--seed`, the tensor's name and the expert's place alone: the same bytes, whatever the workers.
A rule of your own is [one class and one line](../add_a_method.md).

"""

_PAGE = """# {name}

{description}

## Parameters

| parameter | default | values | meaning |
|---|---|---|---|
{parameters}

## What it asks

{needs}

## How to ask for it

All parameters at their defaults, as a recipe:

```yaml
{recipe}```

and on the command line:

```sh
acemerge merge --base ./base --expert ./math --expert ./code \\
    {method} \\
    -o ./merged
```
"""

_BOUNDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "{} at most"}


def rule_pages() -> dict[str, str]:
    """Path under docs/ -> Markdown, for every rule and the list of all."""
    return {INDEX: _index(METHODS)} | {f"rules/{name}.md": rule_page(rule) for name, rule in METHODS.items()}


def rule_page(rule: type[Method]) -> str:
    """What a rule says of itself, and how to ask for it."""
    ready = make(rule.name, {})
    params = {p.name: getattr(ready, p.name) for p in parameters(rule)}
    own = {name: value for name, value in params.items() if name != "scale" and value is not None}
    data = {"calibration": "./tasks.yaml"} if ready.needs.calibration else {}
    recipe = {"method": {"name": rule.name, **own}, "base": "./base", "experts": ["./math", "./code"], **data}
    settings = [f"--set {name}={_value(value)}" for name, value in own.items() if isinstance(value, int | float | str)]
    return _PAGE.format(
        name=rule.name,
        description=from_docstring(inspect.getdoc(rule) or ""),
        parameters="\n".join(_parameter(rule, p) for p in parameters(rule)),
        needs="\n".join(f"- {line}" for line in _needs(ready)),
        recipe=yaml.safe_dump(recipe | {"scale": ready.scale}, sort_keys=False, default_flow_style=None, width=100),
        method=" ".join([f"--method {rule.name}", *settings, *(f"--{key} {value}" for key, value in data.items())]),
    )


def _index(rules: Mapping[str, type[Method]]) -> str:
    parts = []
    for family, found in families(rules).items():
        rows = (row(f"[`{r.name}`]({r.name}.md)", prose(summary(r)), prose(r.source)) for r in found)
        parts.append("\n".join([f"## {family}", "", "| rule | what it does | source |", "|---|---|---|", *rows, ""]))
    return _LIST.format(auto=rule_name("auto")) + "\n".join(parts)


def _parameter(rule: type[Method], parameter: Parameter) -> str:
    default = f"`{_value(parameter.default)}`"
    return row(f"`{parameter.name}`", default, _values(rule, parameter), prose(parameter.meaning))


def _needs(rule: Method) -> list[str]:
    """What the rule asks of its input and does with it, for people."""
    needs = rule.needs
    said = [
        (needs.matrix, "Weights of linear layers only; the [policy](../concepts/policies.md) averages other tensors."),
        (not needs.matrix, "Tensors of any shape."),
        (needs.base, "The base's weights, not only the task vectors."),
        (needs.base_energy, "How large the base's weights are, where a base is given."),
        (needs.calibration is not None, "[Examples](../calibration.md) of what each expert was trained for."),
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


def _values(rule: type[Method], parameter: Parameter) -> str:
    """The values that a parameter may have, as far as its type says so."""
    if parameter.choices:
        return ", ".join(f"`{_value(choice)}`" for choice in parameter.choices)
    hint = get_type_hints(rule, include_extras=True)[parameter.name]
    bounds = [
        text.format(getattr(limit, sign))
        for field in getattr(hint, "__metadata__", ())
        for limit in getattr(field, "metadata", ())
        for sign, text in _BOUNDS.items()
        if getattr(limit, sign, None) is not None
    ]
    kind = get_type_hints(rule)[parameter.name]
    return ", ".join(bounds) or {float: "a number", int: "a whole number"}.get(kind, "")
