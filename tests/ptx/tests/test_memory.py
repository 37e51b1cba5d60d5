"""Order of memory accesses: for each rule, a program that violates it and one that follows it."""

import numpy as np
import pytest

from ptx.machine import FINDINGS, Fault, Machine
from ptx.tests.programs import ONE_RUN, findings, program, run
from ptx.text import Unsupported

# %d1 = address of the thread's word of the first array, %r1 = its address in shared memory, %r2 =
# that of the corresponding thread of the next warp.
PLACES = """
    mad.wide.u32 %d1, %r99, 4, %d100;
    mov.u32 %r0, global_smem;
    mad.lo.u32 %r1, %r99, 4, %r0;
    add.u32 %r3, %r99, 32;
    and.b32 %r3, %r3, 63;
    mad.lo.u32 %r2, %r3, 4, %r0;
"""
STORE, LOAD = "st.shared.b32 [ %r1 + 0 ], %r99;", "ld.shared.b32 %r4, [ %r2 + 0 ];"
OUT = "st.global.b32 [ %d1 + 0 ], %r4;"
BARRIER, NOTHING = "bar.sync 0;", ""
READ_RACE, WRITE_RACE, LATE_READ = FINDINGS[:3]
GLOBAL_READ_RACE, GLOBAL_WRITE_RACE, GLOBAL_LATE_READ, ATOMIC, UNWRITTEN = FINDINGS[3:8]


def two_warps(*lines: str, **options) -> set[str]:
    data = np.zeros(64, np.uint32)
    return findings(program(PLACES + "\n".join(lines), threads=64), data, **options)


def test_a_barrier_orders_shared_memory():
    data = np.zeros(64, np.uint32)
    text = program("\n".join([PLACES, STORE, BARRIER, LOAD, OUT]), threads=64)
    assert run(text, data).reports == []
    assert (data == (np.arange(64) + 32) % 64).all()


@pytest.mark.parametrize(
    ("between", "found"), [(NOTHING, {READ_RACE, LATE_READ, UNWRITTEN}), (BARRIER, set())]
)
def test_write_then_read(between, found):
    # The seed decides which of them runs first.
    results = two_warps(STORE, between, LOAD, OUT)
    assert results <= found and bool(results) == bool(found)


@pytest.mark.parametrize(
    ("between", "found"), [(NOTHING, {LATE_READ, READ_RACE}), (BARRIER, set())]
)
def test_read_then_write(between, found):
    results = two_warps(STORE, BARRIER, LOAD, between, STORE)
    assert results <= found and bool(results) == bool(found)


def test_writes_of_two_warps():
    other = "st.shared.b32 [ %r2 + 0 ], %r99;"
    assert two_warps(STORE, other) == {WRITE_RACE}
    assert two_warps(STORE, BARRIER, other) == set()


def test_lanes_of_one_instruction_may_store_the_same_value():
    at_zero = "st.global.b32 [ %d100 + 0 ], {};"
    same = np.zeros(1, np.uint32)
    assert findings(program(at_zero.format("%r50")), same) == set()
    assert findings(program("mov.u32 %r50, 7;" + at_zero.format("%r50")), same) == set()
    assert same[0] == 7
    assert findings(program(at_zero.format("%r99")), same) == {GLOBAL_WRITE_RACE}


def test_lanes_of_a_warp_are_ordered_by_its_barrier():
    exchange = """
    st.shared.b32 [ %r1 + 0 ], %r99;
    {}
    xor.b32 %r3, %r99, 1;
    mad.lo.u32 %r2, %r3, 4, %r0;
    ld.shared.b32 %r4, [ %r2 + 0 ];
    """
    data = np.zeros(32, np.uint32)
    assert findings(program(PLACES + exchange.format("")), data) == {READ_RACE}
    assert findings(program(PLACES + exchange.format("bar.warp.sync -1;")), data) == set()


