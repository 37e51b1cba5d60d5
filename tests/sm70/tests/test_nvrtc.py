"""The NVRTC wrapper and the disassembler."""

import numpy as np
import pytest

from sm70 import CompileError, Kernel, compile_cuda, disasm, disassemble, emulator

SOURCE = """
#include "scale.h"
extern "C" __global__ void scale(float* x) {
  __shared__ float s[COUNT];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = SCALE * s[threadIdx.x ^ 1];
}
"""


@pytest.fixture
def include(tmp_path):
    (tmp_path / "scale.h").write_text("#define SCALE 3.0f\n")
    return tmp_path


def test_resources_and_defines(include):
    result = compile_cuda(SOURCE, include_dirs=[include], defines={"COUNT": 64})
    assert result.kernels["scale"].shared == 256
    assert 0 < result.kernels["scale"].registers < 32
    assert result.kernels["scale"].spill_stores == 0


def test_spills_are_reported():
    loop = "\n#pragma unroll\nfor (int i = 0; i < 100; i++) "
    body = f"float v[100]; {loop} v[i] = x[i * n]; {loop} x[i] = v[99 - i];"
    source = (
        'extern "C" __global__ __launch_bounds__(1024, 2) void k(volatile float* x, int n) {'
        + body
        + "}"
    )
    resources = compile_cuda(source).kernels["k"]
    assert resources.registers <= 32 and resources.spill_stores > 0 and resources.spill_loads > 0


@pytest.mark.parametrize("arch", ["sm_70", "sm_75", "sm_80", "sm_90a"])
def test_architectures(include, arch):
    assert (
        compile_cuda(SOURCE, arch, include_dirs=[include], defines=["COUNT=32"]).image[:4]
        == b"\x7fELF"
    )


def test_ptx(include):
    ptx = compile_cuda(SOURCE, include_dirs=[include], defines=["COUNT=32"], want="ptx")
    assert b".target sm_70" in ptx.image


def test_errors_are_clear(monkeypatch):
    import nvrtc  # which sm70 has made importable

    with pytest.raises(CompileError, match="undefined_name"):
        compile_cuda('extern "C" __global__ void k(int* x) { *x = undefined_name; }')
    with pytest.raises(CompileError, match="does not support sm_35"):
        compile_cuda("", "sm_35")
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"nvidia-cuda-nvrtc-cu12==12\.9\.86"):
        nvrtc.package_dir("cuda_nvrtc")


def test_disassembly_fields(include):
    code = disassemble(compile_cuda(SOURCE, include_dirs=[include], defines=["COUNT=32"]).image)[
        "scale"
    ]
    ops = [x.op for x in code]
    assert {"LDG", "STS", "BAR", "LDS", "FMUL", "STG", "EXIT"} <= set(ops)
    load = code[ops.index("LDG")]
    assert load.control.write_barrier != 7 and load.access_bytes == 4
    user = code[ops.index("STS")]
    assert user.control.wait >> load.control.write_barrier & 1


def test_unimplemented_instruction_is_named(include, monkeypatch):
    monkeypatch.delitem(emulator.codegen.HANDLERS, "FMUL")
    cubin = compile_cuda(SOURCE, include_dirs=[include], defines=["COUNT=32"])
    with pytest.raises(NotImplementedError, match=r"FMUL at pc 0x[0-9a-f]+: FMUL R"):
        Kernel(cubin, "scale", strict=True)
    with pytest.warns(UserWarning, match="FMUL"):
        kernel = Kernel(cubin, "scale")
    with pytest.raises(
        emulator.KernelFault, match=r"unimplemented instruction.*pc 0x[0-9a-f]+: FMUL"
    ):
        kernel.launch(1, 32, [np.zeros(32, np.float32)])


def test_tools_setting_is_checked(monkeypatch, tmp_path):
    monkeypatch.setenv("SM70_CUOBJDUMP_DIR", str(tmp_path))
    with pytest.raises(disasm.DisassemblerError, match="no cuobjdump"):
        disasm.find_tools()
