"""No row of the tile tables compiles to PTX that reads before its wait or stores after its release.

Kernels are compiled for VLMo's layers, but not run. Faults injected into them show that the check
detects each kind. ``PYTHONPATH`` may select another Triton than the installed one, as in
tests/kernels/compiling.py.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

import compiled_attention
from compiled import LAYERS, NoDriver, run_case, with_descriptors
from ptx.driver import CACHE
from ptx.flow import END, blocks_of
from ptx.order import CHANNELS, COUNTERS, Channel, Result, Rule, check
from ptx.tests import tensor_kernels
from ptx.tests.programs import program
from ptx.text import Kernel, Statement, parse
from vlmo.kernels._backends import triton_launch
from vlmo.kernels._backends.triton import compile_options, operands_of
from vlmo.kernels.attention.triton import tiles as attention_tiles
from vlmo.kernels.moe_ffn.triton import arguments as moe_ffn_launch
from vlmo.kernels.moe_ffn.triton import tiles as moe_ffn_tiles
from vlmo.kernels.target import GENERATIONS

PRECISIONS = {  # of products: the dtype, and whether those of float32 are in TF32
    "16-bit": (torch.bfloat16, False),
    "32-bit": (torch.float32, False),
    "tf32": (torch.float32, True),
}
OFTEN = [(generation, "16-bit", "vlmo") for generation in ("sm_80", "sm_90", "sm_120")]
OFTEN += [("sm_90", "16-bit", layer) for layer in ("decoder", "beit3", "beit3, recomputed")]
ATTENTION_OFTEN = [("sm_90", "16-bit", 64, "vlmo")]
MULTIPROCESSORS = 132


class Compiled(NamedTuple):
    """A kernel, and Triton's type and name of each of its parameters."""

    kernel: Kernel
    arguments: list[tuple[str, str]]

    @property
    def channels(self) -> list[Channel]:
        """The channels of this variant of the kernel."""
        names = {name for _, name in self.arguments}
        return [
            channel
            for channel in CHANNELS.get(self.kernel.name, ())
            if not channel.optional or not names.isdisjoint(channel.data)
        ]

    def check(self) -> Result:
        return check(self.kernel, self.arguments, self.channels)


# ---- compiling


def parameters_of(name: str, type_: object) -> Iterator[tuple[str, str]]:
    """The parameters of an argument; a tuple has several, and a compile-time constant has none."""
    if isinstance(type_, tuple):
        fields = getattr(type_, "_fields", range(len(type_)))
        for field, inner in zip(fields, type_, strict=True):
            yield from parameters_of(f"{name}.{field}", inner)
    elif type_ != "constexpr":
        yield str(type_), name


@contextlib.contextmanager
def compiling(generation: str, descriptors: bool = False) -> Iterator[list[Compiled]]:
    """In this context, launches compile the kernel to PTX and append it to the yielded list."""
    found: list[Compiled] = []

    def note(kernel, device, programs, tile, *args) -> None:
        compiled = kernel.warmup(*args, grid=(programs,), **compile_options(tile))
        signature = compiled.src.signature.items()
        arguments = [p for name, type_ in signature for p in parameters_of(name, type_)]
        found.append(Compiled(parse(compiled.asm["ptx"]), arguments))

    def moe_ffn_row(device, dtype):
        row = moe_ffn_tiles.TABLE[generation, operands_of(dtype)]
        return with_descriptors(row) if descriptors else row

    def attention_row(device, dtype, head_dim):
        width = attention_tiles.width_of(head_dim)
        return attention_tiles.TABLE[generation, operands_of(dtype), width]

    previous = driver._active if hasattr(driver, "_active") else None
    driver.set_active(NoDriver(generation))
    with (
        mock.patch.object(CUDABackend, "make_cubin", lambda self, source, *rest: source.encode()),
        mock.patch.object(knobs.cache, "dir", str(CACHE)),
        mock.patch.object(triton_launch, "launch", note),
        mock.patch.object(moe_ffn_launch.target, "multiprocessors", return_value=MULTIPROCESSORS),
        mock.patch.object(moe_ffn_tiles, "choose", moe_ffn_row),
        mock.patch.object(attention_tiles, "choose", attention_row),
    ):
        try:
            yield found
        finally:
            driver.set_active(previous)


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[torch.dtype]:
    dtype, tf32 = PRECISIONS[precision]
    previous = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield dtype
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous


