"""Models of other libraries with and without our feed-forward operation."""

import copy
import io
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from accuracy import assert_as_accurate_as
from tiny_models import CASES, LAYERS, MODELS, Case, Inputs
from vlmo.kernels import moe_ffn
from vlmo.testing import FACTOR

TOLERANCE = 1e-5
DRAWS = 8


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=MODELS)
def one(request) -> Case:
    """One case of each model."""
    return CASES[request.param]


@pytest.fixture
def calls(monkeypatch) -> list[Any]:
    """The calls of our operation by any integration."""
    seen: list[Any] = []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(options)
        return moe_ffn(*args, **options)

    for name in ("torchscale", "bagel", "wall_x", "cosmos3"):
        monkeypatch.setattr(f"vlmo.integrations.{name}.moe_ffn", spy)
    return seen


def results(case: Case, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and the gradients of inputs and parameters that there are."""
    dtype = next(model.parameters()).dtype
    given = {
        name: tensor.to(dtype, copy=True).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    model.zero_grad()
    outputs = case.run(model, given)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    leaves = given | dict(model.named_parameters())
    found = {f"d {name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return found | {f"output {i}": y.detach() for i, y in enumerate(outputs)}


def test_float32(case, calls):
    original = case.make().float()
    model = copy.deepcopy(original)
    inputs = case.inputs()
    wanted = results(case, original, inputs)
    assert not calls
    case.apply(model)
    found = without_unused(case, results(case, model, inputs))
    assert len(calls) == LAYERS
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # A key's bias changes all scores of a query alike: its gradient is rounding error.
        like = wanted[name.replace("k_proj", "q_proj") if name.endswith("bias") else name]
        if not tensor.numel():
            continue
        error, size = (found[name] - tensor).abs().max(), like.abs().max()
        assert error <= TOLERANCE * size, f"{name}: error {error:.1e}, largest {size:.1e}"


def test_bfloat16(case, calls):
    """The error bound for all draws together, because most of the error is that of attention."""
    exact, baseline, actual = [], [], []
    for _ in range(DRAWS):
        original, inputs = case.make().bfloat16(), case.inputs()
        inputs |= {name: t.bfloat16() for name, t in inputs.items() if t.is_floating_point()}
        exact.append(results(case, copy.deepcopy(original).double(), inputs))
        baseline.append(results(case, original, inputs))
        case.apply(original)
        actual.append(without_unused(case, results(case, original, inputs)))
    assert len(calls) == DRAWS * LAYERS
    assert actual[0].keys() == exact[0].keys()
    for name in exact[0]:
        found, wanted, eager = (
            torch.stack([draw[name] for draw in draws]) for draws in (actual, exact, baseline)
        )
        # Gradients behind a softmax multiply rounding errors at random, in both alike.
        factor = 4 if "self_attn" in name or "input_layernorm" in name else FACTOR
        assert_as_accurate_as(name, found, wanted, eager, factor)


def without_unused(case: Case, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results but the gradients of an expert without tokens, which are zero.

    Wall-X does not call such an expert, and leaves it without gradients.
    """
    unused = {name for name in found if case.unused and case.unused in name}
    assert not any(found[name].any() for name in unused)
    return {name: tensor for name, tensor in found.items() if name not in unused}


def test_parameters_stay(one):
    model = one.make()
    before, keys = dict(model.named_parameters()), [*model.state_dict()]
    one.apply(model)
    after = dict(model.named_parameters())
    assert [*after] == [*before] and [*model.state_dict()] == keys
    assert all(after[name] is before[name] for name in before)


def test_remove(one, calls):
    model, inputs = one.make(), one.inputs()
    wanted = one.run(model, inputs)
    handle = one.apply(model)
    one.run(model, inputs)
    assert len(calls) == LAYERS
    handle.remove()
    found = one.run(model, inputs)
    assert len(calls) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    handle.remove()
    one.apply(model)
    one.run(model, inputs)
    assert len(calls) == 2 * LAYERS


def test_applied_twice(one):
    model = one.make()
    one.apply(model)
    with pytest.raises(ValueError, match="already replaced"):
        one.apply(model)


def test_replaced_since(one, calls):
    model, inputs = one.make(), one.inputs()
    handle = one.apply(model)
    module, method = next(
        (module, name)
        for module in model.modules()
        for name in ("forward", "forward_train")
        if name in vars(module)
    )
    ours = vars(module)[method]
    setattr(module, method, lambda *args, **options: ours(*args, **options))
    with pytest.raises(RuntimeError, match=f"{method}.*undo that first"):
        handle.remove()
    one.run(model, inputs)
    assert len(calls) == LAYERS


def test_hooked_later(one, calls):
    """A hook, as calibration and adapters have it, is called: its layer computes as before."""
    model, inputs, seen = one.make(), one.inputs(), []
    wanted = one.run(model, inputs)
    one.apply(model)
    network = model.get_submodule(one.network)
    network.register_forward_hook(lambda module, args, output: seen.append(output))
    found = one.run(model, inputs)
    assert len(seen) == 1 and len(calls) == LAYERS - 1
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["adapted first", "applied first"])
def test_adapters(one, order, calls):
    """PEFT's layers are called, although their class has the name of the one that they wrap."""
    model, inputs = one.make(), one.inputs()
    if order == "applied first":
        one.apply(model)
    inject_adapter_in_model(
        LoraConfig(target_modules=[one.network], init_lora_weights=False), model
    )
    if order == "adapted first":
        with pytest.raises(ValueError, match=r"expected torch's Linear, got that of peft\."):
            one.apply(model)
        return
    assert type(model.get_submodule(one.network)).__name__ == "Linear"
    results(one, model.double(), inputs)
    assert len(calls) == LAYERS - 1
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 and all(p.grad.any() for p in adapters)


def test_hooked_before(one):
    model = one.make()
    model.get_submodule(one.network).register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match="a Linear with hooks"):
        one.apply(model)


def test_copy_has_its_own_parameters(one, calls):
    model, inputs = one.make(), one.inputs()
    one.apply(model)
    wanted = one.run(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = one.run(other, inputs)
    assert len(calls) == 2 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_pickled_model_is_the_original(one, calls):
    model, inputs = one.make(), one.inputs()
    wanted = one.run(model, inputs)
    one.apply(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    found = one.run(other, inputs)
    assert not calls
    one.apply(other)
    one.run(other, inputs)
    assert len(calls) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_named_backend(one, calls):
    model = one.make()
    one.apply(model, backend="reference")
    one.run(model, one.inputs())
    assert [options["backend"] for options in calls] == ["reference"] * LAYERS


def test_no_such_layer(one):
    with pytest.raises(ValueError, match="model: Linear has no layer of class"):
        one.apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        one.apply({})
