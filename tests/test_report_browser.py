"""The report in a browser: it is clicked, sorted, filtered and saved, asks for nothing and complains of nothing."""

import csv
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.reportruns import MadeRun, class_names
from vitscore.metrics.fold import refold
from vitscore.report import write_report
from vitscore.shards.labels import load_labels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no chromium with its driver here")
SCHEMES = ("light", "dark")
WIDTHS = (375, 1100)


class Tab:
    """A browser's tab with one report in it."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, path: Path, *, scheme: str = "light", width: int = 1100) -> "Tab":
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        media = {"features": [{"name": name, "value": value} for name, value in features.items()]}
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(path.as_uri())
        return self

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def column(self, index: int) -> list[str]:
        return self.texts(f"#class-table tbody tr > :nth-child({index + 1})")

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def saved(self, name: str) -> Path:
        """A file that was saved, once it is whole: Chromium first makes an empty one of its name."""
        deadline, path = time.monotonic() + 30, self.downloads / name
        while not (path.exists() and path.stat().st_size) or list(self.downloads.glob("*.crdownload")):
            assert time.monotonic() < deadline, f"{name} was not saved: {os.listdir(self.downloads)}"
            time.sleep(0.05)
        return path

    def requests(self) -> list[str]:
        """What was asked of anywhere but the file itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    from selenium import webdriver

    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # Clicks of a script are no gestures of a user, who may save one file after the other.
    allowed = {"profile.default_content_setting_values.automatic_downloads": 1}
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads), **allowed})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Tab(driver, downloads)
    driver.quit()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any]) -> Path:
    """The demo's own report."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = start("vitscore", "run", "demo", "-m", "demo-vit", "-m", "demo-clip", "-o", folder)
    assert done.code == 0, done.err
    return folder / "report.html"


def made(folder: Path, *arguments: Any, sizes: list[int], **options: Any) -> Path:
    run = MadeRun(folder / "run", *arguments, **options).write(sizes)
    record = json.loads((run.folder / "run.json").read_bytes())
    return write_report(run.folder, refold(run.folder), record).path


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with 1,000 classes."""
    folder = tmp_path_factory.mktemp("thousand")
    return made(folder, class_names(1000), sizes=[6000, 6000], skill=4.0, bad_share=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["demo", "thousand"])
