"""The snippets of docs/integrations run with a tiny model."""

import re
from pathlib import Path
from typing import Any

import pytest

from tiny_models import LAYERS, MODELS
from vlmo.integrations import Handle

FOLDER = Path(__file__).parents[2] / "docs" / "integrations"
PAGES = {"overview": "torchscale"} | {name: name for name in MODELS}


def test_every_page_is_run():
    assert {path.stem for path in FOLDER.glob("*.md")} == PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_page(page, monkeypatch):
    name = PAGES[page]
    removed: list[Handle] = []
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```", (FOLDER / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    monkeypatch.setattr(Handle, "remove", lambda handle: removed.append(handle))
    space: dict[str, Any] = {"model": MODELS[name].make()}
    exec(compile(snippet, page, "exec"), space)
    handle = space["handle"]
    assert f"apply_to_{name}" in space
    assert removed == ([handle] if page == "overview" else [])
    assert len({layer for _, layer, _, _ in handle._replaced}) == LAYERS
