"""The report's page in a browser: what its script adds, and that nothing leaves the machine."""

import json
import shutil
from pathlib import Path

import pytest
from test_report import NASTY, build, make_run, metrics_of, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium here; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def opened(browser):
    """A function that opens a page of a run; a test fails if a script of it does, or if it asks
    for anything."""
    problems: list[str] = []
    asked: list[str] = []

    def open_page(path: Path, **options):
        options = {"viewport": {"width": 1400, "height": 900}} | options
        page = browser.new_context(**options).new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text))  # blocked things, and errors
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{path}")
        return page

    yield open_page
    assert problems == [] and {url.split(":")[0] for url in asked} == {"file"}


def wide(page):
    """The box of the loss chart's picture."""
    page.locator("figure.wide > svg").scroll_into_view_if_needed()
    return page.locator("figure.wide > svg").bounding_box()


def ticks_of(page) -> list[str]:
    return page.locator("figure.wide > svg > text.x").all_text_contents()


def test_values_under_the_pointer(tmp_path, opened):
    run = make_run(tmp_path / "run")
    build(run)
    page = opened(run / "report.html")
    box = wide(page)
    page.mouse.move(box["x"] + 56 + (box["width"] - 70) * 0.5, box["y"] + 50)  # step 50
    tip = page.locator("figure.wide .tip").inner_text()
    rows = {row["step"]: row for row in metrics_of(run) if "loss" in row}
    evaluated = {row["step"]: row["val_loss"] for row in metrics_of(run) if "val_loss" in row}
    assert tip.startswith("step 50") and str(float(f"{rows[50]['loss']:.5g}")) in tip
    assert str(float(f"{evaluated[50]:.5g}")) in tip
    page.mouse.move(5, 5)
    assert page.locator(".tip").count() == 0
    page.locator("figure.wide > svg").focus()  # by keys as well
    page.keyboard.press("ArrowRight")
    first = page.locator(".tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert first.startswith("step 10") and page.locator(".tip").inner_text().startswith("step 20")


def test_zoom_and_back(tmp_path, opened):
    run = make_run(tmp_path / "run")
    build(run)
    page = opened(run / "report.html")
    before, box = ticks_of(page), wide(page)
    inner = box["width"] - 70
    page.mouse.move(box["x"] + 56 + inner * 0.4, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 56 + inner * 0.6, box["y"] + 60, steps=3)
    page.mouse.up()
    shown = [float(text) for text in ticks_of(page)]
    assert min(shown) >= 40 and max(shown) <= 60
    box = wide(page)
    page.mouse.dblclick(box["x"] + 300, box["y"] + 50)
    assert ticks_of(page) == before


def test_other_axes_a_log_scale_and_the_first_steps(tmp_path, opened):
    run = make_run(tmp_path / "run")
    build(run)
    page = opened(run / "report.html")
    page.get_by_label("tokens", exact=True).check()
    assert "50k" in ticks_of(page)  # 51,200 tokens
    page.get_by_label("hours").check()
    assert float(ticks_of(page)[-1]) <= 100 / 3600 < float(ticks_of(page)[-1]) * 1.3
    page.get_by_label("steps", exact=True).check()
    heights = page.locator("figure.wide > svg > text.y")
    linear = heights.all_text_contents()
    assert page.locator("figure.wide small.cut").is_visible()
    page.get_by_label("with the first steps").check()
    assert "5" in heights.all_text_contents() and "5" not in linear  # the loss of step 0 is 5.5
    assert not page.locator("figure.wide small.cut").is_visible()
    before = page.locator("figure.wide .curve.strong path").get_attribute("d")
    page.get_by_label("log y").check()
    assert page.locator("figure.wide .curve.strong path").get_attribute("d") != before


def test_the_script_draws_what_python_drew(tmp_path, opened):
    """The same marks on both axes, and as many curves and dots."""
    run = make_run(tmp_path / "run")
    build(run)

    def drawn(page) -> list:
        return [[figure.locator("> svg > text.y").all_text_contents(),
                 figure.locator(".curve").count(), figure.locator("circle").count()]
                for figure in page.locator("figure").all()]

    page = opened(run / "report.html")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(200)
    still = opened(run / "report.html", java_script_enabled=False)
    assert drawn(page) == drawn(still) and len(drawn(page)) == 6
    assert page.locator("#controls").is_visible() and not still.locator("#controls").is_visible()


def test_the_page_keeps_its_readers_place(tmp_path, opened):
    """When it loads itself anew: scrolled, folds, axis; the run has gone on meanwhile."""
    run = make_run(tmp_path / "run")
    write(run / "samples.jsonl", {"step": 1, "prompt": NASTY, "completion": NASTY})
    from plainllama.report.page import write_page
    from plainllama.report.runs import load

    write_page([load(run)], run / "report.html", every=1)
    page = opened(run / "report.html")
    page.get_by_label("tokens", exact=True).check()
    page.get_by_text("Optimizer and machine").click()
    page.evaluate("scrollTo(0, 400)")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 110, "tokens": 56320, "loss": 1.5}) + "\n")
    write_page([load(run)], run / "report.html")  # the last one
    page.get_by_text("at step 110 of").wait_for(timeout=10_000)
    assert page.get_by_label("tokens", exact=True).is_checked() and page.evaluate("scrollY") == 400
    assert page.locator("details.panel").first.get_attribute("open") is not None
    page.wait_for_timeout(1500)
    assert page.evaluate("performance.now()") > 1400  # it does not load again


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window(tmp_path, opened, width, scheme):
    """Neither with long names nor with hostile text."""
    run = make_run(tmp_path / "run", init_from=NASTY + "x" * 300)
    write(run / "samples.jsonl", {"step": 1, "prompt": NASTY, "completion": "y" * 500})
    write(run / "eval/step_100.json", {"step": 100, "val_bpb": 1.25, "tasks": {
        f"local:{'z' * 80}": {"acc": 0.5, "acc_stderr": 0.1}}})
    build(run)
    page = opened(run / "report.html", viewport={"width": width, "height": 800},
                  color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = [box["width"] for box in page.evaluate(
        "[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect())")]
    assert max(sizes) <= width and page.evaluate(
        "getComputedStyle(document.querySelector('svg text')).fontSize") == "12px"
