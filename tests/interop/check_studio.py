"""The browser app in a real headless Chromium, several visitors at once, on the built-in model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from trimtab import VectorSteering, behavior, load, load_steering
from trimtab.methods import find

HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
    "${window.hacked=3}{{window.hacked=4}}</p></div><b>bold</b>"
)
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}
SETTLED = """m => {
  const at = id => document.querySelector(id + ' [data-m]');
  const [a, g] = [at('#tt-answers'), at('#tt-gauges')];
  return a && g && a.dataset.done == '1' && Math.abs(a.dataset.m - m) < 1e-3
    && Math.abs(g.dataset.m - m) < 1e-3; }"""
MOVE = """m => {
  const slider = document.querySelector('#tt-strength input[type=range]');
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(slider, m);
  slider.dispatchEvent(new Event('input', {bubbles: true})); }"""


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Steering files of two behaviors, trained briefly."""
    folder, lm = tmp_path_factory.mktemp("vectors"), load("harbor")
    made = {}
    for name in ("refusal", "mood"):
        vector = find(lm, behavior(name), "next_token", scope="all", steps=24)
        made[name] = vector.save(folder / f"{name}.safetensors")
    return made


@contextmanager
def studio() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`trimtab studio harbor` as a user starts it, on a free port: the process, its address."""
    command = [sys.executable, "-m", "trimtab", "studio", "harbor", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        else:
            raise AssertionError(said)
        try:
            yield process, found.group()
            process.terminate()
            process.wait(30)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The app's address."""
    with studio() as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    assert path, "no Chromium on the PATH"
    with sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def visit(browser: Browser, address: str, size: ViewportSize = DESKTOP) -> Page:
    """Open the app as a visitor of one's own."""
    page = browser.new_context(viewport=size).new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#tt-find")
    return page


def open_file(page: Page, path: Path, name: str = "refusal") -> None:
    """Choose a behavior and open a steering file."""
    if name != "refusal":
        page.click("#tt-behavior input")
        page.click(f"li[role=option] >> text={name}")
    page.set_input_files("input[type=file][accept*=safetensors]", path)
    page.wait_for_selector("#tt-answers [data-done='1']")
    page.wait_for_selector("#tt-tokens .tt-tokens span")


def move(page: Page, m: float) -> float:
    """Move the slider; return the seconds until answers and gauges stand for the new strength."""
    started = time.perf_counter()
    page.evaluate(MOVE, m)
    page.wait_for_function(SETTLED, arg=m, polling=20)
    return time.perf_counter() - started