@functools.cache
def moe_ffn(
    generation: str, precision: str, layer: str, descriptors: bool = False
) -> list[Compiled]:
    with compiling(generation, descriptors) as found, products_in(precision) as dtype:
        run_case(dtype, **LAYERS[layer])
    return found


def attention(generation: str, precision: str, head_dim: int, layer: str) -> list[Compiled]:
    options = compiled_attention.LAYERS[layer]
    with compiling(generation) as found, products_in(precision) as dtype:
        compiled_attention.run(compiled_attention.layer(head_dim, dtype, **options))
    return found


def each(*choices: Iterable, often: list[tuple]) -> list:
    return [
        pytest.param(*v, marks=[] if v in often else [pytest.mark.slow], id="-".join(map(str, v)))
        for v in itertools.product(*choices)
    ]


# ---- the unmodified kernels


def assert_ordered(compiled: Compiled) -> None:
    result, kernel = compiled.check(), compiled.kernel
    assert not result.findings, "\n".join(map(str, result.findings))
    channels = compiled.channels
    # Without waits and releases the check would be vacuous.
    assert len(result.tickets) >= 2 and result.barriers
    assert set(result.uses) == {channel.name for channel in channels}
    for channel in channels:
        uses = result.uses[channel.name]
        assert uses.acquires and uses.waits and uses.releases and uses.writes, (kernel.name, uses)
        assert bool(uses.reads) == (channel.data != (COUNTERS,))
    # Data that is both read and written, but has no row in CHANNELS, would not be checked.
    assert result.both <= {name for channel in channels for name in channel.data}
    reads = [kernel.statements[n] for uses in result.uses.values() for n in uses.reads]
    # Operands of products are copied ahead of their step (cp.async); partial tiles are not.
    assert any(read.parts[0] == "cp" for read in reads) == ("weights" not in kernel.name)


@pytest.mark.parametrize(
    ("generation", "precision", "layer"),
    each(GENERATIONS, PRECISIONS, LAYERS, often=OFTEN),
)
def test_moe_ffn(generation, precision, layer):
    kernels = moe_ffn(generation, precision, layer)
    assert {compiled.kernel.name for compiled in kernels} == set(CHANNELS)
    for compiled in kernels:
        assert_ordered(compiled)


def test_moe_ffn_through_descriptors():
    """The copies by tensor descriptors are behind a proxy fence."""
    kernels = moe_ffn("sm_90", "16-bit", "vlmo", descriptors=True)
    for compiled in kernels:
        assert any("bulk.tensor" in s.text for s in compiled.kernel.statements)
        assert_ordered(compiled)


@pytest.mark.parametrize(
    ("generation", "precision", "head_dim", "layer"),
    each(
        *(GENERATIONS, PRECISIONS),
        *(compiled_attention.HEAD_DIMS, compiled_attention.LAYERS),
        often=ATTENTION_OFTEN,
    ),
)
def test_no_program_of_attention_reads_what_another_writes(generation, precision, head_dim, layer):
    kernels = attention(generation, precision, head_dim, layer)
    assert len(kernels) >= 3
    for compiled in kernels:
        result = compiled.check()
        assert not result.findings, result.findings
        # Each program has its own row of these two.
        own = {"SUMS", "PARTIAL"} if "table" in compiled.kernel.name else set()
        assert result.both == own
        for statement in compiled.kernel.statements:
            assert not {"acquire", "release", "acq_rel"} & {*statement.parts}


# ---- faults


class Plant(NamedTuple):
    """The changes to a kernel: statements by number."""

    dropped: frozenset[int] = frozenset()
    replaced: Mapping[int, Statement] = {}
    inserted: Mapping[int, Statement] = {}  # before these numbers, and before a label there


