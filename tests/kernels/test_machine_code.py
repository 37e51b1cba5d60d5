"""The parser of machine code, on a made-up kernel of two phases."""

from pathlib import Path

import pytest

from machine_code import loop_of, parse, phases

SOURCE = """\
def kernel():
    first()
    second()
def first():
    pass
def second():
    pass
"""
KERNEL, FIRST, SECOND, ELSEWHERE = 2, 5, 7, None
# Python line, label or instruction; "first" has a loop with products, "second" an unrolled one.
CODE = [
    (KERNEL, "S2R R0, SR_TID.X"),
    (KERNEL, "@P0 BRA `(.L_x_3)"),
    (FIRST, "LDG.E R1, [R2.64]"),
    (FIRST, "MOV R3, RZ"),
    (ELSEWHERE, ".L_x_1:"),
    (ELSEWHERE, "HMMA.16816.F32.BF16 R4, R5, R6, R4"),
    (ELSEWHERE, "HMMA.16816.F32.BF16 R4, R5, R6, R4"),
    (ELSEWHERE, "IADD3 R7, R7, 0x1, RZ"),
    (ELSEWHERE, "LDL R8, [R1]"),
    (ELSEWHERE, "@!P1 BRA `(.L_x_1)"),
    (FIRST, "FADD R9, R4, R9"),
    (FIRST, "STG.E [R2.64], R9"),
    (KERNEL, "BRA `(.L_x_4)"),
    (ELSEWHERE, ".L_x_3:"),
    (SECOND, "MOV R3, RZ"),
    (ELSEWHERE, "HGMMA.64x256x16.F32.BF16 R4, gdesc[UR4], R4"),
    (SECOND, "IADD3 R7, R7, 0x1, RZ"),
    (ELSEWHERE, "HGMMA.64x256x16.F32.BF16 R4, gdesc[UR4], R4"),
    (SECOND, "MUFU.EX2 R9, R9"),
    (ELSEWHERE, ".L_x_4:"),
    (KERNEL, "EXIT"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "triton").mkdir()
    path = tmp_path / "triton" / "forward.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def blocks(source):
    lines = []
    for number, (line, text) in enumerate(CODE):
        if text.endswith(":"):
            lines.append(text)
            continue
        place = source if line is not None else source.with_name("device.py")
        lines.append(f'\t//## File "{place}", line {line or 1}')
        lines.append(f"        /*{16 * number:04x}*/                   {text} ;")
    return parse("\n".join(lines))


def test_blocks_and_what_follows_them(blocks):
    assert [[i.name for i in block.instructions][-1] for block in blocks] == [
        *("BRA", "MOV", "BRA", "BRA", "MUFU", "EXIT")
    ]
    assert [sorted(block.next) for block in blocks] == [[1, 4], [2], [2, 3], [5], [5], []]


def test_phases(blocks, source):
    found = phases(blocks, source, {"a": ["first"], "b": ["second"]}, products=2)
    first, second = found["a"], found["b"]
    assert (first.start, first.step) == (2, 5)
    assert first.end == {"FADD": 1, "STG": 1, "BRA": 1}
    assert (second.start, second.step) == (1, 3)
    assert second.end == {"MUFU": 1}


def test_spills_in_main_loops(blocks):
    assert [i.name for i in loop_of(blocks)] == [
        *("HMMA", "HMMA", "IADD3", "LDL", "BRA", "HGMMA", "IADD3", "HGMMA")
    ]