def test_it_opens_without_network_errors_or_sideways_scrolling(
    request: pytest.FixtureRequest, tab: Tab, which: str, width: int, scheme: str
) -> None:
    path = request.getfixturevalue(which)
    tab.open(path, scheme=scheme, width=width)
    assert tab.errors() == []
    assert tab.requests() == [path.as_uri()]
    assert tab.js("return document.documentElement.scrollWidth") <= width
    ground = tab.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 384) == (scheme == "light")
    assert tab.js("return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_the_demo_shows_its_figures(tab: Tab, demo: Path) -> None:
    tab.open(demo)
    document = json.loads((demo.parent / "metrics.json").read_bytes())
    rows = dict(zip(tab.texts("table.models tbody th"), tab.texts("table.models tbody tr:not(.group)"), strict=False))
    assert rows
    shown = " ".join(tab.texts("table.models tr"))
    for model in document["models"].values():
        assert f"{100 * model['accuracy']:.2f}%" in shown and f"{model['nll']:.4f}" in shown
        low, high = model["confidence_intervals"]["accuracy"]
        assert f"{100 * low:.1f} to {100 * high:.1f}" in shown
    report = document["models"]["demo-vit"]["report"]
    assert tab.column(0) == document["classes"]
    assert tab.column(2) == [f"{100 * report[name]['f1-score']:.1f}%" for name in document["classes"]]
    matrix = [int(text) for text in tab.texts("#matrix .count")]
    assert sum(matrix) == 500 and tab.texts("#matrix .plot-box rect.right")


def test_headings_sort_both_ways(tab: Tab, thousand: Path) -> None:
    tab.open(thousand)
    tab.find("#class-table th:nth-child(3) button").click()
    falling = [float(text.rstrip("%")) for text in tab.column(2)]
    assert falling == sorted(falling, reverse=True)
    assert tab.find("#class-table th:nth-child(3)").get_attribute("aria-sort") == "descending"
    tab.find("#class-table th:nth-child(3) button").click()
    rising = [float(text.rstrip("%")) for text in tab.column(2)]
    assert rising == sorted(rising) and rising[0] < falling[0]
    tab.find("#class-table th:first-child button").click()
    assert tab.column(0) == sorted(tab.column(0))
    # The focus stays on the heading, so that the keyboard can go on sorting.
    tab.press(" ")
    assert tab.find("#class-table th:first-child").get_attribute("aria-sort") == "descending"


def test_names_filter_the_classes(tab: Tab, thousand: Path) -> None:
    tab.open(thousand)
    assert tab.texts("#class-count") == ["40 of 1,000 classes."]
    tab.find("#class-filter").send_keys("OWL")
    assert tab.column(0) and all("owl" in name for name in tab.column(0))
    assert "70 classes found among 1,000" in tab.texts("#class-count")[0]
    tab.find("#class-more").click()
    assert len(tab.column(0)) == 70 and not tab.find("#class-more").is_displayed()
    tab.find("#class-mistakes").click()
    recall = tab.column(5)
    assert 0 < len(recall) < 70 and "100.0%" not in recall


def test_a_thousand_rows_sort_at_once(tab: Tab, thousand: Path) -> None:
    tab.open(thousand)
    while tab.find("#class-more").is_displayed():
        tab.find("#class-more").click()
    assert len(tab.column(0)) == 1000
    code = "const t = performance.now(); arguments[0].click(); return performance.now() - t"
    button = tab.find("#class-table th:nth-child(2) button")
    assert tab.js(code, button) < 500
    ready = tab.js("const [n] = performance.getEntriesByType('navigation'); return n.domComplete - n.startTime")
    assert ready < 3000


def test_the_model_is_chosen_for_all_sections(tab: Tab, thousand: Path) -> None:
    tab.open(thousand)
    before = tab.column(2), tab.texts("#pairs p")
    assert [button.is_selected() for button in tab.driver.find_elements("css selector", "input[value=vit]")] == [
        True
    ] * 2
    tab.js("document.querySelector('.models-switch input[value=clip]').click()")
    assert [button.is_selected() for button in tab.driver.find_elements("css selector", "input[value=clip]")] == [
        True
    ] * 2
    assert tab.column(2) != before[0] and tab.texts("#pairs p") != before[1]
    assert "Confusion matrix of clip" in tab.find("#matrix svg").get_attribute("aria-label")
    assert tab.errors() == []


def test_the_map_is_read_and_zoomed_by_keyboard(tab: Tab, thousand: Path) -> None:
    tab.open(thousand)
    tab.js("document.querySelector('#matrix svg').focus()")
    tab.press("\ue014", "\ue015", "\ue015")
    assert "mistakes" in tab.texts("#matrix-readout")[0] and "…" in tab.texts("#matrix-readout")[0]
    tab.press("\ue007")
    assert "zoomed in" in tab.texts("#matrix-view label")
    assert 12 <= len(tab.texts("#matrix .plot-box text:not(.count, .axis-name)")) / 2 <= 24
    tab.press("\ue015")
    assert "images" in tab.texts("#matrix-readout")[0]
    tab.js("document.querySelector('#matrix-view input[value=confused]').click()")
    assert tab.texts("#matrix .plot-box rect.wrong") and tab.errors() == []


def test_a_cell_shows_its_pictures(tab: Tab, demo: Path) -> None:
    tab.open(demo)
    document = np.load(demo.parent / "confusion_demo-vit.npz")["counts"]
    row, col = next(cell for cell in np.argwhere(document).tolist() if cell[0] != cell[1])
    tab.js("document.querySelector('#matrix svg').focus()")
    tab.press(*["\ue015"] * row, *["\ue014"] * col, "\ue007")
    names = tab.column(0)
    assert f"Label {names[row]}, answer {names[col]}: " in tab.texts("#matrix-readout")[0]
    assert len(tab.texts("#matrix-samples img")) == document[row, col]


def test_wrong_labels_are_ticked_and_saved_as_run_takes_them(tab: Tab, thousand: Path) -> None:
    tab.open(thousand)
    cards = tab.driver.find_elements("css selector", "#mistake-list input")
    assert len(cards) == 24
    for card in (cards[0], cards[2]):
        tab.js("arguments[0].click()", card)
    assert "2 labels ticked as wrong" in tab.texts("#mistake-count")[0]
    tab.find("#mistake-csv").click()
    path = tab.saved("labels-to-correct.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 500
    ticked = [row for row in rows if row["label"]]
    assert [row["label"] for row in ticked] == [row["answer"] for row in ticked] and len(ticked) == 2
    assert load_labels(path) == {row["key"]: row["answer"] for row in ticked}
    tab.find("#mistake-filter").send_keys("no such class")
    assert tab.texts("#mistake-list .card") == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_figure_is_saved_as_svg_and_png(tab: Tab, demo: Path, scheme: str) -> None:
    from PIL import Image

    tab.open(demo, scheme=scheme)
    for path in tab.downloads.iterdir():
        path.unlink()
    models = ("demo-vit", "demo-clip")
    names = ["accuracy", "difference", "confusion-demo-vit"]
    names += [f"{kind}-{model}" for model in models for kind in ("reliability", "confidence")]
    buttons = tab.driver.find_elements("css selector", ".saves button")
    assert len(buttons) == 2 * len(names)
    for place, name in enumerate(names):
        # By the mouse: Chromium drops the eleventh download that no user asked for.
        for button, kind in zip(buttons[2 * place : 2 * place + 2], ("svg", "png"), strict=True):
            tab.js("arguments[0].scrollIntoView({block: 'center'})", button)
            button.click()
            tab.saved(f"{name}.{kind}")
        text = tab.saved(f"{name}.svg").read_text()
        assert text.startswith("<svg") and "var(" not in text
        with Image.open(tab.saved(f"{name}.png")) as image:
            ground = image.convert("RGB").getpixel((1, 1))
            assert image.width >= 500 and (sum(ground) > 384) == (scheme == "light")
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3
    assert tab.errors() == []


def test_hostile_names_and_keys_stay_text(tab: Tab, tmp_path: Path) -> None:
    names = ["</script><img src=x onerror=\"document.title='hit'\">", "<b>b</b>", "a&amp;b", "\u2028", "${x}"]
    key = "<img src=x onerror=\"document.title='hit'\">{}</script>".format
    path = made(tmp_path, names, sizes=[300], key=key, skill=0.5, bad_share=0.05)
    tab.open(path)
    assert tab.errors() == [] and tab.requests() == [path.as_uri()]
    assert tab.column(0) == names
    assert "hit" not in tab.driver.title
    assert not tab.texts("b b, caption img, th img, .key img")


@pytest.mark.parametrize(
    "options", [{"has_labels": False}, {"bad_share": 2.0}, {"is_never_right": True}, {"has_shards": False}]
)
def test_odd_runs_open_cleanly(tab: Tab, tmp_path: Path, options: dict[str, Any]) -> None:
    path = made(tmp_path, class_names(12), sizes=[200], **options)
    tab.open(path, width=375)
    assert tab.errors() == []
    assert tab.js("return document.documentElement.scrollWidth") <= 375


def test_everything_is_named_and_reached_by_keyboard(tab: Tab, demo: Path) -> None:
    tab.open(demo)
    unnamed = """return [...document.querySelectorAll('button, input, select, svg[role], [role=region]')].filter((e) =>
        !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length && e.labels[0].textContent.trim()))
        .map((e) => e.outerHTML)"""
    assert tab.js(unnamed) == []
    assert tab.js("return [...document.querySelectorAll('img')].filter((e) => !e.alt).length") == 0
    assert (
        tab.js(
            "return [...document.querySelectorAll('table')].filter((e) => !e.caption && !e.closest('details')).length"
        )
        == 0
    )
    levels = [int(tag[1]) for tag in tab.js("return [...document.querySelectorAll('h1,h2,h3')].map((e) => e.tagName)")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = tab.js("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    place = "const e = document.activeElement; return e.closest('section')?.id ?? e.className"
    reached = set()
    for _ in range(60):
        tab.press("\ue004")
        reached.add(tab.js(place))
    assert {"models", "comparison", "classes", "confusion"} <= reached


def test_it_prints(tab: Tab, demo: Path) -> None:
    tab.open(demo, scheme="dark")
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert tab.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.find(".controls").is_displayed()
    pdf = tab.driver.execute_cdp_cmd("Page.printToPDF", {})
    assert len(pdf["data"]) > 20_000
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
