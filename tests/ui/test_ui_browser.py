"""`acemerge ui` in a real browser, from the first look to the report, and what it asks of the network."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from browser import chromium, hold_like_a_phone, needs_browser, prefer, wait
from builders import PlainModel, load_folder, write_checkpoint
from hostile import MARKUP as HOSTILE

from acemerge.engine.execute import OnProgress, Progress
from acemerge.errors import UsageError
from acemerge.methods import METHODS
from acemerge.methods.about import summary
from acemerge.ui import steps
from acemerge.ui.folders import Folders
from acemerge.ui.server import Server
from acemerge.ui.view import REPLACE

pytestmark = [
    needs_browser,
    pytest.mark.filterwarnings("ignore"),
    # Looked up, not imported: every process of the tests collects this file, and one runs it.
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio"),
]


@dataclass
class Desk:
    """The page in a browser, and every address that this process has asked for since before Gradio was imported."""

    driver: Any
    server: Server
    folder: Path
    asked: list[str]

    def html(self, area: str) -> str:
        return str(self.driver.execute_script(f"return document.getElementById({area!r}).innerHTML"))

    def text(self, area: str) -> str:
        return str(self.driver.execute_script(f"return document.getElementById({area!r}).innerText"))

    def failures(self, area: str) -> list[str]:
        """What is said there to have failed; the area's own text has that of a clock that no one sees, now and then."""
        script = f"return [...document.querySelectorAll('#{area} .failure')].map(e => e.innerText)"
        return list(self.driver.execute_script(script))

    def press(self, button: str) -> None:
        wait(self.driver, f"document.getElementById({button!r})?.disabled === false")
        self.driver.execute_script(f"document.getElementById({button!r}).click()")

    def pick(self, field: str, *names: str) -> None:
        """As from the keyboard: type, and take the first that is offered."""
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        entry = self.driver.find_element(By.CSS_SELECTOR, f"#{field} input")
        entry.click()
        for name in names:
            entry.send_keys(Keys.CONTROL, "a")
            entry.send_keys(name)
            wait(self.driver, f"document.querySelectorAll('#{field} ul [role=option]').length === 1")
            entry.send_keys(Keys.ENTER)
            # Gradio answers the key when it gets to it: the next one, sent before, would undo the pick.
            wait(self.driver, f"document.querySelector('#{field} input').value !== {name!r}")
        entry.send_keys(Keys.ESCAPE, Keys.TAB)

    def write(self, field: str, text: str) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        entry = self.driver.find_element(By.CSS_SELECTOR, f"#{field} :is(input, textarea)")
        entry.send_keys(Keys.CONTROL, "a")
        entry.send_keys(text, Keys.TAB)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    plain = PlainModel(folder / "models")
    base, experts = plain.save()
    for path, names in ((base, plain.base), *zip(experts, plain.tuned, strict=True)):
        write_checkpoint(path, names | {HOSTILE: names["layers.0.up.weight"].clone()})
    (folder / "outside").mkdir()
    (folder / "models" / HOSTILE.replace("/", "")).symlink_to(folder / "outside")
    asked: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def noting_connect(self: socket.socket, address: Any) -> None:
        asked.append(str(address[0] if isinstance(address, tuple) else address))
        connect(self, address)

    def noting_look_up(host: Any, *rest: Any, **more: Any) -> Any:
        asked.append(str(host))
        return look_up(host, *rest, **more)

    with pytest.MonkeyPatch.context() as patch, chromium(folder / "profile") as driver:
        patch.chdir(folder)
        patch.setattr(socket.socket, "connect", noting_connect)
        patch.setattr(socket, "getaddrinfo", noting_look_up)
        server = Server(Folders([Path("models")]), port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            driver.get("about:blank")
            driver.get_log("performance")  # the browser's own first page
            driver.get(server.address)
            wait(driver, "document.getElementById('found')?.innerText.includes('4 checkpoints found')")
            yield Desk(driver, server, folder, asked)
        finally:
            server.stop()
            thread.join()


def test_from_the_first_look_to_the_report(desk: Desk) -> None:
    driver = desk.driver
    desk.pick("base", "base")
    wait(driver, "document.querySelector('#recipe').innerText.includes('experts: none is picked')")
    wait(driver, "['look', 'plan', 'merge'].every(b => document.getElementById(b).disabled)")
    assert "(recommended)" in driver.execute_script("return document.querySelector('#rule input').value")
    desk.pick("experts", "e1", "e3")
    desk.press("look")
    wait(driver, "document.querySelectorAll('#inspected table').length === 4")
    assert "expert e3 dominates" in desk.text("inspected")
    desk.write("weights", "1, 0.5")
    desk.press("look")
    wait(driver, "document.querySelector('#inspected').innerText.includes('No warnings.')")
    desk.pick("rule", "breadcrumbs")
    wait(driver, f"document.body.innerText.includes({summary(METHODS['breadcrumbs'])!r})")
    desk.write("parameter-1", "0.8")
    wait(driver, "document.querySelector('#recipe').innerText.includes('density: 0.8')")
    desk.press("plan")
    wait(driver, "document.querySelector('#planned table')")
    assert "breadcrumbs" in desk.text("planned")
    lines = driver.execute_script("return [...document.querySelectorAll('#recipe .cm-line')].map(e => e.innerText)")
    desk.press("merge")
    wait(driver, "document.querySelector('#merged .done')")
    assert "Merged into ./models/merged" in desk.text("merged")
    assert "Score it in a terminal: acemerge evaluate" in desk.text("merged")

    (desk.folder / "recipe.yaml").write_text("\n".join(lines))
    expected = {
        "method": {"name": "breadcrumbs", "density": 0.8},
        "base": "./models/base",
        "experts": ["./models/e1", {"model": "./models/e3", "weight": 0.5}],
    }
    assert yaml.safe_load("\n".join(lines)) == expected
    from acemerge.cli.app import main

    with pytest.raises(SystemExit):
        main(["merge", "recipe.yaml", "-o", "same", "--quiet"])
    merged, same = load_folder(desk.folder / "models/merged"), load_folder(desk.folder / "same")
    assert merged.keys() == same.keys()
    assert all(torch.equal(merged[name], same[name]) for name in same)
    assert driver.get_log("browser") == []

    before = driver.current_window_handle
    driver.execute_script("document.querySelector('a.report').click()")
    driver.switch_to.window(_other_window(driver))
    wait(driver, "document.documentElement.dataset.drawn === 'yes'")
    assert driver.title == "Merge report: 2 experts by breadcrumbs"
    assert driver.execute_script("return self.origin") == "null"  # it may not speak to the page's server
    driver.close()
    driver.switch_to.window(before)


def _other_window(driver: Any) -> str:
    from selenium.webdriver.support.ui import WebDriverWait

    here = driver.current_window_handle
    return str(WebDriverWait(driver, 120).until(lambda d: next((x for x in d.window_handles if x != here), None)))


def test_an_error_is_one_line_beside_the_button(desk: Desk) -> None:
    desk.press("merge")
    wait(desk.driver, "document.querySelector('#merged .failure')")
    taken = f"{desk.folder / 'models/merged'}: holds a finished merge; choose another folder or tick “{REPLACE}”"
    assert desk.failures("merged") == [taken]
    desk.write("out", "../outside")
    desk.press("merge")
    wait(desk.driver, "document.querySelector('#merged .failure')?.innerText.includes('outside the folders')")
    (outside,) = desk.failures("merged")
    assert "\n" not in outside
    assert list((desk.folder / "outside").iterdir()) == []
    desk.write("out", "models/other")
    wait(desk.driver, "document.querySelector('#merged .failure') === null")


def test_a_merge_is_stopped_and_found_again_after_the_page_was_loaded_anew(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(opened: Any, out: Path, options: Any, on_progress: OnProgress) -> None:
        for i in range(30_000):  # until it is stopped: ten minutes at most
            on_progress(Progress("merge", HOSTILE, i, 30_000, i, 30_000))
            time.sleep(0.02)

    monkeypatch.setattr(steps, "run_opened", slowly)
    desk.write("out", "models/another")
    desk.press("merge")
    wait(desk.driver, "document.querySelector('#merged progress[value]')")
    desk.driver.refresh()
    wait(desk.driver, "document.querySelector('#merged progress[value]')")
    assert HOSTILE in desk.text("merged")
    desk.press("stop-merge")
    wait(desk.driver, "document.querySelector('#merged').innerText.includes('Nothing of it was kept.')")
    desk.pick("base", "base")  # nothing is picked on a page that was loaded anew
    desk.pick("experts", "e1")
    wait(desk.driver, "document.getElementById('merge').disabled === false")


def test_it_is_dark_where_the_reader_is_and_fits_a_phone(desk: Desk) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        prefer(desk.driver, scheme)
        desk.driver.refresh()
        wait(desk.driver, "document.getElementById('found')?.innerText.includes('found')")
        ground = desk.driver.execute_script("return getComputedStyle(document.querySelector('.step')).backgroundColor")
        seen[scheme] = sum(map(int, ground[4:-1].split(",")))
    assert seen["light"] > 3 * 240
    assert seen["dark"] < 3 * 40
    hold_like_a_phone(desk.driver)
    wait(desk.driver, "innerWidth === 360 && document.documentElement.scrollWidth <= 360")


def test_nothing_left_the_machine(desk: Desk) -> None:
    """After all that the tests before it did, with names that would have done something."""
    entries = [json.loads(entry["message"])["message"] for entry in desk.driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    assert sum("/run/predict" in url for url in urls) > 10
    assert not any("/queue/" in url for url in urls)  # whose streams lose what is asked for while they end
    here = {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in urls} - {"data://", "blob://"}
    assert here == {desk.server.origin}
    assert {name for name in desk.asked if name not in ("127.0.0.1", "localhost", "::1", "None")} == set()
    assert "<img" not in desk.html("found") + desk.html("planned") + desk.html("merged")


def test_no_file_is_served_even_to_its_own_page(desk: Desk) -> None:
    secret = desk.folder / "outside/secret"
    secret.write_text("secret")
    (cookie,) = desk.driver.get_cookies()
    for path in (secret, desk.folder / "models/base/model.safetensors"):
        request = urllib.request.Request(f"{desk.server.origin}/gradio_api/file={path}")
        request.add_header("Cookie", f"{cookie['name']}={cookie['value']}")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)


def test_it_listens_at_this_machine_alone_and_where_it_is_told(desk: Desk) -> None:
    assert desk.server.origin == f"http://127.0.0.1:{desk.server.port}"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", desk.server.port), timeout=5)
    folders = Folders([desk.folder])
    with pytest.raises(UsageError, match=f"127.0.0.1:{desk.server.port}: cannot listen there: .*; choose another"):
        Server(folders, port=desk.server.port)
    with pytest.raises(UsageError, match=r"192\.0\.2\.1: cannot listen there"):
        Server(folders, host="192.0.2.1")
