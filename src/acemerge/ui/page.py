"""The page itself: Gradio's components, and which button does what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from acemerge.cli.text import size
from acemerge.errors import AcemergeError
from acemerge.methods import METHODS
from acemerge.methods.about import Parameter, parameters, summary
from acemerge.methods.registry import rule_name
from acemerge.ui import steps, view
from acemerge.ui.choice import Choice, rules
from acemerge.ui.folders import Folders
from acemerge.ui.runner import Runner, State, line

_WORKING, _RESTING = 0.5, 2.0  # seconds between looks at how things stand, while something runs and else
_BASE = "the model that all experts were fine-tuned from"
_EXPERTS = "the fine-tuned models, or LoRA adapters"
_WEIGHTS = "one for each expert, in their order; where it is empty all have 1"


def build(folders: Folders, runner: Runner) -> gr.Blocks:
    """The page over these folders, showing the work of this runner."""
    with gr.Blocks(title="acemerge", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Merge models</h1>{view.roots(folders.roots)}")
        models, rule, output = _Models(), _Rule(), _Output(f"{folders.name(folders.roots[0])}/merged")
        with _step("4. Recipe", "<p>The same on the command line: <code>acemerge merge recipe.yaml -o OUT</code>"):
            recipe = gr.Code(language="yaml", show_label=False, interactive=False, elem_id="recipe")
        timer = gr.Timer(_WORKING)
        _connect(page, models, rule, output, recipe, timer, _Work(folders, runner, rule.slots))
    return page


def _step(heading: str, below: str = "") -> gr.Column:
    """A part of the page; to be entered, and filled."""
    column = gr.Column(elem_classes="step")
    with column:
        gr.HTML(f"<h2>{heading}</h2>{below}")
    return column


class _Models:
    """What is merged, and how it is looked at."""

    def __init__(self) -> None:
        with _step("1. Models"):
            with gr.Row():
                self.base = gr.Dropdown([], value=None, label="Base", info=_BASE, elem_id="base")
                self.experts = gr.Dropdown(
                    [], value=[], label="Experts", info=_EXPERTS, multiselect=True, elem_id="experts"
                )
            self.weights = gr.Textbox(label="Weights", info=_WEIGHTS, placeholder="1, 0.5, 1", elem_id="weights")
            with gr.Row(elem_classes="buttons"):
                self.look = gr.Button("Inspect", interactive=False, elem_id="look")
                self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-look")
                self.again = gr.Button("Look for models again")
            self.found, self.inspected = gr.HTML(elem_id="found"), gr.HTML(elem_id="inspected")


class _Rule:
    """By which rule, with which parameters, and what that would take."""

    def __init__(self) -> None:
        first = rule_name("auto")
        with _step("2. Rule"):
            offered = [(shown, name) for name, shown in rules().items()]
            self.rule = gr.Dropdown(offered, value=first, label="Rule", elem_id="rule")
            self.about = gr.HTML(_about(first))
            self.slots = _Slots(first)
            with gr.Row(elem_classes="buttons"):
                self.plan = gr.Button("Plan", interactive=False, elem_id="plan")
            self.planned = gr.HTML(elem_id="planned")


class _Output:
    """Where to, and what came out."""

    def __init__(self, out: str) -> None:
        with _step("3. Merge"):
            self.out = gr.Textbox(out, label="Output folder", elem_id="out")
            self.overwrite = gr.Checkbox(label=view.REPLACE, elem_id="overwrite")
            self.force = gr.Checkbox(label=view.FORCE)
            with gr.Row(elem_classes="buttons"):
                self.merge = gr.Button("Merge", variant="primary", interactive=False, elem_id="merge")
                self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-merge")
            self.merged = gr.HTML(elem_id="merged")


def _connect(
    page: gr.Blocks, models: _Models, rule: _Rule, output: _Output, recipe: gr.Code, timer: gr.Timer, work: _Work
) -> None:
    """Which button, field or tick does what."""
    slots = rule.slots.inputs
    entered = [output.out, output.overwrite, output.force, models.base, models.experts, models.weights]
    entered += [rule.rule, *slots]
    shown = [recipe, models.inspected, rule.planned, output.merged, models.look, rule.plan, output.merge]
    shown += [models.stop, output.stop, timer]
    # Each is one request and its answer, not the queue: Gradio ends a page's stream of events when the last one is
    # answered, what is asked for in this moment is never answered, and its button is dead until the page is loaded
    # anew. An answer may overtake another: the next tick puts that right.
    alone: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gr.on([page.load, models.again.click], work.models, None, [models.base, models.experts, models.found], **alone)
    rule.rule.change(lambda name: [_about(name), *rule.slots.of(name)], rule.rule, [rule.about, *slots], **alone)
    changes = [component.change for component in entered]
    gr.on([page.load, timer.tick, *changes], work.show, entered, shown, trigger_mode="always_last", **alone)
    gr.on([models.stop.click, output.stop.click], work.stop, entered, shown, **alone)
    models.look.click(work.inspect, entered, shown, **alone)
    rule.plan.click(work.plan, entered, shown, **alone)
    output.merge.click(work.merge, entered, shown, **alone)


_AREAS = ("inspect", "plan", "merge")


class _Work:
    """What happens on the page. Each takes all that was entered, and gives what is to be shown then."""

    def __init__(self, folders: Folders, runner: Runner, slots: _Slots) -> None:
        self._folders, self._runner, self._slots = folders, runner, slots

    def models(self) -> list[Any]:
        """The two menus, and what was found."""
        listing = self._folders.find()
        names = [(f"{f.name} ({', '.join(filter(None, (f.kind, size(f.nbytes))))})", f.name) for f in listing.found]
        return [gr.Dropdown(choices=names), gr.Dropdown(choices=names), view.listing(listing)]

    def inspect(self, *entered: Any) -> list[Any]:
        return self._start("inspect", lambda: steps.inspect(self._choice(entered), self._folders), entered)

    def plan(self, *entered: Any) -> list[Any]:
        return self._start("plan", lambda: steps.plan(self._choice(entered), self._folders), entered)

    def merge(self, *entered: Any) -> list[Any]:
        out, overwrite, force = entered[:3]
        choice = self._choice(entered)
        return self._start("merge", lambda: steps.merge(choice, self._folders, out, overwrite, force), entered)

    def stop(self, *entered: Any) -> list[Any]:
        self._runner.stop()
        return self.show(*entered)

    def show(self, *entered: Any) -> list[Any]:
        """The recipe, areas, buttons and timer as they are at this moment."""
        state = self._runner.state
        busy = state is not None and state.is_busy
        running = state.what if state is not None and state.phase == "running" else ""
        ready = bool(entered[3] and entered[4]) and not busy  # a base and an expert are picked
        areas = [gr.skip() if last is None else _drawn(last, entered) for last in map(self._runner.last, _AREAS)]
        buttons = [gr.Button(interactive=ready) for _ in _AREAS]
        stops = [gr.Button(visible=running == what) for what in ("inspect", "merge")]
        return [self.recipe(*entered), *areas, *buttons, *stops, gr.Timer(_WORKING if busy else _RESTING)]

    def recipe(self, *entered: Any) -> str:
        try:
            return self._choice(entered).yaml(self._folders)
        except AcemergeError as error:
            return f"# {view.plain(str(error))}\n"

    def _choice(self, entered: Sequence[Any]) -> Choice:
        base, experts, weights, rule, *values = entered[3:]
        return Choice(base, experts or [], rule, weights or "", self._slots.values(rule, values))

    def _start(self, what: str, work: Callable[[], Callable[..., Any]], entered: Sequence[Any]) -> list[Any]:
        concerns = _concerns(what, entered)
        try:
            try:
                self._runner.start(what, work(), concerns)
            except Exception as error:
                self._runner.refuse(what, error, concerns)
        except AcemergeError as busy:  # as from another window
            shown = self.show(*entered)
            shown[1 + _AREAS.index(what)] = view.failure(line(busy))
            return shown
        return self.show(*entered)


def _drawn(state: State, entered: Sequence[Any]) -> str:
    """Nothing of an error whose cause was mended: it stays while what caused it does."""
    is_mended = state.phase == "failed" and state.of != _concerns(state.what, entered)
    return "" if is_mended else view.state(state)


def _concerns(what: str, entered: Sequence[Any]) -> list[Any]:
    """What of all that was entered this work depends on: the output's three fields are the merge's."""
    return list(entered if what == "merge" else entered[3:])


def _about(rule: str) -> str:
    return view.about(summary(METHODS[rule]), METHODS[rule].source)


class _Slots:
    """As many text fields and as many menus as any rule has parameters; those that a rule has no use for are hidden."""

    def __init__(self, first: str) -> None:
        of_all = [parameters(METHODS[name]) for name in rules()]
        texts = max(len(_free(found)) for found in of_all)
        menus = max(len(found) - len(_free(found)) for found in of_all)
        with gr.Row(elem_classes="parameters"):
            shown = enumerate([*_texts(first, texts), *_menus(first, menus)], 1)
            fields = [(gr.Textbox if i <= texts else gr.Dropdown)(**s, elem_id=f"parameter-{i}") for i, s in shown]
        self._texts, self._menus = fields[:texts], fields[texts:]

    @property
    def inputs(self) -> list[Any]:
        return [*self._texts, *self._menus]

    def of(self, rule: str) -> list[Any]:
        """Every slot as it is for this rule."""
        texts = [gr.Textbox(**shown) for shown in _texts(rule, len(self._texts))]
        return [*texts, *(gr.Dropdown(**shown) for shown in _menus(rule, len(self._menus)))]

    def values(self, rule: str, entered: Sequence[Any]) -> dict[str, Any]:
        """The rule's parameters with what was entered for them."""
        found = parameters(METHODS[rule])
        free, chosen = _free(found), [p for p in found if p.choices]
        pairs = [*zip(free, entered, strict=False), *zip(chosen, entered[len(self._texts) :], strict=False)]
        return {parameter.name: value for parameter, value in pairs}


def _free(found: Sequence[Parameter]) -> list[Parameter]:
    return [parameter for parameter in found if not parameter.choices]


def _texts(rule: str, slots: int) -> list[dict[str, Any]]:
    found = _free(parameters(METHODS[rule]))
    shown: list[dict[str, Any]] = [
        {
            "label": p.name,
            "info": p.meaning,
            "placeholder": "" if p.default is None else str(p.default),
            "value": "",
            "visible": True,
        }
        for p in found
    ]
    return shown + [{"value": "", "visible": False}] * (slots - len(found))


def _menus(rule: str, slots: int) -> list[dict[str, Any]]:
    found = [p for p in parameters(METHODS[rule]) if p.choices]
    shown: list[dict[str, Any]] = [
        {"label": p.name, "info": p.meaning, "choices": list(p.choices), "value": p.default, "visible": True}
        for p in found
    ]
    return shown + [{"value": None, "choices": [], "visible": False}] * (slots - len(found))
