"""moe_ffn in context: autograd's modes, compilation, checkpointing, parallelism.

An eager call bypasses torch.library; a compiled one cannot. Both paths share their backward, and
every test here covers both.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from accuracy import labelled
from moe_ffn_cases import Case, Spy, call, leaves, make_routing, make_tensors, outputs_and_gradients
from processes import in_ranks
from vlmo.kernels import ModalityRouting, _op, moe_ffn
from vlmo.kernels.moe_ffn import op as ops

CASES = [
    Case(dim=8, hidden=(6, 10)),
    Case(dim=8, hidden=(6, 10), form="ids", activation="swiglu"),
    Case(dim=8, hidden=(6, 10), pieces=((1, 2), (0, 5), (1, 9))),
    Case(dim=8, hidden=(6, 10), split=True, activation="swiglu"),
    Case(
        dim=8,
        hidden=(6, 10),
        norm="none",
        bias=False,
        layer_scale=False,
        token_scale=False,
        residual=False,
    ),
]


@pytest.fixture(params=["direct", "registered"])
def way(request, monkeypatch):
    """How the call gets to its implementation; the other way is barred."""
    if request.param == "registered":
        monkeypatch.setattr(_op, "runs_eagerly", lambda tensors: False)
        monkeypatch.setattr(_op, "_Direct", None)
    else:
        monkeypatch.setattr(ops.MOE_FFN, "forward", None)
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def run(case: Case, function=None, **options) -> dict[str, Tensor]:
    routing = make_routing(case, "cpu")
    function = function or (lambda t: call(case, routing, t, **options))
    return outputs_and_gradients(function, make_tensors(case, "cpu", torch.float32))


@pytest.fixture
def expected(case):
    """Of a call through torch.library, before ``way`` bars it."""
    routing = make_routing(case, "cpu")

    def registered(tensors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_op, "runs_eagerly", lambda tensors: False)
            return call(case, routing, tensors)

    return run(case, registered)


@pytest.mark.parametrize("recompute", [False, True])
def test_both_ways_agree(case, expected, way, recompute):
    torch.testing.assert_close(run(case, recompute=recompute), expected)


def test_saved_tensor_hooks(case, expected, way):
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        torch.testing.assert_close(run(case), expected)
    assert packed


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(case, expected, way, use_reentrant):
    routing = make_routing(case, "cpu")

    def function(tensors):
        def layer(x):
            return call(case, routing, {**tensors, "x": x})

        return checkpoint(layer, tensors["x"], use_reentrant=use_reentrant)

    torch.testing.assert_close(run(case, function), expected)


@pytest.mark.parametrize("names", [["x"], ["w1[1]"], ["w2[0]", "b1[0]"], ["residual"]])
def test_gradients_of_some(names, way):
    case = CASES[0]
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    flat = leaves(tensors)
    grads = torch.autograd.grad(call(case, routing, tensors).sin().sum(), list(flat.values()))
    every = dict(zip(flat, grads, strict=True))
    y = call(case, routing, tensors)
    some = torch.autograd.grad(y.sin().sum(), [flat[name] for name in names])
    torch.testing.assert_close(some, tuple(every[name] for name in names))

    for name, tensor in flat.items():  # now the others are frozen
        tensor.requires_grad_(name in names)
    y = call(case, routing, tensors)
    some = torch.autograd.grad(y.sin().sum(), [flat[name] for name in names])
    torch.testing.assert_close(some, tuple(every[name] for name in names))


class Drop(torch.autograd.Function):
    """Passes its input on and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return None


def test_an_unused_output_costs_nothing(case, way, monkeypatch):
    def fail(*_):
        raise AssertionError("backward was called")

    monkeypatch.setattr(ops.BACKENDS["cpu"], "backward", fail)
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    flat = leaves(tensors)
    call(case, routing, tensors)
    (Drop.apply(call(case, routing, tensors)).sum() + tensors["x"].sum()).backward()
    assert torch.equal(tensors["x"].grad, torch.ones_like(tensors["x"]))
    assert all(t.grad is None for name, t in flat.items() if name != "x")


@pytest.mark.parametrize("alone", [False, True])
def test_second_derivatives_are_refused(case, way, alone):
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    if alone:
        tensors["x"].requires_grad_()
    else:
        leaves(tensors)
    y = call(case, routing, tensors)
    (dx,) = torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not available"):
        dx.square().sum().backward()


def test_nothing_is_recorded_without_gradients(case, way):
    routing = make_routing(case, "cpu")
    frozen = make_tensors(case, "cpu", torch.float32)
    assert not call(case, routing, frozen).requires_grad
    recorded = make_tensors(case, "cpu", torch.float32)
    leaves(recorded)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = call(case, routing, recorded)
        assert not y.requires_grad
        torch.testing.assert_close(y, call(case, routing, frozen))


