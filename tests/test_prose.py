"""Docstrings read at once: no headless "What ..." and none of the words that hide the subject."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.imports import modules

ROOT = Path(__file__).parent.parent
HIDING = re.compile(r"^What\b|\b(told|stands|whatever|nobody|of its own)\b", re.I)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Every docstring and every string under a field, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(child, ast.Expr) and isinstance(getattr(child.value, "value", None), str):
                yield child.lineno, child.value.value


def test_no_docstring_hides_its_subject() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in modules(ROOT).values()
        for line, text in docstrings(path)
        if (match := HIDING.search(text))
    ]
    assert found == []


def test_the_map_names_files_and_rooms_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.(?:py|html))`", text))
    assert len(named) > 30
    assert [name for name in named if not any((folder / name).is_file() for folder in (ROOT, ROOT / "vitscore"))] == []
    rooms = set(re.findall(r"^\| `vitscore/(\w+)/` \|", text, re.M))
    assert rooms == {path.name for path in (ROOT / "vitscore").iterdir() if (path / "__init__.py").is_file()}