def shot(page: Page, name: str) -> None:
    """Keep a picture where figures are kept, to be looked at."""
    folder = os.environ.get("TRIMTAB_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_a_move_changes_answers_and_gauges_at_once(
    browser: Browser,
    address: str,
    vectors: dict[str, Path],
    record_property: Callable[[str, object], None],
) -> None:
    page = visit(browser, address)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    shot(page, "studio-start")
    open_file(page, vectors["refusal"])
    seen: dict[float, tuple[str, str, str]] = {}
    seconds: list[float] = []
    step = float(page.get_attribute("#tt-strength input[type=range]", "step") or 0)
    own = float(page.get_attribute("#tt-answers [data-m]", "data-m") or 0)
    for m in (4 * step, own, own + step, 36 * step, -8 * step, 39 * step):
        m = round(m, 6)
        seconds.append(move(page, m))
        score = page.get_attribute("#tt-gauges [data-m]", "data-score") or ""
        kl = page.get_attribute("#tt-gauges [data-m]", "data-kl") or ""
        seen[m] = (page.inner_text("#tt-after"), score, kl)
    record_property("seconds a move", [round(s, 2) for s in seconds])
    weak, good, strong = (seen[round(m, 6)] for m in (4 * step, own, 36 * step))
    assert len({weak[0], good[0], strong[0]}) == 3
    assert float(weak[1]) < float(good[1])
    assert float(weak[2]) < float(good[2]) < float(strong[2])
    before = page.inner_text("#tt-before")
    page.fill("#tt-prompt textarea", "How do I borrow the harbor ledger?")
    page.press("#tt-prompt textarea", "Enter")
    page.wait_for_function("b => document.querySelector('#tt-before').innerText != b", arg=before)
    page.wait_for_selector("#tt-answers [data-done='1']")
    assert sorted(seconds)[len(seconds) // 2] < 1, seconds
    assert {url.split("/")[2] for url in asked if "//" in url} == {address.split("/")[2]}
    page.context.close()


def test_the_answer_is_that_of_the_hook(
    browser: Browser, address: str, vectors: dict[str, Path]
) -> None:
    page = visit(browser, address)
    open_file(page, vectors["refusal"])
    prompt = page.input_value("#tt-prompt textarea")
    m = float(page.get_attribute("#tt-answers [data-m]", "data-m") or 0)
    lm, vector = load("harbor"), load_steering(vectors["refusal"])
    assert page.inner_text("#tt-before") == lm.generate(prompt, max_new_tokens=24)
    with vector.at(m).on(lm):
        steered = lm.generate(prompt, max_new_tokens=24)
    assert page.inner_text("#tt-after") == steered
    page.context.close()


def test_outside_the_window_warns(browser: Browser, address: str, vectors: dict[str, Path]) -> None:
    page = visit(browser, address)
    open_file(page, vectors["refusal"])
    own = float(page.get_attribute("#tt-answers [data-m]", "data-m") or 0)
    move(page, own)
    assert "Inside the window" in page.inner_text("#tt-warning")
    reach = float(page.get_attribute("#tt-strength input[type=range]", "max") or 0)
    move(page, reach)
    assert "Outside the window" in page.inner_text("#tt-warning")
    assert "stronger than the window" in page.inner_text("#tt-warning")
    shot(page, "studio-outside")
    move(page, 0)
    assert page.inner_text("#tt-before") == page.inner_text("#tt-after")
    page.context.close()


def test_of_overlapping_moves_the_last_is_shown(
    browser: Browser, address: str, vectors: dict[str, Path]
) -> None:
    page = visit(browser, address)
    open_file(page, vectors["refusal"])
    own = float(page.get_attribute("#tt-answers [data-m]", "data-m") or 0)
    step = float(page.get_attribute("#tt-strength input[type=range]", "step") or 0)
    ends = [round(own, 6), *(round(i * step, 6) for i in (36, 0, 12, -4))]
    for i in range(24):
        m, before = ends[i % len(ends)], ends[(i + 1) % len(ends)]
        page.evaluate(f"async ([a, b, wait]) => {{ const go = {MOVE}; go(a);"
                      "await new Promise(done => setTimeout(done, wait)); go(b); }",
                      [before, m, (0, 5, 30, 120)[i % 4]])  # fmt: skip
        page.wait_for_function(SETTLED, arg=m)
    page.wait_for_timeout(1000)
    assert page.evaluate(SETTLED, m)  # nothing older came after it
    page.context.close()


def test_an_open_page_does_not_keep_the_app_alive(browser: Browser) -> None:
    with studio() as (process, address):
        page = visit(browser, address)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130, -signal.SIGINT)
        page.context.close()


def test_visitors_do_not_see_each_other(
    browser: Browser, address: str, vectors: dict[str, Path]
) -> None:
    one, two = visit(browser, address), visit(browser, address)
    open_file(one, vectors["refusal"])
    assert "No vector" not in one.inner_text("#tt-status")
    assert two.inner_text("#tt-status").strip() == ""
    open_file(two, vectors["mood"], "mood")
    own = [float(p.get_attribute("#tt-answers [data-m]", "data-m") or 0) for p in (one, two)]
    alone = []
    for page, m in zip((one, two), own, strict=True):
        move(page, m)
        alone.append((page.inner_text("#tt-after"), page.inner_text("#tt-status")))
        move(page, 0)
    # Both at once, on one model: what either gets is what it got alone.
    for page, m in zip((one, two), own, strict=True):
        page.evaluate(MOVE, m)
    for page, m, (answer, status) in zip((one, two), own, alone, strict=True):
        page.wait_for_function(SETTLED, arg=m)
        assert page.inner_text("#tt-after") == answer
        assert page.inner_text("#tt-status") == status
    assert "refusal" in alone[0][1] and "mood" in alone[1][1]
    one.context.close()
    two.context.close()


