"""kron_auto with each expert's moments measured on its data in place of those that its update tells: how far the rule
is from what it estimates.

    .venv/bin/python benchmarks/text8/measured.py                       # text8's eight experts, trained if need be
    acemerge demo -o digits
    .venv/bin/python benchmarks/text8/measured.py --digits digits       # the demo's six

Measured are, on 512 training examples of each task, the second moments of every linear layer's inputs and of the
gradients by its outputs, the labels drawn from the expert itself: the two factors of K-FAC (Martens and Grosse 2015,
arXiv 1503.05671). They replace S_t and A_t in kron_auto's system, solved to a residual of 0.1 %, and the factor that
fits best is taken as it is, without the agreement. Scores are percent of the experts' accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experts import base_folder, expert, load_encoder, pooled, reader
from packages import default_cache
from safetensors.torch import load_file
from tasks import TASKS, Task, build, read
from torch import Tensor, nn

from acemerge import demo
from acemerge.linalg.two_sided import conjugate_gradients, dot
from acemerge.methods import make
from acemerge.methods.base import Layer
from acemerge.models.quiet import quiet_transformers

_EXAMPLES = 512
_HELD_OUT = 1000
_BATCH = 64
Weights = dict[str, Tensor]
Moments = dict[str, tuple[Tensor, Tensor]]  # layer -> of the gradients by its outputs, of its inputs


@dataclass(frozen=True)
class Asked:
    """A model with one expert's head. Its body's weights are set before use.

    `logits` are of training examples, in batches, with the rows of a layer that are no padding where some are.
    """

    name: str
    model: nn.Module
    expert: Weights
    logits: Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
    accuracy: Callable[[], float]


@quiet_transformers()
def main() -> None:
    parser = argparse.ArgumentParser(prog="measured", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--digits", type=Path, metavar="FOLDER", help="of `acemerge demo -o FOLDER`, in text8's place")
    parser.add_argument("--seed", type=int, default=0, help="of text8's experts")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, tasks = digits(arguments.digits) if arguments.digits else text8(arguments.cache, arguments.seed)
    best = [scored(task, task.expert) for task in tasks]
    print(f"| | {' | '.join(task.name for task in tasks)} | of experts |\n|---|{'--:|' * (len(tasks) + 1)}")

    def show_scaled(name: str, merged: Weights) -> None:
        for scale in (1.0, 1.2):
            weights = {
                name: W + (scale * merged[name] if name in merged else deltas(name, base, tasks).mean(0))
                for name, W in base.items()
            }
            shares = [scored(task, weights) / own for task, own in zip(tasks, best, strict=True)]
            cells = " | ".join(f"{100 * share:.1f}" for share in [*shares, sum(shares) / len(shares)])
            print(f"| {name}, scale={scale:g} | {cells} |", flush=True)

    layers = linear_layers(tasks[0].model, base)
    layer = Layer(torch.ones(len(tasks), dtype=torch.float64), (0,) * len(tasks))
    merged = {name: make("kron_auto", {}).merge(deltas(name, base, tasks), layer).delta for name in layers}
    show_scaled("kron_auto", merged)
    found = [measured(task, layers) for task in tasks]
    for lam in (1.0, 0.1, 0.01):
        merged = {name: solved(deltas(name, base, tasks), [one[name] for one in found], lam) for name in layers}
        show_scaled(f"measured, lam={lam:g}", merged)


def deltas(name: str, base: Weights, tasks: Sequence[Asked]) -> Tensor:
    return torch.stack([task.expert[name] - base[name] for task in tasks])


def scored(task: Asked, weights: Weights) -> float:
    task.model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return task.accuracy()


def linear_layers(model: nn.Module, base: Weights) -> list[str]:
    """Whose weight the rule merges: in the body, and used (the pooler is not)."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name in base and "pooler" not in name]