def planted(kernel: Kernel, plant: Plant) -> Kernel:
    statements: list[Statement] = []
    places = []  # new number of each old statement
    for number, statement in enumerate(kernel.statements):
        if number in plant.inserted:
            statements.append(plant.inserted[number])
        places.append(len(statements))
        if number not in plant.dropped:
            statements.append(plant.replaced.get(number, statement))
    places.append(len(statements))
    labels = {label: places[number] for label, number in kernel.labels.items()}
    return kernel._replace(statements=statements, labels=labels)


def reached(starts: Iterable[int], edges: Mapping[int, list[int]], ends: set[int]) -> set[int]:
    """The statements that are reachable from ``starts`` without passing through ``ends``."""
    found: set[int] = set()
    stack = [target for start in starts for target in edges.get(start, [])]
    while stack:
        number = stack.pop()
        if number not in found:
            found.add(number)
            if number not in ends:
                stack += edges.get(number, [])
    return found


def with_opcode(statement: Statement, old: str, new: str) -> Statement:
    assert old in statement.opcode
    return statement._replace(
        opcode=statement.opcode.replace(old, new), text=statement.text.replace(old, new)
    )


class Faults:
    """Faults of one channel of a kernel, each with the rules that it violates.

    Args:
        step: move or change every ``step``-th load and store.
    """

    def __init__(self, compiled: Compiled, channel: Channel, step: int) -> None:
        result = compiled.check()
        self.kernel, self.channel, self.step = compiled.kernel, channel, step
        self.uses, self.barriers = result.uses[channel.name], result.barriers
        self.result = result
        # The last program to leave clears the counters: a store that needs a wait, but no release.
        self.clears = channel.data == (COUNTERS,)
        self.early = {Rule.WRITE_BEFORE_WAIT if self.clears else Rule.READ_BEFORE_WAIT}
        self.late = set() if self.clears else {Rule.STORE_WITHOUT_RELEASE}
        # An atomic that must acquire and release counts as neither if it lacks one of them.
        self.both = self.early | self.late if channel.last else set()
        self.needing = self.uses.writes if self.clears else self.uses.reads

    def opcode(self, number: int, old: str, new: str) -> Plant:
        return Plant(replaced={number: with_opcode(self.kernel.statements[number], old, new)})

    def moved(self, number: int, before: int) -> Plant:
        return Plant(frozenset({number}), inserted={before: self.kernel.statements[number]})

    def of_waits(self) -> Iterator[tuple[str, Plant, set[Rule]]]:
        statements = self.kernel.statements
        for acquire in self.uses.acquires:
            order = "acq_rel" if self.channel.last else "acquire"
            broken = self.both or self.early
            yield "acquire is relaxed", self.opcode(acquire, order, "relaxed"), broken
            yield "acquire among threads of a CTA", self.opcode(acquire, "gpu", "cta"), broken
            yield "acquire is dropped", Plant(frozenset({acquire})), broken
            behind = min(barrier for barrier in self.barriers if barrier > acquire)
            without = {Rule.WAIT_WITHOUT_BARRIER} | self.early
            yield "barrier behind the acquire is dropped", Plant(frozenset({behind})), without
            others = {n for uses in self.result.uses.values() for n in uses.acquires} - {acquire}
            for other in others:
                operands = list(statements[acquire].operands)
                operands[1] = statements[other].operands[1]
                change = statements[acquire]._replace(operands=tuple(operands))
                yield "waits for another counter", Plant(replaced={acquire: change}), broken
        for wait in self.uses.waits:
            yield "branch of the wait is dropped", Plant(frozenset({wait})), self.early
            change = statements[wait]._replace(negated=not statements[wait].negated)
            yield "branch of the wait is turned", Plant(replaced={wait: change}), self.early

    def of_what_waits(self) -> Iterator[tuple[str, Plant, set[Rule]]]:
        statements = self.kernel.statements
        first = min(self.uses.acquires)
        # Before the loop, if there is one.
        heads = [0, *self.kernel.labels.values()]
        head = first if self.channel.last else max(n for n in heads if n <= first)
        late = max(self.result.tickets, key=lambda ticket: ticket > first)
        for number in self.needing[:: self.step]:
            yield "moved before the wait", self.moved(number, head), self.early
            yield "moved behind the ticket", self.moved(number, late + 1), self.early
            if self.clears:
                continue
            if statements[number].parts[0] == "cp":
                change = statements[number]._replace(opcode="cp.async.bulk.shared::cta.global")
                rule = Rule.UNKNOWN_OPERATION
            else:
                change = with_opcode(statements[number], "ld.global", "ld.global.nc")
                rule = Rule.NOT_COHERENT
            yield "load of another kind", Plant(replaced={number: change}), {rule}

    def of_releases(self) -> Iterator[tuple[str, Plant, set[Rule]]]:
        if self.clears:
            return
        for release in self.uses.releases:
            order = "acq_rel" if self.channel.last else "release"
            yield (
                "release is relaxed",
                self.opcode(release, order, "relaxed"),
                self.both or self.late,
            )
            yield "release is dropped", Plant(frozenset({release})), self.both or self.late
            without = {Rule.RELEASE_WITHOUT_BARRIER}
            between = self.barriers_before(release)
            yield "barriers before the release are dropped", Plant(between), without
            for number in self.uses.writes[:: self.step]:
                yield "store behind the release", self.moved(number, release + 1), self.late
                behind = self.moved(number, release)
                yield "store behind the barrier", behind, without

    def barriers_before(self, release: int) -> frozenset[int]:
        """The barriers on all paths from a store to its release; stores of sums have several paths.

        A counter of contributions (``last``) has its barrier directly before the release.
        """
        if self.channel.last:
            return frozenset({max(barrier for barrier in self.barriers if barrier < release)})
        following: dict[int, list[int]] = {}
        for block in (blocks := blocks_of(self.kernel)):
            for number in range(block.first, block.end - 1):
                following[number] = [number + 1]
            following[block.end - 1] = [blocks[n].first for n in block.next if n != END]
        before: dict[int, list[int]] = {}
        for number, targets in following.items():
            for target in targets:
                before.setdefault(target, []).append(number)
        ends = {release, *self.result.tickets}
        behind = reached(self.uses.writes or [release], following, ends)
        ahead = reached([release], before, {*self.uses.writes, *self.result.tickets})
        return frozenset(set(self.barriers) & ahead & (behind if self.uses.writes else ahead))

    def all(self) -> Iterator[tuple[str, Plant, set[Rule]]]:
        yield from self.of_waits()
        yield from self.of_what_waits()
        yield from self.of_releases()


