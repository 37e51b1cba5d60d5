"""shared_attention: parity with eager PyTorch, gradients, the index, registration, bad input."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accuracy import labelled
from attention_cases import (
    CASES,
    Case,
    assert_parity,
    call,
    make_index,
    make_options,
    make_tensors,
    on_every_backend,
    on_every_registered_backend,
    outputs_and_gradients,
)
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention
from vlmo.kernels.attention import op as ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@on_every_backend
def test_parity(case, dtype, place):
    assert_parity(case, dtype, place)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch and c.length], ids=str)
def test_gradcheck(case):
    case = replace(case, heads=2, head_dim=3)
    tensors, options = make_tensors(case, "cpu", torch.float64), make_options(case, "cpu")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def function(*_):
        return call(case, leaves, options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@on_every_backend
def test_query_without_a_key_gets_zeros(place):
    case = Case()
    tensors, options = (
        make_tensors(case, place.device, place.dtype),
        make_options(case, place.device),
    )
    out = call(case, tensors, options, backend=place.backend)
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


@on_every_backend
def test_packed_qkv_and_strides(place):
    device, backend = place
    case = Case(mask=None)
    tensors = make_tensors(case, device, place.dtype)
    expected = outputs_and_gradients(lambda t: call(case, t, {}, backend=backend), tensors)
    index = make_index(case, device)
    qkv = torch.stack([tensors[name] for name in "qkv"], dim=2).requires_grad_()
    out = shared_attention(qkv, bias=RelativePositionBias(tensors["table"], index), backend=backend)
    torch.testing.assert_close(out, expected["out"])
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    assert qkv.grad is not None
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(qkv.grad[:, :, i], expected[name])


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (1, 3, 2, 0), (2, 1, 0, 3)], ids=str)
@on_every_backend
def test_any_order_of_dimensions_in_memory(order, place):
    """Also the head dim outermost, and with gaps between its numbers."""
    device, backend = place
    case = Case(mask=None)
    tensors = make_tensors(case, device, place.dtype)
    expected = outputs_and_gradients(lambda t: call(case, t, {}, backend=backend), tensors)
    back = [order.index(i) for i in range(4)]

    def strided(given):
        moved = {n: given[n].permute(order).repeat_interleave(2, 3)[..., ::2] for n in "qkv"}
        views = {n: t.permute(back) for n, t in moved.items()}
        assert views["q"].stride() != given["q"].stride()
        return call(case, {**given, **views}, {}, backend=backend)

    actual = outputs_and_gradients(strided, tensors)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


@on_every_backend
def test_layers_of_a_model_wide_table(place):
    """Views of one table give the gradient of the whole table."""
    device, backend = place
    case, layers = Case(), 3
    index, options = make_index(case, device), make_options(case, device)
    tensors = make_tensors(case, device, place.dtype)
    table = torch.randn(index.entries, layers * case.heads, device=device, requires_grad=True)

    def loss(layer_table):
        bias = RelativePositionBias(layer_table, index)
        out = shared_attention(*(tensors[n] for n in "qkv"), bias=bias, backend=backend, **options)
        return out.square().sum()

    views = table.view(index.entries, layers, case.heads).unbind(1)
    sum(loss(view) for view in views[:2]).backward()
    assert table.grad is not None
    gradient = table.grad.view(index.entries, layers, case.heads)
    for layer in range(2):
        alone = table.detach().view(index.entries, layers, case.heads)[:, layer].clone()
        alone.requires_grad_()
        loss(alone).backward()
        torch.testing.assert_close(gradient[:, layer], alone.grad)
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], CASES[5]], ids=str)
@on_every_registered_backend
def test_opcheck(case, place):
    device = place.device
    tensors = make_tensors(case, device, place.dtype)
    options, index = make_options(case, device), make_index(case, device)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    arguments = (
        *(leaves[name] for name in "qkv"),
        leaves.get("table"),
        *((None,) * 3 if index is None else (index.matrix, index.affine, index.short)),
        options.get("key_mask"),
        options.get("key_lengths"),
        options.get("offsets"),
        options.get("max_length", 0),
        options.get("positions"),
        *(case.causal, 0.25, options.get("distinct", False), place.backend),
    )
    torch.library.opcheck(ops.ATTENTION.forward, arguments)


@pytest.mark.heavy
@pytest.mark.parametrize("case", [CASES[0], CASES[-1], CASES[2]], ids=str)
@on_every_backend
def test_compile_fullgraph(case, place):
    torch.compiler.reset()  # or the cases of all backends count as recompilations of one function
    device, backend = place
    options, tensors = make_options(case, device), make_tensors(case, device, place.dtype)
    bias_index = make_index(case, device)

    def run(t):
        bias = RelativePositionBias(t["table"], bias_index)
        return shared_attention(t["q"], t["k"], t["v"], bias=bias, backend=backend, **options)

    expected = outputs_and_gradients(run, tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = outputs_and_gradients(compiled, tensors)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=labelled(name))


@on_every_backend
def test_autocast(place):
    device, backend = place
    dtype = place.autocast_dtype
    case = Case()
    tensors, options = make_tensors(case, device, torch.float32), make_options(case, device)
    with torch.autocast(device.type, dtype=dtype):
        actual = outputs_and_gradients(lambda t: call(case, t, options, backend=backend), tensors)
    assert actual["out"].dtype == dtype
    assert {actual[name].dtype for name in ("q", "k", "v", "table")} == {torch.float32}
    expected = outputs_and_gradients(
        lambda t: call(case, t, options, backend=backend),
        {n: t if n == "table" else t.to(dtype) for n, t in tensors.items()},
    )
    torch.testing.assert_close(actual["out"], expected["out"])
    torch.testing.assert_close(actual["table"], expected["table"])


class Log(TorchDispatchMode):
    """Names of the operations that a mode sees."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Log])
