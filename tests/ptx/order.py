"""Static check on PTX that programs of one launch read each other's data only after a wait.

The moe_ffn kernels communicate between the programs of a launch. The producer stores its data,
synchronises its CTA with a barrier, and increments a counter with an atomic of release order. The
consumer reads the counter with acquire order until it is high enough, synchronises its CTA, and
only then loads. This depends on the position of a few instructions: a compiler that moves one of
them breaks it without an error. :func:`check` follows every path through the basic blocks and
reports accesses that may happen in the wrong order. A kernel must meet three conditions:

* Every path to a load of such data, since the ticket of this work was taken, contains the acquire,
  a barrier, and the edge of a branch on which the counter was high enough, in this order.
* Every store of such data is followed by a barrier and then by the release, before the next ticket.
* The load is coherent. After an acquire and a barrier a weak load is coherent with any cache
  operator: PTX defines .ca, .cg and the like as performance hints, and cp.async reads as a weak
  load does. A load with .nc is not coherent, and a copy of a tile (cp.async.bulk.tensor), which the
  async proxy executes, needs a proxy fence behind the acquire and the barrier.

The data and the counter that an address refers to are derived from the code: from the kernel
parameters that its registers are computed from. A copy of a tile refers to the data whose address
the program has put into its descriptor.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from .flow import END, blocks_of, joins_of
from .text import Kernel, Statement, Unsupported, split

COUNTERS, BOUND = "COUNTERS", "bound"
_COUNTER_BYTES = 4
_CELL, _ACQUIRE = "shared memory at", "the acquire itself"
MANY_STATES = 5000  # of a block; more mean that there are too many branches to follow


class Channel(NamedTuple):
    """Data that programs pass to each other, and the counter that signals its completion.

    Attributes:
        data: the kernel's parameters that point to it.
        bounds: offset of the channel's counters from the first ones, in units of ``bound``.
        at: byte offset of the only counter; None if each row tile or share has one.
        last: the program that makes the last increment continues, and none waits; else consumers
            wait until the counter is high enough.
        optional: not every variant of the kernel has the parameters.
    """

    data: tuple[str, ...]
    bounds: int = 0
    at: int | None = None
    last: bool = False
    optional: bool = False

    @property
    def name(self) -> str:
        return ", ".join(self.data)


# The program that leaves last clears the counters: no other program may still use them.
_LEAVE = Channel((COUNTERS,), at=4, last=True)
_TICKET = Channel((), at=0)
CHANNELS = {
    "moe_ffn_fwd_kernel": (
        Channel(("NORMED",)),
        Channel(("HIDDEN",), bounds=1),
        Channel(("SUB_NORMED",), bounds=2, optional=True),
        _LEAVE,
    ),
    "moe_ffn_bwd_rows_kernel": (
        Channel(("DH2", "NORMED")),
        Channel(("DPRE",), bounds=1),
        Channel(("DNORMED",), bounds=2),
        Channel(("DHIDDEN", "AGAIN"), bounds=3, optional=True),
        _LEAVE,
    ),
    "moe_ffn_bwd_weights_kernel": (
        Channel(("PARTIAL",)),
        Channel(("SUM_SCALE", "SUM_BIAS"), at=8, last=True),
        _LEAVE,
    ),
}


class Rule(IntEnum):
    """The rule that a finding violates."""

    READ_BEFORE_WAIT = 0
    WRITE_BEFORE_WAIT = 1
    WAIT_WITHOUT_BARRIER = 2
    RELEASE_WITHOUT_BARRIER = 3
    STORE_WITHOUT_RELEASE = 4
    NOT_COHERENT = 5
    UNKNOWN_ADDRESS = 6
    UNKNOWN_OPERATION = 7
    NO_PROXY_FENCE = 8


_MEANING = {
    Rule.READ_BEFORE_WAIT: "data of other programs is read without a wait before it",
    Rule.WRITE_BEFORE_WAIT: "what other programs use is written without a wait before it",
    Rule.WAIT_WITHOUT_BARRIER: "no barrier between the acquire and what depends on it",
    Rule.RELEASE_WITHOUT_BARRIER: "no barrier between a store and its release",
    Rule.STORE_WITHOUT_RELEASE: "a store is not followed by its release",
    Rule.NOT_COHERENT: "data of other programs is read by a load that is not coherent",
    Rule.UNKNOWN_ADDRESS: "an address in global memory that comes from no parameter",
    Rule.UNKNOWN_OPERATION: "an operation on global memory that this check does not know",
    Rule.NO_PROXY_FENCE: "data of other programs is copied without a proxy fence behind the wait",
}


class Finding(NamedTuple):
    rule: Rule
    data: str
    statement: Statement

    def __str__(self) -> str:
        s = self.statement
        where = f"{s.source}, line {s.line} of the PTX: {s.text[:90]}"
        return f"{_MEANING[self.rule]} ({self.data})\n    {where}"


class Uses(NamedTuple):
    """The statements of one channel, by number."""

    acquires: list[int]
    waits: list[int]  # branches after which the data is known to be complete
    releases: list[int]
    reads: list[int]
    writes: list[int]


class Result(NamedTuple):
    """The result of :func:`check`.

    Attributes:
        uses: the statements of each channel whose data the kernel has, by the channel's name.
        both: parameters whose memory is both loaded from and stored to.
        tickets: statements that take a ticket.
        barriers: statements that are barriers of all threads of a CTA.
    """

    findings: list[Finding]
    uses: dict[str, Uses]
    both: set[str]
    tickets: list[int]
    barriers: list[int]


# ---- origins of register values


@functools.lru_cache(maxsize=1 << 16)
def _registers(operand: str) -> tuple[str, ...]:
    """The registers in an operand, including special ones such as %tid.x."""
    return tuple(re.findall(r"%[\w.]+", operand))


def _destinations(statement: Statement) -> tuple[str, ...]:
    """Registers that a statement writes."""
    first = statement.operands[0] if statement.operands else "["
    return () if first.startswith("[") else _registers(first)


def _sources(statement: Statement) -> list[str]:
    """Registers that a statement's results are computed from, or that it stores."""
    operands = statement.operands[1:] if _destinations(statement) else statement.operands
    return [register for operand in operands for register in _registers(operand)]