def assert_faults_seen(compiled: Compiled, step: int) -> None:
    """Inject every fault, one at a time: each violates its rules and no others."""
    for channel in compiled.channels:
        for what, plant, rules in Faults(compiled, channel, step).all():
            changed = compiled._replace(kernel=planted(compiled.kernel, plant))
            findings = changed.check().findings
            where = compiled.kernel.name, channel.name, what
            assert {f.rule for f in findings} == rules, (where, findings)
            assert {f.data for f in findings} <= {channel.name, ""}, (where, findings)


@pytest.mark.parametrize(
    ("kernel", "layer"),
    [*((kernel, "vlmo") for kernel in CHANNELS), ("moe_ffn_bwd_rows_kernel", "beit3")],
)
def test_planted_faults(kernel, layer):
    (compiled,) = (c for c in moe_ffn("sm_90", "16-bit", layer) if c.kernel.name == kernel)
    assert_faults_seen(compiled, step=16)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_planted_faults_of_every_row(generation, precision):
    for compiled in moe_ffn(generation, precision, "vlmo"):
        assert_faults_seen(compiled, step=4)


def weights_kernel() -> tuple[Compiled, Result]:
    (compiled,) = (c for c in moe_ffn("sm_90", "16-bit", "vlmo") if "weights" in c.kernel.name)
    return compiled, compiled.check()


