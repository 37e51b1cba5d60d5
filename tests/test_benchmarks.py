"""What benchmarks refuse, and the ratios they tell."""

import pytest
import torch

from reporting import summary
from sublayer import Sublayer, dense, routed, slices


def make(form, eager) -> Sublayer:
    return Sublayer.make(
        *(form, eager),
        tokens=70,
        dim=16,
        hidden=24,
        split=(3, 4),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("form", "eager"), [(slices, slices), (dense, dense), (routed("reference"), slices)]
)
def test_a_right_form_may_be_timed(form, eager):
    sublayer = make(form, eager)
    assert sublayer.x.shape == (10, 7, 16) and sublayer.tokens == 70
    for backward in (False, True):
        found = sublayer.check(backward=backward)
        assert found[0].name == "y" and all(deviation.ok for deviation in found)
    used = 1 if eager is dense else 2
    assert len(found) == 2 + 6 * used + 1  # y, dx, six of each expert, the layer scale


def test_a_wrong_form_may_not():
    class Biased(torch.autograd.Function):
        """Right but for the gradient of a row."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            dy = dy.clone()
            dy[-1, -1] *= 1.01
            return dy

    sublayer = make(lambda x, p, split: slices(Biased.apply(x), p, split), slices)
    assert all(deviation.ok for deviation in sublayer.check(backward=False))
    assert [d.name for d in sublayer.check(backward=True) if not d.ok] == ["dx"]
    swapped = make(lambda x, p, split: slices(x, p, (4, 3)), slices)
    assert not all(deviation.ok for deviation in swapped.check(backward=False))


def test_summary_tells_ratios_within_a_case():
    def record(contender, split, device_ms):
        labels = dict(operation="moe_ffn", phase="forward", dtype="float16", size="base")
        numbers = dict(tokens=8192, device_ms=device_ms, tflops=1.0, share_of_roof=0.5)
        return labels | numbers | dict(contender=contender, split=split)

    lines = summary(
        [
            record("moe_ffn:triton", "1:1", 2.0),
            record("slices", "1:1", 3.0),
            record("dense-compiled", "1:1", 1.0),
            record("moe_ffn:triton", "1:2", 4.0),
        ]
    )
    assert len(lines) == 6  # two cases, four records
    assert lines[1].split()[-2:] == ["0.50x", "1.50x"]
    # The dense layer counts for every split, slices only for their own.
    assert lines[5].split()[-2:] == ["0.25x", "-"]
    assert summary([]) == []
