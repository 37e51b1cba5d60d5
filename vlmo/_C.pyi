"""Kernels for the CPU (csrc/cpu/bindings.cpp); embedded CUDA kernels and their launch."""

_Strided = tuple[int, int, int, int]

def instruction_sets() -> list[str]: ...
def thread_runtime() -> str: ...
def attention_forward(
    instructions: str,
    threads: int,
    type: int,
    qkv: list[_Strided],
    inputs: list[int],
    sizes: tuple[int, ...],
    causal: bool,
    scale: float,
    out: int,
    lse: int,
) -> None: ...
def attention_backward(
    instructions: str,
    threads: int,
    type: int,
    qkv: list[_Strided],
    inputs: list[int],
    sizes: tuple[int, ...],
    causal: bool,
    scale: float,
    out: _Strided,
    dout: _Strided,
    lse: int,
    gradients: list[int],
    dtable: int,
) -> None: ...

def cubins() -> list[tuple[str, str]]: ...
def image(name: str, target: str) -> bytes: ...
def resources(name: str, target: str) -> str: ...
def target_for(name: str, major: int, minor: int) -> str | None: ...
def why_no_driver() -> str | None: ...
def launch(
    cubin: str,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int,
    device: int,
    args: bytes,
) -> None: ...
