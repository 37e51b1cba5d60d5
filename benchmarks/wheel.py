"""Prints the newest wheel of vlmo in a folder that is compatible with the running Python.

    python benchmarks/wheel.py FOLDER

Exits with status 2 and a message if there is none.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.tags import Tag, sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename


def choose(folder: Path, supported: Sequence[Tag]) -> Path:
    """The newest wheel of vlmo that has one of the ``supported`` tags, in order of preference.

    Raises:
        LookupError: there is none; the message lists the existing and the supported tags.
    """
    fitting, others = [], []
    rank = {tag: -place for place, tag in enumerate(supported)}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, build, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            others.append(path.name)
            continue
        if name != "vlmo":
            continue
        if tags & rank.keys():
            fitting.append((version, build, max(rank[tag] for tag in tags & rank.keys()), path))
        else:
            others.append(path.name)
    if fitting:
        return max(fitting)[-1]
    python = f"Python {platform.python_version()} ({supported[0]})"
    there = ", ".join(others) or "no wheel of vlmo"
    raise LookupError(f"{folder}: no wheel fits {python}; there is {there}")


def main() -> int:
    try:
        print(choose(Path(sys.argv[1]), list(sys_tags())))
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