def rules_broken(compiled: Compiled, plant: Plant) -> set[Rule]:
    kernel = planted(compiled.kernel, plant)
    return {finding.rule for finding in compiled._replace(kernel=kernel).check().findings}


def test_peers_are_waited_for_wherever_they_are_read():
    """A branch that skips the reads must have the predicate of the branch that skips the waits."""
    compiled, result = weights_kernel()
    statements = compiled.kernel.statements
    acquire = min(result.uses["PARTIAL"].acquires)
    over = max(
        number
        for number, statement in enumerate(statements[:acquire])
        if statement.parts[0] == "bra" and compiled.kernel.labels[statement.operands[0]] > acquire
    )
    same = [
        number
        for number, statement in enumerate(statements)
        if statement.parts[0] == "bra" and statement.guard == statements[over].guard
    ]
    assert len(same) == 9  # the waits, and the reads of each eighth of a tile
    for number in same:
        other = statements[number]._replace(guard="%p99999")
        assert rules_broken(compiled, Plant(replaced={number: other})) == {Rule.READ_BEFORE_WAIT}


def test_only_who_brings_nothing_need_not_release():
    compiled, result = weights_kernel()
    statements = compiled.kernel.statements
    (release,) = result.uses["SUM_SCALE, SUM_BIAS"].releases
    amount = statements[release].operands[-1]
    (number,) = (
        number
        for number, statement in enumerate(statements)
        if statement.parts[0] == "setp" and statement.operands[1:] == (amount, "1")
    )
    first = statements[number].operands[0]
    more = statements[number]._replace(operands=(first, amount, "2"))
    assert rules_broken(compiled, Plant(replaced={number: more})) == {Rule.STORE_WITHOUT_RELEASE}


def test_an_address_from_nowhere():
    compiled, result = weights_kernel()
    read = result.uses["PARTIAL"].reads[0]
    statement = compiled.kernel.statements[read]
    changed = statement._replace(operands=(statement.operands[0], "[ %rd99999 + 0 ]"))
    assert rules_broken(compiled, Plant(replaced={read: changed})) == {Rule.UNKNOWN_ADDRESS}


def test_names_in_braces_are_told_apart():
    wait = "{\n.reg .pred complete;\nwaitLoop:\n"
    wait += "mbarrier.try_wait.b64 complete, [%r1], %r2;\n@!complete bra.uni waitLoop;\n}\n"
    entry = ".visible .entry kernel(\n.param .u64 kernel_param_0\n)\n.reqntid 32\n{\n"
    kernel = parse(f"{entry}.reg .b32 %r<3>;\n{wait}bar.sync 0;\n{wait}ret;\n}}\n")
    waits = [s for s in kernel.statements if s.parts[0] == "bra"]
    assert [kernel.labels[s.operands[0]] for s in waits] == [0, 3]
    assert len({s.guard for s in waits}) == 2
    assert [s.line for s in waits] == [11, 18]


# ---- copies of tiles

DESCRIPTORS = """
    setp.eq.u32 %p0, %r99, 0;
    mov.u32 %r0, global_smem;
    cvt.u64.u32 %d0, %r0;
    add.s64 %d4, %d103, 128;
    cvta.global.u64 %d5, %d103;
    cvta.global.u64 %d6, %d4;
""" + "".join(
    f"""
    @%p0 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [ %d0 + 0 ], {tensor};
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned """
    f"""[ {at} + 0 ], [ %d0 + 0 ], 0x80;
    fence.proxy.tensormap::generic.acquire.gpu [ {at} + 0 ], 0x80;
    bar.sync 0;
"""
    for tensor, at in (("%d100", "%d103"), ("%d101", "%d4"))
)
WAITING = """
$LOOP:
    @%p0 ld.global.gpu.acquire.b32 %r8, [ %d102 + 8 ];
    @%p0 st.shared.b32 [ %r0 + 512 ], %r8;
    bar.sync 0;
    ld.shared.b32 %r9, [ %r0 + 512 ];
    setp.lt.u32 %p3, %r9, 3;
    @%p3 bra $LOOP;
    bar.sync 0;
"""
PROXY_FENCE = "fence.proxy.async.global;\n"
COPYING = """
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
"""
COPYING = COPYING.rstrip() + " [%r0], [{}, {{%r50, %r51}}], [%r2];\n"
SELECTED = "setp.eq.u32 %p4, %r50, 1;\nselp.b64 %d7, %d5, %d6, %p4;\n"
BRANCHED = "mov.b64 %d7, %d5;\n@%p5 bra $SAME;\nmov.b64 %d7, %d6;\n$SAME:\n"


