"""Compile CUDA C++ to a cubin or PTX with NVRTC 12.9, the last release that supports sm_70.

Needs neither a CUDA installation nor a GPU: NVRTC, the headers and libnvvm come from pip packages
found in the running Python environment (the project's extra `test` installs them).

The build runs this file as a script, so it imports only the standard library.

    python csrc/nvrtc.py kernel.cu -o kernel.cubin --arch sm_70 -I include -D TILE=128
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
from dataclasses import asdict, dataclass, field

PACKAGES = {
    "cuda_nvrtc": "nvidia-cuda-nvrtc-cu12==12.9.86",
    "cuda_runtime": "nvidia-cuda-runtime-cu12==12.9.79",
    "cuda_cccl": "nvidia-cuda-cccl-cu12==12.9.27",
    "cuda_nvcc": "nvidia-cuda-nvcc-cu12==12.9.86",
}


class CompileError(RuntimeError):
    """NVRTC rejected the source; the message is its log."""


@dataclass
class Resources:
    """What ptxas reports about one kernel."""

    registers: int = 0
    spill_stores: int = 0  # bytes
    spill_loads: int = 0  # bytes
    stack: int = 0
    shared: int = 0  # static shared memory, bytes
    barriers: int = 0


@dataclass
class Compiled:
    """Result of `compile_cuda`."""

    image: bytes
    log: str
    arch: str
    kernels: dict = field(default_factory=dict)  # name -> Resources

    def save(self, path) -> pathlib.Path:
        """Write the image to a file and return its path."""
        path = pathlib.Path(path)
        path.write_bytes(self.image)
        return path


def package_dir(component: str) -> pathlib.Path:
    """Folder of one NVIDIA pip component, e.g. cuda_nvrtc; the error names the missing package."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(root) / component
        if path.is_dir():
            return path
    raise ImportError(
        f"pip package missing: {PACKAGES[component]}   (pip install {PACKAGES[component]})"
    )


@functools.lru_cache(None)
def load_nvrtc():
    """Load libnvrtc and its builtins."""
    folder = package_dir("cuda_nvrtc") / "lib"
    libraries = sorted(x for x in folder.glob("libnvrtc.so.12*") if "alt" not in x.name)
    if not libraries:
        raise ImportError(
            f"no libnvrtc.so.12 in the installed package; need {PACKAGES['cuda_nvrtc']}"
        )
    for builtins in folder.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(libraries[0]))


def nvrtc_version() -> tuple:
    """(major, minor) version of the NVRTC that was found."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    load_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def supported_archs() -> list:
    """Compute capabilities this NVRTC can compile for, e.g. [50, 52, ..., 70, ...]."""
    lib, n = load_nvrtc(), ctypes.c_int()
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(n))
    archs = (ctypes.c_int * n.value)()
    lib.nvrtcGetSupportedArchs(archs)
    return list(archs)


def system_includes() -> list:
    """Include folders of the CUDA headers in the pip packages."""
    return [package_dir(x) / "include" for x in ("cuda_runtime", "cuda_cccl", "cuda_nvcc")]


def parse_ptxas_log(log: str) -> dict:
    """Parse the output of `ptxas -v` into {kernel name: Resources}."""
    kernels: dict[str, Resources] = {}
    functions: dict[str, Resources] = {}
    current = function = None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels.setdefault(m.group(1), Resources())
        elif m := re.search(r"Function properties for (\S+)", line):
            function = kernels.get(m.group(1)) or functions.setdefault(m.group(1), Resources())
        elif m := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            target = function or current
            if target:
                target.stack, target.spill_stores, target.spill_loads = map(int, m.groups())
        elif current and (m := re.search(r"Used (\d+) registers(.*)", line)):
            current.registers = int(m.group(1))
            if b := re.search(r"used (\d+) barriers", m.group(2)):
                current.barriers = int(b.group(1))
            if b := re.search(r"(\d+) bytes smem", m.group(2)):
                current.shared = int(b.group(1))
    return kernels


def _read(lib, program, name):
    """Fetch a size-then-bytes result (log, PTX or cubin) from NVRTC."""
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{name}")(program, buffer)
    return buffer.raw


def compile_cuda(
    source,
    arch="sm_70",
    *,
    name="kernel.cu",
    include_dirs=(),
    defines=None,
    options=(),
    want="cubin",
) -> Compiled:
    """Compile CUDA C++ (text, or a path to a file); returns the image, the log and the resources.

    `arch` is e.g. "sm_70"; `defines` is a dict or a list of "NAME" / "NAME=value"; `want` is
    "cubin" or "ptx".
    """
    if isinstance(source, os.PathLike):
        name, include_dirs = pathlib.Path(source).name, [*include_dirs, pathlib.Path(source).parent]
        source = pathlib.Path(source).read_text()
    if want not in ("cubin", "ptx"):
        raise ValueError("want must be 'cubin' or 'ptx'")
    lib = load_nvrtc()
    capability = int(re.sub(r"\D", "", arch) or 0)
    if capability not in supported_archs():
        raise CompileError(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} does not support {arch}; "
            f"it supports {supported_archs()} (sm_70 needs {PACKAGES['cuda_nvrtc']})"
        )
    if isinstance(defines, dict):
        defines = [k if v is None else f"{k}={v}" for k, v in defines.items()]
    target = arch.replace("sm_", "compute_") if want == "ptx" else arch
    arguments = [f"--gpu-architecture={target}", "--std=c++17", "-default-device"]
    if want == "cubin":
        arguments.append("--ptxas-options=-v")
    arguments += [f"--include-path={x}" for x in [*include_dirs, *system_includes()]]
    arguments += [f"--define-macro={x}" for x in defines or ()]
    arguments += list(options)

    program = ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        array = (ctypes.c_char_p * len(arguments))(*[x.encode() for x in arguments])
        status = lib.nvrtcCompileProgram(program, len(arguments), array)
        log = _read(lib, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(log or f"NVRTC error {status}")
        image = _read(lib, program, "CUBIN" if want == "cubin" else "PTX")
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(
        image if want == "cubin" else image.rstrip(b"\0"), log, arch, parse_ptxas_log(log)
    )


def main():
    parser = argparse.ArgumentParser(description="Compile CUDA C++ with NVRTC.")
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("-o", "--output", type=pathlib.Path, help=".cubin or .ptx")
    parser.add_argument("--arch", default="sm_70")
    parser.add_argument("-I", dest="include_dirs", action="append", default=[])
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("--option", action="append", default=[], help="passed on to NVRTC")
    parser.add_argument(
        "--resources",
        type=pathlib.Path,
        help="where to write registers, spills and shared memory of each kernel, as JSON",
    )
    args = parser.parse_args()
    output = args.output or args.source.with_suffix(".cubin")
    try:
        result = compile_cuda(
            args.source,
            args.arch,
            include_dirs=args.include_dirs,
            defines=args.defines,
            options=args.option,
            want="ptx" if output.suffix == ".ptx" else "cubin",
        )
    except (CompileError, ImportError) as error:
        sys.exit(str(error))
    result.save(output)
    if args.resources:
        kernels = {name: asdict(kernel) for name, kernel in result.kernels.items()}
        args.resources.write_text(json.dumps(kernels, indent=1) + "\n")
    for kernel, r in result.kernels.items():
        print(
            f"{kernel}: {r.registers} registers, {r.shared} B shared, {r.stack} B stack, "
            f"spills {r.spill_stores}/{r.spill_loads} B"
        )
    print(f"{output}: {len(result.image)} bytes")


if __name__ == "__main__":
    main()
