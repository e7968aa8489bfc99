"""Report pages as a reader's program sees them, and what they are made of without any files."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch

from acemerge.evaluation.tables import EXPERTS, Evaluation, Row, Score
from acemerge.inspection.look_back import BEFORE, LookBack, Probe
from acemerge.inspection.statistics import Sums


class Page(HTMLParser):
    """The elements of a page and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._inside = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside = dict(attributes).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag in ("script", "style") else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif not self._inside:
            self.text += data


def many(tensors: int, experts: int) -> tuple[dict[str, Any], LookBack]:
    """A manifest and a look back on many tensors, without any files."""
    generator = torch.Generator().manual_seed(0)
    labels = [f"expert-{t}" for t in range(experts)]
    records, probes = {}, {}
    for i in range(tensors):
        part = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")[i % 4]
        name = f"model.layers.{i // 4}.{part}.weight"
        energies = (torch.rand(experts, generator=generator) + 0.1).double()
        records[name] = {
            "role": "linear", "rule": "ace", "reason": "weight of a linear layer", "status": "ok",
            "energies": energies.tolist(), "gamma": 0.1 * (i % 7), "condition": 10.0 + i, "seconds": 0.001 * i,
            "branch": "heterogeneous" if i % 7 > 3 else "homogeneous",
        }  # fmt: skip
        products = energies.diag() + 0.05
        values = torch.rand(64, generator=generator).double().sort(descending=True).values
        curves = dict.fromkeys([*labels, "merged", BEFORE], values)
        probes[name] = Probe(
            Sums(products, 1.0, 2.0, 1.0 + i / (2 * tensors), 4096), torch.ones(experts + 1).double(), curves, (64, 64)
        )
    manifest = {
        "created": "2026-01-01", "versions": {"acemerge": "0"}, "seconds": 1.0, "experts": labels, "tensors": records,
        "outputs": {}, "inputs": [], "recipe": {"method": {"name": "ace"}}, "warnings": [], "heads": {},
    }  # fmt: skip
    return manifest, LookBack(tuple(labels), probes)


def evaluation(models: Sequence[str], tasks: Sequence[str] = ("digits", "parity", "text8")) -> Evaluation:
    """A score for each model and task, the last task a perplexity; the experts have no part in that."""
    generator = np.random.default_rng(0)

    def score(task: str, at: float) -> Score:
        is_perplexity = task == tasks[-1]
        value, spread = (20 * at, 0.5) if is_perplexity else (at, 0.02)
        metrics = {"perplexity" if is_perplexity else "accuracy": value}
        draws = value + spread * generator.standard_normal(200)
        return Score(task, value, metrics, draws, {"seconds": 0.1}, is_perplexity)

    own = Row(EXPERTS, (*(score(task, 0.95) for task in tasks[:-1]), None))
    rows = [Row(name, tuple(score(task, 0.6 + 0.07 * i) for task in tasks)) for i, name in enumerate(models)]
    return Evaluation(tuple(tasks), (own, *rows))


def content(models: dict[str, str], **more: Any) -> dict[str, Any]:
    """What `evaluation.json` holds."""
    return evaluation(list(models), **more).as_table() | {"models": models}
