"""Names that a wrapper put a prefix before, as `module.` of data-parallel training, or a part within."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from acemerge.checkpoints.folder import Checkpoint

# What trainers wrap a model in. Beside it they may have parts of their own, as a head for values.
_TRAINERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_forward_module.",
    "pretrained_model.",
)
# Names that models have, too: these are a wrapper's only where all names have them.
_MODELS = ("base_model.", "model.")
# Of single layers that were compiled, sharded or are computed again.
_WITHIN = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Unwrapped:
    """The names that differ without their wrapper, and what that was: a prefix of them, parts within them."""

    names: Mapping[str, str]
    prefix: str = ""
    within: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """What was done, behind `expert NAME: `; empty where nothing was."""
        if self.prefix:
            return f"read without the prefix {self.prefix!r} of its names"
        return f"read without {' and '.join(map(repr, self.within))} within its names" if self.within else ""


def unwrapped(names: Collection[str], base_names: Collection[str]) -> Unwrapped:
    """A model's names as the base has them.

    Wrappers may lie within each other, as `module._orig_mod.`. A prefix goes only where the base then knows more of the
    names; what is wrapped within is found whichever of the two has it.
    """
    in_base = {_WITHIN.sub("", name): name for name in base_names}
    prefix, best, known = "", "", _known(names, "", in_base)
    while more := _next_wrapper(names, prefix):
        prefix += more
        found = _known(names, prefix, in_base)
        if found > known:
            best, known = prefix, found
    renamed = {name: _in_base(name.removeprefix(best), in_base, base_names) for name in names}
    changed = {name: new for name, new in renamed.items() if new != name}
    if len(set(renamed.values())) < len(renamed) or not changed:
        return Unwrapped({})
    return Unwrapped(changed, best, tuple(sorted({part for name in changed for part in _WITHIN.findall(name)})))


def _in_base(name: str, in_base: Mapping[str, str], base_names: Collection[str]) -> str:
    plain = _WITHIN.sub("", name)
    return name if name in base_names else in_base.get(plain, plain)


def _next_wrapper(names: Collection[str], prefix: str) -> str:
    """What stands behind a prefix in the names that have it: in all of them, or of a trainer's wrapper in most."""
    rest = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    counts = {wrapper: sum(name.startswith(wrapper) for name in rest) for wrapper in (*_TRAINERS, *_MODELS)}
    found = (w for w, count in counts.items() if count == len(rest) or (w in _TRAINERS and 2 * count > len(rest)))
    return next(found, "") if rest else ""


def _known(names: Collection[str], prefix: str, in_base: Mapping[str, str]) -> int:
    return sum(_WITHIN.sub("", name[len(prefix) :]) in in_base for name in names if name.startswith(prefix))


def without_wrapper(expert: Checkpoint, base_names: Collection[str]) -> tuple[Checkpoint, str]:
    """The expert under names that the base knows, and what is to be said of it.

    An adapter's names were taken out of its wrapper already.
    """
    found = unwrapped(expert.tensors.keys(), base_names) if expert.adapter is None else Unwrapped({})
    if not found.names:
        return expert, ""
    new = {name: found.names.get(name, name) for name in (*expert.tensors, *expert.places, *expert.scales)}
    tensors = {new[name]: replace(spec, name=new[name]) for name, spec in expert.tensors.items()}
    places = {new[name]: info for name, info in expert.places.items()}
    scales = {new[name]: scale for name, scale in expert.scales.items()}
    return replace(expert, tensors=tensors, places=places, scales=scales), found.about
