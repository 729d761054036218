"""The report's content: its figures are metrics.json's, its samples are the parts', and nothing can break out of it."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import classification_report, confusion_matrix

from support.reportruns import MadeRun, class_names, jpeg
from vitscore.metrics.fold import refold, write_metrics
from vitscore.report import write_report
from vitscore.report.figures import axis
from vitscore.report.samples import contradictions
from vitscore.report.thumbnails import draw

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "vitscore" / "report"
EVIL = ["</script><img src=x onerror=alert(1)>", '<b>"bold"</b>', "a&amp;b", "\u2028", "${x}", "'); alert(1)"]


class Page(HTMLParser):
    """The texts, attributes and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.words: list[str] = []
        self.html = text
        self._id: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._id = dict(attrs).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._id = None

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self.scripts[self._id] = self.scripts.get(self._id, "") + data
        else:
            self.words.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts["data"])

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(run: MadeRun, **options: Any) -> tuple[Page, Any]:
    folded = refold(run.folder)
    write_metrics(run.folder, folded)
    record = json.loads((run.folder / "run.json").read_bytes())
    return Page(write_report(run.folder, folded, record, **options).path.read_text()), folded


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MadeRun]:
    def made(*sizes: int, classes: Any = 12, **options: Any) -> MadeRun:
        names = class_names(classes) if isinstance(classes, int) else classes
        return MadeRun(tmp_path / "run", names, **options).write(sizes or (150, 90))

    return made


def test_class_figures_are_metrics_jsons_and_scikit_learns(make: Callable[..., MadeRun]) -> None:
    run = make(bad_share=0.1)
    page, folded = report(run)
    labels = np.array(run.labels)
    for name in run.models:
        counted = labels >= 0
        preds = np.array(run.preds[name])[counted]
        wanted = classification_report(
            labels[counted], preds, labels=range(12), target_names=run.classes, output_dict=True, zero_division=0
        )
        shown = page.data["models"][name]
        for key, figure in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert shown[key] == pytest.approx([wanted[label][figure] for label in run.classes], abs=1e-6)
            assert shown[key] == pytest.approx(
                [folded.document["models"][name]["report"][label][figure] for label in run.classes], abs=1e-6
            )
        assert shown["support"] == [wanted[label]["support"] for label in run.classes]


def test_the_heat_map_is_the_confusion_matrix(make: Callable[..., MadeRun]) -> None:
    run = make()
    page, _ = report(run)
    labels = np.array(run.labels)
    for name in run.models:
        shown = page.data["models"][name]
        matrix = np.diag(shown["right"])
        for row, col, count in np.array(shown["cells"]).reshape(-1, 3):
            matrix[row, col] = count
        assert (matrix == confusion_matrix(labels, run.preds[name], labels=range(12))).all()
        assert shown["hidden"] == 0
        counts = shown["cells"][2::3]
        assert counts == sorted(counts, reverse=True)


def test_confused_pairs_show_samples_of_that_pair(make: Callable[..., MadeRun]) -> None:
    run = make(400, 300, skill=2.0)
    page, _ = report(run)
    data = page.data
    for place, name in enumerate(run.models):
        pairs = data["pairs"][name]
        assert len(pairs) == 12
        assert [pair[2] for pair in pairs] == sorted((pair[2] for pair in pairs), reverse=True)
        for truth, pred, count, support, numbers in pairs:
            assert truth != pred and count <= support == run.labels.count(truth)
            assert len(numbers) == min(count, 6)
            samples = [data["samples"][number] for number in numbers]
            assert all(sample[2] == truth and sample[4][place][0] == pred for sample in samples)
            surest = [sample[4][place][1] for sample in samples]
            assert surest == sorted(surest, reverse=True)