@pytest.mark.parametrize("alone", [False, True], ids=["with others", "alone"])
def test_second_derivatives_are_refused(mode, alone):
    case = Case(mask=None)
    tensors = make_tensors(case, "cpu", torch.float32)
    q = tensors["q"].requires_grad_()
    with mode():
        out = call(case, tensors, {})
        loss = out.sum() if alone else out.square().sum()
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], Case()], ids=str)
def test_second_derivatives_of_the_reference(case):
    case = replace(case, heads=2, head_dim=3)
    tensors, options = make_tensors(case, "cpu", torch.float64), make_options(case, "cpu")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def function(*_):
        return call(case, leaves, options, backend="reference")

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_modes_see_the_operation():
    case = Case()
    tensors = make_tensors(case, "cpu", torch.float32)
    tensors["q"].requires_grad_()
    options = make_options(case, "cpu")
    with Log() as log:
        call(case, tensors, options).sum().backward()
    assert {"vlmo.attention_fwd.default", "vlmo.attention_bwd.default"} <= log.seen


def test_index_counts_and_closed_forms():
    """The published 224-pixel layout: 1126 rows, and the rules of the official code."""
    index = RelativePositionIndex.joint(14, 40)
    assert index.entries == 1126
    matrix = index.matrix
    assert matrix.shape == (237, 237)
    text, image = matrix[:40, :40], matrix[40:, 40:]
    assert (matrix[:40, 40:] == 732).all()  # text query, image key
    assert (matrix[40:, :40] == 733).all()
    assert image[0, 1:].unique().tolist() == [729]  # CLS to any, any to CLS, CLS to CLS
    assert image[1:, 0].unique().tolist() == [730]
    assert image[0, 0] == 731
    p, q = 3 * 14 + 5, 7 * 14 + 2  # patches (3, 5) and (7, 2): query minus key
    assert image[1 + p, 1 + q] == (3 - 7 + 13) * 27 + (5 - 2 + 13)
    assert text[0, 1:].unique().tolist() == [1123]
    assert text[1:, 0].unique().tolist() == [1124]
    assert text[0, 0] == 1125
    assert text[2, 9] == 732 + 196 + (9 - 2)  # key minus query
    assert torch.equal(image, RelativePositionIndex.image(14).matrix)
    assert torch.equal(text, RelativePositionIndex.text(14, 196).matrix[:40, :40])


