"""Imports between modules: only from the same floor or a lower one, and never in a circle."""

import ast
import graphlib
import os
from pathlib import Path

ROOT = Path(__file__).parents[2] / "fastnewton"
FLOORS = (
    ("dtypes", "checks", "environment"),
    ("kernels",),
    ("arrays",),
    ("results", "options", "safeguards", "diagnostics"),
    ("decision",),
    ("backends",),
    ("method",),
    ("mpi", "server", "torch"),
    ("config", "__init__", "__main__"),
)


def _sources() -> dict[str, Path]:
    """Find all modules by their names; kernels may be a symbolic link."""
    paths = (Path(folder, file) for folder, _, files in os.walk(ROOT, followlinks=True) for file in files)
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
        if path.suffix == ".py"
    }


SOURCES = _sources()


def _imports(name: str) -> set[str]:
    """List the package's modules that a module imports, wherever in it, functions included."""
    targets = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {member if member in SOURCES else str(node.module) for member in members}
    return targets & set(SOURCES)


def _floor(name: str) -> int:
    part = name.split(".")[1] if "." in name else "__init__"
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def test_no_module_imports_from_a_higher_floor():
    imports = [(name, target) for name in SOURCES for target in _imports(name)]
    assert len(imports) > len(SOURCES)
    assert not [pair for pair in imports if _floor(pair[1]) > _floor(pair[0])]


def test_no_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter({name: _imports(name) for name in SOURCES}).prepare()
