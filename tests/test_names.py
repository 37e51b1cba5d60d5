"""Names of Python objects in the documentation and in docstrings exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vlmo

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
SOURCES = [p for folder in ("vlmo", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
OF_OTHERS = {"metrics.py"}  # of the NLVR2 data set
DOTTED = re.compile(r"(?<![\w./-])vlmo(?:\.[A-Za-z_]\w*)+(\()?")
FILE = re.compile(r"`((?:[\w.]+/)+[\w.]+\.(?:py|cuh?|cpp|md|toml|txt))`")
BARE_FILE = re.compile(r"`(\w+\.(?:py|cuh?|cpp))`")
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data):`~?([\w.]+)`")


def resolve(name: str) -> object:
    """What a dotted name stands for: attributes of the longest prefix that is a module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = _member(found, part)
        return found
    raise AttributeError(name)


def _member(owner: object, name: str) -> object:
    """An attribute, or a field that has an annotation only."""
    for one in owner.__mro__ if isinstance(owner, type) else ():
        if name in inspect.get_annotations(one):
            return one
    return getattr(owner, name)


def as_written(name: str) -> object:
    """The same by attributes alone, as code does it once the modules have been imported."""
    resolve(name)
    found: object = vlmo
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, messages and help texts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def module_of(path: Path) -> ModuleType:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "vlmo")
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda p: str(p.relative_to(ROOT)))
def test_dotted_names(path):
    texts = [(0, path.read_text())] if path.suffix == ".md" else strings(path)
    for line, text in texts:
        for match in DOTTED.finditer(text):
            name = match[0].rstrip("(")
            try:
                (as_written if match[1] else resolve)(name)
            except AttributeError as error:
                pytest.fail(f"{path.name}, from line {line}: {name}: {error}")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_roles(path):
    """``:func:`name``` and its like: of the package, of the module, or a member of its classes."""
    for line, text in strings(path):
        for name in ROLE.findall(text):
            first, *rest = name.split(".")
            if first in ("vlmo", "torch"):
                resolve(name)
                continue
            module = module_of(path)
            classes = [c for c in vars(module).values() if isinstance(c, type)]
            owners = [owner for owner in (module, *classes) if _has(owner, first)]
            assert owners, f"{path.name}, from line {line}: {name}"
            found = _member(owners[0], first)
            for part in rest:
                found = _member(found, part)


def _has(owner: object, name: str) -> bool:
    try:
        _member(owner, name)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_paths(path):
    """Files of the repository that a page names."""
    for name in FILE.findall(path.read_text()):
        places = (ROOT, ROOT / "docs", ROOT / "csrc")
        assert any((place / name).exists() for place in places), f"{path.name}: {name}"
    folders = ("kernels", "vlmo", "csrc", "tests", "benchmarks")
    known = {p.name for folder in folders for p in (ROOT / folder).rglob("*.*")}
    known |= {p.name for p in ROOT.iterdir()}
    for name in BARE_FILE.findall(path.read_text()):
        assert name in known or name in OF_OTHERS, f"{path.name}: {name}"
