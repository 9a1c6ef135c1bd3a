"""index.html in a real browser: clicks, keys, search, themes, many parameters, names that look like HTML."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import optimizers
from npu_fuse_pass.dump.contents import Contents
from npu_fuse_pass.dump.page.page import page
from tests.support.dumped import contents_of, contents_of_rule, parameters

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,900"),
)
# WebDriver's codes of keys
TAB, ENTER, ESCAPE, UP, DOWN = "\ue004", "\ue007", "\ue00c", "\ue013", "\ue015"
PATIENCE = 20.0  # seconds in which anything has to happen, on whatever machine


def missing() -> str:
    """What a browser test lacks here; "" if nothing."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    modules = [name for name in ("selenium",) if importlib.util.find_spec(name) is None]
    return ", ".join([*programs, *modules])


class Browser:
    """A page in a browser; selectors are CSS."""

    def __init__(self, driver: Any, folder: pathlib.Path) -> None:
        self.driver, self._folder = driver, folder

    def open(self, name: str, contents: Contents) -> None:
        """Load a contents' page and wait until it is there."""
        path = self._folder / f"{name}.html"
        if not path.exists():
            path.write_text(page(contents), encoding="utf-8")
        self.driver.get(path.as_uri())
        self.until(lambda: self.run("return document.documentElement.dataset.ready") == "yes")

    def until(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def keys(self, *keys: str) -> None:
        """Keys go to what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def names(self, selector: str) -> list[str]:
        """The first word of each box."""
        script = "return [...document.querySelectorAll(arguments[0])].map(b => b.querySelector('tspan').textContent)"
        return list(self.run(script, selector))

    def errors(self) -> list[Any]:
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    lacking = missing()
    if lacking:
        assert not os.environ.get("NPU_FUSE_BROWSER"), f"a browser was asked for; missing: {lacking}"
        pytest.skip(f"missing: {lacking}; bash scripts/test.sh installs them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = "localhost,127.0.0.1"  # the driver is asked directly
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()
    os.environ.pop("NO_PROXY") if before is None else os.environ.update(NO_PROXY=before)


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """Every test also asserts that the console shows no error."""
    started.errors()
    yield started
    assert started.errors() == []


@pytest.fixture(scope="module")
def two_groups() -> Contents:
    """Two families that two fused nodes take."""
    ps = parameters(7)
    momenta = [torch.zeros_like(p) for p in ps]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_mul_(momenta[:4], 0.9)
        torch._foreach_add_(momenta[:4], [p.grad for p in ps[:4]])
        torch._foreach_add_(ps[:4], momenta[:4], alpha=-0.1)
        torch._foreach_add_(ps[4:], [p.grad.sign() for p in ps[4:]], alpha=-0.1)

    return contents_of(step)


@pytest.fixture(scope="module")
def many() -> Contents:
    return contents_of_rule(optimizers.NpuFusedAdam(parameters(2000, ((2,), (3,)))))


def test_clicking_a_fused_node_lights_what_it_took(browser: Browser, two_groups: Contents) -> None:
    browser.open("two", two_groups)
    assert browser.text("h1") == "7 parameters on cpu"
    first, second = (g.name for g in two_groups.grouped.groups)
    browser.click('[data-key="g0"]')
    assert browser.names("#before .box.lit.op") == ["mul", "add", "add"]
    panel = browser.text("#details")
    row = two_groups.report.groups[0]
    assert first in panel and second not in panel
    assert "× 4 parameters" in panel and f"{row.bytes_per_element} bytes per element" in panel
    assert f"{row.launches} per step" in panel
    shown = browser.run("return document.querySelector('#details .formula').getAttribute('aria-label')")
    assert shown == row.formula
    assert f"void {first}(" in browser.text("#details .source pre")
    assert browser.run("return document.querySelectorAll('#details .member').length") == 4
    browser.click('[data-key="g1"]')
    assert browser.names("#before .box.lit.op") == ["sign", "add"]


def test_clicking_an_operation_shows_who_took_it(browser: Browser, two_groups: Contents) -> None:
    browser.open("two", two_groups)
    next(box for box in browser.all("#before .box.op") if "sign" in box.text).click()
    assert browser.names(".box.lit") == [two_groups.grouped.groups[1].name]
    assert two_groups.grouped.groups[1].name in browser.text("#details")
    assert "test_page_browser.py:" in browser.text("#details .line")
    browser.click("#details .chip")
    assert browser.text("#details .name") == two_groups.grouped.groups[1].name


def test_members_expand_and_take_the_drawing_over(browser: Browser, two_groups: Contents) -> None:
    browser.open("two", two_groups)
    assert not browser.all(".card .member")
    browser.click(".card .expand")
    members = browser.all(".card .member")
    assert len(members) == 4
    members[2].click()
    name = members[2].find_element("css selector", "span").text
    assert name in browser.text(".card .picked")
    assert members[2].get_attribute("aria-pressed") == "true" and members[0].get_attribute("aria-pressed") == "false"
    browser.click(".card .box.op")
    assert name in browser.text("#details")


def test_search_finds_operations_parameters_and_fused_nodes(browser: Browser, many: Contents) -> None:
    browser.open("many", many)
    browser.keys("/")
    browser.keys("sqrt")
    browser.until(lambda: browser.all("#found [role=option]"))
    assert browser.text("#found .text") == "sqrt"
    browser.keys(ENTER)
    assert browser.text("#details .name") == "sqrt"
    browser.keys("/")
    browser.run("document.querySelector('#search').value = ''")
    browser.keys("param_1742")
    browser.keys(ENTER)
    browser.until(lambda: "param_1742" in browser.text(".picked"))
    assert browser.run("return document.activeElement.textContent").startswith("param_1742")


def test_keys_alone_are_enough(browser: Browser, two_groups: Contents) -> None:
    browser.open("two", two_groups)
    for _ in range(40):  # Tab reaches the first drawing
        browser.keys(TAB)
        if browser.run("return document.activeElement.classList.contains('box')"):
            break
    first = browser.run("return document.activeElement.dataset.key")
    browser.keys(DOWN)
    below = browser.run("return document.activeElement.dataset.key")
    assert below != first
    outline = browser.run("return getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth")
    assert outline == "3px"  # the focus can be seen
    browser.keys(ENTER)
    assert browser.run("return document.querySelector('.box.selected').dataset.key") == below
    browser.keys(UP)
    assert browser.run("return document.activeElement.dataset.key") != below
    browser.keys(ESCAPE)
    assert not browser.all(".box.selected") and "How to read" in browser.text("#details")


def test_light_and_dark(browser: Browser, two_groups: Contents) -> None:
    def background() -> str:
        return str(browser.run("return getComputedStyle(document.documentElement).backgroundColor"))

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer("light")
    browser.open("two", two_groups)
    light = background()
    prefer("dark")
    browser.until(lambda: background() != light)
    dark = background()
    browser.click("#theme")
    assert background() == light
    browser.click("#theme")
    assert background() == dark
    prefer("light")


def test_2000_parameters_are_no_trouble(browser: Browser, many: Contents) -> None:
    browser.open("many", many)
    start = time.monotonic()
    browser.click('[data-key="g0"]')
    assert "× 2\u202f000 parameters" in browser.text("#details")
    made = browser.run("return document.querySelectorAll('#details .member').length")
    assert 0 < made < 500  # more are made when the list is scrolled
    browser.run("const l = document.querySelector('#details .list'); l.scrollTop = l.scrollHeight")
    browser.until(lambda: browser.run("return document.querySelectorAll('#details .member').length") > made)
    browser.click(".card .expand")
    assert browser.run("return document.querySelectorAll('*').length") < 5000
    assert time.monotonic() - start < PATIENCE


def test_the_bandwidth_changes_the_modelled_time(browser: Browser, many: Contents) -> None:
    browser.open("many", many)
    field = browser.driver.find_element("css selector", "#totals input")
    before = browser.text("#totals .tile:last-child .new")
    field.clear()
    field.send_keys("1")
    assert browser.text("#totals .tile:last-child .new") != before


def test_names_are_no_html(browser: Browser) -> None:
    name = "</script><b id=planted>x</b><img src=x onerror=\"document.title='planted'\">"
    contents = contents_of_rule(optimizers.NpuFusedAdam(parameters(3)))
    renamed = [dataclasses.replace(leaf, name=name + leaf.name) for leaf in contents.grouped.leaves]
    contents = dataclasses.replace(contents, grouped=dataclasses.replace(contents.grouped, leaves=tuple(renamed)))
    browser.open("names", contents)
    browser.click(".card .expand")
    browser.click("#before .box.leaf")
    browser.keys("/")
    browser.keys("planted")
    assert browser.text(".card .member").startswith("</script><b id=planted>")
    assert not browser.all("#planted") and not browser.all("img")
    assert "planted" not in browser.driver.title


def test_a_narrow_screen_does_not_scroll_sideways(browser: Browser, two_groups: Contents) -> None:
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.open("two", two_groups)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
