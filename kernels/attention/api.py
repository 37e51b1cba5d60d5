"""The public function shared_attention: contract, argument checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import FLOATS, autocast_dtype, check_tensor, check_values
from ..dispatch import resolve
from .bias import RelativePositionBias
from .call import Call
from .op import ATTENTION, BACKENDS
from .packing import unpack
from .reference import shared_attention_reference

_INTEGERS = (torch.int32, torch.int64)


def shared_attention(
    q: Tensor,  # [B, N, H, K], or [T, H, K] with offsets; packed [B, N, 3, H, K] or [T, 3, H, K]
    k: Tensor | None = None,  # as q
    v: Tensor | None = None,  # as q
    *,
    bias: RelativePositionBias | None = None,
    key_mask: Tensor | None = None,  # [B, N] bool
    key_lengths: Tensor | None = None,  # [B]
    offsets: Tensor | None = None,  # [B + 1]
    max_length: int = 0,
    positions: Tensor | None = None,  # [B, N] or [T]
    distinct: bool = False,
    causal: bool = False,
    scale: float | None = None,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:  # [B, N, H, K] or [T, H, K]
    r"""Self-attention over the tokens of all modalities: softmax(scale * q k^T + bias) v.

    There are two layouts: dense ``[B, N, H, K]``, and packed ``[T, H, K]``, in which the sequences
    are concatenated without padding and sequence b owns rows ``offsets[b]`` to ``offsets[b + 1]``.
    q, k and v may have any strides. They may also be passed as one tensor q that has an additional
    dimension of size 3 before H; k and v are then None.

    Args:
        q, k, v: queries, keys and values, of one shape and dtype.
        bias: relative position bias: a table, and the index of the row for each (query, key) pair.
        key_mask: True where a key may be attended to.
        key_lengths: number of leading keys that may be attended to; int32 or int64.
        offsets: first row of each sequence and T at the end, int32 or int64 (``cu_seqlens``;
            :attr:`vlmo.kernels.ModalityRouting.offsets`).
        max_length: upper bound of the sequence lengths; required with ``offsets``.
        positions: row of ``bias.index`` for each token; by default its position in its sequence.
        distinct: declares that no two tokens of a sequence have the same of ``positions``. Triton
            kernels then read the bias faster.
        causal: let a query attend only to keys at its own position and before.
        scale: factor of the scores, ``K ** -0.5`` by default; applied to q before the product.
        validate: check the values of ``key_lengths``, ``offsets`` and ``positions``, which takes a
            dozen small kernels on a GPU. For layers that share these tensors, one check is enough.
            Unchecked values out of range make the kernels read and write out of bounds, and with
            unchecked ``positions`` that are not ``distinct``, they miss tokens.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; see :mod:`vlmo.kernels`.

    Returns:
        The attention output, in the shape and dtype of q. A query without a valid key gets zeros.

    The values of k and v at a masked key, which ``key_mask`` or ``key_lengths`` excludes, affect no
    output and no gradient, even if they are NaN or infinite; the gradients of such a key are zeros.
    The query at that position is not masked: it gets an output and contributes to the gradients of
    the keys that it attends to.

    Scores, bias and softmax are computed in float32 (float64 for float64); probabilities are
    rounded to the dtype of v before the second product, as in unilm, the reference implementation.
    Under autocast, q, k and v are cast to its dtype; the table is not.

    Differentiable with respect to q, k, v and ``bias.table``. Forward-mode differentiation and the
    transforms of ``torch.func`` (grad, jvp, vmap, ...) use the backend ``"reference"``, the only
    one that supports them. It is also the only one with second derivatives.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        NotImplementedError: the requested backend cannot run this call (with its reason).
    """
    q, k, v = _unpack(q, k, v, packed=offsets is not None)
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_tensor("q", q, dtypes=FLOATS)
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    if offsets is not None:
        for name, value in (("key_mask", key_mask), ("key_lengths", key_lengths)):
            if value is not None:
                raise ValueError(f"{name}: has no meaning beside offsets, which give each length")
        _check_offsets(q, offsets, max_length, validate)
    elif max_length:
        raise ValueError(f"max_length: {max_length} was given without offsets")
    _check_keys(q, key_mask, key_lengths, validate)
    length = max_length if offsets is not None else q.shape[1]
    _check_bias(q, bias, positions, length, validate)
    if distinct:
        _check_distinct(positions, offsets, validate)

    table, index = (None, None) if bias is None else bias
    facts = (q.device, q.dtype, q.shape[-1], 0 if index is None else index.entries)
    name = resolve("shared_attention", BACKENDS, backend, (q, k, v, table), *facts)
    plain = name == "reference"
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    call = Call(
        *(q, k, v, table),
        None if index is None else index.matrix,
        None if index is None or plain else index.affine,  # only kernels read these two
        None if index is None or plain else index.short,
        *(key_mask, key_lengths, offsets),
        max_length=max_length,
        positions=positions,
        causal=causal,
        scale=scale,
        distinct=distinct,
    )
    return shared_attention_reference(call) if plain else ATTENTION.run(call, name)


def _unpack(
    q: Tensor, k: Tensor | None, v: Tensor | None, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensor("q", q)
    dims = 3 if packed else 4
    if k is None and v is None:
        if q.dim() != dims + 1 or q.shape[-3] != 3:
            raise ValueError(
                f"q: shape {tuple(q.shape)} does not hold q, k and v in a dimension of 3 before H, "
                "and k and v are missing"
            )
        q, k, v = unpack(q)
    if k is None or v is None:
        raise TypeError(f"{'k' if k is None else 'v'}: missing; give both k and v, or neither")
    if q.dim() != dims or 0 in q.shape[-2:]:
        layout = "[T, H, K], because offsets are given" if packed else "[B, N, H, K]"
        raise ValueError(f"q: shape {tuple(q.shape)} is not {layout}")
    return q, k, v


def _check_keys(
    q: Tensor, key_mask: Tensor | None, key_lengths: Tensor | None, validate: bool
) -> None:
    if key_mask is not None:
        check_tensor("key_mask", key_mask, shape=q.shape[:2], dtypes=(torch.bool,), device=q.device)
    if key_lengths is not None:
        check_tensor(
            "key_lengths", key_lengths, shape=q.shape[:1], dtypes=_INTEGERS, device=q.device
        )
        if not validate:
            return
        wrong = (key_lengths < 0) | (key_lengths > q.shape[1])
        check_values("key_lengths", key_lengths, wrong, f"outside 0..{q.shape[1]}")


def _check_offsets(q: Tensor, offsets: Tensor, max_length: int, validate: bool) -> None:
    check_tensor("offsets", offsets, shape=(-1,), dtypes=_INTEGERS, device=q.device)
    if offsets.numel() < 2:
        raise ValueError(f"offsets: {offsets.numel()} entries hold no sequence")
    if not validate:
        return
    ends = torch.zeros_like(offsets, dtype=torch.bool)
    ends[0], ends[-1] = offsets[0] != 0, offsets[-1] != q.shape[0]
    check_values("offsets", offsets, ends, f"not 0 at the start or not {q.shape[0]} at the end")
    lengths = offsets.diff()
    wrong = (lengths < 0) | (lengths > max_length)
    check_values("offsets", lengths, wrong, f"a sequence length outside 0..max_length {max_length}")


def _check_bias(
    q: Tensor,
    bias: RelativePositionBias | None,
    positions: Tensor | None,
    length: int,
    validate: bool,
) -> None:
    if bias is None:
        if positions is not None:
            raise ValueError("positions: given without a bias, which alone reads them")
        return
    if not isinstance(bias, RelativePositionBias):
        raise TypeError(f"bias: expected a RelativePositionBias, got {type(bias).__name__}")
    table_shape = (bias.index.entries, q.shape[-2])
    dtypes = tuple({torch.float32, q.dtype})
    check_tensor("bias.table", bias.table, shape=table_shape, dtypes=dtypes, device=q.device)
    size = bias.index.matrix.shape[0]
    check_tensor("bias.index.matrix", bias.index.matrix, device=q.device)
    if positions is None:
        fits = length <= size if q.dim() == 3 else length == size
        if not fits:
            raise ValueError(f"bias.index: made for length {size}, but the sequences have {length}")
        return
    check_tensor("positions", positions, shape=q.shape[:-2], dtypes=_INTEGERS, device=q.device)
    if not validate:
        return
    wrong = (positions < 0) | (positions >= size)
    check_values("positions", positions, wrong, f"outside 0..{size - 1}, the rows of bias.index")


def _check_distinct(positions: Tensor | None, offsets: Tensor | None, validate: bool) -> None:
    if positions is None:
        raise ValueError("distinct: given without positions, of which it is a property")
    if not validate:
        return
    if offsets is None:
        ordered = positions.sort(-1).values
        repeated = ordered.diff(dim=-1) == 0
    else:
        # Sorted by position, then stably by sequence.
        token = torch.arange(positions.shape[0], device=positions.device)
        sequence = torch.searchsorted(offsets, token, right=True)
        order = positions.argsort()
        order = order[sequence[order].argsort(stable=True)]
        ordered = positions[order]
        repeated = (ordered.diff() == 0) & (sequence[order].diff() == 0)
    check_values("positions", ordered[..., 1:], repeated, "repeated in a sequence, not distinct")