class Linear(NamedTuple):
    """A linear combination of leaves, plus a constant."""

    factors: Mapping[str, int]
    constant: int = 0

    def plus(self, other: Linear, times: int = 1) -> Linear:
        factors = dict(self.factors)
        for leaf, factor in other.factors.items():
            factors[leaf] = factors.get(leaf, 0) + factor * times
        kept = {leaf: factor for leaf, factor in factors.items() if factor}
        return Linear(kept, self.constant + other.constant * times)


class Values:
    """The origins of the values of a kernel's registers, over all paths."""

    def __init__(self, kernel: Kernel, names: Sequence[str], wanted: Iterable[str]) -> None:
        """
        Args:
            names: of the kernel's parameters, as in its Python source.
            wanted: operands whose origins will be queried.
        """
        self._statements = kernel.statements
        self._names = {p.name: n for p, n in zip(kernel.parameters, names, strict=False)}
        self._made: dict[str, list[int]] = {}
        for number, statement in enumerate(kernel.statements):
            for register in _destinations(statement):
                self._made.setdefault(register, []).append(number)
        self._origins = self._flow(wanted)
        self._linear: dict[str, Linear] = {}

    def definition(self, register: str) -> Statement | None:
        """The only statement that writes a register; None if there are several or none."""
        made = self._made.get(register, ())
        return self._statements[made[0]] if len(made) == 1 else None

    def origins(self, text: str) -> frozenset[str]:
        """Parameters, special registers and "memory" that an operand is computed from."""
        found = [self._origins.get(name, {name}) for name in _registers(text)]
        return frozenset().union(*found)

    def linear(self, text: str) -> Linear:
        """An operand or an address as a linear combination of values that cannot be decomposed.

        These are parameters, values from memory, special registers, and registers that several
        statements write. Widths are ignored: no address here wraps around.
        """
        total = Linear({})
        for term in re.findall(r"%[\w.]+|-?\b0x[0-9a-fA-F]+|-?\b\d+|[A-Za-z_]\w*", text):
            if term.startswith("%"):
                total = total.plus(self._of_register(term))
            elif re.match(r"[A-Za-z_]", term):
                total = total.plus(Linear({term: 1}))
            else:
                total = total.plus(Linear({}, int(term, 0)))
        return total

    def choices(self, text: str) -> list[Linear]:
        """What an operand may be, where branches or a selection decide between addresses."""
        found: list[Linear] = []
        work, seen = [text], set()
        while work:
            seen.add(text := work.pop())
            registers = _registers(text)
            made = [self._statements[n] for n in self._made.get(text, ())]
            if made and {s.parts[0] for s in made} <= {"mov", "cvta", "selp"}:
                sources = [o for s in made for o in s.operands[1 : 2 + (s.parts[0] == "selp")]]
                work += {*sources} - seen
            elif registers and (value := self.linear(text)) not in found:
                found.append(value)
        return found

    def _flow(self, wanted: Iterable[str]) -> dict[str, set[str]]:
        """Origins of registers, and of all registers that they are computed from.

        The least fixed point over all statements.
        """
        origins: dict[str, set[str]] = {}
        readers: dict[str, list[int]] = {}
        work = [register for text in wanted for register in _registers(text)]
        needed: list[int] = []
        while work:
            register = work.pop()
            if register not in origins and register in self._made:
                origins[register] = set()
                for number in self._made[register]:
                    needed.append(number)
                    work += (sources := self._sources(self._statements[number]))
                    for source in sources:
                        readers.setdefault(source, []).append(number)
        while needed:
            statement = self._statements[needed.pop()]
            found = self._made_of(statement, origins)
            for register in _destinations(statement):
                if register in origins and not found <= origins[register]:
                    origins[register] |= found
                    needed += readers.get(register, ())
        return origins

    @staticmethod
    def _sources(statement: Statement) -> list[str]:
        """Registers from which the origins of a statement's results are derived."""
        if statement.parts[0] in ("ld", "atom", "ldmatrix"):
            return []  # the origins of its address do not count
        sources = _sources(statement)
        return sources[:-1] if statement.parts[0] == "selp" else sources  # nor its condition

    def _made_of(self, statement: Statement, origins: Mapping[str, set[str]]) -> set[str]:
        if statement.parts[:2] == ["ld", "param"]:
            return {self._parameter(statement.operands[1])}
        if not (sources := self._sources(statement)) and statement.parts[0] != "mov":
            return {"memory"}
        return set().union(*(origins.get(name, {name}) for name in sources))

    def _parameter(self, operand: str) -> str:
        found = re.fullmatch(r"\[\s*(\w+)\s*\]", operand)
        if found is None:
            raise Unsupported(f"parameter {operand}")
        return self._names.get(found[1], found[1])

    def _of_register(self, name: str) -> Linear:
        if name not in self._linear:
            self._linear[name] = Linear({name: 1})  # in case it is computed from itself
            made = self.definition(name)
            if made is not None and made.guard is None:
                self._linear[name] = self._taken_apart(made) or Linear({name: 1})
        return self._linear[name]

    def _taken_apart(self, statement: Statement) -> Linear | None:
        operation, inputs = statement.parts[0], statement.operands[1:]
        if statement.parts[:2] == ["ld", "param"]:
            return Linear({self._parameter(inputs[0]): 1})
        if operation in ("mov", "cvt", "cvta") and not inputs[0].startswith("{"):
            return self.linear(inputs[0])
        if operation in ("add", "sub") and statement.parts[-1][0] in "subf":
            return self.linear(inputs[0]).plus(self.linear(inputs[1]), 1 - 2 * (operation == "sub"))
        if operation in ("mul", "mad", "shl"):
            a, b = map(self.linear, inputs[:2])
            product = _times(a, b, shifts=operation == "shl")
            if product is not None and operation == "mad":
                product = product.plus(self.linear(inputs[2]))
            return product
        return None