def test_confident_mistakes_are_ranked_and_right_about_the_parts(make: Callable[..., MadeRun]) -> None:
    run = make(400, skill=2.0)
    data = report(run)[0].data
    scores = [score for _, _, score in data["mistakes"]]
    assert scores == sorted(scores, reverse=True)
    keys = {f"img-{row:06d}": row for row in range(400)}
    num_wrong = sum(any(run.preds[name][row] != run.labels[row] for name in run.models) for row in range(400))
    assert len(scores) == num_wrong
    for number, answer, _ in data["mistakes"]:
        key, _, label, _, answers = data["samples"][number]
        assert label == run.labels[keys[key]] != answer
        assert [pred for pred, _, _ in answers] == [run.preds[name][keys[key]] for name in run.models]


def test_an_answer_of_all_models_weighs_more() -> None:
    label, sure = np.zeros(3, int), np.array([0.9, 0.9, 0.9])
    preds = {"a": np.array([1, 1, 0]), "b": np.array([1, 2, 0])}
    answer, score = contradictions(label, preds, {"a": sure, "b": sure})
    assert answer.tolist() == [1, 1, -1]
    assert score == pytest.approx([0.9, 0.45, 0.0])


def test_disagreements_are_of_the_side_they_stand_on(make: Callable[..., MadeRun]) -> None:
    data = report(make(300, skill=1.5))[0].data
    (entry,) = data["disagreements"]
    assert (entry["a"], entry["b"]) == ("vit", "clip")
    for side, right in (("only_a", 0), ("only_b", 1)):
        assert entry[side]
        for number in entry[side]:
            _, _, label, _, answers = data["samples"][number]
            assert answers[right][0] == label != answers[1 - right][0]


def test_the_headline_is_the_conclusion_that_the_numbers_support(make: Callable[..., MadeRun]) -> None:
    from vitscore.metrics.pairs import conclusion

    page, folded = report(make())
    said = conclusion(folded.document["comparisons"][0])
    assert said.lower().split(" (")[0] in page.text.lower()


def test_three_models_have_every_pair_with_holms_p(make: Callable[..., MadeRun]) -> None:
    page, folded = report(make(models=("a", "b", "c")))
    assert len(folded.document["comparisons"]) == 3
    for pair in ("a and b", "a and c", "b and c"):
        assert pair in page.text
    assert "Holm" in page.text
    rows = page.html.split('aria-label="Table of comparisons"')[1].split("</table>")[0].split("<tr>")[1:]
    assert len(rows) == 4 and len({row.count("</t") - row.count("</tr") - row.count("</tb") for row in rows[1:]}) == 1


def test_figures_that_a_newer_fold_adds_are_shown(make: Callable[..., MadeRun]) -> None:
    run = make()
    folded = refold(run.folder)
    found = folded.document["models"]["vit"]["report"]
    groups = {"classes": ["birds"], "report": {"birds": {**found[run.classes[0]], "f1-score": 0.4321, "support": 77.0}}}
    folded.document["models"]["vit"] |= {"micro": {"f1-score": 0.1234}, "groups": groups}
    folded.document["comparisons"][0] |= {"macro_f1_difference": 0.0777, "macro_f1_difference_ci": [0.01, 0.1]}
    record = json.loads((run.folder / "run.json").read_bytes()) | {"parity": {"pixels": {"mean": 0.21}}}
    text = Page(write_report(run.folder, folded, record).path.read_text()).text
    for shown in ("12.34%", "43.2%", "birds", "7.8 1.0 to 10.0", "parity", "pixels.mean"):
        assert shown in text


