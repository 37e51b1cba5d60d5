"""The feed-forward sublayer of a multiway transformer, in every form that is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.kernels import ModalityRouting, moe_ffn
from vlmo.parity import Deviation, deviations

EPS = 1e-6


class Parameters(NamedTuple):
    """Of all experts."""

    norm_weight: list[Tensor]  # E x [D]
    norm_bias: list[Tensor]
    w1: list[Tensor]  # E x [F, D]
    b1: list[Tensor]
    w2: list[Tensor]  # E x [D, F]
    b2: list[Tensor]
    layer_scale: list[Tensor]  # one, [D]


Form = Callable[[Tensor, Parameters, Sequence[int]], Tensor]


def feed_forward(x: Tensor, p: Parameters, expert: int) -> Tensor:
    h = F.layer_norm(x, x.shape[-1:], p.norm_weight[expert], p.norm_bias[expert], EPS)
    h = F.gelu(F.linear(h, p.w1[expert], p.b1[expert]))
    return x + p.layer_scale[0] * F.linear(h, p.w2[expert], p.b2[expert])


def dense(x: Tensor, p: Parameters, split: Sequence[int]) -> Tensor:
    """All tokens to the first expert: what a model without experts of modalities would do."""
    return feed_forward(x, p, 0)


def slices(x: Tensor, p: Parameters, split: Sequence[int]) -> Tensor:
    """How multiway transformers are written: slice, feed forward, concatenate."""
    parts = x.split(list(split), dim=1)
    return torch.cat([feed_forward(part, p, e) for e, part in enumerate(parts)], dim=1)


def routed(backend: str) -> Form:
    def form(x: Tensor, p: Parameters, split: Sequence[int]) -> Tensor:
        return moe_ffn(
            *(x, ModalityRouting.segments(list(enumerate(split))), p.w1, p.w2),
            b1=p.b1,
            b2=p.b2,
            norm="layer",
            norm_weight=p.norm_weight,
            norm_bias=p.norm_bias,
            norm_eps=EPS,
            layer_scale=p.layer_scale[0],
            residual=x,
            backend=backend,
        )

    return form


def compiled(form: Form, device: torch.device) -> Form:
    # Without the reset, the shapes of earlier cases count towards Dynamo's limit of recompilations.
    torch._dynamo.reset()
    # On the CPU only to see that it can be traced: building C++ code would take too long.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(form, fullgraph=True, dynamic=False, backend=backend)


@dataclass
class Sublayer:
    """Inputs of one shape, and a form to run on them."""

    form: Form
    eager: Form  # the same function in plain PyTorch, which the result is held against
    x: Tensor  # [B, L, D]
    dy: Tensor
    parameters: Parameters
    split: Sequence[int]

    @classmethod
    def make(
        cls,
        form: Form,
        eager: Form,
        *,
        tokens: int,
        dim: int,
        hidden: int,
        split: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Sublayer:
        """Random inputs; about ``tokens`` of them, in whole sequences."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale + shift
            return values.to(dtype).requires_grad_()

        experts = range(len(split))
        length = sum(split)
        shape = (max(1, round(tokens / length)), length, dim)
        return cls(
            form,
            eager,
            draw(*shape),
            draw(*shape).detach(),
            Parameters(
                norm_weight=[draw(dim, scale=0.1, shift=1.0) for _ in experts],
                norm_bias=[draw(dim, scale=0.1) for _ in experts],
                w1=[draw(hidden, dim, scale=dim**-0.5) for _ in experts],
                b1=[draw(hidden, scale=0.1) for _ in experts],
                w2=[draw(dim, hidden, scale=hidden**-0.5) for _ in experts],
                b2=[draw(dim, scale=0.1) for _ in experts],
                layer_scale=[draw(dim, scale=0.1)],
            ),
            split,
        )

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.form(self.x, self.parameters, self.split)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        y = self.form(self.x, self.parameters, self.split)
        return torch.autograd.grad(y, self._leaves(self.x, self.parameters), self.dy)

    def check(self, *, backward: bool) -> list[Deviation]:
        """Run at full size and hold against float64 what depends on three sequences only.

        Those are the first, the middle and the last. The rows of y and dx are independent of each
        other, and with a dy that is zero elsewhere, the other sequences add nothing to the gradient
        of a parameter. So a large problem is checked at the cost of a small one.
        """
        count = self.x.shape[0]
        chosen = sorted({0, count // 2, count - 1})
        dy = torch.zeros_like(self.dy)
        dy[chosen] = self.dy[chosen]
        if not backward:
            actual = {"y": self.forward()[chosen]}
        else:
            actual = self._results(self.form, self.x, self.parameters, dy)
            actual |= {name: actual[name][chosen] for name in ("y", "dx")}
        wide = Parameters(*([t.detach().double() for t in list_] for list_ in self.parameters))
        wide = Parameters(*([t.requires_grad_() for t in list_] for list_ in wide))
        x = self.x.detach()[chosen]
        eager = self._results(self.eager, x.clone(), self.parameters, dy[chosen])
        exact = self._results(self.eager, x.double(), wide, dy[chosen].double())
        return deviations(actual, eager, {name: exact[name] for name in actual})

    def _results(self, form: Form, x: Tensor, p: Parameters, dy: Tensor) -> dict[str, Tensor]:
        x.requires_grad_()
        y = form(x, p, self.split)
        leaves = self._leaves(x, p)
        dx, *grads = torch.autograd.grad(y, leaves, dy)
        named = {f"gradient {i}": gradient for i, gradient in enumerate(grads)}
        return {"y": y.detach(), "dx": dx} | named

    def _leaves(self, x: Tensor, p: Parameters) -> list[Tensor]:
        """x and every parameter that the form uses."""
        last = 1 if self.eager is dense else None
        return [x, *(tensor for tensors in p for tensor in tensors[:last])]
