"""Cache folder for build outputs and downloads, and its locks."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import subprocess


def cache_dir() -> pathlib.Path:
    """Cache folder: $SM70_CACHE_DIR, else $XDG_CACHE_HOME/sm70, else ~/.cache/sm70."""
    root = os.environ.get("SM70_CACHE_DIR")
    if not root:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(base, "sm70")
    path = pathlib.Path(root)
    path.mkdir(parents=True, exist_ok=True)
    return path


def host_id() -> str:
    """Identifier of the CPU, part of the cache keys because code is built with -march=native."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        wanted = [x for x in lines if x.startswith(("model name", "flags"))][:2]
        return "\n".join(wanted)
    except OSError:
        return ""


@contextlib.contextmanager
def locked(path: pathlib.Path):
    """Lock under which one process at a time creates ``path``; the others wait and then find it."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_shared_library(
    source: pathlib.Path, flags=(), extra: str = "", stem: str = "lib"
) -> pathlib.Path:
    """Compile one C++ file into a cached shared library.

    `extra` is text that also enters the cache key.
    """
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-fPIC", "-shared", "-w", *flags]
    key = hashlib.sha256(
        "\0".join([*command, source.read_text(), extra, host_id()]).encode()
    ).hexdigest()[:20]
    library = cache_dir() / f"{stem}-{key}.so"
    if library.exists():
        return library
    with locked(library):
        if not library.exists():
            _compile(command, source, library)
    return library


def _compile(command: list[str], source: pathlib.Path, library: pathlib.Path) -> None:
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        result = subprocess.run(
            [*command, "-o", str(temporary), str(source)], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise RuntimeError(
            f"no C++ compiler: {command[0]!r} not found (install g++ or set CXX)"
        ) from None
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed on {source.name}:\n{result.stderr[:4000]}")
    os.replace(temporary, library)
