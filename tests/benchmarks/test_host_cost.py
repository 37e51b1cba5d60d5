"""benchmarks/host_cost.py runs without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMAND = Path(__file__).parents[2] / "benchmarks" / "host_cost.py"


def test_every_launch_is_made(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(COMMAND), "--seconds", "0", "--folder", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads((tmp_path / "host_cost.json").read_text())["rows"]
    assert {(row["operation"], row["mode"]): row["launches"] for row in rows} == {
        ("moe_ffn", "forward"): 1,
        ("moe_ffn", "forward, recorded"): 1,
        ("moe_ffn", "forward + backward"): 3,
        ("shared_attention", "forward"): 1,
        ("shared_attention", "forward, recorded"): 1,
        ("shared_attention", "forward + backward"): 4,
    }
    assert all(row["microseconds"] > 0 for row in rows)
    assert "| moe_ffn | forward | 1 |" in (tmp_path / "host_cost.md").read_text()