MESSAGE = """
    mov.u32 %r5, %ctaid.x;
    setp.eq.u32 %p1, %r5, 0;
    setp.eq.u32 %p2, %r99, 0;
    mov.u32 %r7, 1;
    @!%p1 bra $RECEIVE;
    st.global.b32 [ %d1 + 0 ], %r7;
    {bar_before}
    @%p2 atom.global.gpu.{release}.add.u32 %r6, [ %d101 + 0 ], %r7;
    {late}
    bra $END;
$RECEIVE:
$LOOP:
    mov.u32 %r8, 1;
    @%p2 ld.global.gpu.{acquire}.b32 %r8, [ %d101 + 0 ];
    setp.eq.u32 %p3, %r8, 0;
    @%p3 bra $LOOP;
    {bar_behind}
    ld.global.b32 %r4, [ %d1 + 0 ];
$END:
"""
RIGHT = dict(release="release", acquire="acquire", bar_before=BARRIER, bar_behind=BARRIER, late="")


def message(**changes: str) -> set[str]:
    """One CTA writes a message that another reads."""
    body = PLACES + MESSAGE.format(**(RIGHT | changes))
    arrays = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
    return findings(program(body, threads=64, parameters=2), *arrays, grid=2)


def test_release_and_acquire_order_global_memory():
    assert message() == set()


@pytest.mark.parametrize(
    "change",
    [
        dict(release="relaxed"),
        dict(acquire="relaxed"),
        dict(bar_before=""),
        dict(bar_behind=""),
        # A release does not publish the stores that follow it.
        dict(late="@%p2 st.global.b32 [ %d1 + 0 ], %r5;"),
    ],
    ids=str,
)
def test_half_an_order_is_none(change):
    found = message(**change)
    assert found and found <= {GLOBAL_READ_RACE, GLOBAL_LATE_READ}


def test_plain_access_beside_an_atomic_operation():
    body = """
    mov.u32 %r7, 1;
    setp.lt.u32 %p1, %r99, 32;
    @%p1 atom.global.gpu.relaxed.add.u32 %r6, [ %d100 + 0 ], %r7;
    {}
    @!%p1 ld.global.b32 %r4, [ %d100 + 0 ];
    """
    data = np.zeros(1, np.uint32)
    assert findings(program(body.format(""), threads=64), data) == {ATOMIC}
    assert findings(program(body.format(BARRIER), threads=64), data) == set()
    assert data[0] == 64


def test_neighbours_do_not_race():
    """Single bytes, and the word after that of an atomic operation."""
    bytes_ = """
    cvt.u64.u32 %d1, %r99;
    add.s64 %d1, %d100, %d1;
    st.global.b8 [ %d1 + 0 ], %r99;
    """
    data = np.zeros(64, np.uint8)
    assert findings(program(bytes_, threads=64), data) == set()
    assert data.tolist() == list(range(64))
    words = """
    mov.u32 %r7, 1;
    setp.lt.u32 %p1, %r99, 32;
    @%p1 atom.global.gpu.relaxed.add.u32 %r6, [ %d100 + 0 ], %r7;
    @!%p1 st.global.b32 [ %d100 + 4 ], %r7;
    """
    assert findings(program(words, threads=64), np.zeros(2, np.uint32)) == set()


@pytest.mark.parametrize(
    ("operation", "type_", "before", "operand", "after"),
    [
        ("add", "u32", np.uint32(5), np.uint32(3), np.uint32(8)),
        ("add", "s32", np.int32(-5), np.int32(3), np.int32(-2)),
        ("add", "u64", np.uint64(2**40), np.uint64(3), np.uint64(2**40 + 3)),
        ("add", "f32", np.float32(0.5), np.float32(0.25), np.float32(0.75)),
        ("exch", "b32", np.uint32(5), np.uint32(3), np.uint32(3)),
        ("exch", "b64", np.uint64(5), np.uint64(2**50), np.uint64(2**50)),
    ],
)
def test_atomic_operations(operation, type_, before, operand, after):
    letter, bits = ("d", 64) if "64" in type_ else ("r", 32)
    body = f"""
    ld.global.b{bits} %{letter}1, [ %d101 + 0 ];
    setp.eq.u32 %p1, %r99, 9;
    @%p1 atom.global.gpu.acq_rel.{operation}.{type_} %{letter}2, [ %d100 + 0 ], %{letter}1;
    @%p1 st.global.b{bits} [ %d102 + 0 ], %{letter}2;
    """
    arrays = [np.array([value]) for value in (before, operand, np.zeros_like(before))]
    run(program(body, parameters=3), *arrays)
    assert arrays[0] == after and arrays[2] == before


