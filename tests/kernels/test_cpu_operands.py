"""The CPU backend with 16-bit operands, on CPUs with and without instructions for them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ffn_cases as ffn
from accuracy import assert_as_accurate_as
from conftest import Place
from vlmo import VLMo, VLMoConfig
from vlmo.kernels._backends import cpu as cpu_target
from vlmo.kernels.moe_ffn import cpu as ffn_cpu
from vlmo.kernels.moe_ffn import products as ffn_products

CPU = Place(torch.device("cpu"), "cpu")
NARROW = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_linear_pointwise", "dot", "mv")


class Products(TorchDispatchMode):
    """Dtypes of the operands of matrix products."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in PRODUCTS:
            tensors = (t for t in args if isinstance(t, torch.Tensor))
            self.seen.update(t.dtype for t in tensors)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def products(monkeypatch) -> Products:
    """What moe_ffn multiplies; a mode around a call would see the operation alone."""
    mode = Products()

    def watched(function):
        def run(*args):
            with mode:
                return function(*args)

        return run

    def own(a, *rest):
        mode.seen.add(a.dtype)
        return multiply(a, *rest)

    multiply = cpu_target.matmul
    monkeypatch.setattr(cpu_target, "matmul", own)
    monkeypatch.setattr(ffn_cpu, "forward", watched(ffn_cpu.forward))
    monkeypatch.setattr(ffn_cpu, "backward", watched(ffn_cpu.backward))
    return mode


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def native(request, monkeypatch) -> bool:
    """Whether the CPU has instructions for 16-bit operands; as oneDNN says if it is to use them."""
    monkeypatch.setattr(cpu_target, "_multiplies", lambda dtype: request.param)
    return request.param


def expect(products: Products, dtype: torch.dtype, native: bool) -> None:
    """Without instructions nothing is multiplied in 16 bits; with them, everything is."""
    assert products.seen == {dtype if native else torch.float32}


FFN = [
    ffn.Case(),
    ffn.Case(form="ids"),
    ffn.Case(form="packed", activation="swiglu", norm="rms", bias=False, norm_bias=False),
    ffn.Case(pieces=((0, 3), (3, 5), (1, 4)), hidden=(17, 64, 8, 33), form="ids"),
    ffn.Case(norm="none", layer_scale=False, token_scale=False),
    ffn.Case(layer_scale=False, activation="gelu_tanh", residual=False),
]


def to(tensors: dict, dtype: torch.dtype) -> dict:
    """The same values in another dtype."""
    return {
        name: [t.to(dtype) for t in item] if isinstance(item, list) else item.to(dtype)
        for name, item in tensors.items()
    }


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", FFN, ids=str)
def test_moe_ffn(case, dtype, native, products, monkeypatch):
    if native and not cpu_target._has_instructions(dtype):
        monkeypatch.setattr(ffn_products, "_fuses", lambda dtype: False)  # oneDNN would refuse
    routing = ffn.make_routing(case, "cpu")
    ids = routing.expert_ids(ffn.expert_ids(case).numel(), "cpu")

    def run(function, at):
        tensors = to(ffn.make_tensors(case, "cpu", dtype), at)
        return ffn.outputs_and_gradients(function, tensors)

    exact, baseline = (run(lambda t: ffn.eager(case, ids, t), at) for at in (torch.float64, dtype))
    actual = run(lambda t: ffn.call(case, routing, t, backend="cpu"), dtype)
    for name, value in actual.items():
        assert_as_accurate_as(name, value, exact[name], baseline[name])
    expect(products, dtype, native)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_forward_alone_is_rounded_once(dtype, monkeypatch):
    """It is the float32 result of the same operands, rounded, bit by bit."""
    monkeypatch.setattr(cpu_target, "_multiplies", lambda dtype: False)
    case = ffn.Case(residual=False)
    routing, tensors = ffn.make_routing(case, "cpu"), ffn.make_tensors(case, "cpu", dtype)
    both = (tensors, to(tensors, torch.float32))
    actual, expected = (ffn.call(case, routing, t, backend="cpu") for t in both)
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_operands_stay_as_they_are(dtype, native):
    assert cpu_target.operand_dtype(dtype) == dtype


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_a_model_multiplies_nothing_in_16_bits_inside_the_operations(how, native, products):
    config = VLMoConfig(
        dim=24, depth=2, heads=2, vl_start=1, image_size=32, vocab_size=30, max_text_length=6
    )
    model = VLMo(config.replace(tasks=("mlm", "itm"), text_capacity=8))
    text, image = torch.randint(1, 30, (3, 6)), torch.randn(3, 3, 32, 32)
    mask = torch.arange(6) < torch.tensor([[3], [6], [4]])
    if how == "bfloat16":
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        # In training mode, whose drop path must keep the dtype.
        model.fuse(text, mask, image).image.float().sum().backward()
    expect(products, torch.bfloat16, native)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_without_mkldnn_there_are_no_instructions(dtype):
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets more than that
    try:
        assert cpu_target.operand_dtype(dtype) == torch.float32
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize(
    ("avx512", "extension", "expected"),
    [
        (False, False, torch.bfloat16),  # AVX-NE-CONVERT, or a CPU that is no x86
        (True, False, torch.float32),
        (True, True, torch.bfloat16),
    ],
)
def test_what_onednn_would_emulate_is_widened(avx512, extension, expected, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: extension)
    monkeypatch.setattr(cpu_target, "is_x86", lambda: True)
    cpu_target._has_instructions.cache_clear()
    try:
        assert cpu_target.operand_dtype(torch.bfloat16) == expected
    finally:
        cpu_target._has_instructions.cache_clear()
