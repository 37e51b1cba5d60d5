"""What a result says about the CPU: its name, its instruction sets, and what restricts them."""

from __future__ import annotations

import pytest
import torch

from harness.cpu import describe_cpu, restrictions
from harness.session import machine

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu avx avx2 avx512f avx512_bf16 avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
XEON = """vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
flags\t\t: avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8
"""
NEOVERSE = """processor\t: 0
Features\t: fp asimd fphp asimdhp sve bf16 i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("cpuinfo", "name", "instructions"),
    [
        (
            EPYC,
            "AMD EPYC (family 26 model 2)",
            "AVX2, AVX-512, AVX512-BF16, AVX512-FP16 no, AMX no",
        ),
        (
            XEON,
            "GenuineIntel (family 6 model 143)",
            "AVX2, AVX-512, AVX512-BF16, AVX512-FP16, AMX",
        ),
        (NEOVERSE, "aarch64 (implementer 0x41 part 0xd40)", "NEON, FP16, BF16, SVE, SME no"),
    ],
    ids=["EPYC", "Xeon", "Neoverse"],
)
def test_name_and_instruction_sets(cpuinfo, name, instructions, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert describe_cpu(path) == {"cpu": name, "instructions": instructions}


def test_what_no_file_tells_is_unknown(tmp_path):
    assert describe_cpu(tmp_path / "missing") == {"instructions": "unknown"}
    (tmp_path / "other").write_text("processor\t: 0\nisa\t: rv64\n")
    assert describe_cpu(tmp_path / "other") == {"instructions": "unknown"}


def test_variables_that_restrict_instruction_sets(monkeypatch):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)
    assert restrictions() == {}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert restrictions() == {"environment": "ONEDNN_MAX_CPU_ISA=AVX2"}
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    facts = machine(torch.device("cpu"))
    assert facts["environment"] == "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"
    assert facts["instructions"] == describe_cpu()["instructions"]
    assert facts["threads"] == torch.get_num_threads()
