"""Two processes compute the same losses and gradients of the global batch as one process."""

import pytest
import torch

import ranks
from processes import in_ranks
from test_step import CONFIGS, assert_same, batch_of, gradients, model_of
from vlmo import distributed
from vlmo.device import HostCopy
from vlmo.training import step

pytestmark = pytest.mark.heavy

ROWS = 8


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """Results of ranks.py: (losses, gradients) by configuration, wrapper and rows of a part."""
    output = tmp_path_factory.mktemp("ranks") / "results.pt"
    in_ranks(lambda: ranks.main(output), output.parent)
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_equal_one(two_ranks, name):
    """With DistributedDataParallel and FSDP2, whole shares and parts."""
    model = model_of(CONFIGS[name])
    ranks.freeze_unused(model)
    expected = step.backward(model, batch_of(ROWS), seed=(1, 2))
    wanted = gradients(model)
    for how in ("ddp", "fsdp"):
        for micro_batch in (4, 2):
            losses, grads = two_ranks[name, how, micro_batch]
            assert_same(losses, expected)
            assert_same(grads, wanted)


def test_a_world_of_one():
    rows = torch.arange(6.0).view(3, 2)
    assert distributed.rank() == 0
    assert distributed.world_size() == 1
    assert distributed.gather(rows) is rows
    assert torch.equal(distributed.fetch_rows(rows, [[2, 0]]), rows[[0, 2]])
    assert torch.equal(HostCopy(rows).get(), rows)
