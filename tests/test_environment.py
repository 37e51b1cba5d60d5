"""docs/environment.md lists the environment variables that the code reads, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "vlmo", "benchmarks", "csrc", "tests")
SOURCES = [ROOT / "setup.py", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")))]
METHODS = ("get", "pop", "setdefault")
OF_ANY_PROGRAM = {"PATH"}


def read_by(path: Path) -> Iterator[str]:
    """Names of the variables that a Python file asks for or sets.

    A name is a literal, a constant of the module, or runs through a tuple of literals.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = literals(node.value)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            known[node.target.id] = literals(node.iter)
    for node in ast.walk(tree):
        for name in asked(node):
            found = known.get(name.id, []) if isinstance(name, ast.Name) else literals(name)
            assert found, f"{path.name}, line {name.lineno}: which variable is read?"
            yield from found


def literals(node: ast.AST) -> list[str]:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    return [value for value in values if isinstance(value, str)]


def asked(node: ast.AST) -> list[ast.expr]:
    """The expressions that name a variable in os.environ[x], os.environ.get(x), x in os.environ."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
        return [node.slice]
    if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
        return [node.left]
    if isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func)
        if called == "os.getenv" or called in [f"os.environ.{method}" for method in METHODS]:
            return [node.args[0]]
    return []


def on_the_page() -> set[str]:
    """Names in the first column of the page's tables."""
    lines = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([A-Z_0-9]+)`", cell)}


@pytest.fixture(scope="module")
def read() -> set[str]:
    """All that Python code reads, and what the Makefile takes from the environment."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = {name for path in SOURCES for name in read_by(path)}
    return (names | set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))) - OF_ANY_PROGRAM


def test_what_is_read_is_on_the_page(read):
    assert {"VLMO_KERNELS", "OMP_NUM_THREADS", "PYTEST_ARGS"} <= read
    assert sorted(read - on_the_page()) == []


def test_what_is_on_the_page_is_read(read):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    given = set(re.findall(r"\$\(([A-Z_]+)\)|\$\(if \$\(([A-Z_]+)\)", makefile))
    assert sorted(on_the_page() - read - {name for pair in given for name in pair}) == []


def test_shell_and_c_plus_plus_read_no_other():
    """Variables of the project by their prefix; macros and variables of CMake have it too."""
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks").glob("*.sh")]
    texts += [p.read_text(encoding="utf-8") for p in (ROOT / "csrc").rglob("*.cpp")]
    names = {name for text in texts for name in re.findall(r"(?:\$\{?|getenv\(\")(VLMO_\w+)", text)}
    names |= {name for text in texts for name in re.findall(r"\b(VLMO_\w+)=", text)}
    assert sorted(names - on_the_page()) == []


def test_how_a_name_is_found(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("X = 'A'\nos.environ[X]\nfor y in ('B', 'C'):\n    os.environ.get(y)\n")
    assert sorted(read_by(path)) == ["A", "B", "C"]
    path.write_text("'D' in os.environ\nos.getenv(unknown)")
    with pytest.raises(AssertionError, match=r"program\.py, line 2: which variable is read"):
        list(read_by(path))