def test_nothing_is_asked_of_a_network(make: Callable[..., MadeRun]) -> None:
    page, _ = report(make())
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object") or attributes.get("href") == "data:,"
        for name in ("src", "href", "action", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    style = "".join((REPORT / name).read_text() for name in ("page.css", "figure.css"))
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data: blob:;")


def test_names_and_keys_cannot_break_out(make: Callable[..., MadeRun]) -> None:
    key = "<img src=x onerror=alert({})></script>".format
    page, _ = report(make(classes=EVIL, key=key, skill=1.0, bad_share=0.1))
    assert page.data["classes"] == EVIL
    assert key(0) in [sample[0] for sample in page.data["samples"]] or page.data["samples"]
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_shards_that_are_gone_cost_the_pictures_alone(make: Callable[..., MadeRun], tmp_path: Path) -> None:
    run = make()
    full, _ = report(run)
    (tmp_path / "run-shards" / "s-1.tar").unlink()
    part, _ = report(run)
    assert "s-1.tar (not found)" in part.text
    assert 0 < sum(sample[3] is not None for sample in part.data["samples"]) < len(part.data["samples"])
    assert [sample[:3] for sample in part.data["samples"]] == [sample[:3] for sample in full.data["samples"]]
    assert part.data["models"] == full.data["models"]


def test_a_shard_that_has_changed_gives_no_wrong_picture(make: Callable[..., MadeRun], tmp_path: Path) -> None:
    run = make(150, 90)
    shards = tmp_path / "run-shards"
    (shards / "s-0.tar").write_bytes((shards / "s-1.tar").read_bytes())
    page, _ = report(run)
    assert "s-0.tar (has changed)" in page.text
    assert not [sample for sample in page.data["samples"] if sample[1].endswith("s-0.tar") and sample[3]]


def test_shards_that_have_moved_are_found(make: Callable[..., MadeRun], tmp_path: Path) -> None:
    run = make()
    (tmp_path / "run-shards").rename(tmp_path / "moved")
    assert "not found" in report(run)[0].text
    page, _ = report(run, shards=[str(tmp_path / "moved")])
    assert all(page.data["samples"][number][3] for number, _, _ in page.data["mistakes"][:20])
    assert "not found" not in page.text


def test_without_labels_the_report_says_so(make: Callable[..., MadeRun]) -> None:
    page, _ = report(make(has_labels=False))
    assert "No sample has a label: 240 images predicted, nothing to measure them by" in page.text
    assert "240 without a label" in page.text
    assert "Macro F1" not in page.text and page.data["mistakes"] == []


def test_one_class_one_model(make: Callable[..., MadeRun]) -> None:
    page, _ = report(make(classes=["cat"], models=("lone",)))
    assert "lone is right on 100.0% of 240 images" in page.text
    assert page.data["models"]["lone"]["cells"] == []


def test_no_correct_answer(make: Callable[..., MadeRun]) -> None:
    page, folded = report(make(is_never_right=True))
    assert folded.document["models"]["vit"]["accuracy"] == 0
    assert "On 0 images both models are right" in page.text


def test_all_bad(make: Callable[..., MadeRun]) -> None:
    page, _ = report(make(bad_share=2.0))
    assert "None of the 240 samples could be scored" in page.text
    assert "undecodable image" in page.text and "no image: got txt" in page.text


@pytest.mark.parametrize("sizes", [(), (0,)])
def test_nothing_scored_at_all(make: Callable[..., MadeRun], tmp_path: Path, sizes: tuple[int, ...]) -> None:
    run = MadeRun(tmp_path / "run", class_names(3)).write(sizes)
    page, _ = report(run)
    assert "nothing to report" in page.text or "hold no samples" in page.text


def test_an_unfinished_run_says_how_far_it_is(make: Callable[..., MadeRun]) -> None:
    run = make()
    next((run.folder / "parts").glob("0000001-*")).unlink()
    page, _ = report(run)
    assert "The run is not finished: 1 of 2 shards are done." in page.text


def test_classes_without_images_are_told_beside_the_averages(make: Callable[..., MadeRun]) -> None:
    page, folded = report(make(20, classes=60))
    present = folded.document["models"]["vit"]["num_classes_in_truth"]
    assert f"Only {present} of 60 classes occur among the labels." in page.text
    assert "Macro F1, classes that occur" in page.text


def test_a_report_of_a_thousand_classes_is_small(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", class_names(1000)).write([4000])
    report(run)
    assert (run.folder / "report.html").stat().st_size < 2_000_000


def test_the_same_run_gives_the_same_report(make: Callable[..., MadeRun]) -> None:
    run = make()
    report(run)
    first = (run.folder / "report.html").read_bytes()
    report(run)
    assert (run.folder / "report.html").read_bytes() == first


def test_pictures_are_small_turned_and_never_an_error() -> None:
    uri = draw(jpeg(3, 1), max_pixels=10**6)
    assert uri is not None and uri.startswith("data:image/webp;base64,") and len(uri) < 6000
    assert draw(b"no image", max_pixels=10**6) is None
    assert draw(jpeg(3, 1)[:300], max_pixels=10**6) is None
    assert draw(jpeg(3, 1), max_pixels=100) is None


def test_the_command_writes_it_where_it_is_told(make: Callable[..., MadeRun], vitscore: Any, tmp_path: Path) -> None:
    run = make()
    done = vitscore("report", run.folder, "-o", tmp_path / "there.html")
    assert done.code == 0, done.err
    assert done.out.startswith(f"written to {tmp_path / 'there.html'}: ")
    assert not (run.folder / "report.html").exists()
    done = vitscore("report", run.folder, "--no-thumbnails")
    assert done.code == 0 and ", 0 pictures" in done.out
    assert vitscore("report", tmp_path / "none").code == 2
    assert vitscore("report", run.folder, "-o", tmp_path / "no" / "folder.html").code == 4


def test_a_run_ends_with_its_report(vitscore: Any, tmp_path: Path) -> None:
    done = vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out", "--limit", 60)
    assert done.code == 0, done.err
    assert "report.html" in done.out
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "demo-vit is right on" in page.text
    assert vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out", "--limit", 60, "--overwrite").code == 0


def test_a_report_that_fails_costs_no_result(vitscore: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr("vitscore.report.write_report", fail)
    done = vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out", "--limit", 20)
    assert done.code == 0 and "report.html was not made (ValueError: on purpose)" in done.out
    assert (tmp_path / "out" / "metrics.json").exists()


def tokens(style: str) -> list[dict[str, str]]:
    """The colours of each scheme, in the order of the style sheet; a later one inherits from the first."""
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    return [{**blocks[0], **block} for block in blocks]


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_every_text_has_contrast_enough_in_every_scheme(scheme: int) -> None:
    colours = tokens((REPORT / "page.css").read_text())[scheme]
    for text in ("ink", "muted", "link"):
        for ground in ("paper", "raised", "cell", "notes"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("right", "wrong", "m0", "m1", "m2", "m3", "m4", "m5"):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark


def test_axes_hold_their_values_and_have_round_ticks() -> None:
    scale = axis(0.9795, 0.997, start=0, stop=100)
    assert scale.low <= 0.9795 and scale.high >= 0.997 and len(scale.ticks) <= 7
    assert scale(scale.low) == 0 and scale(scale.high) == 100


def test_the_report_imports_no_torch(start: Any, make: Callable[..., MadeRun]) -> None:
    import sys

    run = make()
    code = f"import sys, vitscore.cli.main; assert vitscore.cli.main.main(['report', {str(run.folder)!r}]) == 0\n"
    code += "assert not {'torch', 'transformers', 'nvidia.dali'} & {*sys.modules}"
    done = start(sys.executable, "-c", code)
    assert done.code == 0, done.err


def test_the_files_of_the_page_are_in_the_package() -> None:
    sources = (REPORT / "page.py").read_text() + (ROOT / "vitscore" / "robustness" / "html.py").read_text()
    named = set(re.findall(r'"([\w.-]+\.(?:css|js))"', sources))
    assert named == {path.name for path in REPORT.iterdir() if path.suffix in (".css", ".js")}
    texts = [path for path in REPORT.rglob("*") if path.suffix in (".py", ".html", ".css", ".js")]
    assert all(len(path.read_text().splitlines()) < 400 for path in texts)