def _times(a: Linear, b: Linear, shifts: bool) -> Linear | None:
    if a.factors and not b.factors:
        return Linear({}).plus(a, 1 << b.constant if shifts else b.constant)
    if b.factors and not a.factors and not shifts:
        return Linear({}).plus(b, a.constant)
    return None


# ---- effects of statements


class _Access(NamedTuple):
    """An access to global memory."""

    reads: bool
    writes: bool
    weak: bool  # an ordinary load or store
    coherent: bool
    address: str  # of a copy of a tile, that of its descriptor
    copies: bool = False  # whether it is a copy of a tile


_OTHER_SPACES = {"shared", "shared::cta", "shared::cluster", "param", "local", "const"}
# The check must see every access to global memory: by these, or by names with "global" in them.
_STRANGE = {"call", "tex", "tld4", "ldu", "suld", "sust", "sured", "multimem", "prefetch"}
_LOAD_WORDS = re.compile(
    r"ld|global|weak|relaxed|acquire|volatile|gpu|sys|ca|cg|cs|lu|cv|v[248]|[busf]\d+|"
    r"L1::(evict\w+|no_allocate)|L2::[\w:]+"
)


def _access(statement: Statement) -> _Access | None:
    """A statement's access to global memory; None if it has none.

    Raises:
        Unsupported: it may have an effect that this check does not know.
    """
    parts, operands = statement.parts, statement.operands
    if parts[0] in ("ld", "st", "atom", "red") and not _OTHER_SPACES & set(parts):
        address = operands[0] if parts[0] in ("st", "red") else operands[1]
        atomic = parts[0] in ("atom", "red")
        weak = not atomic and not {"relaxed", "acquire", "release", "volatile"} & set(parts)
        coherent = parts[0] != "ld" or all(map(_LOAD_WORDS.fullmatch, parts))
        return _Access(parts[0] != "st", parts[0] != "ld", weak, coherent, address)
    if parts[:2] == ["cp", "async"] and parts[2] in ("ca", "cg"):
        return _Access(True, False, True, "nc" not in parts, operands[1])
    if statement.opcode == "prefetch.global.L2":
        return None  # L2 is where programs meet; a copy in L1 might become old
    if re.match(r"cp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global\.", statement.opcode):
        descriptor, *_ = split(operands[1].removeprefix("[").removesuffix("]"))
        return _Access(True, False, True, True, descriptor, copies=True)
    if statement.opcode in _WITHOUT_ACCESS or _is_proxy_fence(statement):
        return None
    if parts[0] in _STRANGE or "global" in parts or "bulk" in parts:
        raise Unsupported(statement.text)
    return None


