"""The report page in a real browser, where there is one: Debian's `chromium` and `chromium-driver`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, hold_like_a_phone, needs_browser, prefer, wait
from hostile import TENSOR as HOSTILE
from report_pages import content, many

from acemerge.report.facts import page_facts
from acemerge.report.html import html_page
from acemerge.report.scores import scores_of

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A window on the page of a thousand tensors, one of them with a hostile name."""
    folder = tmp_path_factory.mktemp("browser")
    manifest, seen = many(1000, 4)
    first = next(iter(seen.tensors))
    manifest["tensors"][HOSTILE] = manifest["tensors"].pop(first)
    seen.tensors[HOSTILE] = seen.tensors.pop(first)
    page = folder / "report.html"
    scores = scores_of(content({"base": "b", "ace": str(folder)}), folder / "evaluation.json", folder)
    page.write_text(html_page(page_facts(manifest, seen, "", scores)))
    with chromium(folder / "profile") as driver:
        open_page(driver, page)
        yield driver


def open_page(driver: Any, page: Path) -> None:
    driver.get(page.as_uri())
    wait(driver, "document.documentElement.dataset.drawn === 'yes'")


def texts(driver: Any, selector: str) -> list[str]:
    """Of the elements that are not hidden."""
    shown = f"[...document.querySelectorAll({selector!r})].filter(e => !e.closest('[hidden]'))"
    return list(driver.execute_script(f"return {shown}.map(e => e.textContent)"))


def use(driver: Any, name: str, value: str, event: str) -> None:
    """Set a control as its user does."""
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event(arguments[2]))",
        name,
        value,
        event,
    )


def test_it_draws_everything_without_a_complaint_or_a_request(browser: Any) -> None:
    charts = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(c => c.id + ' ' + !!c.querySelector('svg'))"
    )
    names = ("scores", "cosines", "shares", "heat", "spectrum", "time")
    assert charts == [f"chart-{name} true" for name in names]
    assert browser.execute_script("return document.querySelectorAll('#chart-scores svg').length") == 3  # one a task
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.title == "Merge report: 4 experts by ace"  # what a name would have changed
    assert HOSTILE in texts(browser, "#table tbody th")


def test_a_layer_that_is_picked_shows_its_spectrum(browser: Any) -> None:
    before = browser.execute_script("return document.getElementById('chart-spectrum').innerHTML")
    name = "model.layers.17.mlp.up_proj.weight"
    use(browser, "layer", name, "change")
    wait(browser, f"document.getElementById('spectrum-text').textContent.startsWith({name!r})")
    assert len(texts(browser, "#chart-spectrum .mark-line path")) == 6  # four experts, merged, before refinement
    assert browser.execute_script("return document.getElementById('chart-spectrum').innerHTML") != before


@pytest.mark.parametrize("figure", ["gamma", "branch", "condition", "cancelled", "energy"])
def test_the_heat_map_has_every_tensor_in_every_colouring(browser: Any, figure: str) -> None:
    browser.execute_script("document.getElementById('chart-heat').replaceChildren()")
    use(browser, "heat", figure, "change")
    wait(browser, "document.querySelectorAll('#chart-heat .role-mark path').length === 1000")
    assert browser.get_log("browser") == []


def test_the_table_filters_and_sorts(browser: Any) -> None:
    use(browser, "filter", "layers.24. MLP", "input")
    assert texts(browser, "#count") == ["2 of 1000 tensors"]
    assert texts(browser, "#table tbody tr:not([hidden]) th") == [
        f"model.layers.24.mlp.{x}_proj.weight" for x in ("up", "down")
    ]
    use(browser, "filter", "", "input")
    header = "#table thead th:nth-child(8)"
    for direction, first in (("ascending", "10"), ("descending", "1.01e+03")):
        browser.execute_script(f"document.querySelector({header!r} + ' button').click()")
        assert browser.execute_script(f"return document.querySelector({header!r}).ariaSort") == direction
        column = texts(browser, "#table tbody td:nth-child(8)")
        assert column[0] == first
        assert [float(x) for x in column] == sorted(map(float, column), reverse=direction == "descending")


def test_it_is_dark_where_the_reader_is_and_fits_a_phone(browser: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        seen[scheme] = browser.execute_script(ground)
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
    hold_like_a_phone(browser)
    for chart in ("scores", "cosines", "shares", "heat", "spectrum", "time"):
        wait(browser, f"document.querySelector('#chart-{chart} svg').getBoundingClientRect().width <= 360")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert browser.get_log("browser") == []
