"""A real browser, where there is one: Debian's `chromium` and `chromium-driver`."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")), reason="needs chromium and chromedriver"
)

_FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
_FLAGS += ("disable-component-update", "disable-sync", "window-size=1200,900")


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A window, whose logs tell of complaints and of requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*_FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver: Any, condition: str) -> None:
    """Until a condition is true in the page; two minutes at most, for where much else runs."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 120, 0.05).until(lambda d: d.execute_script(f"return {condition}"), condition)


def prefer(driver: Any, scheme: str) -> None:
    """Be a reader who likes it light, or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def hold_like_a_phone(driver: Any) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
