"""Copies of tiles by tensor descriptors: exact products, planted faults, rules of order."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ptx.driver import Emulated, emulated
from ptx.machine import FINDINGS, Fault, Interleaving
from ptx.tests import tensor_kernels
from ptx.tests.programs import ONE_RUN, findings, program

READ_RACE, _, LATE_WRITE, GLOBAL_RACE, _, GLOBAL_LATE_WRITE = FINDINGS[:6]
IN_FLIGHT, NEVER_WAITED_FOR = FINDINGS[9], FINDINGS[12]
READS_UNFENCED, WRITES_UNFENCED, NO_TENSORMAP_FENCE = FINDINGS[-3:]
TILE = (128, 128, 64)
INTERLEAVINGS = (
    *(Interleaving(seed=seed, quantum=5 + 100 * (seed % 2), limit=10_000_000) for seed in range(3)),
    Interleaving(seed=3, late=False, limit=10_000_000),
)


def operands(*shapes: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Small integers: their products are exact in every type."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in shapes]


def multiply(
    size=(200, 136, 200),
    tile=TILE,
    dtype=torch.float16,
    across=False,
    specialize=False,
    change=str,
) -> Emulated:
    """Run the product with a change to its PTX; without one it must be exact."""
    rows, columns, depth = size
    a, b = operands((rows, depth), (depth, columns) if across else (columns, depth), dtype=dtype)
    grid = (-(-rows // tile[0]) * -(-columns // tile[1]),)
    with emulated("sm_90", INTERLEAVINGS) as gpu:
        gpu.change = change
        c = torch.empty(rows, columns)
        tensor_kernels.product[grid](
            *(a, b, c, rows, columns, depth, *tile, across, specialize), num_warps=4, num_stages=3
        )
    if change is str:
        assert (c.double() == a.double() @ (b if across else b.t()).double()).all()
    return gpu


def assert_clean(gpu: Emulated) -> None:
    assert not gpu.reports, gpu.reports
    for launch in gpu.launches:
        assert launch.machine.executed(launch.results[0])["cp.async.bulk.tensor"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("depth", [16, 32, 64, 128])
def test_product(dtype, depth):
    """Boxes with rows of 32, 64 and 128 bytes, each with its swizzle, some beyond the tensors."""
    assert_clean(multiply((200, 136, 200), (64, 64, depth), dtype))


@pytest.mark.parametrize("tile", [TILE, (64, 32, 32), (64, 16, 64)], ids=str)
def test_operand_across(tile):
    assert_clean(multiply(tile=tile, across=True))


@pytest.mark.parametrize("expert", [0, 1])
def test_selected_descriptor(expert):
    rows, columns, depth = 200, 136, 200
    a, *b = operands((rows, depth), *[(columns, depth)] * 2, dtype=torch.float16)
    with emulated("sm_90", INTERLEAVINGS) as gpu:
        c = torch.empty(rows, columns)
        tensor_kernels.selected_product[4,](
            *(a, *b, c, rows, columns, depth, expert, *TILE), num_warps=4, num_stages=3
        )
    assert (c.double() == a.double() @ b[expert].double().t()).all()
    assert_clean(gpu)


@pytest.mark.parametrize("depth", [64, 200, 520])
def test_specialized_warps(depth):
    gpu = multiply((200, 136, depth), specialize=True)
    assert_clean(gpu)
    assert gpu.launches[0].machine.kernel.threads == 384


# ---- faults injected into the kernels

WAIT = r"mbarrier\.try_wait\.parity\S+ complete, [^;]*;"
NO_WAIT = "mov.pred complete, -1;"
EXPECT = r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;"
PUBLISH = r"@%p\d+ tensormap\.cp_fenceproxy[^;]*;"
STUCK, TOO_MANY = "a barrier never completes", "more arrivals at an mbarrier than it expects"
FAULTS = [  # whether warps are specialized, pattern, its replacement, which occurrences, finding
    (False, r"@%p\d+ fence\.proxy\.tensormap[^;]*;", "", (0, 1), NO_TENSORMAP_FENCE),
    (False, r"fence\.proxy\.async\S*;", "", (0,), WRITES_UNFENCED),
    (False, WAIT, NO_WAIT, (0,), TOO_MANY),
    (False, EXPECT, "", (0, 1, 2), STUCK),
    (False, PUBLISH, "", (0, 1), "a descriptor of another rank"),
    (True, WAIT, NO_WAIT, (4, 6), TOO_MANY),  # of the warps that copy, for the tiles' readers
    (True, WAIT, NO_WAIT, (1,), LATE_WRITE),  # of the warps that multiply
    (True, r"@%p\d+ mbarrier\.arrive\.shared[^;]*;", "", (0, 1, 2, 3), STUCK),
]


def outcome(specialize: bool, change: Callable[[str], str]) -> set[str]:
    try:
        gpu = multiply(specialize=specialize, change=change)
    except Fault as fault:
        return {str(fault).split("\n")[0]}
    return {report.finding for report in gpu.reports}


@pytest.mark.parametrize(("specialize", "pattern", "by", "which", "expected"), FAULTS)
def test_each_fault_is_seen(specialize, pattern, by, which, expected):
    for number in which:

        def change(text: str, number: int = number) -> str:
            place = [*re.finditer(pattern, text)][number]
            return text[: place.start()] + by + text[place.end() :]

        assert outcome(specialize, change) == {expected}


# ---- rules, in programs of two warps

# The first 128 bytes of shared memory hold the descriptor of 8 rows of 4 words at %d100, which is
# copied to %d101; then come the tile and the mbarrier, at 256. %p0: thread 0; %p1: the first warp.
DESCRIPTOR = {
    "global_address": ("b64", "", "%d100"),
    "rank": ("b32", "", "0x1"),
    "box_dim": ("b32", "0x0, ", "%r51"),
    "box_dim ": ("b32", "0x1, ", "%r52"),
    "global_dim": ("b32", "0x0, ", "%r51"),
    "global_dim ": ("b32", "0x1, ", "%r52"),
    "global_stride": ("b64", "0x0, ", "%d50"),
    "element_stride": ("b32", "0x0, ", "%r53"),
    "element_stride ": ("b32", "0x1, ", "%r53"),
    "elemtype": ("b32", "", "0x2"),
}
PLACES = """
    mov.u32 %r0, global_smem;
    cvt.u64.u32 %d0, %r0;
    setp.eq.u32 %p0, %r99, 0;
    setp.lt.u32 %p1, %r99, 32;
    and.b32 %r2, %r99, 31;
    mad.lo.u32 %r1, %r2, 4, %r0;
    mad.wide.u32 %d1, %r2, 4, %d100;
    mad.wide.u32 %d2, %r99, 4, %d102;
    mov.b32 %r50, 0;
    mov.b32 %r51, 4;
    mov.b32 %r52, 8;
    mov.b32 %r53, 1;
    mov.b64 %d50, 16;
