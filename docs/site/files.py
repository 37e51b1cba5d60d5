"""MkDocs hook: files lie on the site where they lie in the repository, so that links fit both.

The site holds the pages of the navigation and, page by page, every file that they link to.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset|href)=\"([^\"#]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files of the theme, and those of the repository that can be reached."""
    root = Path(config.config_file_path).parent
    found = Files([file for file in files if file.src_dir != config.docs_dir])
    waiting = list(_pages(config.nav))
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        source = root / name
        if not source.is_file():
            continue  # MkDocs itself says where it is missed
        found.append(File.generated(config, name, abs_src_path=str(source)))
        for link in _links(source) if source.suffix == ".md" else ():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
            if target not in seen and not target.startswith(".."):
                seen.add(target)
                waiting.append(target)
    return found


def _pages(nav: Any) -> Iterator[str]:
    """The names of files in a navigation."""
    for item in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(item, str):
            yield item
        else:
            yield from _pages(item)


def _links(page: Path) -> Iterator[str]:
    """Relative links in Markdown and in HTML, outside of code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if "://" not in link and not link.startswith(("mailto:", "/")):
            yield link