@pytest.mark.parametrize(("pixels", "entries"), [(224, 1126), (384, 2606), (480, 3878)])
def test_table_sizes_of_published_resolutions(pixels, entries):
    assert RelativePositionIndex.table_entries(pixels // 16, 196) == entries


def test_index_of_a_rectangular_grid_is_in_range():
    index = RelativePositionIndex.joint((2, 5), 7, 9)
    matrix = index.matrix
    assert matrix.min() >= 0
    assert matrix.max() == index.entries - 1
    # a pair of patches and its mirror image read different rows, equal offsets the same one
    image = matrix[8:, 8:]
    assert image[0, 6] == image[1, 7]
    assert image[0, 6] != image[6, 0]


GOOD = Case()
TABLE = torch.zeros(46, 3)
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "q: expected a tensor": (TypeError, dict(q=None)),
    r"q: shape \(2, 15, 3\) is not": (ValueError, dict(q=torch.zeros(2, 15, 3))),
    r"q: shape \(2, 15, 3, 16\) does not hold q, k and v": (ValueError, dict(k=None, v=None)),
    "v: missing; give both": (TypeError, dict(v=None)),
    r"k: shape \(2, 14, 3, 16\)": (ValueError, dict(k=torch.zeros(2, 14, 3, 16))),
    "v: dtype float16": (TypeError, dict(v=torch.zeros(2, 15, 3, 16).half())),
    r"key_mask: shape \(2, 14\)": (ValueError, dict(key_mask=torch.ones(2, 14).bool())),
    "key_mask: dtype int64": (TypeError, dict(key_mask=torch.ones(2, 15).long())),
    "key_mask: on meta": (
        ValueError,
        dict(key_mask=torch.ones(2, 15, device="meta", dtype=torch.bool)),
    ),
    r"key_lengths: 16 is outside 0\.\.15": (
        ValueError,
        dict(key_mask=None, key_lengths=torch.tensor([3, 16])),
    ),
    "key_lengths: dtype float32": (TypeError, dict(key_lengths=torch.zeros(2))),
    "max_length: 5 was given without offsets": (ValueError, dict(max_length=5)),
    r"bias.table: shape \(45, 3\) does not fit \(46, 3\)": (
        ValueError,
        dict(bias=lambda index: RelativePositionBias(TABLE[1:], index)),
    ),
    "bias: expected a RelativePositionBias": (TypeError, dict(bias=lambda index: TABLE)),
    "bias.index: made for length 15, but the sequences have 14": (
        ValueError,
        dict(
            q=torch.zeros(2, 14, 3, 16),
            k=torch.zeros(2, 14, 3, 16),
            v=torch.zeros(2, 14, 3, 16),
            key_mask=None,
        ),
    ),
    r"positions: 15 is outside 0\.\.14": (ValueError, dict(positions=torch.full((2, 15), 15))),
    r"positions: 3 is repeated in a sequence, not distinct": (
        ValueError,
        dict(positions=torch.tensor([[*range(15)], [0, 1, 3, 2, 3, *range(5, 15)]]), distinct=True),
    ),
    "distinct: given without positions": (ValueError, dict(distinct=True)),
    "positions: given without a bias": (
        ValueError,
        dict(bias=lambda index: None, positions=torch.zeros(2, 15).long()),
    ),
    "backend 'triton' cannot run this call: it has no kernel for float64": (
        NotImplementedError,
        dict(
            **{name: torch.zeros(2, 15, 3, 16).double() for name in "qkv"},
            backend="triton",
        ),
    ),
    "backend 'triton' cannot run this call: head dim 129 is above 128": (
        NotImplementedError,
        dict(**{name: torch.zeros(2, 15, 3, 129) for name in "qkv"}, backend="triton"),
    ),
}
BAD_PACKED: dict[str, dict[str, Any]] = {
    "key_mask: has no meaning beside offsets": dict(key_mask=torch.ones(1, 9).bool()),
    "offsets: 1 entries hold no sequence": dict(offsets=torch.tensor([0])),
    "offsets: 8 is not 0 at the start or not 9 at the end": dict(offsets=torch.tensor([0, 3, 8])),
    r"offsets: 6 is a sequence length outside 0\.\.max_length 5": dict(max_length=5),
    r"offsets: -2 is a sequence length": dict(offsets=torch.tensor([0, 3, 1, 9]), max_length=9),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, changes = BAD[message]
    tensors, index = make_tensors(GOOD, "cpu", torch.float32), make_index(GOOD, "cpu")
    arguments = {name: tensors[name] for name in "qkv"}
    arguments |= {
        "bias": lambda index: RelativePositionBias(TABLE, index),
        **make_options(GOOD, "cpu"),
    }
    arguments |= changes
    arguments["bias"] = arguments["bias"](index)
    with pytest.raises(error, match=message):
        shared_attention(**arguments)


@pytest.mark.parametrize("message", BAD_PACKED)
def test_bad_packed_input(message):
    q = torch.zeros(9, 2, 16)
    arguments: dict[str, Any] = dict(offsets=torch.tensor([0, 3, 9]), max_length=6)
    arguments |= BAD_PACKED[message]
    with pytest.raises(ValueError, match=message):
        shared_attention(q, q, q, **arguments)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3, 4).long(), r"shape \(3, 4\) is not square"),
        (torch.full((3, 3), 5), r"value 5 is outside 0\.\.4"),
        (torch.full((3, 3), -1), r"value -1 is outside"),
    ],
)
def test_bad_index(matrix, message):
    with pytest.raises(ValueError, match=message):
        RelativePositionIndex(matrix, 5)


