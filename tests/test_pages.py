"""Every page is laid out by templates: outside names are escaped, and no Python file writes markup."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from support.reportruns import MadeRun
from vitscore.metrics.fold import refold
from vitscore.report import write_report
from vitscore.report.templating import environment
from vitscore.robustness.grid import GridCounts, make_document
from vitscore.robustness.html import render

ROOT = Path(__file__).parent.parent
HOSTILE = ["</script><script>alert(1)", "\"><img src=x on='1'>", "{{ 7*7 }}", "{% raw %}", "</b>", "&lt;", "' on='"]
TAG = re.compile(
    r"<!doctype|</?(?:a|article|aside|b|body|br|button|caption|circle|code|col|dd|details|div|dl|dt|em|figcaption|figure"
    r"|footer|form|g|h[1-6]|head|header|html|i|img|input|label|legend|li|line|link|main|meta|nav|ol|option|p|path|polygon"
    r"|polyline|pre|rect|script|section|select|small|span|strong|style|sub|summary|sup|svg|table|tbody|td|text|tfoot|th"
    r"|thead|title|tr|tspan|ul)(?=[\s/>])",
    re.IGNORECASE,
)


class Skeleton(HTMLParser):
    """A page's tags with the names of their attributes; and its texts, attributes' values and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.texts += [value for _, value in attrs if value]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def harmless(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9 ]", "x", text)


def same(text: str) -> str:
    return text


def report_page(folder: Path, changed: Callable[[str], str]) -> str:
    """A report in which every name, key and recorded text is one of the hostile ones, changed."""
    names = [changed(name) for name in HOSTILE]
    models = [changed("</script><b>{{ 7*7 }}"), changed("\"'{% if %}")]
    run = MadeRun(folder / "run", names, models, lambda row: changed(f"<i>{{{{ 7*7 }}}}</i>{row}"), bad_share=0.1)
    run.write((150,))
    record = json.loads((run.folder / "run.json").read_bytes())
    record["versions"] |= {changed("<u>"): changed("</table>")}
    record["choices"] |= {changed("<s>"): {"value": changed("</td>"), "reason": changed("</html>")}}
    record |= {f"zz{changed('<h1>')}": {changed("<tt>"): changed("</section>")}}
    return write_report(run.folder, refold(run.folder), record).path.read_text()


def robustness_page(_: Path, changed: Callable[[str], str]) -> str:
    models, grid = [changed(name) for name in HOSTILE[:3]], {"contrast": [1, 2], "hue": [1, 2]}
    counts = GridCounts(models, grid, is_bad_wrong=False)
    rng = np.random.default_rng(0)
    columns = {name: ["ok"] * 50 if name == "status" else rng.integers(0, 3, 50) for name in counts.columns()}
    counts.update(pa.record_batch(columns))
    document = make_document(counts, baseline=None, seed=0)
    for operator in document["operators"].values():
        operator |= {"does": changed("</svg><b>"), "source": changed("<a>")}
    return render(document, {"": b"png", "@hue:2": b"png"})


@pytest.mark.parametrize("make", [report_page, robustness_page])
def test_no_outside_name_changes_the_markup(make: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    page = make(tmp_path, same)
    hostile, plain = Skeleton(page), Skeleton(make(tmp_path / "plain", harmless))
    assert hostile.tags == plain.tags
    assert len(hostile.tags) > 100
    texts = "\n".join(hostile.texts)
    in_report = ["</script><b>{{ 7*7 }}", "<i>{{ 7*7 }}</i>", "</table>", "</td>", "</section>"]
    assert all(name in texts for name in (in_report if make is report_page else HOSTILE[:3]))
    assert "<script>alert" not in page and "<img src=x" not in page


def test_class_names_reach_the_script_as_they_are(tmp_path: Path) -> None:
    page = report_page(tmp_path, same)
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["classes"] == HOSTILE
    assert not set("<>&") & set(data)


def test_every_template_is_strict_and_escapes() -> None:
    made = environment()
    names = {path.name for path in (ROOT / "vitscore" / "report" / "templates").iterdir()}
    assert set(made.list_templates()) == names and len(names) > 10
    for name in names:
        made.get_template(name)
        source = (ROOT / "vitscore" / "report" / "templates" / name).read_text()
        assert not re.search(r"\|\s*safe|autoescape", source), name
    assert made.from_string("{{ name }}").render(name="<b>") == "&lt;b&gt;"
    with pytest.raises(Exception, match="'nothing' is undefined"):
        made.from_string("{{ nothing }}").render()


def markup_in(source: str) -> Iterator[str]:
    """String literals with HTML or SVG in them, docstrings aside."""
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            if TAG.search(node.value):
                yield f"line {node.lineno}: {node.value}"


def test_markup_is_written_by_templates_alone() -> None:
    paths = [path for folder in ("vitscore", "kernels", "shards") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert {path.name: lines for path in paths if (lines := list(markup_in(path.read_text())))} == {}
    planted = 'def cell(x):\n    """A <td>."""\n    return f"<td class={x}>" + \'<line x1="\' + "a < b </w> <NAME>"\n'
    assert len(list(markup_in(planted))) == 2


@pytest.mark.parametrize(
    "code",
    [
        "from vitscore.cli.main import main; assert main(['--help']) == 0 and main(['run', '--help']) == 0",
        "import vitscore.run.run, vitscore.run.finish, vitscore.report, vitscore.robustness.grid, vitscore.api",
    ],
)
def test_jinja_is_imported_only_to_write_a_page(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'jinja2' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
