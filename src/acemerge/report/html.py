"""The report: one HTML page that needs nothing else."""

from __future__ import annotations

import re
from importlib.resources import files as resources
from typing import Any

from acemerge.errors import UsageError
from acemerge.report.facts import Facts

# What would end a script element, or change how a browser reads it.
_ENDS_SCRIPT = re.compile(r"<(?=/script|script|!--)", re.IGNORECASE)


def check_libraries() -> None:
    """UsageError that names the extra when it is not installed."""
    _libraries()


def html_page(facts: Facts) -> str:
    """The page. What comes from files is escaped as text, or as JSON that cannot end its element.

    Raises UsageError without the extra `report`.
    """
    jinja2, vl_convert = _libraries()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    page = resources("acemerge.report") / "page"
    template = environment.from_string((page / "page.html.j2").read_text("utf-8"))
    text: str = template.render(
        facts=facts,
        manifest=facts.manifest,
        style=jinja2.utils.markupsafe.Markup((page / "page.css").read_text("utf-8")),
        script=jinja2.utils.markupsafe.Markup((page / "page.js").read_text("utf-8")),
        library=jinja2.utils.markupsafe.Markup(_ENDS_SCRIPT.sub(r"\\x3c", vl_convert.javascript_bundle())),
    )
    return text


def _libraries() -> tuple[Any, Any]:
    try:
        import jinja2
        import vl_convert
    except ModuleNotFoundError as missing:
        what = f"the report needs {missing.name}, which is not installed"
        raise UsageError("report", what, "pip install 'acemerge[report]'") from None
    return jinja2, vl_convert


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)
