"""The number of variants of the Triton kernels that a training compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

# Of each kind of batch, whatever its lengths. The feed-forward layer has variants for one expert,
# which takes texts, images or joint sequences, and for two, which share joint ones; each with and
# without a factor for each token, which the kernel of the weights does not read. Attention has one
# for an expanded bias, which its forward and backward prepare differently, and one for a lookup,
# for the batches that are too small.
EXPECTED = {
    "packed": {
        "attention_fwd_kernel": 2,
        "attention_bwd_q_kernel": 2,
        "attention_bwd_kv_kernel": 2,
        "attention_bwd_table_kernel": 2,
        "attention_expand_kernel": 2,
        "moe_ffn_fwd_kernel": 4,
        "moe_ffn_bwd_rows_kernel": 4,
        "moe_ffn_bwd_weights_kernel": 2,
    },
    # Masked with a bias, and causal without one; two experts.
    "padded": {
        "attention_fwd_kernel": 3,
        "attention_bwd_q_kernel": 3,
        "attention_bwd_kv_kernel": 3,
        "attention_bwd_table_kernel": 2,
        "attention_expand_kernel": 2,
        "moe_ffn_fwd_kernel": 2,
        "moe_ffn_bwd_rows_kernel": 2,
        "moe_ffn_bwd_weights_kernel": 1,
    },
}


@pytest.fixture(scope="module")
def found():
    """What tests/kernels/variants.py says, in a process in which Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("variants.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("kind", EXPECTED)
def test_lengths_make_no_variants(kind, found):
    assert found[kind] == EXPECTED[kind]