# These wait for copies to global memory, change the kind of an address, or order descriptors.
_WITHOUT_ACCESS = {
    *("cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read", "cvta.global.u64"),
    *("cvta.to.global.u64", "fence.proxy.tensormap::generic.acquire.gpu"),
}


def _is_proxy_fence(statement: Statement) -> bool:
    """Whether the async proxy sees what was written to global memory before the statement."""
    fences = statement.opcode in ("fence.proxy.async", "fence.proxy.async.global")
    return fences and statement.guard is None


def _of_shared_memory(statement: Statement) -> str | None:
    """The operation of a statement on shared memory, such as "ld"; None for other statements."""
    shared = any(part.split("::")[0] == "shared" for part in statement.parts)
    return statement.parts[0] if shared else None


def _is_barrier(statement: Statement) -> bool:
    """Whether the statement is a barrier of all threads of a CTA."""
    parts = statement.parts
    meets = (
        parts[0] in ("bar", "barrier") and "sync" in parts and not {"warp", "cluster"} & {*parts}
    )
    return meets and len(statement.operands) == 1 and statement.guard is None


def _orders(statement: Statement) -> tuple[bool, bool]:
    """(acquires, releases): its memory order, at a scope that includes other CTAs."""
    parts = set(statement.parts)
    if statement.parts[0] not in ("ld", "st", "atom", "red") or not {"gpu", "sys"} & parts:
        return False, False
    return bool({"acquire", "acq_rel"} & parts), bool({"release", "acq_rel"} & parts)


_COMPARED = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


# ---- the state on a path


class Seen(IntEnum):
    """The state of a counter since the ticket was taken."""

    NOTHING = 0
    ACQUIRED = 1  # by one thread
    SHARED = 2  # a barrier followed
    HIGH = 3  # a branch found it high enough


