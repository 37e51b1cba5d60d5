"""Attention over text and image with a relative position bias, on sequences without padding.

python examples/shared_attention.py
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention

GRID, LONGEST, HEADS, HEAD_DIM = 4, 12, 3, 32  # 4 x 4 patches, at most 12 tokens of text
LENGTHS = [7, 12, 3]  # tokens of each text
IMAGE = GRID * GRID + 1  # patches and [CLS]


def places(text: int) -> Tensor:
    """Where the tokens of a pair stand in a joint sequence whose text is padded to LONGEST."""
    return torch.cat([torch.arange(text), LONGEST + torch.arange(IMAGE)])


def main() -> None:
    torch.manual_seed(0)
    index = RelativePositionIndex.joint(GRID, LONGEST, text_capacity=LONGEST)
    table = torch.randn(index.entries, HEADS, requires_grad=True)

    # Sequences end to end: sequence b owns the rows offsets[b] to offsets[b + 1].
    lengths = torch.tensor([text + IMAGE for text in LENGTHS])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    qkv = torch.randn(int(lengths.sum()), 3, HEADS, HEAD_DIM)  # as nn.Linear(D, 3 * D) gives it
    out = shared_attention(
        qkv,
        bias=RelativePositionBias(table, index),
        offsets=offsets,
        max_length=LONGEST + IMAGE,
        positions=torch.cat([places(text) for text in LENGTHS]),
    )
    out.square().sum().backward()
    assert table.grad is not None
    print(
        f"{len(LENGTHS)} sequences, {len(out)} tokens; padded they would be "
        f"{len(LENGTHS) * (LONGEST + IMAGE)}"
    )
    print(f"gradient of the table: {tuple(table.grad.shape)}")

    # The same in plain PyTorch, sequence by sequence, with the bias as an N x N tensor.
    wanted = []
    for text, rows in zip(LENGTHS, qkv.split(lengths.tolist()), strict=True):
        place = places(text)
        bias = table[index.matrix[place][:, place].long()].permute(2, 0, 1)  # [H, N, N]
        q, k, v = rows.permute(1, 2, 0, 3)  # each [H, N, K]
        wanted.append(scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1))
    print("agrees with PyTorch:", torch.allclose(out, torch.cat(wanted), atol=1e-5))


if __name__ == "__main__":
    main()
