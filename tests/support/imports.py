"""List the project's modules, rooms and imports from the sources, including lazy and type-only imports."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDERS = {"vitscore": "vitscore", **{name: f"vitscore.{name}" for name in ("kernels", "shards", "bench")}}
"""Packages by the folder of the checkout that they are installed from."""


def modules(root: Path) -> dict[str, Path]:
    """Return all modules of the project, by dotted name."""
    paths: dict[str, Path] = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            paths[".".join((package, *(inner[:-1] if inner[-1] == "__init__" else inner)))] = path
    return paths


def imported_by(path: Path) -> Iterator[str]:
    """Yield all names that a file imports, anywhere in the file: modules, and `module.name` for names from modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(paths: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return, for every module, the project's modules that it imports; a name from a module counts as the module."""
    return {name: {target for target in targets(paths, path) if target != name} for name, path in paths.items()}


def targets(paths: Mapping[str, Path], path: Path) -> Iterator[str]:
    """Yield the project's modules that a file imports; `from package import module` counts as the module only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in paths)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in paths or node.module in paths:
                    yield inner if inner in paths else str(node.module)


def room_of(name: str, path: Path) -> str:
    """Return a module's room: its folder in `vitscore/`, another top folder, or the module itself at the root."""
    words = name.split(".")
    is_root = len(words) == 1 or (len(words) == 2 and path.name != "__init__.py")
    return words[-1] if is_root else words[1]


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that can reach each other, sorted."""
    reached = {node: reachable(edges, node) for node in edges}
    groups = {frozenset({node, *(o for o in reached[node] if node in reached.get(o, ()))}) for node in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """Return the nodes that can be reached by at least one edge."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in edges.get(waiting.pop(), ()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen
