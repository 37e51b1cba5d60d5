"""Describes the CPU of this machine, and the variables that restrict its instruction sets."""

from __future__ import annotations

import os
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The instruction sets on which the speed of matrix products depends, and their flags in
# /proc/cpuinfo.
_X86 = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX512-BF16": "avx512_bf16",
    "AVX512-FP16": "avx512_fp16",
    "AMX": "amx_tile",
}
_ARM = {"NEON": "asimd", "FP16": "asimdhp", "BF16": "bf16", "SVE": "sve", "SME": "sme"}


def describe_cpu(path: Path = CPUINFO) -> dict[str, str]:
    """``instructions``, or "unknown" where Linux does not tell; ``cpu`` (a name) if it is known."""
    processor = _first_processor(path)
    if "flags" in processor:
        family, model = processor.get("cpu family", "?"), processor.get("model", "?")
        brand = processor.get("model name", processor.get("vendor_id", "unknown"))
        name = f"{brand} (family {family} model {model})"
        return {"cpu": name, "instructions": _sets(_X86, processor["flags"])}
    if "Features" in processor:
        parts = [processor.get(f"CPU {part}", "?") for part in ("implementer", "part")]
        name = "aarch64 (implementer {} part {})".format(*parts)
        return {"cpu": name, "instructions": _sets(_ARM, processor["Features"])}
    return {"instructions": "unknown"}


def restrictions() -> dict[str, str]:
    """``environment``: the variables that are set and restrict PyTorch's instruction sets."""
    values = {
        "ATEN_CPU_CAPABILITY": os.environ.get("ATEN_CPU_CAPABILITY"),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "MKL_ENABLE_INSTRUCTIONS": os.environ.get("MKL_ENABLE_INSTRUCTIONS"),
    }
    found = [f"{name}={value}" for name, value in values.items() if value is not None]
    return {"environment": " ".join(found)} if found else {}


def _first_processor(path: Path) -> dict[str, str]:
    """The properties of the first processor in a file like /proc/cpuinfo, which may be missing."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sets(known: dict[str, str], flags: str) -> str:
    """Every known instruction set, with a "no" behind those that are missing."""
    present = flags.split()
    return ", ".join(name if flag in present else f"{name} no" for name, flag in known.items())
