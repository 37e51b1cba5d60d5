"""Replace slice / one FFN for each modality / cat by `moe_ffn`, and compare both.

python examples/moe_ffn.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.kernels import ModalityRouting, moe_ffn

TEXT, IMAGE, WIDTH, HIDDEN = 40, 197, 192, 768


def separate(x: Tensor, w1: list[Tensor], w2: list[Tensor], gamma: Tensor) -> Tensor:
    """The usual way: a pre-norm FFN for each modality, with layer scale and residual."""
    outputs = []
    for e, part in enumerate(x.split([TEXT, IMAGE], dim=1)):
        hidden = F.gelu(F.layer_norm(part, (WIDTH,)) @ w1[e].T)
        outputs.append(part + gamma * (hidden @ w2[e].T))
    return torch.cat(outputs, dim=1)


def fused(x: Tensor, w1: list[Tensor], w2: list[Tensor], gamma: Tensor) -> Tensor:
    """The same in one operation; tokens are not moved."""
    routing = ModalityRouting.segments([(0, TEXT), (1, IMAGE)])  # in a model: made once a batch
    ones = torch.ones(WIDTH, dtype=x.dtype)
    return moe_ffn(
        x,
        routing,
        w1,
        w2,
        norm="layer",
        norm_weight=[ones] * 2,
        norm_eps=1e-5,
        layer_scale=gamma,
        residual=x,
    )


def main() -> None:
    torch.manual_seed(0)
    make = dict(dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, TEXT + IMAGE, WIDTH, **make)
    w1 = [torch.randn(HIDDEN, WIDTH, **make) for _ in range(2)]
    w2 = [torch.randn(WIDTH, HIDDEN, **make) for _ in range(2)]
    gamma = torch.full((WIDTH,), 0.1, **make)

    results = {}
    for layer in (separate, fused):
        y = layer(x, w1, w2, gamma)
        results[layer] = (y, *torch.autograd.grad(y.square().mean(), (x, *w1, *w2, gamma)))
    for name, a, b in zip(("output", "gradient of x"), *results.values(), strict=False):
        print(f"{name}: {tuple(a.shape)}, largest difference {(a - b).abs().max():.0e}")
    pairs = zip(*results.values(), strict=True)
    agree = all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)
    print("output and all gradients agree:", agree)


if __name__ == "__main__":
    main()
