"""The project's modules, rooms and imports, read as text: lazy and type-only imports count like any other."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDERS = {"vitscore": "vitscore", **{name: f"vitscore.{name}" for name in ("kernels", "shards", "bench")}}
"""Folders of the checkout, and the package that each is installed as."""


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    found: dict[str, Path] = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *(inner[:-1] if inner[-1] == "__init__" else inner)))] = path
    return found


def imported_by(path: Path) -> Iterator[str]:
    """Every name that a file imports, wherever in the file: modules, and `module.name` for names out of modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """For every module the project's modules that it imports; a name out of a package's module counts as that one."""
    return {name: {each for each in targets(found, path) if each != name} for name, path in found.items()}


def targets(found: Mapping[str, Path], path: Path) -> Iterator[str]:
    """The modules that a file imports; of `from package import module` the module alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in found)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in found or node.module in found:
                    yield inner if inner in found else str(node.module)


def room_of(name: str, path: Path) -> str:
    """The room of a module: a folder of `vitscore/`, one of the other top folders, or a module at the root itself."""
    words = name.split(".")
    is_root = len(words) == 1 or (len(words) == 2 and path.name != "__init__.py")
    return words[-1] if is_root else words[1]


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, sorted."""
    reached = {node: reachable(edges, node) for node in edges}
    groups = {frozenset({node, *(o for o in reached[node] if node in reached.get(o, ()))}) for node in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """The nodes that a path of at least one edge leads to."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in edges.get(waiting.pop(), ()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen
