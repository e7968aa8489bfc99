"""Suites of lm-evaluation-harness, generative ones too, by its own Python interface; code from elsewhere never runs.

The harness's own tasks are programs that come with it. A task in a file is data: what would be code in it is refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from acemerge.checkpoints.hub import in_words
from acemerge.errors import AcemergeError, CheckpointError, NumericalError, UsageError, nearest, shortage_of
from acemerge.evaluation.metrics import Array, bootstrap
from acemerge.evaluation.tables import Score
from acemerge.tasks.harness_file import is_task_file, read_task
from acemerge.tasks.networks import Model, load_whole
from acemerge.tasks.predict import ARE_WEIGHTS_FINITE
from acemerge.tasks.task_file import LmEval

_INSTALL = "pip install 'acemerge[lm]'"


def score_by_harness(model: Model, task: LmEval, resamples: int, seed: list[int]) -> Score:
    """A causal language model on one task of the harness; the draws are of its documents.

    UsageError for a task, a metric or a filter that is not there.
    """
    where = f"task {task.name}"
    harness = _library()
    with _silent(), _own_metrics_only(where):
        try:
            asked = _asked(harness, task, where)
            found = harness.simple_evaluate(
                model=_wrapped(harness, model, task),
                tasks=[asked],
                num_fewshot=task.few_shot,
                limit=task.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=task.chat_template,
                confirm_run_unsafe_code=False,
            )
        except AcemergeError:
            raise
        except Exception as failure:  # of whichever of its parts, data sets and downloads
            what = f"lm_eval fails on {task.task} ({in_words(failure)})"
            cure = "check the task's data and the model's context"
            if shortage_of(failure) is not None:
                cure = "use a smaller batch_size or max_length"
            raise UsageError(where, what, cure) from failure
    return _score(found, asked, task, resamples, seed)


def _library() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise UsageError("lm_eval", "is not installed", _INSTALL) from None
    return lm_eval


def _wrapped(harness: Any, model: Model, task: LmEval) -> Any:
    """The model as the harness takes it: made here, from safetensors, without the folder's own code."""
    tokenizer = model.tokenizer()
    if tokenizer.eos_token_id is None:
        what = "has no end-of-text token, which lm_eval needs"
        raise CheckpointError(model.name, what, "set `eos_token` in its tokenizer_config.json")
    network = model.on_device(load_whole("AutoModelForCausalLM", model))
    return harness.models.huggingface.HFLM(
        pretrained=network,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=task.batch_size,
        max_length=task.max_length,
        trust_remote_code=False,
    )


def _asked(harness: Any, task: LmEval, where: str) -> Any:
    """The harness's task object; UsageError where there is none of that name, or where it is a group of tasks."""
    manager = _manager(harness, own_tasks=not is_task_file(task.task))
    spec: Any = read_task(Path(task.task)) if is_task_file(task.task) else task.task
    if isinstance(spec, str) and spec not in manager.all_tasks:  # it would take it for a file, and run that
        cure = nearest(spec, list(manager.all_tasks), "name one that `lm-eval ls tasks` lists, or a YAML file")
        raise UsageError(where, f"lm_eval has no task {spec!r}", cure)
    built = list(manager.load([spec])["tasks"].values())
    if len(built) != 1:
        names = ", ".join(sorted(one.task_name for one in built)[:3])
        raise UsageError(
            where, f"{task.task!r} is {len(built)} tasks of lm_eval", f"list them one by one: {names}, ..."
        )
    return built[0]


@lru_cache
def _manager(harness: Any, own_tasks: bool) -> Any:
    """It reads thousands of files to know the harness's own tasks."""
    return harness.tasks.TaskManager(include_defaults=own_tasks)


def _score(found: Mapping[str, Any], asked: Any, task: LmEval, resamples: int, seed: list[int]) -> Score:
    """The score as the harness has it, and draws of the same statistic of the same documents."""
    where, name = f"task {task.name}", asked.task_name
    numbers = {
        key: float(value)
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    metric, kept = _chosen(list(numbers), task, where)
    key = f"{metric},{kept}"
    is_perplexity = metric.endswith("perplexity")
    if not is_perplexity and found["higher_is_better"][name].get(metric) is False:
        raise UsageError(where, f"of {metric} less is better, which no table here has", "name another `metric:`")
    values = [sample[metric] for sample in found["samples"][name] if sample["filter"] == kept]
    if not values or not np.isfinite(numbers[key]):
        raise NumericalError(where, f"lm_eval's {metric} is {numbers[key]}", ARE_WEIGHTS_FINITE)
    aggregate = asked.aggregation()[metric]

    def statistic(rows: Array) -> float:
        return float(aggregate([values[i] for i in rows]))

    draws = bootstrap(statistic, len(values), resamples, seed)
    about = {"examples": len(values), "metric": key, "few_shot": found["n-shot"][name], "limit": task.limit}
    return Score(task.name, numbers[key], numbers, draws, about, is_perplexity)


def _chosen(found: Sequence[str], task: LmEval, where: str) -> tuple[str, str]:
    """Metric and filter: the named ones, else the first that the harness gives."""
    pairs = [tuple(key.split(",", 1)) for key in found]
    for about, wanted, place in (("metric", task.metric, 0), ("filter", task.filter, 1)):
        names = list(dict.fromkeys(pair[place] for pair in pairs))
        if wanted is not None and wanted not in names:
            raise UsageError(where, f"lm_eval gives no {about} {wanted!r} for {task.task}", nearest(wanted, names))
        pairs = [pair for pair in pairs if wanted in (None, pair[place])]
    if not pairs:
        raise CheckpointError(where, "lm_eval gave no number", "name another task")
    return pairs[0][0], pairs[0][1]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's own bars and lines."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _own_metrics_only(where: str) -> Iterator[None]:
    """Metrics of the library `evaluate` are programs that it fetches from the Hub: a task that asks for one is refused.

    The harness takes a refusal for a metric that is not there, and goes on; so it is told again at the end.
    """
    try:
        import evaluate
    except ImportError:  # then it cannot be asked either
        yield
        return
    asked: list[str] = []

    def refuse(name: str, *_: object, **__: object) -> None:
        asked.append(name)
        raise RuntimeError(f"metric {name} is a program on the Hub")

    before, evaluate.load = evaluate.load, refuse
    try:
        yield
    except UsageError:
        if not asked:
            raise
    finally:
        evaluate.load = before
    if asked:
        what = f"its metric {asked[0]!r} is a program on the Hub, which is not run"
        raise UsageError(where, what, "name a task whose metrics are lm_eval's own")