COPY = """
    mad.wide.u32 %d2, %r99, 16, %d100;
    mad.lo.u32 %r1, %r99, 16, %r0;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %d2 + 0 ], 0x10, %r7;
    cp.async.commit_group;
    {wait}
    {barrier}
    xor.b32 %r3, %r99, 33;
    mad.lo.u32 %r2, %r3, 16, %r0;
    ld.shared.v2.b32 {{%r4, %r5}}, [ %r2 + 8 ];
    st.global.v2.b32 [ %d2 + 0 ], {{%r4, %r5}};
    {end}
"""
WAIT = "cp.async.wait_group 0;"


def copy(size: int, wait: str, barrier: str, end: str = "", late: bool = True):
    data = np.arange(256, dtype=np.uint32)
    body = PLACES + f"mov.u32 %r7, {size};" + COPY.format(wait=wait, barrier=barrier, end=end)
    result = run(program(body, threads=64), data, how=ONE_RUN._replace(late=late))
    return {report.finding for report in result.reports}, data.reshape(64, 4)


@pytest.mark.parametrize("late", [True, False])
def test_asynchronous_copy(late):
    found, data = copy(16, WAIT, BARRIER, late=late)
    assert found == set()
    lanes = np.arange(64) ^ 33
    assert (data[:, 0] == lanes * 4 + 2).all() and (data[:, 1] == lanes * 4 + 3).all()


def test_copy_of_fewer_bytes_gives_zeros():
    found, data = copy(8, WAIT, BARRIER)
    assert found == set() and not data[:, :2].any()


def test_copy_without_wait_or_barrier():
    in_flight, unfenced, never = FINDINGS[9:11] + FINDINGS[12:13]
    found, data = copy(16, NOTHING, BARRIER)
    assert {in_flight, never} <= found
    assert (data[:, 0] == 0xFFFFFFFF).all()
    found, _ = copy(16, WAIT, NOTHING, end=BARRIER)
    assert found and found <= {in_flight, READ_RACE, UNWRITTEN, LATE_READ}
    assert unfenced not in found


def test_the_source_of_a_copy_may_not_change_before_its_wait():
    overwrite = "st.global.b32 [ %d2 + 4 ], %r99;"
    found, _ = copy(16, overwrite + WAIT, BARRIER)
    assert found <= {GLOBAL_WRITE_RACE, GLOBAL_LATE_READ}


def test_unwritten_memory():
    assert two_warps(LOAD, OUT) == {UNWRITTEN}
    data, written = np.zeros(32, np.uint32), np.zeros(128, np.uint8)
    body = "mad.wide.u32 %d1, %r99, 4, %d100; {} ld.global.b32 %r4, [ %d1 + 0 ];"
    for store, found in (("", {FINDINGS[8]}), ("st.global.b32 [ %d1 + 0 ], %r99;", set())):
        machine = Machine(program(body.format(store)), 16)
        buffers = {(data.ctypes.data, data.nbytes): written}
        result = machine.launch(1, [("*", data.ctypes.data)], buffers, ONE_RUN)
        assert {report.finding for report in result.reports} == found
    assert written.all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ld.global.b32 %r4, [ %d1 + 4 ];", "out of bounds"),
        ("st.global.b32 [ %d1 + -128 ], %r99;", "out of bounds"),
        ("ld.global.b32 %r4, [ %d1 + 2 ];", "misaligned global"),
        ("ld.shared.b32 %r4, [ %r1 + 1000 ];", "shared access out of bounds"),
        ("ld.shared.b32 %r4, [ %r1 + 2 ];", "misaligned shared"),
        ("ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [ %r1 + 0 ];", "misaligned shared"),
        ("setp.lt.u32 %p1, %r99, 3; @%p1 bar.sync 0;", "part of a warp at a barrier"),
        ("setp.lt.u32 %p1, %r99, 3; @%p1 bar.warp.sync -1;", "part of a warp"),
        ("$HERE: bra $HERE;", "no end"),
        ("mov.b64 %d4, k_param_0; ld.param.b64 %d5, [%d4+8];", "out of the parameters"),
    ],
)
def test_faults(line, message):
    with pytest.raises(Fault, match=message):
        run(program(PLACES + line), np.zeros(32, np.uint32))


