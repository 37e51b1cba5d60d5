"""Multiway modules: each token goes through its own expert's modules, fused or not."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from vlmo.kernels import ModalityRouting
from vlmo.kernels import nn as multiway
from vlmo.kernels.nn import FeedForward, MultiwayFFN, MultiwayLinear, MultiwayNorm, by_expert

NAMES = ("image", "text")
D, F = 8, 12
# Each with the expert of every one of its 10 tokens.
ROUTINGS = {
    "segments": (ModalityRouting.segments([(0, 3), (1, 2)]), [0, 0, 0, 1, 1] * 2),
    "interleaved": (ModalityRouting.segments([(0, 1), (1, 3), (0, 1)]), [0, 1, 1, 1, 0] * 2),
    "one expert": (ModalityRouting.segments([(1, 5)], num_experts=2), [1] * 10),
    "packed": (ModalityRouting.packed([[(0, 4), (1, 2)], [(1, 4)]]), [0] * 4 + [1] * 6),
    "ids": (ModalityRouting.from_ids(torch.tensor([1, 0] * 5), 2), [1, 0] * 5),
}
on_every_routing = pytest.mark.parametrize("kind", ROUTINGS)
FFNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sub-norm": dict(sub_norm=True),
    "gated": dict(activation="swiglu"),
    "gated, sub-norm": dict(activation="geglu", sub_norm=True),
    "no bias, sub-norm": dict(bias=False, sub_norm=True, eps=1e-3),
}
NORMS = {"none": None, "layer": "layer", "rms": "rms"}


class Called(nn.Module):
    """As adapters are: the module does more than its parameters say."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer, self.calls = base, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base_layer(x)