def test_the_output_may_be_written_over(case, expected, way):
    routing = make_routing(case, "cpu")

    def function(tensors):
        y = call(case, routing, tensors)
        assert not y._is_view()
        return y.mul_(1)

    torch.testing.assert_close(run(case, function), expected)


def test_writing_over_a_saved_tensor_is_noticed(way):
    case = CASES[0]
    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    leaves(tensors)
    y = call(case, routing, tensors)
    with torch.no_grad():
        tensors["w1"][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_of_the_reference(case):
    tensors, routing = make_tensors(case, "cpu", torch.float64), make_routing(case, "cpu")
    flat = leaves(tensors)

    def function(*_):
        return call(case, routing, tensors, backend="reference")

    assert torch.autograd.gradgradcheck(function, tuple(flat.values()), fast_mode=True)


@pytest.mark.heavy
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("backend", "warm", "recompute"),
    [
        ("reference", False, False),
        ("reference", True, True),
        ("triton", False, False),
        ("triton", True, True),
    ],
)
def test_compiled(case, backend, warm, recompute, checkpointed, monkeypatch):
    """One graph, with the routing index made in it or (warm) before; the same results as eager."""
    spy = Spy()
    monkeypatch.setitem(ops.BACKENDS, "triton", spy)
    routing = make_routing(case, "cpu")

    def function(tensors):
        x = tensors["x"]
        for _ in range(2):

            def layer(x):
                options = dict(backend=backend, recompute=recompute)
                return call(case, routing, {**tensors, "x": x}, **options)

            x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return x

    if warm:
        call(case, routing, make_tensors(case, "cpu", torch.float32), backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = run(case, compiled)
    torch.testing.assert_close(actual, run(case, function))


def test_modes_and_subclasses_see_the_operation(case):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    tensors, routing = make_tensors(case, "cpu", torch.float32), make_routing(case, "cpu")
    leaves(tensors)
    with Log():
        y = call(case, routing, tensors)
        y.sum().backward()
    assert {"vlmo.moe_ffn_fwd.default", "vlmo.moe_ffn_bwd.default"} <= set(seen)
    if case.form == "segments":  # the ids would be real
        with FakeTensorMode() as mode:
            fake = {
                k: [mode.from_tensor(t) for t in v] if isinstance(v, list) else mode.from_tensor(v)
                for k, v in tensors.items()
            }
            assert call(case, routing, fake).shape == y.shape
            assert call(case, routing, fake, backend="reference").shape == y.shape


class Layers(nn.Module):
    """Two multiway layers; the second has a frozen expert."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)]) for _ in range(4)
        )
        self.experts[3].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        routing = ModalityRouting.segments([(0, 2), (1, 3)])
        for experts in (self.experts[:2], self.experts[2:]):
            norms, first, second = zip(*experts, strict=True)
            x = moe_ffn(
                *(x, routing, [m.weight for m in first], [m.weight for m in second]),
                b1=[m.bias for m in first],
                b2=[m.bias for m in second],
                norm="layer",
                norm_weight=[m.weight for m in norms],
                norm_bias=[m.bias for m in norms],
                residual=x,
            )
        return x


def parallel_worker() -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    models = [Layers() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    alone, ddp, fsdp = models
    batch = torch.randn(2 * world, 5, 8)
    alone(batch).square().mean().backward()

    mine = batch[2 * rank : 2 * rank + 2]
    wrapper = DistributedDataParallel(ddp)
    wrapper(mine).square().mean().backward()
    fully_shard(fsdp)
    assert isinstance(fsdp, FSDPModule)
    fsdp.set_force_sum_reduction_for_comms(True)  # gloo of torch 2.8 adds without dividing
    fsdp(mine).square().mean().backward()
    for (name, p), q, r in zip(
        alone.named_parameters(), ddp.parameters(), fsdp.parameters(), strict=True
    ):
        if p.grad is None:
            assert q.grad is None and r.grad is None, name
            continue
        torch.testing.assert_close(q.grad, p.grad, msg=labelled(f"ddp {name}"))
        assert isinstance(r.grad, DTensor)
        gathered = r.grad.full_tensor()
        torch.testing.assert_close(gathered, p.grad, msg=labelled(f"fsdp {name}"))
    dist.destroy_process_group()


def test_data_parallel_and_fully_sharded(tmp_path):
    """Two processes agree with one on the gradients of the whole batch."""
    in_ranks(parallel_worker, tmp_path)
