"""Control flow: basic blocks, dominators, and the statements where branches reconverge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .text import Kernel

END = -1  # past the last statement of a program


class Block(NamedTuple):
    """A basic block: statements [first, end)."""

    first: int
    end: int
    next: tuple[int, ...]  # successors: blocks, or END


def target_of(kernel: Kernel, number: int) -> int | None:
    """The target of a branch; None for other statements."""
    statement = kernel.statements[number]
    return kernel.labels[statement.operands[0]] if statement.parts[0] == "bra" else None


def blocks_of(kernel: Kernel) -> list[Block]:
    count = len(kernel.statements)
    ends = {
        number + 1
        for number, statement in enumerate(kernel.statements)
        if statement.parts[0] in ("bra", "ret", "exit")
    }
    firsts = sorted({0, *kernel.labels.values(), *ends} - {count})
    number_of = {first: number for number, first in enumerate(firsts)} | {count: END}
    blocks = []
    for first, end in zip(firsts, [*firsts[1:], count], strict=True):
        last = kernel.statements[end - 1]
        following: list[int] = []
        if last.parts[0] == "bra":
            following.append(number_of[kernel.labels[last.operands[0]]])
        elif last.parts[0] in ("ret", "exit"):
            following.append(END)
        if not following or last.guard is not None:
            following.append(number_of[end])
        blocks.append(Block(first, end, tuple(following)))
    return blocks


def joins_of(kernel: Kernel) -> dict[int, int]:
    """For each branch, by number, the statement where both sides reconverge, or END.

    That is the immediate post-dominator.
    """
    blocks = blocks_of(kernel)
    exit_ = len(blocks)
    following = [[exit_ if n == END else n for n in block.next] for block in blocks]
    meeting = dominators(_reversed(following), exit_)
    joins = {}
    for number, block in enumerate(blocks):
        if kernel.statements[block.end - 1].parts[0] == "bra":
            join = meeting.get(number, exit_)
            joins[block.end - 1] = END if join == exit_ else blocks[join].first
    return joins


def _reversed(following: Sequence[Sequence[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in range(len(following) + 1)]
    for number, targets in enumerate(following):
        for target in targets:
            before[target].append(number)
    return before


def dominators(edges: Sequence[Sequence[int]], root: int) -> dict[int, int]:
    """The immediate dominator of each node that is reachable from ``root``.

    Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm (2001).
    """
    order: list[int] = []
    seen, stack = {root}, [(root, iter(edges[root]))]
    while stack:
        node, targets = stack[-1]
        target = next((t for t in targets if t not in seen), None)
        if target is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(edges[target])))
    order.reverse()
    place = {node: number for number, node in enumerate(order)}
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for target in edges[node]:
            before[target].append(node)
    found = {root: root}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [n for n in before[node] if n in found]
            new = known[0]
            for other in known[1:]:
                new = _common(new, other, found, place)
            changed |= found.get(node) != new
            found[node] = new
    return found


def _common(a: int, b: int, found: dict[int, int], place: dict[int, int]) -> int:
    while a != b:
        while place[a] > place[b]:
            a = found[a]
        while place[b] > place[a]:
            b = found[b]
    return a
