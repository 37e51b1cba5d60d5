"""Which backends can run here and why the others cannot, how to choose one, and torch.compile.

python examples/backends.py
"""

import torch
from torch import Tensor, nn

from vlmo.kernels import BACKEND_NAMES, ModalityRouting, moe_ffn, use_backend, why_not


class Layer(nn.Module):
    """Two experts of one width; `routing` says which token goes to which."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, routing: ModalityRouting) -> Tensor:
        w1, w2 = ([linear.weight for linear in linears] for linears in (self.up, self.down))
        return moe_ffn(x, routing, w1, w2, residual=x)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in BACKEND_NAMES:
        print(f"{name:10}", why_not("moe_ffn", name, device=device) or "can run")

    torch.manual_seed(0)
    layer = Layer(64, 256).to(device)
    x = torch.randn(2, 30, 64, device=device)
    routing = ModalityRouting.segments([(0, 10), (1, 20)])
    y = layer(x, routing)  # on the first backend that can run
    with use_backend("reference"):  # or backend= of one call, or VLMO_KERNELS=reference
        print("agrees with the reference:", torch.allclose(y, layer(x, routing), atol=1e-3))

    try:  # A backend asked for by name never falls back: float64 has no CUDA kernel anywhere.
        with use_backend("cuda"):
            layer.double()(x.double(), routing)
    except NotImplementedError as error:
        print(error)
    layer.float()

    # The operation is one node of the graph. "aot_eager" needs no compiler; leave it out for speed.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    print("compiled agrees:", torch.allclose(y, compiled(x, routing), atol=1e-5))


if __name__ == "__main__":
    main()