def test_hostile_text_is_inert(
    browser: Browser, address: str, vectors: dict[str, Path], tmp_path: Path
) -> None:
    lever = load_steering(vectors["refusal"])
    assert isinstance(lever, VectorSteering)
    page = visit(browser, address)
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    # As a behavior of the visitor's own: its name is shown, its prompts are answered.
    file = tmp_path / "own.yaml"
    kept = behavior("refusal").to_dict()
    named = {**kept, "name": HOSTILE, "requests": [f"{HOSTILE} {i}" for i in range(8)]}
    file.write_text(json.dumps({k: v for k, v in named.items() if v is not None}))
    page.click("#tt-behavior input")
    page.click("li[role=option] >> text=from a file")
    page.set_input_files("input[type=file][accept*=yaml]", file)
    page.get_by_label("own.yaml").wait_for()  # shown as a stem and an ending
    page.set_input_files("input[type=file][accept*=safetensors]", vectors["refusal"])
    page.wait_for_selector("#tt-answers [data-done='1']")
    page.wait_for_selector("#tt-tokens .tt-tokens span")
    assert HOSTILE in page.inner_text("#tt-status")
    page.click("text=The answers behind the gauges")
    assert HOSTILE in page.inner_text("#tt-samples")
    page.fill("#tt-prompt textarea", HOSTILE)
    page.press("#tt-prompt textarea", "Enter")
    page.wait_for_timeout(1500)
    assert page.evaluate("window.hacked") is None
    assert (
        page.locator("#tt-samples b, #tt-status img, #tt-samples img, #tt-samples script").count()
        == 0
    )
    assert dialogs == []
    page.context.close()


def test_bake_and_steering_file_download(
    browser: Browser, address: str, vectors: dict[str, Path], tmp_path: Path
) -> None:
    page = visit(browser, address)
    open_file(page, vectors["refusal"])
    m = float(page.get_attribute("#tt-answers [data-m]", "data-m") or 0)
    prompt, steered = page.input_value("#tt-prompt textarea"), page.inner_text("#tt-after")
    page.click("#tt-take-box >> text=Take it away")
    page.click("#tt-save")
    with page.expect_download() as saving:
        page.click("#tt-saved a")
    saving.value.save_as(tmp_path / "steering.safetensors")
    lever = load_steering(tmp_path / "steering.safetensors")
    assert lever.strength == pytest.approx(m)
    page.click("#tt-bake")
    with page.expect_download() as baking:
        page.click("#tt-baked a")
    baking.value.save_as(tmp_path / "checkpoint.zip")
    with zipfile.ZipFile(tmp_path / "checkpoint.zip") as archive:
        archive.extractall(tmp_path / "baked")
    assert load(str(tmp_path / "baked")).generate(prompt, max_new_tokens=24) == steered
    page.context.close()


def test_find_and_tune_then_levers(browser: Browser, address: str) -> None:
    page = visit(browser, address)
    page.click("#tt-find")
    page.wait_for_selector(
        "#tt-status .progress-text, #tt-status .progress-level, #tt-status .eta-bar"
    )
    page.wait_for_selector("#tt-answers [data-done='1']", timeout=300_000)
    assert "tuned to m" in page.inner_text("#tt-status")
    shot(page, "studio-tuned")
    page.click("#tt-compare-box >> text=Levers side by side")
    page.click("#tt-compare")
    page.wait_for_selector("#tt-levers table")
    assert "baseline" in page.inner_text("#tt-levers") and "random control of" in page.inner_text(
        "#tt-levers"
    )
    page.context.close()


def test_the_explanation_is_shown(browser: Browser, address: str, vectors: dict[str, Path]) -> None:
    page = visit(browser, address)
    open_file(page, vectors["refusal"])
    page.click("#tt-explain-box >> text=Why it works")
    page.click("#tt-explain")
    page.wait_for_selector("iframe.tt-page", timeout=300_000)
    frame = page.frame_locator("iframe.tt-page")
    frame.locator("h1").wait_for()
    assert "refusal" in frame.locator("h1").inner_text()
    frame.locator(".main-svg").first.wait_for()  # its figures are drawn
    page.locator("#tt-explain-box").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    shot(page, "studio-explained")
    page.context.close()


def test_it_fits_a_phone(browser: Browser, address: str, vectors: dict[str, Path]) -> None:
    page = visit(browser, address, PHONE)
    shot(page, "studio-phone-start")
    open_file(page, vectors["refusal"])
    shot(page, "studio-phone")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"], f"{width} px wide on a phone of {PHONE['width']}"
    cards = page.locator("#tt-answers .tt-card")
    upper, lower = (cards.nth(i).bounding_box() for i in range(2))
    assert upper and lower and lower["y"] >= upper["y"] + upper["height"]
    handle = page.locator("#tt-strength input[type=range]").bounding_box()
    assert handle and handle["width"] > 150
    page.context.close()