def measured(task: Asked, layers: Sequence[str]) -> Moments:
    """K-FAC's two factors of each layer at the expert, not normalised."""
    task.model.load_state_dict(task.expert, strict=False)
    inputs, gradients, hooks = dict[str, Tensor](), dict[str, Tensor](), list[Any]()
    for name in layers:
        module = task.model.get_submodule(name.removesuffix(".weight"))

        def keep_input(_: nn.Module, given: tuple[Tensor, ...], __: Tensor, name: str = name) -> None:
            inputs[name] = given[0].detach().flatten(0, -2)

        def keep_gradient(_: nn.Module, __: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            gradients[name] = given[0].flatten(0, -2)

        hooks += [module.register_forward_hook(keep_input), module.register_full_backward_hook(keep_gradient)]
    found: Moments = {}
    torch.manual_seed(0)
    for logits, mask in task.logits():
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name in layers:
            rows = slice(None) if mask is None else mask
            g, z = gradients[name][rows], inputs[name][rows]
            left, right = found.get(name, (0.0, 0.0))
            found[name] = (left + g.T @ g, right + z.T @ z)
    for hook in hooks:
        hook.remove()
    return found


def solved(D: Tensor, moments: Sequence[tuple[Tensor, Tensor]], lam: float) -> Tensor:
    """kron_auto's X times the factor that fits best, for these A_t and S_t over their mean eigenvalue."""
    T = len(D)
    sides = [tuple(M * (len(M) / M.trace()) for M in pair) for pair in moments]
    B = torch.stack([A @ update @ S for (A, S), update in zip(sides, D, strict=True)]).sum(0)

    def applied(X: Tensor) -> Tensor:
        return torch.stack([A @ X @ S for A, S in sides]).sum(0)

    L, R = (
        torch.linalg.inv(torch.stack(each).sum(0) / T**0.5 + 0.1 * T**0.5 * torch.eye(len(each[0])))
        for each in zip(*sides, strict=True)
    )
    X = conjugate_gradients(applied, lambda X: L @ X @ R, B, steps=300, tol=1e-3, ridge=lam).X
    return X * (dot(X, B) / dot(X, applied(X)))


def digits(folder: Path) -> tuple[Weights, list[Asked]]:
    data = demo.load_digits()

    def task(asked: demo.Task) -> Asked:
        expert = folder / "experts" / asked.name
        model = demo.with_head(expert, expert / "model.safetensors", asked)
        images = asked.see(data.part(held_out=False)[0][:_EXAMPLES])

        def logits() -> Iterator[tuple[Tensor, None]]:
            yield from ((model(batch[:, None]).logits, None) for batch in images.split(_BATCH))

        return Asked(asked.name, model, body(model), logits, lambda: demo.accuracy(model, asked, data))

    base = demo.with_head(folder / "base", folder / "base" / "model.safetensors", demo.DIGIT)
    return body(base), [task(asked) for asked in demo.TASKS]


def text8(cache: Path, seed: int) -> tuple[Weights, list[Asked]]:
    origin = base_folder(cache)
    encoder = load_encoder(origin)  # one for all tasks
    base = body(encoder)

    def asked(task: Task) -> Asked:
        data, encode = build(task, cache), reader(origin, task)
        labels = json.loads((data / "labels.json").read_text())
        weights = load_file(expert(task, cache, seed, quick=False) / "model.safetensors")
        head, bias = weights["classifier.weight"], weights["classifier.bias"]

        def batches(part: str, most: int) -> Iterator[tuple[list[dict[str, str]], dict[str, Tensor]]]:
            rows = sorted(read(data, part)[:most], key=lambda row: len(row["text"]))  # little padding
            for start in range(0, len(rows), _BATCH):
                yield rows[start : start + _BATCH], encode(rows[start : start + _BATCH])

        def logits() -> Iterator[tuple[Tensor, Tensor]]:
            for _, tokens in batches("train", _EXAMPLES):
                yield pooled(encoder, tokens) @ head.T + bias, tokens["attention_mask"].flatten().bool()

        def accuracy() -> float:
            right = list[bool]()
            for rows, tokens in batches("test", _HELD_OUT):
                guesses = (pooled(encoder, tokens) @ head.T + bias).argmax(1).tolist()
                right += [labels[guess] == row["label"] for guess, row in zip(guesses, rows, strict=True)]
            return sum(right) / len(right)

        return Asked(task.name, encoder, {name: weights[name] for name in base}, logits, accuracy)

    return base, [asked(task) for task in TASKS]


def body(model: nn.Module) -> Weights:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith("classifier.") and value.is_floating_point()
    }


if __name__ == "__main__":
    main()
