"""Choice of the backend: argument, use_backend(), VLMO_KERNELS, first that can run; no fallback."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from vlmo.kernels import ModalityRouting, moe_ffn, use_backend, why_not
from vlmo.kernels.dispatch import Backend, choose, requested
from vlmo.kernels.support import OPERATIONS


class Runs:
    def why_not(self, *facts):
        return None


class Absent:
    def __init__(self, reason):
        self.reason = reason

    def why_not(self, *facts):
        return self.reason


BACKENDS: dict[str, Backend] = {"cuda": Absent("no GPU."), "triton": Runs(), "reference": Runs()}


def test_the_first_that_can_runs():
    assert choose("op", BACKENDS, None) == "triton"


def test_precedence(monkeypatch):
    monkeypatch.setenv("VLMO_KERNELS", "triton")
    assert requested("op", None) == "triton"
    with use_backend("reference"):
        assert requested("op", None) == "reference"
        assert requested("op", "triton") == "triton"
        with use_backend(None):
            assert requested("op", None) == "triton"
        assert choose("op", BACKENDS, None) == "reference"
    assert choose("op", BACKENDS, None) == "triton"


def test_use_backend_is_undone_by_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert requested("op", None) is None


def test_overlapping_blocks_of_two_threads_leave_nothing_behind():
    first, second = threading.Event(), threading.Event()

    def holds_reference():
        with use_backend("reference"):
            first.set()
            assert second.wait(60)

    thread = threading.Thread(target=holds_reference)
    thread.start()
    assert first.wait(60)
    block = use_backend("cpu")
    with pytest.warns(UserWarning, match=r"another thread is inside use_backend\('reference'\)"):
        block.__enter__()
    second.set()
    thread.join()
    assert requested("op", None) == "cpu"  # the block that is still open
    block.__exit__(None, None, None)
    assert requested("op", None) is None


def test_a_named_backend_never_falls_back():
    with pytest.raises(
        NotImplementedError, match="op: backend 'cuda' cannot run this call: no GPU"
    ):
        choose("op", BACKENDS, "cuda")


def test_every_reason_is_told_when_none_can_run():
    nobody = {"cuda": Absent("no GPU."), "triton": Absent("too old.")}
    with pytest.raises(NotImplementedError, match=r"cuda: no GPU\. triton: too old\."):
        choose("op", nobody, None)


def test_unknown_names_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match="use_backend: 'cudnn' is not a backend"),
        use_backend("cudnn"),
    ):
        pass
    monkeypatch.setenv("VLMO_KERNELS", "Reference")
    with pytest.raises(ValueError, match="VLMO_KERNELS: 'Reference' is not a backend"):
        requested("op", None)


def test_a_name_for_one_operation(monkeypatch):
    monkeypatch.setenv("VLMO_KERNELS", "shared_attention=triton")
    with use_backend("moe_ffn=composed,shared_attention=cpu"):
        assert requested("moe_ffn", None) == "composed"
        assert requested("moe_ffn", "reference") == "reference"
        assert requested("moe_ffn", "shared_attention=cuda") == "composed"
        assert requested("shared_attention", None) == "cpu"
    assert requested("shared_attention", "moe_ffn=cpu") == "triton"
    assert requested("moe_ffn", None) is None


@pytest.mark.parametrize("name", ["ffn=composed", "composed,moe_ffn=cpu", "=cpu", "moe_ffn=cpu,"])
def test_names_of_no_operation_are_refused(name):
    with pytest.raises(ValueError, match=r"names no operation|is not a backend"):
        requested("moe_ffn", name)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_why_not_on_the_cpu(operation):
    assert why_not(operation, "reference") is None
    for backend in ("cuda", "triton", "composed"):
        reason = why_not(operation, backend)
        of_triton = {"moe_ffn": ("triton", "composed"), "shared_attention": ("triton",)}
        of_triton["moe_linear"] = of_triton["moe_ffn"]
        has_kernel = backend in of_triton.get(operation, ())
        if has_kernel and not torch.cuda.is_available():
            assert reason is None  # in Triton's interpreter, which conftest.py asks for
            continue
        assert reason is not None
        assert reason.endswith(".")
        assert "\n" not in reason


def test_why_not_checks_its_arguments():
    with pytest.raises(ValueError, match="operation: 'ffn' is not one of"):
        why_not("ffn", "cuda")
    with pytest.raises(ValueError, match="backend: 'hip' is not one of"):
        why_not("moe_ffn", "hip")


def test_a_kernel_is_interpreted_only_when_asked_for_by_name(monkeypatch):
    from vlmo.kernels.moe_ffn import op as ops

    def fail(*_):
        raise RuntimeError("the Triton kernel ran")

    monkeypatch.setattr(ops.BACKENDS["triton"], "why_not", lambda *facts: None)
    monkeypatch.setattr(ops.BACKENDS["triton"], "forward", fail)
    routing, x, w = ModalityRouting.segments([(0, 4)]), torch.randn(4, 8), [torch.randn(8, 8)]
    moe_ffn(x, routing, w, w)
    with pytest.raises(RuntimeError, match="the Triton kernel ran"):
        moe_ffn(x, routing, w, w, backend="triton")
    with use_backend("triton"), pytest.raises(RuntimeError, match="the Triton kernel ran"):
        moe_ffn(x, routing, w, w)


@pytest.mark.heavy
def test_compiled_code_follows_use_backend():
    routing = ModalityRouting.segments([(0, 4)])
    x, w = torch.randn(4, 8), [torch.randn(8, 8)]
    compiled = torch.compile(lambda x: moe_ffn(x, routing, w, w), backend="eager", fullgraph=True)
    with use_backend("reference"):
        expected = compiled(x)
    torch.testing.assert_close(compiled(x), expected)
    error = "its kernels run on NVIDIA GPUs|NotImplementedError"  # torch 2.8 names the type only
    with use_backend("cuda"), pytest.raises(Exception, match=error):
        compiled(x)


@pytest.mark.heavy
def test_import_needs_neither_gpu_nor_driver():
    code = (
        "from vlmo.kernels import moe_ffn, shared_attention, ModalityRouting; import vlmo._C as c;"
    )
    code += "print(sorted(c.cubins()))"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "HOME": "/nonexistent"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "sm_70" in result.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from kernels import moe_ffn", "this package is vlmo.kernels, not 'kernels'"),
        ("import kernels; kernels.moe_ffn", "this package is vlmo.kernels, not 'kernels'"),
        ("import kernels.moe_ffn.ops", "No module named 'kernels.moe_ffn'"),
        ("import kernels; assert not hasattr(kernels, '__version__')", ""),
    ],
)
def test_the_package_has_one_name(code, message):
    """Imported as plain `kernels`, every operation would be registered twice.

    That alone is no error: transformers imports a package of that name where it finds one.
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (result.returncode != 0) == bool(message), result.stderr
    assert message in result.stderr
