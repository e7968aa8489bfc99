"""The suites by name. Which are for choosing a rule and which only confirm the choice was fixed before any was run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import convolutional
import known
import language
import scripts
from suite import Prepared, Suite


def _scripts(name: str, purpose: str, about: str, kind: scripts.Kind) -> Suite:
    return Suite(name, purpose, about, partial(_prepare_scripts, kind=kind))  # type: ignore[arg-type]


def _prepare_scripts(cache: Path, kind: scripts.Kind) -> Prepared:
    return scripts.prepare(cache, kind)


def _language(name: str, purpose: str, about: str, kind: language.Kind) -> Suite:
    return Suite(name, purpose, about, partial(language.prepare, kind=kind))  # type: ignore[arg-type]


_ALL = tuple(scripts.SCRIPTS)
SUITES = (
    Suite("digits", "choosing", "the demo's six vision experts", known.digits),
    Suite("text8", "choosing", "four tasks of text on MiniLM, short training", known.text8),
    _scripts("scripts", "choosing", "eight scripts, all weights, AdamW", scripts.Kind()),
    _scripts(
        "scripts-bad", "choosing", "four, one of which learned labels by chance", scripts.Kind(_ALL[:4], bad="greek")
    ),
    _language("language", "choosing", "six kinds of text, all weights, AdamW", language.Kind()),
    _language("language-lora", "choosing", "six kinds of text, LoRA of rank 8 from one seed", language.Kind(rank=8)),
    Suite("text8-lora", "confirming", "four tasks of text, LoRA of rank 16", partial(known.text8, rank=16)),
    _scripts("scripts-2", "confirming", "two scripts", scripts.Kind(_ALL[4:6])),
    _scripts("scripts-4", "confirming", "four scripts", scripts.Kind(_ALL[4:])),
    _scripts("scripts-sgd", "confirming", "six scripts, SGD", scripts.Kind(_ALL[:6], optimiser="sgd", rate=0.02)),
    _scripts("scripts-muon", "confirming", "six scripts, Muon", scripts.Kind(_ALL[:6], optimiser="muon", rate=5e-3)),
    _scripts("scripts-shared", "confirming", "five that share a component", scripts.Kind(_ALL[3:], shared=300)),
    _language(
        "language-lora-4",
        "confirming",
        "four kinds of text, LoRA of rank 4, a seed for each",
        language.Kind(language.DOMAINS[2:], rank=4, apart=True),
    ),
    _language(
        "language-3",
        "confirming",
        "three kinds of text, SGD",
        language.Kind(language.DOMAINS[:3], optimiser="sgd", rate=0.1),
    ),
    Suite(
        "convolutional",
        "confirming",
        "six scripts on EfficientNet-Lite0 with ImageNet's weights",
        partial(convolutional.prepare, kind=convolutional.Kind()),
    ),
)
