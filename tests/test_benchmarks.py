"""The ratios that benchmarks tell."""

from reporting import summary


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
