"""Benchmark suite of the integrations, compared with the modules that they replace.

For each model of :mod:`vlmo.integrations` one or two layers at a published width, with weights in
the case's dtype: the whole of a small BEiT-3 of torchscale, and decoder layers of BAGEL (Qwen2.5
7B), Wall-X (Qwen2.5-VL 3B with a second expert of half its hidden width) and Cosmos3. As in the
tests, PyTorch's attention is in the place of BAGEL's FlexAttention, and a linear layer in that of
Wall-X's attention.

"unpatched" are the library's own modules. Ours have the same parameters. A backward has the
gradients of the tokens, except those of torchscale, which are embedded, and of every parameter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.contenders import Case, Scale, Suite, half_dtypes, is_compiled, smoke_dtype
from harness.cost import Cost
from harness.models import (
    OURS,
    Batch,
    Exactly,
    Form,
    Named,
    Small,
    WholeModel,
    on_device,
    widened,
)
from harness.peers import why_not_installed
from vlmo.model.beit3 import BEiT3Config

FORWARD, BACKWARD = "forward", "forward+backward"
# The packages of the models (tests/model/torchscale.txt, tests/integrations/third_party.txt).
PACKAGES = {
    "torchscale": "torchscale",
    "bagel": "lmms-engine",
    "wall_x": "lerobot",
    "cosmos3": "diffusers",
}
_COUNTS = {Scale.cpu: 2048, Scale.full: 8192}  # tokens
_CHECKED = 64  # tokens of the accuracy check
_STD = 0.02  # of parameters
_EMBEDDED = ("x", "und", "gen")  # inputs with gradients, unless they are indices
_QUERIES = (".q_proj.weight", ".q_proj.A.weight", ".to_q.weight")


def cases(device: torch.device, scale: Scale) -> list[Case]:
    """Both phases of every model; float32 where CPUs have no 16-bit products, in small only."""
    if scale is Scale.smoke:
        return [
            _case(name, "tiny", smoke_dtype(device), phase, 0)
            for name in PACKAGES
            for phase in (FORWARD, BACKWARD)
        ]
    half = half_dtypes(device)[0]
    dtypes = dict.fromkeys(PACKAGES, (half,)) | {"torchscale": (half, torch.float32)}
    return [
        _case(name, "wide", dtype, phase, _COUNTS[scale])
        for phase in (BACKWARD, FORWARD)
        for name in PACKAGES
        for dtype in dtypes[name]
    ]


def _case(name: str, size: str, dtype: torch.dtype, phase: str, tokens: int) -> Case:
    shape = {"tokens": tokens} if tokens else {}
    return Case("integrations", size, dtype, f"{name} {phase}", shape)


class Layers(NamedTuple):
    """A model, its inputs, and the arithmetic that they require.

    Attributes:
        case: how the model is made, patched and called, as in the tests (``tiny_models.Case``).
        few: other inputs, for the accuracy check.
        rows: the number of tokens that the weight with a given name multiplies.
        scores: the number of scores that a head computes.
    """

    case: Any
    few: Callable[[], Batch]
    rows: Callable[[str, Batch], int]
    scores: Callable[[Batch], int]


def _layers(
    name: str,
    tokens: int,
    make: Callable[[], nn.Module],
    inputs: Callable[[int], Batch],
    rows: Callable[[str, Batch], int],
    scores: Callable[[Batch], int],
) -> Layers:
    """The layers of ``make`` with ``inputs`` of so many tokens; for 0, those of the tests."""
    known = _tiny().MODELS[name]
    if not tokens:
        return Layers(known, known.inputs, rows, scores)
    case = dataclasses.replace(known, make=make, inputs=functools.partial(inputs, tokens))
    return Layers(case, functools.partial(inputs, _CHECKED), rows, scores)


def _tiny() -> Any:
    import tiny_models  # with torchscale, which may not be installed

    return tiny_models


def _torchscale(tokens: int) -> Layers:
    config = BEiT3Config.base(depth=2, drop_path=0.0) if tokens else _tiny().BEIT3
    patches, length = config.grid**2, config.max_text_length

    def rows(name: str, inputs: Batch) -> int:
        images = len(inputs["image"])
        if name == "vision_embed.proj.weight":
            return images * patches
        if "layers." not in name:
            return 0  # embeddings
        return images * (patches + 1) if ".A." in name else int((~inputs["padding"]).sum())

    def scores(inputs: Batch) -> int:
        lengths = patches + 1 + (~inputs["padding"]).sum(1)
        return int((lengths**2).sum())

    return _layers(
        *("torchscale", tokens),
        lambda: _tiny().beit3(config, std=_STD),
        lambda count: _tiny().beit3_inputs(config, batch=max(2, count // (patches + 1 + length))),
        rows,
        scores,
    )


def _bagel(tokens: int) -> Layers:
    width, heads = 3584, 28
    sizes = dict(hidden_size=width, intermediate_size=18944, num_key_value_heads=4)

    def inputs(count: int) -> Batch:
        generated = slice(count // 2, None)
        return _tiny().bagel_inputs(generated, tokens=count, width=width, head=width // heads)()

    return _layers(
        *("bagel", tokens),
        lambda: _tiny().bagel(layers=1, std=_STD, num_attention_heads=heads, **sizes),
        inputs,
        lambda name, inputs: len(inputs["gen" if "moe_gen" in name else "und"]),
        lambda inputs: len(inputs["x"]) ** 2,
    )


def _wall_x(tokens: int) -> Layers:
    width, hidden = 2048, 11008

    def rows(name: str, inputs: Batch) -> int:
        _, _, expert = name.partition(".experts.")
        types = inputs["types"]
        return int((types == int(expert.split(".")[0])).sum()) if expert else types.numel()

    return _layers(
        *("wall_x", tokens),
        lambda: _tiny().wall_x((hidden, hidden // 2), width=width, std=_STD),
        lambda count: _tiny().wall_x_inputs(batch=2, length=count // 2, width=width),
        rows,
        lambda inputs: 0,
    )


def _cosmos3(tokens: int) -> Layers:
    width, head = 4096, 128
    heads = dict(num_attention_heads=width // head, head_dim=head, num_key_value_heads=8)
    sizes = dict(hidden_size=width, intermediate_size=12288, **heads)

    def scores(inputs: Batch) -> int:
        """Understood tokens attend to each other, generated ones to all."""
        und, gen = len(inputs["und"]), len(inputs["gen"])
        return und**2 + gen * (und + gen)

    return _layers(
        *("cosmos3", tokens),
        lambda: _tiny().cosmos3(layers=1, std=_STD, **sizes),
        lambda count: _tiny().cosmos3_inputs(count // 2, count // 2, width=width, head=head)(),
        lambda name, inputs: len(inputs["gen" if "moe_gen" in name or "add_" in name else "und"]),
        scores,
    )


LAYERS = {
    "torchscale": _torchscale,
    "bagel": _bagel,
    "wall_x": _wall_x,
    "cosmos3": _cosmos3,
}


class Patched(nn.Module):
    """A library's model, and a patched copy with the same parameters.

    Args:
        case: see :class:`Layers`.
        model: the library's model.
        inputs: of the model; the tokens among them become parameters.
    """

    patched: nn.Module

    def __init__(self, case: Any, model: nn.Module, inputs: Batch) -> None:
        super().__init__()
        self.original, self.run = model, case.run
        same: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        patched = copy.deepcopy(model, same)
        case.apply(patched)
        vars(self)["patched"] = patched  # no submodule: a parameter has one name
        tokens = {n: t for n, t in inputs.items() if n in _EMBEDDED and t.is_floating_point()}
        self.tokens = nn.ParameterDict(tokens)

    def outputs(self, batch: Batch, *, patched: bool) -> Sequence[Tensor]:
        return self.run(self.patched if patched else self.original, batch | {**self.tokens})


class LayersProblem(WholeModel):
    """Layers of another library's model, patched and unpatched.

    Nothing is made or imported before it is needed, because not every library may be installed.
    """

    operations = ("moe_ffn",)

    def __init__(self, case: Case, device: torch.device) -> None:
        self.library, _, phase = case.phase.partition(" ")
        super().__init__(case, device, trains=phase == BACKWARD)
        self.contenders = (*(name for name in OURS if not is_compiled(name)), "unpatched")
        self.samples = 1

    def why_not(self, contender: str) -> str | None:
        """The reason if it cannot run on this machine, else None."""
        for package in ("torchscale", PACKAGES[self.library]):
            if reason := why_not_installed(package):
                return reason
        if contender == "unpatched":
            return None
        if contender == "vlmo:cuda" and self.library == "torchscale":
            return "its kernels have no sub_norm."
        return self.why_not_ours(contender)

    @functools.cached_property
    def layers(self) -> Layers:
        return LAYERS[self.library](int(self.case.shape.get("tokens", 0)))

    @functools.cached_property
    def library_model(self) -> nn.Module:
        with _seeded():
            return self.layers.case.make().to(self.device, self.dtype)

    @functools.cached_property
    def batch(self) -> Batch:  # type: ignore[override]
        return self._drawn(self.layers.case.inputs)

    @functools.cached_property
    def model(self) -> Patched:
        return Patched(self.layers.case, self.library_model, self.batch)

    @functools.cached_property
    def small(self) -> Small:
        """The same layers with a few tokens."""
        batch = self._drawn(self.layers.few)
        model = Patched(self.layers.case, self.library_model, batch)
        eager = self.results(_unpatched, model, batch)
        return Small(model, batch, eager, self.exact(widened(batch)))

    def exact(self, batch: Batch) -> Named:
        """The results of the unpatched model in float64."""
        wide = copy.deepcopy(self.library_model).double()
        with Exactly():
            return self.results(_unpatched, Patched(self.layers.case, wide, batch), batch)

    @functools.cached_property
    def cost(self) -> Cost:  # type: ignore[override]
        """FLOPs without padding; bytes of the parameters, which a step reads twice and writes."""
        weights = dict(self.library_model.named_parameters())
        flops = sum(
            2 * weight.numel() * self.layers.rows(name, self.batch)
            for name, weight in weights.items()
            if weight.dim() > 1
        )
        width = sum(len(weight) for name, weight in weights.items() if name.endswith(_QUERIES))
        flops += 4 * width * self.layers.scores(self.batch)  # width of all layers
        size = sum(weight.numel() * weight.itemsize for weight in weights.values())
        return Cost(flops * (3 if self.trains else 1), size * (3 if self.trains else 1))

    def layer_of(self, name: str) -> str:
        """The half before the patched one as a whole: its norms of a few numbers err by chance."""
        found = re.match(r"(.*)\.(self_attn|input_layernorm)", name)
        return f"{found[1]}.self_attn" if found else super().layer_of(name)

    def ours(self) -> Form:
        return _patched

    def official(self, compiler: str | None) -> Form:
        return _unpatched

    def _drawn(self, inputs: Callable[[], Batch]) -> Batch:
        with _seeded():
            return on_device(inputs(), self.device, self.dtype)


SUITE = Suite("integrations", cases, LayersProblem)


def _patched(phase: str, model: Patched, batch: Batch) -> Named:
    return _named(model.outputs(batch, patched=True))


def _unpatched(phase: str, model: Patched, batch: Batch) -> Named:
    return _named(model.outputs(batch, patched=False))


def _named(outputs: Sequence[Tensor]) -> Named:
    """Outputs and, if gradients are recorded, a loss whose gradient is random signs."""
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    if torch.is_grad_enabled():
        weighed = [(y * _signs(y.shape, y.dtype, y.device)).sum() for y in outputs]
        found["loss"] = torch.stack(weighed).sum()
    return found


@functools.lru_cache(maxsize=8)
def _signs(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    with _seeded():
        return (torch.randint(2, shape) * 2 - 1).to(device, dtype)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def bench_integrations(compete, case, contender):
    compete(SUITE, case, contender)