@pytest.mark.parametrize(
    ("lines", "found", "reads"),
    [
        ((WAITING, PROXY_FENCE, COPYING.format("%d5")), set(), 1),
        ((WAITING, "fence.proxy.async;\n", COPYING.format("%d5")), set(), 1),
        ((SELECTED, WAITING, PROXY_FENCE, COPYING.format("%d7")), set(), 1),
        ((BRANCHED, WAITING, PROXY_FENCE, COPYING.format("%d7")), set(), 1),
        ((COPYING.format("%d6"),), set(), 0),  # of data that no program writes
        ((WAITING, COPYING.format("%d5")), {Rule.NO_PROXY_FENCE}, 1),
        ((BRANCHED, WAITING, COPYING.format("%d7")), {Rule.NO_PROXY_FENCE}, 1),
        ((PROXY_FENCE, WAITING, COPYING.format("%d5")), {Rule.NO_PROXY_FENCE}, 1),
        (
            (WAITING, "fence.proxy.async.shared::cta;\n", COPYING.format("%d5")),
            {Rule.NO_PROXY_FENCE},
            1,
        ),
        ((PROXY_FENCE, COPYING.format("%d5")), {Rule.READ_BEFORE_WAIT}, 1),
        ((WAITING, PROXY_FENCE, COPYING.format("%d8")), {Rule.UNKNOWN_ADDRESS}, 0),
        (
            ("ld.global.b64 %d5, [ %d101 ];\n", WAITING, PROXY_FENCE, COPYING.format("%d5")),
            {Rule.UNKNOWN_ADDRESS},
            0,
        ),
    ],
)
def test_copies_of_tiles(lines, found, reads):
    """DATA is another program's; the descriptors of it and of OTHER lie behind the parameters."""
    kernel = parse(program(DESCRIPTORS + "".join(lines), parameters=4))
    arguments = [("*", "DATA"), ("*", "OTHER"), ("*", COUNTERS)]
    result = check(kernel, arguments, [Channel(("DATA",), at=8)])
    assert {finding.rule for finding in result.findings} == found
    assert len(result.uses["DATA"].reads) == reads


@pytest.mark.parametrize(("data", "reads"), [("A", 3), ("B0", 3), ("B1", 3), ("C", 0)])
def test_copies_of_a_compiled_kernel(data, reads):
    """Two stages are copied ahead of the loop; a copy may use the descriptor of either expert."""
    half, out = torch.empty(256, 256, dtype=torch.float16, device="meta"), "meta"
    c = torch.empty(256, 256, device=out)
    with compiling("sm_90"):
        compiled = tensor_kernels.selected_product.warmup(
            *(half, half, half, c, 256, 256, 256, 2, 128, 128, 64),
            **dict(grid=(4,), num_warps=4, num_stages=3),
        )
    names = ("A", "B0", "B1", "C", "M", "N", "K", "expert")
    arguments = [("*" if name.isupper() and len(name) < 3 else "i32", name) for name in names]
    kernel = parse(compiled.asm["ptx"])
    result = check(kernel, arguments, [Channel((data,), at=8)])
    assert len(result.uses[data].reads) == reads
    rule = Rule.READ_BEFORE_WAIT if reads else Rule.STORE_WITHOUT_RELEASE
    assert {finding.rule for finding in result.findings} == {rule}