"""
DESCRIBE = "\n".join(
    [
        "@%p1 st.shared.b32 [ %r1 + 0 ], %r50;",
        "bar.warp.sync -1;",
        *(
            f"@%p0 tensormap.replace.tile.{field.strip()}.shared::cta.b1024.{type_} "
            f"[ %d0 + 0 ], {index}{value};"
            for field, (type_, index, value) in DESCRIPTOR.items()
        ),
        "@%p1 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync"
        ".aligned [ %d101 + 0 ], [ %d0 + 0 ], 0x80;",
        "@%p1 fence.proxy.tensormap::generic.acquire.gpu [ %d101 + 0 ], 0x80;",
    ]
)
INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r0+256], 1;"
BARRIER = "bar.sync 0;"
EXPECTS = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+256], 128;"
COPY = (
    "@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
    "[%r0+128], [%d101, {%r50, %r50}], [%r0+256];"
)
WAITS = """
{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r0+256], %r50;
	@!complete bra.uni waitLoop;
}
"""
LOAD, STORE = "ld.shared.b32 %r4, [ %r1 + 128 ];", "st.global.b32 [ %d2 + 0 ], %r4;"
CHANGE = "@%p1 st.global.b32 [ %d1 + 0 ], %r99;"
FENCE = "fence.proxy.async.global;"
START = (PLACES, DESCRIBE, INIT, BARRIER)


def copy(*lines: str, late: bool = True, seed: int = 0, **options) -> tuple[set[str], list[int]]:
    """The findings of a program and what its threads have read from the tile."""
    source, out = np.arange(100, 132, dtype=np.uint32), np.zeros(64, np.uint32)
    room = np.zeros(64, np.uint32)  # for a descriptor at a multiple of 128 bytes
    scratch = room[-room.ctypes.data % 128 // 4 :][:32]
    text = program("\n".join(lines), threads=64, parameters=3)
    how = ONE_RUN._replace(late=late, seed=seed, skew=False)
    return findings(text, source, scratch, out, how=how, **options), out.tolist()


@pytest.mark.parametrize("late", [True, False])
def test_copy(late):
    found = copy(*START, EXPECTS, COPY, WAITS, LOAD, STORE, late=late)
    assert found == (set(), 2 * [*range(100, 132)])


def test_copy_without_a_wait():
    """Also with a barrier, and if only the other warp waits."""
    found = copy(*START, EXPECTS, COPY, BARRIER, LOAD, STORE)
    assert found == ({IN_FLIGHT, NEVER_WAITED_FOR}, 64 * [0xFFFFFFFF])
    assert copy(*START, EXPECTS, COPY, BARRIER, LOAD, STORE, late=False)[0] == {
        *(READ_RACE, NEVER_WAITED_FOR)
    }
    other = "@%p1 bra $READ;", WAITS, "$READ:", LOAD, STORE
    for late in (True, False):
        assert copy(*START, EXPECTS, COPY, *other, late=late)[0] <= {IN_FLIGHT, READ_RACE}


def test_a_barrier_passes_a_wait_on():
    other = "@%p1 bra $READ;", WAITS, "$READ:", BARRIER, LOAD, STORE
    assert copy(*START, EXPECTS, COPY, *other) == (set(), 2 * [*range(100, 132)])


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ((FENCE, BARRIER), set()),
        ((BARRIER, FENCE), set()),
        (("fence.proxy.async;", BARRIER), set()),
        ((BARRIER,), {READS_UNFENCED}),
        (("fence.proxy.async.shared::cta;", BARRIER), {READS_UNFENCED}),
        ((), {READS_UNFENCED, GLOBAL_RACE}),  # thread 0 is not ordered after the other threads
        ((FENCE,), {GLOBAL_RACE}),
    ],
)
def test_global_memory_that_was_written(between, found):
    assert copy(*START, CHANGE, *between, EXPECTS, COPY, WAITS)[0] == found


def test_overwritten_before_its_wait():
    """A store to the source races with the copy until a wait for it."""
    changed = "@%p0 st.global.b32 [ %d1 + 0 ], %r50;"
    assert copy(*START, EXPECTS, COPY, changed, WAITS)[0] == {GLOBAL_LATE_WRITE}
    assert copy(*START, EXPECTS, COPY, WAITS, changed)[0] == set()


@pytest.mark.parametrize(("release", "found"), [(True, set()), (False, {LATE_WRITE, READ_RACE})])
def test_tile_is_overwritten_after_its_readers_arrived(release, found):
    """The second warp reads the tile; the first one copies to it again."""
    reading = [LOAD, STORE, "bar.warp.sync -1;"]
    again = [EXPECTS, COPY, WAITS.replace("%r50;", "%r53;")]
    if release:
        reading.append("@%p2 mbarrier.arrive.shared::cta.b64 _, [%r0+264];")
        again.insert(0, WAITS.replace("256", "264"))
    text = [
        *(PLACES, DESCRIBE, INIT, INIT.replace("256", "264"), "setp.eq.u32 %p2, %r99, 32;"),
        *(BARRIER, EXPECTS, COPY, WAITS, BARRIER, "@%p1 bra $AGAIN;", *reading, "bra $END;"),
        *("$AGAIN:", *again, "$END:"),
    ]
    results = [copy(*text, seed=seed)[0] for seed in range(8)]
    assert set().union(*results) == found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("", ""), set()),
        ((FENCE, ""), {READS_UNFENCED}),
        (("ld.global.gpu.acquire", "ld.global.gpu.relaxed"), {GLOBAL_RACE}),
    ],
)
def test_message_of_another_cta(change, found):
    """A fence in the consumer, after the acquire, is enough."""
    text = "\n".join(
        [
            *(PLACES, "mov.u32 %r5, %ctaid.x;", "setp.eq.u32 %p2, %r5, 0;", "@!%p2 bra $RECEIVE;"),
            *(CHANGE, BARRIER, "@%p0 atom.global.gpu.release.add.u32 %r6, [ %d102 + 0 ], %r53;"),
            *("bra $END;", "$RECEIVE:", DESCRIBE, INIT, "$LOOP:", "mov.u32 %r8, 1;"),
            *("@%p0 ld.global.gpu.acquire.b32 %r8, [ %d102 + 0 ];", "setp.eq.u32 %p3, %r8, 0;"),
            *("@%p3 bra $LOOP;", BARRIER, FENCE, EXPECTS, COPY, WAITS, "$END:"),
        ]
    )
    assert copy(text.replace(*change) if change[0] else text, grid=2)[0] == found


@pytest.mark.parametrize(("count", "found"), [(64, set()), (32, {"a barrier never completes"})])
def test_arrivals_are_counted(count, found):
    """All threads arrive at an mbarrier and read what the others stored before."""
    init = INIT.replace(" 1;", f" {2 * 64 - count};")
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r0+256];"
    other = "xor.b32 %r5, %r99, 32;", "mad.lo.u32 %r6, %r5, 4, %r0;", "ld.shared.b32 %r4, [ %r6 ];"
    store = "mad.lo.u32 %r7, %r99, 4, %r0;", "st.shared.b32 [ %r7 ], %r99;"
    text = PLACES, init, BARRIER, *store, arrive, WAITS, *other, STORE
    if found:
        with pytest.raises(Fault, match="a barrier never completes"):
            copy(*text)
    else:
        assert copy(*text) == (set(), [n ^ 32 for n in range(64)])
        assert copy(*(PLACES, init, BARRIER, *store, arrive, *other, STORE))[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[%r0+128]", "[%r0+144]", "misaligned destination of a tile"),
        ("%d50, 16", "%d50, 24", "a stride of a tensor is not a multiple of 16"),
        ("%r52, 8", "%r52, 257", "a box of no elements or more than 256 in a dimension"),
        ("%r51, 4", "%r51, 6", "a box whose rows do not fit its layout"),
        ("global_dim.shared::cta.b1024.b32 [ %d0 + 0 ], 0x0, %r51", None, "without elements"),
        ("b64 [ %d0 + 0 ], %d100", "b64 [ %d0 + 0 ], 0x8", "address of a tensor is not a multiple"),
        ("%d50, 16", "%d50, 32", "global access out of bounds"),
        ("[%r0+256], 1;", "[%r0+264], 1;", "no mbarrier at this address"),
    ],
)
def test_what_the_hardware_refuses(old, new, message):
    text = "\n".join([*START, EXPECTS, COPY, WAITS])
    assert old in text
    with pytest.raises(Fault, match=message):
        copy(text.replace(old, new or old.replace("%r51", "%r50")))


@pytest.mark.parametrize("column", [-2, 2, 4])
@pytest.mark.parametrize("row", [-3, 0, 5, 8])
def test_zeros_beyond_the_tensor(row, column):
    at = f"mov.b32 %r60, {column};", f"mov.b32 %r61, {row};"
    moved = COPY.replace("{%r50, %r50}", "{%r60, %r61}")
    found, out = copy(*START, *at, EXPECTS, moved, WAITS, LOAD, STORE)
    assert found == set()
    padded = np.pad(np.arange(100, 132).reshape(8, 4), 8)
    expected = padded[8 + row : 16 + row, 8 + column : 12 + column]
    assert out == 2 * expected.ravel().tolist()
