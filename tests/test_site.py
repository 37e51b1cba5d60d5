"""The documentation site has every page, and its API reference every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from test_names import resolve

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def in_the_reference() -> list[str]:
    """What the pages of the API reference document."""
    pages = sorted((DOCS / "api").glob("*.md"))
    return [name for page in pages for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))]


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r": (docs/\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted(str(p.relative_to(ROOT)) for p in DOCS.rglob("*.md"))


def test_every_name_of_the_reference_exists():
    names = in_the_reference()
    assert len(names) == len(set(names)) > 40
    for name in names:
        resolve(name)


@pytest.mark.parametrize(
    "package", ["vlmo", "vlmo.kernels", "vlmo.integrations", "vlmo.data", "vlmo.training"]
)
def test_every_public_name_is_in_the_reference(package):
    documented = {name.rpartition(".")[2]: resolve(name) for name in in_the_reference()}
    module = importlib.import_module(package)
    for name in module.__all__:
        assert documented.get(name) is getattr(module, name), f"{package}.{name}"