def test_text_longer_than_capacity_is_refused():
    with pytest.raises(ValueError, match=r"text length: 9 is not within 1\.\.8"):
        RelativePositionIndex.joint(3, 9, 8)


@pytest.mark.parametrize(
    ("index", "irregular"),
    [
        (RelativePositionIndex.joint((3, 4), 5, 8), [0, 1, 2, 3, 4, 5]),
        (RelativePositionIndex.image(14), [0]),
        (RelativePositionIndex.text(14, 40), [0]),
        (RelativePositionIndex.joint(24, 40), [*range(41)]),
        (RelativePositionIndex(torch.zeros(1, 1).long(), 1), []),
        (RelativePositionIndex(torch.zeros(0, 0).long(), 1), []),
    ],
    ids=["joint", "image", "text", "joint-384", "one", "none"],
)
def test_closed_form_of_the_index(index, irregular):
    """Patches, or words, are regular keys; what is called regular is so for every query."""
    offset, factor, column, regular = index.affine.unbind(1)
    assert (regular == 0).nonzero()[:, 0].tolist() == irregular
    known = factor[:, None] * column + offset[:, None]
    keys = regular.bool()
    assert torch.equal(known[:, keys], index.matrix[:, keys])
    size = len(index.matrix)
    assert index.short.shape == (size, -(-size // 8) * 8)
    assert torch.equal(index.short[:, :size].int(), index.matrix)


def test_closed_form_of_any_index():
    matrix = torch.randint(0, 70_000, (20, 20), generator=torch.Generator().manual_seed(0))
    index = RelativePositionIndex(matrix, 70_000)
    assert index.short.shape == (0, 0)
    offset, factor, column, regular = index.affine.unbind(1)
    keys = regular.bool()
    assert not keys[:-1].any()
    assert torch.equal((factor[:, None] * column + offset[:, None])[:, keys], matrix[:, keys].int())
    wide = RelativePositionIndex(matrix.clamp(max=65_535), 65_536)
    assert torch.equal(wide.short[:, :20].int() & 0xFFFF, wide.matrix)
