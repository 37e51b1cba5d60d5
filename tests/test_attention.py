"""shared_attention: parity with eager PyTorch, gradients, the index, registration, bad input."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from accuracy import assert_as_accurate_as
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention
from vlmo.kernels.attention import ops


@dataclass(frozen=True)
class Case:
    """One call; the default is a joint sequence of 5 text and 10 image tokens with padding."""

    index: str | None = "joint"  # "joint", "image", "text", "random" or None
    length: int = 15
    batch: int = 2
    heads: int = 3
    head_dim: int = 16
    mask: str | None = "mask"  # "mask", "lengths" or None
    causal: bool = False
    lengths: tuple = ()  # of packed sequences
    positions: bool = False
    scale: float | None = None

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case, k, None)]
        return ",".join(changed).replace(" ", "") or "joint"


CASES = [
    Case(),
    Case(index="image", length=10, mask=None),
    Case(index="text", length=5, mask="lengths"),
    Case(index="random", length=37, mask="lengths"),
    Case(index=None, mask=None),
    Case(index=None, mask="lengths", causal=True, head_dim=34),
    Case(index=None, mask="mask", scale=0.5),
    Case(index=None, length=1, mask=None),
    Case(positions=True),
    Case(index=None, length=0, mask=None),
    Case(batch=0),
    # packed: an empty sequence among others, alone, with the index read by position
    Case(index=None, lengths=(3, 0, 15, 1), mask=None),
    Case(index=None, lengths=(7,), mask=None, causal=True),
    Case(index="random", lengths=(9, 15, 2), mask=None),
    Case(index="joint", lengths=(9, 15, 2), mask=None, positions=True),
]


def make_index(case: Case, device) -> RelativePositionIndex | None:
    grid, text = (3, 3), 5
    if case.index is None:
        return None
    if case.index == "random":
        generator = torch.Generator().manual_seed(4)
        length = max(case.lengths, default=case.length)
        matrix = torch.randint(0, 11, (length, length), generator=generator)
        return RelativePositionIndex(matrix, 11).to(device)
    make = {
        "joint": lambda: RelativePositionIndex.joint(grid, text, 8),
        "image": lambda: RelativePositionIndex.image(grid, 8),
        "text": lambda: RelativePositionIndex.text(grid, text, 8),
    }
    return make[case.index]().to(device)


def make_tensors(case: Case, device, dtype) -> dict:
    generator = torch.Generator().manual_seed(5)
    rows = (sum(case.lengths),) if case.lengths else (case.batch, case.length)
    shape = (*rows, case.heads, case.head_dim)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for name in "qkv"
    }
    index = make_index(case, device)
    if index is not None:
        table = torch.randn(index.entries, case.heads, generator=generator, dtype=torch.float64)
        tensors["table"] = table.to(device, dtype)
    return tensors


def make_options(case: Case, device) -> dict:
    generator = torch.Generator().manual_seed(6)
    options: dict = {"causal": case.causal, "scale": case.scale}
    if case.mask == "mask":
        mask = torch.rand(case.batch, case.length, generator=generator) > 0.4
        mask[:1] = False  # a sequence without a valid key
        options["key_mask"] = mask.to(device)
    if case.mask == "lengths":
        options["key_lengths"] = torch.tensor([case.length, 2], device=device)
    if case.lengths:
        offsets = torch.tensor([0, *case.lengths]).cumsum(0)
        options |= {"offsets": offsets.to(device), "max_length": max(case.lengths) + 2}
        if case.index and not case.positions:
            options["max_length"] = max(case.lengths)
    if case.positions:
        rows = (sum(case.lengths),) if case.lengths else (case.batch, case.length)
        options["positions"] = torch.randint(0, 15, rows, generator=generator).to(device)
    return options


def eager(case: Case, tensors: dict, options: dict) -> Tensor:
    """Attention as the official code computes it, one sequence after the other, by autograd."""
    index = make_index(case, tensors["q"].device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    wide = torch.promote_types(tensors["q"].dtype, torch.float32)

    def one(q, k, v, allowed, positions):  # [N, H, K]
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        scores = (q * scale).to(wide) @ k.to(wide).transpose(1, 2)
        if index is not None:
            matrix = index.matrix.long()[positions][:, positions]
            scores = scores + tensors["table"].to(wide)[matrix].permute(2, 0, 1)
        if case.causal:
            allowed = allowed & torch.ones_like(scores[0], dtype=torch.bool).tril()
        valid = allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~(allowed | ~valid), float("-inf"))
        p = scores.softmax(-1).to(v.dtype) * valid.to(v.dtype)
        return (p @ v).transpose(0, 1)

    outs = []
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if case.lengths:
        runs = [slice(int(a), int(b)) for a, b in options["offsets"].unfold(0, 2, 1)]
    else:
        runs = list(range(case.batch))
    for number, run in enumerate(runs):
        length = q[run].shape[0]
        allowed = torch.ones(1, length, dtype=torch.bool, device=q.device)
        if "key_mask" in options:
            allowed = options["key_mask"][number][None]
        if "key_lengths" in options:
            allowed = (torch.arange(length, device=q.device) < options["key_lengths"][number])[None]
        positions = torch.arange(length, device=q.device)
        if case.positions:
            positions = options["positions"][run]
        outs.append(one(q[run], k[run], v[run], allowed, positions))
    if not outs:
        return q + 0 * k + 0 * v
    return torch.cat(outs) if case.lengths else torch.stack(outs)


def call(case: Case, tensors: dict, options: dict, **more) -> Tensor:
    bias = None
    if case.index is not None:
        bias = RelativePositionBias(tensors["table"], make_index(case, tensors["q"].device))
    return shared_attention(tensors["q"], tensors["k"], tensors["v"], bias=bias, **options, **more)


def outputs_and_gradients(function, tensors: dict) -> dict[str, Tensor]:
    tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(tensors)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    out.backward(dout)
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, device):
    tensors, options = make_tensors(case, device, dtype), make_options(case, device)
    wide = {name: t.double() for name, t in tensors.items()}
    exact = outputs_and_gradients(lambda t: eager(case, t, options), wide)
    baseline = outputs_and_gradients(lambda t: eager(case, t, options), tensors)
    actual = outputs_and_gradients(lambda t: call(case, t, options), tensors)
    for name, value in actual.items():
        assert_as_accurate_as(name, value, exact[name], baseline[name])


@pytest.mark.parametrize("case", [c for c in CASES if c.batch and c.length], ids=str)
def test_gradcheck(case):
    case = replace(case, heads=2, head_dim=3)
    tensors, options = make_tensors(case, "cpu", torch.float64), make_options(case, "cpu")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def function(*_):
        return call(case, leaves, options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_query_without_a_key_gets_zeros(device):
    case = Case()
    out = call(case, make_tensors(case, device, torch.float32), make_options(case, device))
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


def test_packed_qkv_and_strides(device):
    case = Case(mask=None)
    tensors = make_tensors(case, device, torch.float32)
    expected = outputs_and_gradients(lambda t: call(case, t, {}), tensors)
    index = make_index(case, device)
    qkv = torch.stack([tensors[name] for name in "qkv"], dim=2).requires_grad_()
    out = shared_attention(qkv, bias=RelativePositionBias(tensors["table"], index))
    torch.testing.assert_close(out, expected["out"])
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(qkv.grad[:, :, i], expected[name])


def test_layers_of_a_model_wide_table(device):
    """Views of one table give the gradient of the whole table."""
    case, layers = Case(), 3
    index, options = make_index(case, device), make_options(case, device)
    tensors = make_tensors(case, device, torch.float32)
    table = torch.randn(index.entries, layers * case.heads, device=device, requires_grad=True)
    views = table.view(index.entries, layers, case.heads).unbind(1)
    total = sum(
        shared_attention(
            *(tensors[n] for n in "qkv"), bias=RelativePositionBias(view, index), **options
        )
        .square()
        .sum()
        for view in views[:2]
    )
    total.backward()
    gradient = table.grad.view(index.entries, layers, case.heads)
    for layer in range(2):
        alone = table.detach().view(index.entries, layers, case.heads)[:, layer].clone()
        alone.requires_grad_()
        bias = RelativePositionBias(alone, index)
        shared_attention(
            *(tensors[n] for n in "qkv"), bias=bias, **options
        ).square().sum().backward()
        torch.testing.assert_close(gradient[:, layer], alone.grad)
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], CASES[5]], ids=str)
def test_opcheck(case, device):
    tensors = make_tensors(case, device, torch.float32)
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
        *(case.causal, 0.25, "reference"),
    )
    torch.library.opcheck(ops.attention_fwd, arguments)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1], CASES[2]], ids=str)
def test_compile_fullgraph(case, device):
    options, tensors = make_options(case, device), make_tensors(case, device, torch.float32)
    bias_index = make_index(case, device)

    def run(t):
        bias = RelativePositionBias(t["table"], bias_index)
        return shared_attention(t["q"], t["k"], t["v"], bias=bias, **options)

    expected = outputs_and_gradients(run, tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = outputs_and_gradients(compiled, tensors)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_autocast(device):
    case = Case()
    tensors, options = make_tensors(case, device, torch.float32), make_options(case, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = outputs_and_gradients(lambda t: call(case, t, options), tensors)
    assert actual["out"].dtype == torch.bfloat16
    assert {actual[name].dtype for name in ("q", "k", "v", "table")} == {torch.float32}
    expected = outputs_and_gradients(
        lambda t: call(case, t, options),
        {n: t if n == "table" else t.bfloat16() for n, t in tensors.items()},
    )
    torch.testing.assert_close(actual["out"], expected["out"])
    torch.testing.assert_close(actual["table"], expected["table"])


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
BAD = {
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
    "positions: given without a bias": (
        ValueError,
        dict(bias=lambda index: None, positions=torch.zeros(2, 15).long()),
    ),
    "backend 'triton' cannot run this call: .*no Triton kernel": (
        NotImplementedError,
        dict(backend="triton"),
    ),
}
BAD_PACKED = {
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
    arguments = dict(offsets=torch.tensor([0, 3, 9]), max_length=6) | BAD_PACKED[message]
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
