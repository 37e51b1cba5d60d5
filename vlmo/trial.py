"""One call of the routed feed-forward layer, to try tile shapes of its Triton kernels on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmo.kernels.moe_ffn.call import Call
from vlmo.kernels.moe_ffn.reference import moe_ffn_reference
from vlmo.kernels.moe_ffn.triton import backend as triton_impl
from vlmo.kernels.moe_ffn.triton import tiles
from vlmo.kernels.moe_ffn.triton.tiles import Tiles, use_tiles
from vlmo.parity import deviations
from vlmo.timing import Work


@dataclass(frozen=True)
class Problem:
    """The call that is timed: ``split`` is one sequence, by the tokens of each expert."""

    dim: int = 768
    hidden: int = 3072
    tokens: int = 32768
    split: tuple[int, ...] = (40, 197)
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        if not self.split or min(self.split) < 0 or sum(self.split) < 1:
            raise ValueError(f"split: {self.split} holds no tokens")

    @property
    def command(self) -> str:
        split = ":".join(map(str, self.split))
        return (
            f"vlmo tune --dim {self.dim} --hidden {self.hidden} --tokens {self.tokens} "
            f"--split {split} --dtype {str(self.dtype).removeprefix('torch.')}"
        )


# What the interpreter can run in seconds.
TINY = Problem(dim=32, hidden=48, tokens=12, split=(5, 7), dtype=torch.float32)


class Trial:
    """One call with every optional part of VLMo's, and what must come out of it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.device, self.call = device, make_call(problem, device)
        self.dy = torch.randn_like(self.call.x)
        self.needs = [True] * (2 + sum(len(tensors) for tensors in self.call[1:7]))
        self.eager = self._reference(self.call, self.dy)
        self.exact = self._reference(_in_float64(self.call), self.dy.double())
        # The backward reads it in the kernels' own order of rows.
        with use_tiles(tiles.built_in(device, problem.dtype)):
            self.pre = triton_impl.forward(self.call)[1]

    def run(self, kernel: str, row: Tiles) -> dict[str, Tensor]:
        """The results of the kernel, by name."""
        with use_tiles(row):
            if kernel == "forward":
                return {"y": triton_impl.forward(self.call)[0]}
            gradients = triton_impl.backward(*self._backward_inputs(kernel))
            return {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}

    def why_wrong(self, kernel: str, row: Tiles) -> str | None:
        """Runs the kernel; one sentence if its result is not exact enough."""
        actual = self.run(kernel, row)
        exact = {name: self.exact[name] for name in actual}
        for deviation in deviations(actual, self.eager, exact):
            if not deviation.ok:
                return (
                    f"{deviation.name} is off by {deviation.actual:.1e}, "
                    f"allowed are {deviation.allowed:.1e}."
                )
        return None

    def work(self, kernel: str, row: Tiles) -> Work:
        """One launch of the kernel."""
        if kernel == "forward":

            def forward() -> None:
                with use_tiles(row):
                    triton_impl.forward(self.call)

            return forward
        # Imported here because it imports Triton.
        from vlmo.kernels.moe_ffn.triton.backward import Backward

        with use_tiles(row):
            backward = Backward(*self._backward_inputs(kernel))
        if kernel != "weights":
            return backward.launch_rows
        backward.launch_rows()  # what the kernel of the weights reads
        return backward.launch_weights

    def _backward_inputs(self, kernel: str) -> tuple[Tensor, Tensor, Call, list[bool]]:
        pre = self.pre.new_empty(0, 0) if kernel == "recompute" else self.pre
        return self.dy, pre, self.call._replace(save_pre=pre.numel() > 0), self.needs

    def _reference(self, call: Call, dy: Tensor) -> dict[str, Tensor]:
        flat = [call.x, *(t for tensors in call[1:7] for t in tensors), call.layer_scale]
        leaves = [tensor.detach().requires_grad_() for tensor in flat if tensor is not None]
        fields: list[Any] = [*call]
        rest = iter(leaves)
        fields[0] = next(rest)
        fields[1:7] = [list(itertools.islice(rest, len(tensors))) for tensors in call[1:7]]
        fields[7] = next(rest, None)
        y = moe_ffn_reference(Call(*fields))
        gradients = torch.autograd.grad(y, leaves, dy)
        return {"y": y} | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def make_call(problem: Problem, device: torch.device) -> Call:
    """A random call of the problem's size, with layer scale and residual."""
    experts, dim, hidden = range(len(problem.split)), problem.dim, problem.hidden
    tokens = max(1, problem.tokens // sum(problem.split)) * sum(problem.split)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale + shift
        return values.to(problem.dtype)

    x = draw(tokens, dim)
    return Call(
        x=x,
        w1=[draw(hidden, dim, scale=dim**-0.5) for _ in experts],
        w2=[draw(dim, hidden, scale=hidden**-0.5) for _ in experts],
        b1=[draw(hidden, scale=0.1) for _ in experts],
        b2=[draw(dim, scale=0.1) for _ in experts],
        norm_weight=[draw(dim, scale=0.1, shift=1.0) for _ in experts],
        norm_bias=[draw(dim, scale=0.1) for _ in experts],
        layer_scale=draw(dim, scale=0.1),
        token_scale=None,
        residual=x,
        ids=None,
        rows=None,
        offsets=None,
        pieces=[number for piece in enumerate(problem.split) for number in piece],
        norm="layer",
        norm_eps=1e-6,
        activation="gelu",
        save_pre=True,
    )


def _in_float64(call: Call) -> Call:
    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double()
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [tensor.double() for tensor in value]
        return value

    return Call(*map(wide, call))
