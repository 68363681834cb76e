"""The page in a real browser: Chromium without a window, offline, as wide as a desk or a phone."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.faults  # what needs more than Python


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, regenerated):
    """Opens the page; what it complains of, or asks the network for, fails the test."""
    folder, _ = regenerated
    complaints, contexts = [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
        page.goto((folder / "index.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def column(page, table: str, label: str) -> list[str]:
    """What a column of a table shows, from above."""
    heads = page.locator(f"#table-{table} thead th").all_inner_texts()
    place = next(i for i, head in enumerate(heads) if head.rstrip(" ▲▼") == label)
    lines = page.locator(f"#table-{table} tbody tr:visible")
    return [lines.nth(i).locator("th, td").nth(place).inner_text() for i in range(lines.count())]


def numbers(cells: list[str]) -> list[float]:
    return [float(re.match(r"[+-]?[\d.]+", text)[0]) for text in cells if text != "-"]


def sort_by(page, table: str, label: str) -> None:
    page.locator(f"#table-{table} thead button", has_text=re.compile(rf"^{re.escape(label)}$")).click()


def test_a_click_sorts_numbers_as_numbers_and_dashes_last(opened):
    page = opened()
    name = "published_perturbation"
    before = column(page, name, "AOP mean")
    assert len(before) == 9 and numbers(before) != sorted(numbers(before))
    sort_by(page, name, "AOP mean")
    assert numbers(column(page, name, "AOP mean")) == sorted(numbers(before))
    assert column(page, name, "method")[0] == "Full cache"  # whole lines move
    sort_by(page, name, "AOP mean")
    assert numbers(column(page, name, "AOP mean")) == sorted(numbers(before), reverse=True)
    for _ in range(2):
        sort_by(page, name, "published")
        published = column(page, name, "published")
        assert published[-3:] == ["-", "-", "-"] and "-" not in published[:-3]
    sort_by(page, name, "method")
    assert column(page, name, "method") == sorted(column(page, name, "method"), key=str.lower)


def test_differences_are_sorted_by_their_sign(opened):
    page = opened()
    found = numbers(column(page, "beside_recency", "- StreamingLLM"))
    assert min(found) < 0 < max(found) and found != sorted(found)
    for order in (sorted(found), sorted(found, reverse=True)):
        sort_by(page, "beside_recency", "- StreamingLLM")
        assert numbers(column(page, "beside_recency", "- StreamingLLM")) == order


def test_runs_are_found_by_what_tells_them_apart(opened, regenerated):
    folder, _ = regenerated
    run = pd.read_csv(folder / "tables" / "published_perturbation.csv", index_col="option").loc["tri", "run_id"]
    page = opened()
    box, shown = page.locator("#find-run"), page.locator("details.run:visible")
    assert shown.count() == 9
    for words, count in (("ppl/kl", 0), ("aop", 0), ("triattentionkv", 1), (run[:12], 1), ("wavelet paper", 3)):
        box.fill(words)
        assert shown.count() == count, words


def test_a_word_leaves_the_lines_that_have_it(opened):
    page = opened()
    box = page.locator("#table-published_perturbation input")
    box.fill("wavelet")
    assert sorted(column(page, "published_perturbation", "method")) == [
        "WaveletFourierKV",
        "WaveletKV",
        "WaveletTriAttn",
    ]
    box.fill("wavelet tri")
    assert column(page, "published_perturbation", "method") == ["WaveletTriAttn"]
    box.fill("")
    assert len(column(page, "published_perturbation", "method")) == 9


def test_verdicts_can_be_chosen(opened):
    page = opened()
    cards = page.locator(".card:visible")
    everything = cards.count()
    shown = {}
    for verdict in ("supported", "contradicted", "undecided"):
        page.locator(f"[data-show={verdict}]").click()
        shown[verdict] = cards.count()
        assert set(page.locator(".card:visible .badge").all_inner_texts()) <= {verdict}
    assert sum(shown.values()) == everything and shown["contradicted"] > 0
    page.locator("[data-show=all]").click()
    assert cards.count() == everything


def test_a_number_opens_the_runs_that_it_is_from(opened, regenerated):
    folder, _ = regenerated
    table = pd.read_csv(folder / "tables" / "published_perturbation.csv", index_col="option")
    page = opened()
    line = page.locator("#table-published_perturbation tbody tr", has_text="FourierKV").filter(has_not_text="Wavelet")
    line.locator("a").first.click()
    dialog = page.locator("dialog")
    run = table.loc["fourier", "run_id"]
    assert "python -m pipeline.rerun" in dialog.inner_text() and run in dialog.inner_text()
    assert dialog.locator(".run").count() == 1 and "aop/mean" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    line.locator("td").nth(2).locator("a").click()  # a difference is from two
    assert dialog.locator(".run").count() == 2 and table.loc["streaming", "run_id"] in dialog.inner_text()


def test_every_link_leads_somewhere_with_a_script_or_without(opened):
    for script in (True, False):
        page = opened(java_script_enabled=script)
        links = page.locator("a[href^='#']")
        targets = {links.nth(i).get_attribute("href")[1:] for i in range(links.count())}
        there = set(re.findall(r'\bid="([^"]+)"', page.content()))
        assert len(targets) > 14 and targets <= there
        ids = re.findall(r'\bid="([^"]+)"', page.content())
        assert len(ids) == len(set(ids))


def test_figures_say_what_is_under_the_pointer(opened):
    page = opened()
    tip = page.locator("#tip")
    assert not tip.is_visible()
    mark = page.locator("#figure-layers_and_heads [data-said^='FourierKV, layer 1, head 0']").first
    mark.scroll_into_view_if_needed()
    mark.hover()
    assert tip.inner_text() == "FourierKV, layer 1, head 0: 1.500"  # the base and the layer
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    assert page.locator("#figure-windows [data-said^='WaveletKV, window']").count() > 0
    # the numbers that stand in the cells of a map don't hide them from the pointer
    assert page.locator(".drawing text").first.evaluate("text => getComputedStyle(text).pointerEvents") == "none"


def ground(page) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]]


def test_dark_and_light(opened):
    dark, light = opened(color_scheme="dark"), opened(color_scheme="light")
    assert max(ground(dark)) < 60 and min(ground(light)) > 240
    ink = re.findall(r"\d+", dark.evaluate("getComputedStyle(document.querySelector('td')).color"))
    assert min(int(x) for x in ink[:3]) > 150
    for page in (dark, light):
        before = ground(page)
        page.locator("#theme").click()
        assert abs(before[0] - ground(page)[0]) > 150


def test_a_phone_scrolls_downwards_alone(opened):
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().right))")
        <= 360
    )


def test_on_a_phone_names_stay_beside_their_numbers_and_runs_fit(opened):
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    name = page.locator("#table-published_perturbation tbody th").first
    page.locator("#table-published_perturbation .wide").evaluate("box => box.scrollLeft = 200")
    assert 0 <= name.bounding_box()["x"] < 60
    page.locator("#table-published_perturbation td a").first.click()
    inside = page.locator("dialog").evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert inside[0] <= inside[1]


def test_every_section_can_be_reached_with_a_mouse(opened):
    page = opened(viewport={"width": 1366, "height": 900})
    links = page.locator("nav a")
    assert all(links.nth(i).bounding_box()["x"] < 1300 for i in range(links.count()))


def test_on_paper_there_are_no_controls(opened, tmp_path):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator("#theme").is_visible()
    assert min(ground(page)) > 240
    page.pdf(path=tmp_path / "paper.pdf", format="A4")
    assert (tmp_path / "paper.pdf").stat().st_size > 20_000


def test_the_page_is_one_file_of_modest_size(regenerated):
    folder, _ = regenerated
    assert Path(folder / "index.html").stat().st_size < 5_000_000