class _State(NamedTuple):
    seen: tuple[Seen, ...]  # per channel
    # The last store of each channel that is not yet released, or -1, and whether a barrier followed
    stored: tuple[tuple[int, bool], ...]
    fenced: tuple[bool, ...]  # per channel whether a proxy fence followed the acquire and barrier
    channel: int  # the channel whose counter value is in `holders`, or -1
    holders: frozenset[str]  # registers and shared memory
    known: frozenset[tuple[str, bool]]  # predicates


class _Event(NamedTuple):
    """The effect of a statement on the state."""

    ticket: bool = False
    barrier: bool = False
    fence: bool = False
    acquires: int = -1  # a channel
    releases: int = -1
    reads: tuple[int, ...] = ()  # channels
    writes: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()  # reads by copies of tiles


def check(
    kernel: Kernel, arguments: Sequence[tuple[str, str]], channels: Sequence[Channel]
) -> Result:
    """Follow every path of a kernel.

    Args:
        arguments: Triton's type ("*" for a pointer) and the name of each parameter, as in the
            Python source. The parameters after these are the compiler's.
        channels: those that the kernel may have; channels whose data it lacks are left out.
    """
    names = {name for _, name in arguments}
    return _Check(kernel, arguments, [c for c in channels if {*c.data} & names]).run()