def randomise(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


def token_by_token(module: Any, x: Tensor, ids: list[int], norm=None) -> Tensor:
    """Each token alone through the submodule of its expert."""
    experts = [*module.values()]
    norms: list[Any] = [nn.Identity()] * 2 if norm is None else [*norm.values()]
    tokens = [experts[e](norms[e](t[None])) for t, e in zip(x.view(10, -1), ids, strict=True)]
    return torch.cat(tokens).view(2, 5, -1)


def assert_same_with_gradients(modules: list[nn.Module], x: Tensor, actual, expected) -> None:
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    inputs = [x, *(p for module in modules for p in module.parameters())]
    found = torch.autograd.grad(actual, inputs, grad, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            assert one is other or not (other if one is None else one).any()
        else:
            torch.testing.assert_close(one, other)


def tokens() -> Tensor:
    return torch.randn(2, 5, D, dtype=torch.float64).requires_grad_()


@on_every_routing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_linear(kind, bias, wrapped):
    routing, ids = ROUTINGS[kind]
    linear = randomise(MultiwayLinear(D, 6, NAMES, bias))
    if wrapped:
        linear["text"] = Called(linear["text"])
    x = tokens()
    actual = linear(x, routing)
    assert not wrapped or linear["text"].calls == 1
    assert_same_with_gradients([linear], x, actual, token_by_token(linear, x, ids))


@on_every_routing
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm(kind, norm):
    routing, ids = ROUTINGS[kind]
    module = randomise(MultiwayNorm(D, NAMES, eps=1e-2, kind=norm))
    assert type(module["text"]) is {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm]
    x = tokens()
    assert_same_with_gradients([module], x, module(x, routing), token_by_token(module, x, ids))


@on_every_routing
@pytest.mark.parametrize("options", FFNS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrapped", [None, "fc1", "norm"])
def test_ffn(kind, options, norm, wrapped):
    routing, ids = ROUTINGS[kind]
    ffn = randomise(MultiwayFFN(D, F, NAMES, **FFNS[options]))
    before = None
    if NORMS[norm]:
        before = randomise(MultiwayNorm(D, NAMES, eps=1e-2, kind=norm))
    if wrapped == "fc1":
        ffn["text"].fc1 = Called(ffn["text"].fc1)
    elif wrapped == "norm" and before is not None:
        before["text"] = Called(before["text"])
    x, scale = tokens(), torch.randn(D, dtype=torch.float64)
    draws = torch.tensor([[0.0, 0, 0, 2, 2], [2, 2, 2, 0, 0]], dtype=torch.float64)
    actual = ffn(x, routing, norm=before, layer_scale=scale, token_scale=draws, residual=x)
    branch = token_by_token(ffn, x, ids, before)
    modules = [ffn] if before is None else [ffn, before]
    assert_same_with_gradients(modules, x, actual, x + draws[..., None] * scale * branch)


@pytest.mark.parametrize("sub_norm", [True, False])
def test_plain_ffn_is_one_operation_and_a_hooked_one_is_called(sub_norm):
    routing, _ = ROUTINGS["segments"]
    ffn = randomise(MultiwayFFN(D, F, NAMES, sub_norm=sub_norm))
    norm, x = randomise(MultiwayNorm(D, NAMES)), tokens()
    hooked = [ffn["text"], ffn["image"].fc2, norm, norm["image"]]
    if sub_norm:
        hooked.append(ffn["text"].ffn_layernorm)
    with mock.patch.object(multiway, "moe_ffn", wraps=multiway.moe_ffn) as fused:
        expected = ffn(x, routing, norm=norm)
        assert fused.call_count == 1
        for module in hooked:
            seen: list[nn.Module] = []
            handle = module.register_forward_hook(lambda m, *_, seen=seen: seen.append(m))
            torch.testing.assert_close(ffn(x, routing, norm=norm), expected)
            handle.remove()
            assert seen == [module]
        # A hook on the norm as a whole leaves the experts themselves plain.
        assert fused.call_count == 2


def test_state_dict_reads_as_that_of_separate_networks():
    ffn = MultiwayFFN(D, F, ("A", "B"), sub_norm=True)
    names = [
        f"{layer}.{part}"
        for layer in ("fc1", "fc2", "ffn_layernorm")
        for part in ("weight", "bias")
    ]
    assert [*ffn.state_dict()] == [f"{expert}.{name}" for expert in "AB" for name in names]
    alone = FeedForward(D, F, sub_norm=True)
    alone.load_state_dict(ffn["A"].state_dict())
    assert [*MultiwayLinear(D, F, 3, bias=False).state_dict()] == [f"{e}.weight" for e in range(3)]
    assert [*MultiwayNorm(D, 1, kind="rms").state_dict()] == ["0.weight"]


def test_an_expert_without_a_piece_gets_no_gradient():
    routing, _ = ROUTINGS["one expert"]
    for module in (
        MultiwayLinear(D, D, NAMES),
        MultiwayNorm(D, NAMES),
        MultiwayFFN(D, F, NAMES),
        MultiwayFFN(D, F, NAMES, sub_norm=True),
    ):
        module(torch.randn(2, 5, D), routing).sum().backward()
        assert all(p.grad is not None for p in module["text"].parameters())
        assert all(p.grad is None for p in module["image"].parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiwayLinear(D, F, NAMES),
        lambda: MultiwayNorm(D, NAMES),
        lambda: MultiwayNorm(D, NAMES, kind="rms"),
        lambda: MultiwayFFN(D, F, NAMES, sub_norm=True),
        lambda: MultiwayFFN(D, F, NAMES, activation="swiglu", bias=False),
    ],
)
def test_meta_device_and_reset(make):
    torch.manual_seed(0)
    expected = make()
    with torch.device("meta"):
        module = make()
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(0)
    module.reset_parameters()
    for name, parameter in expected.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter), name
    torch.testing.assert_close(copy.deepcopy(module).state_dict(), module.state_dict())


def test_device_and_dtype_of_the_parameters():
    for module in (
        MultiwayLinear(D, F, 2, device="meta", dtype=torch.bfloat16),
        MultiwayNorm(D, 2, device="meta", dtype=torch.bfloat16),
        MultiwayFFN(D, F, 2, sub_norm=True, device="meta", dtype=torch.bfloat16),
    ):
        assert {(p.is_meta, p.dtype) for p in module.parameters()} == {(True, torch.bfloat16)}


@on_every_routing
def test_autocast(kind):
    routing, _ = ROUTINGS[kind]
    ffn, x = randomise(MultiwayFFN(D, F, NAMES, sub_norm=True)).float(), tokens().float()
    norm = randomise(MultiwayNorm(D, NAMES)).float()
    expected = ffn(x, routing, norm=norm, residual=x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ffn(x, routing, norm=norm, residual=x)
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("kind", ["segments", "packed"])
def test_compiled_in_one_graph(kind):
    routing, _ = ROUTINGS[kind]
    ffn, linear = (
        randomise(MultiwayFFN(D, F, NAMES, sub_norm=True)),
        randomise(MultiwayLinear(D, D, 2)),
    )
    norm = randomise(MultiwayNorm(D, NAMES))

    def run(x):
        return ffn(linear(x, routing), routing, norm=norm, residual=x)

    x = tokens()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same_with_gradients([ffn, linear, norm], x, compiled(x), run(x))


def test_errors():
    routing, _ = ROUTINGS["segments"]
    x = torch.randn(2, 5, D)
    with pytest.raises(ValueError, match=r"routing: 2 experts, but the module has 3 \(0, 1, 2\)"):
        MultiwayLinear(D, D, 3)(x, routing)
    with pytest.raises(TypeError, match="routing: expected a ModalityRouting, got list"):
        MultiwayNorm(D, 2)(x, [0, 1])
    with pytest.raises(ValueError, match="routing: made for sequences of 5 tokens"):
        MultiwayNorm(D, 2)(x[:, :4], routing)
    for experts in (0, (), ("a", "a")):
        with pytest.raises(ValueError, match=r"experts: .* are not one or more different names"):
            MultiwayNorm(D, experts)
    with pytest.raises(ValueError, match="kind: 'batch' is not one of"):
        MultiwayNorm(D, 2, kind="batch")
    with pytest.raises(ValueError, match="activation: 'relu' is not one of"):
        MultiwayFFN(D, F, 2, activation="relu")


def test_each_function_is_called_once_for_tokens_without_padding():
    shapes: list[tuple[int, ...]] = []

    def function(rows: Tensor) -> Tensor:
        shapes.append(tuple(rows.shape))
        return rows

    for routing, ids in ROUTINGS.values():
        used = sorted(set(ids)) if routing.pieces else [0, 1]
        if len(used) == 1:
            continue
        shapes.clear()
        x = torch.randn(2, 5, D)
        assert torch.equal(by_expert(x, routing, [function] * 2), x)
        assert shapes == [(ids.count(e), D) for e in used]


def test_no_tokens():
    ffn, linear = MultiwayFFN(D, F, NAMES, sub_norm=True), MultiwayLinear(D, 6, NAMES)
    norm = MultiwayNorm(D, NAMES)
    for kind in ("segments", "interleaved", "one expert"):
        routing, _ = ROUTINGS[kind]
        out = linear(ffn(torch.randn(0, 5, D), routing, norm=norm), routing)
        assert out.shape == (0, 5, 6)
    routing = ModalityRouting.packed([[(1, 3)]], num_experts=2)  # none for the first expert
    linear(ffn(torch.randn(3, D), routing, norm=norm), routing).sum().backward()
    for module in (ffn, norm, linear):
        for name, expert in module.items():
            gradients = [p.grad for p in expert.parameters() if p.grad is not None]
            assert len(gradients) == len([*expert.parameters()])
            assert any(bool(grad.any()) for grad in gradients) == (name == "text")