def test_a_barrier_that_some_warps_do_not_reach():
    with pytest.raises(Fault, match="others wait for"):
        two_warps("setp.lt.u32 %p1, %r99, 32; @%p1 ret;", BARRIER)


def test_a_report_names_both_statements_and_threads():
    data = np.zeros(64, np.uint32)
    text = program("\n".join([PLACES, STORE, LOAD]), threads=64)
    reports = [r for r in run(text, data).reports if r.finding in (READ_RACE, LATE_READ)]
    assert STORE.strip(";") in str(reports[0]) and LOAD.strip(";") in str(reports[0])
    assert "CTA 0, thread" in reports[0].thread


def test_branches_meet_again():
    body = """
    mad.wide.u32 %d1, %r99, 4, %d100;
    mov.u32 %r4, 0;
    mov.u32 %r5, %r99;
$LOOP:
    and.b32 %r6, %r5, 1;
    setp.eq.u32 %p1, %r6, 0;
    @%p1 bra $EVEN;
    mad.lo.u32 %r5, %r5, 3, 1;
    bra $NEXT;
$EVEN:
    shr.u32 %r5, %r5, 1;
$NEXT:
    add.u32 %r4, %r4, 1;
    setp.gt.u32 %p2, %r5, 1;
    @%p2 bra $LOOP;
    bar.warp.sync -1;
    st.global.b32 [ %d1 + 0 ], %r4;
    """

    def steps(n: int) -> int:
        count = 0
        while True:
            n, count = 3 * n + 1 if n % 2 else n // 2, count + 1
            if n <= 1:
                return count

    data = np.zeros(32, np.uint32)
    run(program(body), data)
    assert data.tolist() == [steps(n) for n in range(32)]


@pytest.mark.parametrize(
    "line",
    [
        "mul.f32 %r1, %r2, %r3, %r4;",
        "frobnicate.b32 %r1, %r2;",
        "bar.arrive 1, 64;",
        "mov.b32 %x, 1;",
    ],
)
def test_what_is_not_known_is_refused(line):
    with pytest.raises(Unsupported, match=r"line \d+"):
        Machine(program(line), 16)


def test_the_same_seed_gives_the_same_run():
    data = np.zeros(64, np.uint32)
    text = program("\n".join([PLACES, STORE, LOAD, OUT]), threads=64)
    runs = [str(run(text, data, how=ONE_RUN._replace(seed=7)).reports) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(
    ("access", "stride", "expected", "ideal"),
    [
        ("ld.shared.b32 %r4, [ %r1 + 0 ];", 4, 1, 1),
        ("ld.shared.b32 %r4, [ %r1 + 0 ];", 0, 1, 1),  # one word for all lanes
        ("ld.shared.b32 %r4, [ %r1 + 0 ];", 8, 2, 1),
        ("ld.shared.b32 %r4, [ %r1 + 0 ];", 128, 32, 1),
        ("st.shared.b16 [ %r1 + 0 ], %h0;", 2, 1, 1),
        ("st.shared.v4.b32 [ %r1 + 0 ], {%r99, %r99, %r99, %r99};", 16, 4, 4),
        ("st.shared.v4.b32 [ %r1 + 0 ], {%r99, %r99, %r99, %r99};", 32, 8, 4),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %d100 + 0 ], 0x4;", 16, 4, 1),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [ %r1 + 0 ];", 16, 2, 2),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4, %r5}, [ %r1 + 0 ];", 128, 16, 2),
    ],
)
def test_bank_conflicts(access, stride, expected, ideal):
    text = program(f"""
        mov.u32 %r0, global_smem;
        mov.b16 %h0, 7;
        mad.lo.u32 %r1, %r99, {stride}, %r0;
        {access}
        cp.async.commit_group;
        cp.async.wait_group 0;
    """)
    found = run(
        text,
        np.zeros(64, np.uint32),
        shared=8192,
        how=ONE_RUN._replace(conflicts=True, races=False),
    )
    assert (found.wavefronts.sum(), found.ideal_wavefronts.sum()) == (expected, ideal)


def test_a_prefetch_of_memory_that_is_not_there():
    data = np.zeros(32, np.uint32)
    run(program("prefetch.global.L2 [ %d100 + 124 ];"), data)
    with pytest.raises(Fault, match="out of bounds"):
        run(program("prefetch.global.L2 [ %d100 + 128 ];"), data)