class _Check:
    def __init__(
        self, kernel: Kernel, arguments: Sequence[tuple[str, str]], channels: list[Channel]
    ) -> None:
        self.kernel, self.channels = kernel, channels
        self.blocks = blocks_of(kernel)
        self._block_at = {
            at: number for number, b in enumerate(self.blocks) for at in range(b.first, b.end)
        }
        names = [name for _, name in arguments]
        self.values = Values(kernel, names, self._addresses())
        self.described = self._described()
        self.pointers = frozenset(name for type_, name in arguments if type_.startswith("*"))
        self.findings: dict[tuple[Rule, str, int], Finding] = {}
        self.uses = {c.name: Uses([], [], [], [], []) for c in channels}
        self.events: dict[int, _Event] = {}
        self.read: set[str] = set()
        self.written: set[str] = set()
        for number, statement in enumerate(kernel.statements):
            event = self._event(number, statement)
            if event != _Event():
                self.events[number] = event
        self.repeated = self._repeated()
        self.amounts = self._amounts()

    def run(self) -> Result:
        nothing = tuple(Seen.NOTHING for _ in self.channels)
        stored, fenced = ((-1, False),) * len(nothing), (False,) * len(nothing)
        start = _State(nothing, stored, fenced, -1, frozenset(), frozenset())
        states: list[set[_State]] = [set() for _ in self.blocks]
        work = [(0, start)]
        while work:
            number, state = work.pop()
            if state in states[number]:
                continue
            states[number].add(state)
            if len(states[number]) > MANY_STATES:
                raise Unsupported("too many paths to follow")
            work += self._through(number, state)
        both = {name for name in self.read & self.written if name != COUNTERS}
        tickets = [number for number, event in self.events.items() if event.ticket]
        barriers = [number for number, event in self.events.items() if event.barrier]
        for uses in self.uses.values():
            uses.waits[:] = sorted(set(uses.waits))
        findings = sorted(self.findings.values(), key=lambda f: f.statement.line)
        return Result(findings, self.uses, both, tickets, barriers)

    # -- statements

    def _addresses(self) -> Iterator[str]:
        """The operands that every access to global memory depends on: address and guard."""
        for statement in self.kernel.statements:
            with contextlib.suppress(Unsupported):
                if (access := _access(statement)) is not None:
                    yield access.address
                    yield statement.guard or ""
            if statement.parts[0] == "tensormap":
                yield statement.operands[-1 if "replace" in statement.parts else 0]

    def _described(self) -> list[tuple[Linear, frozenset[str]]]:
        """For each descriptor, its address in global memory and the origins of its tensor's.

        A program makes it in shared memory and then copies it to global memory.
        """
        tensors: dict[str, frozenset[str]] = {}  # in shared memory
        found = []
        for statement in self.kernel.statements:
            if statement.opcode.startswith("tensormap.replace.tile.global_address.shared"):
                tensors[statement.operands[0]] = self.values.origins(statement.operands[1])
            elif statement.opcode.startswith("tensormap.cp_fenceproxy.global.shared"):
                to, source, _ = statement.operands
                found.append((self.values.linear(to), tensors.pop(source, frozenset())))
        return found

    def _tensors_of(self, descriptor: str) -> frozenset[str]:
        """The origins of the address of a copy's tensor; empty if one of them is unknown."""
        origins = [
            [tensor for at, tensor in self.described if at == choice]
            for choice in self.values.choices(descriptor)
        ]
        if not all(origins) or not all(self.pointers & t for each in origins for t in each):
            return frozenset()
        return frozenset().union(*itertools.chain(*origins))

    def _event(self, number: int, statement: Statement) -> _Event:
        if statement.parts[:2] == ["tensormap", "cp_fenceproxy"]:
            if self.values.origins(statement.operands[0]) & self.pointers:
                self._find(Rule.UNKNOWN_OPERATION, "", number)
            return _Event()  # in the compiler's own memory
        try:
            access = _access(statement)
        except Unsupported:
            self._find(Rule.UNKNOWN_OPERATION, "", number)
            return _Event()
        if access is None:
            return _Event(barrier=_is_barrier(statement), fence=_is_proxy_fence(statement))
        tensors = self._tensors_of if access.copies else self.values.origins
        pointed = tensors(access.address) & self.pointers
        if not pointed:
            self._find(Rule.UNKNOWN_ADDRESS, "", number)
        if COUNTERS in pointed and not access.weak:
            return self._counting(number, statement, access)
        self.read |= pointed if access.reads else set()
        self.written |= pointed if access.writes else set()
        touched = tuple(i for i, c in enumerate(self.channels) if pointed & {*c.data})
        for i in touched:
            uses = self.uses[self.channels[i].name]
            if access.reads:
                uses.reads.append(number)
                if not access.coherent:
                    self._find(Rule.NOT_COHERENT, self.channels[i].name, number)
            if access.writes:
                uses.writes.append(number)
        return _Event(
            reads=touched if access.reads else (),
            writes=touched if access.writes else (),
            copies=touched if access.copies else (),
        )

    def _counting(self, number: int, statement: Statement, access: _Access) -> _Event:
        acquires, releases = _orders(statement)
        if not self._by_one_thread(statement):
            return _Event()
        if self._is_counter(access.address, _TICKET):
            return _Event(ticket=statement.parts[0] == "atom")
        for i, channel in enumerate(self.channels):
            if self._is_counter(access.address, channel):
                if channel.last and not (acquires and releases):
                    return _Event()  # the last program must see the data of all others
                uses = self.uses[channel.name]
                uses.acquires.extend([number] * acquires)
                uses.releases.extend([number] * releases)
                return _Event(acquires=i if acquires else -1, releases=i if releases else -1)
        return _Event()

    def _by_one_thread(self, statement: Statement) -> bool:
        """Whether its guard depends only on the thread index: then some thread executes it."""
        return statement.guard is not None and self.values.origins(statement.guard) <= {"%tid.x"}

    def _is_counter(self, address: str, channel: Channel) -> bool:
        factors, constant = self.values.linear(address)
        others = {leaf for leaf in factors if leaf not in (COUNTERS, BOUND)}
        alone = channel.at is not None
        return (
            factors.get(COUNTERS) == 1
            and factors.get(BOUND, 0) == channel.bounds * _COUNTER_BYTES
            and bool(others) != alone
            and (not alone or constant == channel.at)
        )

    def _amounts(self) -> dict[str, list[int]]:
        """Registers that a release adds to the counter of some channels.

        The weight gradient kernel counts its contributions and increments the counter by their
        number. On a path where this number is 0, its stores are not contributions.
        """
        amounts: dict[str, list[int]] = {}
        for number, event in self.events.items():
            if event.releases < 0:
                continue
            amount = self.kernel.statements[number].operands[-1]
            if re.fullmatch(r"%\w+", amount):
                amounts.setdefault(amount, []).append(event.releases)
        return amounts

    def _repeated(self) -> set[str]:
        """Predicates that guard a wait and, in another branch, the accesses that need the wait.

        The owner of a tile waits for its peers in one loop and adds their partial tiles in other
        loops: without peers all of these are skipped.
        """
        statements = self.kernel.statements
        branches = Counter(s.guard for s in statements if s.parts[0] == "bra")
        joins = {
            at: END if join == END else self._block_at[join]
            for at, join in joins_of(self.kernel).items()
        }
        waits = {self._block_at[n] for n, event in self.events.items() if event.acquires >= 0}
        return {
            guard
            for number, join in joins.items()
            if (guard := statements[number].guard) is not None
            and branches[guard] > 1
            and self.values.definition(guard) is not None
            and waits & self._between(self._block_at[number], join)
        }

    def _between(self, block: int, join: int) -> set[int]:
        """The blocks that are reachable from ``block`` without passing through ``join``."""
        found: set[int] = set()
        work = [*self.blocks[block].next]
        while work:
            number = work.pop()
            if number not in found and number not in (join, END):
                found.add(number)
                work += self.blocks[number].next
        return found

    def _find(self, rule: Rule, data: str, number: int) -> None:
        statement = self.kernel.statements[number]
        self.findings.setdefault((rule, data, number), Finding(rule, data, statement))

    # -- paths

    def _through(self, block: int, state: _State) -> Iterator[tuple[int, _State]]:
        """Execute a block symbolically; yields its successors, each with the state there."""
        first, end, following = self.blocks[block]
        for number in range(first, end):
            statement, event = self.kernel.statements[number], self.events.get(number)
            if event is not None:
                state = self._after(number, event, state)
            if state.holders:
                state = self._pass_on(statement, state)
            if state.known and self.repeated & {*_destinations(statement)}:
                made = _destinations(statement)
                state = state._replace(known=frozenset(k for k in state.known if k[0] not in made))
        last = self.kernel.statements[end - 1]
        if last.guard is None or last.parts[0] != "bra":
            if END in following:
                self._expect_released(state)
            yield from ((target, state) for target in following if target != END)
            return
        for target, taken in zip(following, (True, False), strict=True):
            value = taken != last.negated
            if (last.guard, not value) in state.known:
                continue
            after = self._decided(end - 1, last.guard, value, state)
            if target == END:
                self._expect_released(after)
            else:
                yield target, after

    def _after(self, number: int, event: _Event, state: _State) -> _State:
        seen, stored, fenced = list(state.seen), list(state.stored), list(state.fenced)
        for i in event.reads:
            if seen[i] != Seen.HIGH:
                self._find(Rule.READ_BEFORE_WAIT, self.channels[i].name, number)
        for i in event.copies:
            if seen[i] == Seen.HIGH and not fenced[i]:
                self._find(Rule.NO_PROXY_FENCE, self.channels[i].name, number)
        for i in event.writes:
            if self.channels[i] == _LEAVE:
                if seen[i] != Seen.HIGH:
                    self._find(Rule.WRITE_BEFORE_WAIT, self.channels[i].name, number)
            else:
                stored[i] = number, False
        if event.barrier:
            if any(map(_is_cell, state.holders)):  # the other threads can read the counter there
                seen = [Seen.SHARED if s == Seen.ACQUIRED else s for s in seen]
            stored = [(store, store >= 0) for store, _ in stored]
        if event.releases >= 0:
            if stored[event.releases][0] >= 0 and not stored[event.releases][1]:
                data = self.channels[event.releases].name
                self._find(Rule.RELEASE_WITHOUT_BARRIER, data, number)
            stored[event.releases] = -1, False
        if event.fence:
            fenced = [f or s >= Seen.SHARED for f, s in zip(fenced, seen, strict=True)]
        state = state._replace(seen=tuple(seen), stored=tuple(stored), fenced=tuple(fenced))
        if event.acquires >= 0:
            seen[event.acquires], fenced[event.acquires] = Seen.ACQUIRED, False
            holders = frozenset({_ACQUIRE})  # until its destination is processed
            state = state._replace(
                seen=tuple(seen), fenced=tuple(fenced), channel=event.acquires, holders=holders
            )
        if event.ticket:
            self._expect_released(state)
            nothing = tuple(Seen.NOTHING for _ in seen)
            stored = [(-1, False)] * len(stored)
            fences = (False,) * len(fenced)
            state = _State(nothing, tuple(stored), fences, -1, frozenset(), state.known)
        return state

    def _expect_released(self, state: _State) -> None:
        for channel, (store, _) in zip(self.channels, state.stored, strict=True):
            if store >= 0:
                self._find(Rule.STORE_WITHOUT_RELEASE, channel.name, store)

    def _pass_on(self, statement: Statement, state: _State) -> _State:
        """Track which registers and shared memory hold the counter's value after a statement."""
        holders = set(state.holders)
        operation = _of_shared_memory(statement)
        if operation == "st":
            places, sources = [self._cell(statement.operands[0])], [*statement.operands[1:]]
        else:
            places, sources = [*_destinations(statement)], _sources(statement)
            if operation == "ld":
                sources = [self._cell(statement.operands[1])]
        read = {name for text in sources for name in (*_registers(text), text)}
        if _ACQUIRE in holders or read & holders:
            holders |= {*places}
        elif operation in (None, "ld", "ldmatrix"):
            holders -= {*places}
        else:  # perhaps to the same shared memory
            holders = {holder for holder in holders if not _is_cell(holder)}
        return state._replace(holders=frozenset(holders - {_ACQUIRE}))

    def _cell(self, address: str) -> str:
        factors, constant = self.values.linear(address)
        return f"{_CELL} {sorted(factors.items())} + {constant}"

    def _decided(self, number: int, predicate: str, value: bool, state: _State) -> _State:
        """The state after a branch whose predicate had the given value."""
        if predicate in self.repeated:
            state = state._replace(known=state.known | {(predicate, value)})
        made = self.values.definition(predicate)
        if made is None or made.parts[0] != "setp":
            return state
        if predicate in state.holders:
            state = self._counter_compared(number, made, value, state)
        for amount, channels in self.amounts.items():
            if self._brings_nothing(made, amount, value):
                stored = list(state.stored)
                for channel in channels:
                    stored[channel] = -1, False
                state = state._replace(stored=tuple(stored))
        return state

    def _counter_compared(self, number: int, made: Statement, value: bool, state: _State) -> _State:
        channel = self.channels[state.channel]
        seen = list(state.seen)
        if seen[state.channel] == Seen.ACQUIRED:
            self._find(Rule.WAIT_WITHOUT_BARRIER, channel.name, number)
        high = _holds(made, state.holders, channel.last) == value
        if high and seen[state.channel] == Seen.SHARED:
            seen[state.channel] = Seen.HIGH
            self.uses[channel.name].waits.append(number)
        else:
            seen[state.channel] = Seen.NOTHING
        return state._replace(seen=tuple(seen), channel=-1, holders=frozenset())

    @staticmethod
    def _brings_nothing(made: Statement, amount: str, value: bool) -> bool:
        """Whether a comparison with a constant implies that an amount is not above 0."""
        compare = _COMPARED.get(made.parts[1])
        a, b = made.operands[1:3]
        if compare is None or a != amount or not re.fullmatch(r"-?\d+", b):
            return False
        return compare(0, int(b)) == value and compare(1, int(b)) != value


def _is_cell(holder: str) -> bool:
    return holder.startswith(_CELL)


def _holds(made: Statement, holders: frozenset[str], last: bool) -> bool | None:
    """The result of a comparison that means that the counter is high enough; None if neither does.

    For a counter that others wait for, that is the result for an arbitrarily high counter. For a
    counter of contributions (``last``), it is the result for equality with the other operand.
    """
    compare, (a, b) = made.parts[1], made.operands[1:3]
    if last:
        return {"eq": True, "ne": False}.get(compare)
    high = _COMPARED.get(compare) if compare not in ("eq", "ne") else None
    if high is None or (a in holders) == (b in holders):
        return None
    return bool(high(1, 0) if a in holders else high(0, 1))
