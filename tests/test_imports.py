"""Modules import only from lower layers, without cycles; there are no duplicate blocks of code."""

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the bottom up: a module may import its own group and the groups of the lines before.
LAYERS = [
    ["vlmo"],
    ["vlmo.kernels"],
    ["vlmo.integrations"],
    ["vlmo.files", "vlmo.device", "vlmo.testing"],
    ["vlmo.distributed", "vlmo.plotting"],
    ["vlmo.model"],
    ["vlmo.checkpoint", "vlmo.data"],
    ["vlmo.tasks", "vlmo.inputs"],
    ["vlmo.run_folder"],
    ["vlmo.training", "vlmo.predictor"],
    ["vlmo.demo"],
    ["vlmo.commands"],
    ["vlmo.__main__"],
]
# from_checkpoint of a model, a shorthand for load_checkpoint, imports it when it is called.
UPWARD = {
    ("vlmo.model.vlmo", "vlmo.checkpoint.io"),
    ("vlmo.model.beit3", "vlmo.checkpoint.io"),
    ("vlmo.model.beit3", "vlmo.checkpoint.beit3"),
}

BLOCK = 10  # lines that are not blank
# Files that share a block of them, and what it is.
REPEATED = {
    ("kernels/attention/triton/backward.py", "kernels/attention/triton/forward.py"): (
        "what begins a kernel, which Triton cannot return from a function"
    ),
    ("kernels/attention/triton/bias_gradient.py",): "arguments of two kernels",
    ("kernels/moe_ffn/triton/backward_rows.py",): "arguments of two kernels",
    ("kernels/moe_ffn/triton/backward_rows.py", "kernels/moe_ffn/triton/forward.py"): (
        "arguments of two kernels"
    ),
}


def files() -> dict[str, Path]:
    """Source files by the names of their modules; vlmo/kernels is a link to kernels/."""
    found = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "vlmo").rglob("*.py")]
    named = {}
    for path in found:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] != ("vlmo", "kernels"):
            parts = ("vlmo", *parts) if parts[0] == "kernels" else parts
            named[".".join(parts).removesuffix(".__init__")] = path
    return named


FILES = files()


def imported(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, at its top or in a function."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (
                found for name in names if (found := name if name in FILES else base) in FILES
            )


ARROWS = {(module, other) for module in FILES for other in imported(module)} - UPWARD


def test_no_circle_of_imports():
    graph = defaultdict(set)
    for module, other in ARROWS:
        if module != other:
            graph[module].add(other)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_no_import_of_what_lies_above():
    height = {group: number for number, groups in enumerate(LAYERS) for group in groups}
    group = {module: ".".join(module.split(".")[:2]) for module in FILES}
    assert set(group.values()) <= height.keys()
    upward = [
        f"{module} imports {other}"
        for module, other in sorted(ARROWS)
        if group[module] != group[other] and height[group[module]] <= height[group[other]]
    ]
    assert not upward


def test_no_block_of_code_stands_twice():
    places = defaultdict(list)
    for path in FILES.values():
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        for start in range(len(lines) - BLOCK + 1):
            block = tuple(lines[start : start + BLOCK])
            places[block].append(str(path.relative_to(ROOT)))
    repeated = {
        tuple(sorted({one, other}))
        for found in places.values()
        for one, other in itertools.combinations(found, 2)
    }
    assert repeated <= REPEATED.keys()
