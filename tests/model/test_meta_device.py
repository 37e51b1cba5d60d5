"""Models built on the meta device: computed buffers get their values back."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlmo import VLMo, VLMoConfig, load_checkpoint, save_checkpoint
from vlmo.kernels import RelativePositionIndex
from vlmo.tasks.losses import compute_losses

TINY = VLMoConfig(
    dim=24,
    depth=2,
    heads=2,
    vl_start=1,
    image_size=32,
    patch_size=16,
    max_text_length=6,
    text_capacity=8,
    vocab_size=30,
    drop_path=0.0,
    tasks=("mlm", "itc", "itm", "vqa", "nlvr2"),
    vqa_labels=5,
)


@pytest.fixture
def expected() -> VLMo:
    torch.manual_seed(0)
    return VLMo(TINY)


def on_meta() -> VLMo:
    with torch.device("meta"):
        model = VLMo(TINY)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model


def assert_same_buffers(model: VLMo, expected: VLMo) -> None:
    found, wanted = dict(model.named_buffers()), dict(expected.named_buffers())
    assert found.keys() == wanted.keys() and len(wanted) == 10
    for name, buffer in wanted.items():
        assert torch.equal(found[name], buffer), name


def test_to_empty_and_strict_load(expected, tmp_path):
    save_checkpoint(expected, tmp_path / "model.safetensors")
    model = on_meta().to_empty(device="cpu")
    load_checkpoint(model, tmp_path / "model.safetensors", strict=True)
    assert_same_buffers(model, expected)


def test_load_with_assign(expected):
    model = on_meta()
    model.load_state_dict(expected.state_dict(), assign=True)
    assert_same_buffers(model, expected)
    assert not any(t.is_meta for t in model.parameters())


def test_reset_parameters_leaves_nothing_as_it_was(expected):
    model = on_meta().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    assert_same_buffers(model, expected)
    found = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        if parameter.unique().numel() == 1:
            assert torch.equal(found[name], parameter), name
        else:
            assert found[name].isfinite().all(), name
            assert found[name].std().item() == pytest.approx(parameter.std().item(), rel=0.5), name


def test_values_come_back_from_every_move(expected):
    model = copy.deepcopy(expected)
    model.to("meta")
    assert all(buffer.is_meta for buffer in model.buffers())
    assert_same_buffers(model.to_empty(device="cpu"), expected)
    assert_same_buffers(pickle.loads(pickle.dumps(expected)), expected)
    assert_same_buffers(copy.deepcopy(expected).half(), expected)
    shared = copy.deepcopy(expected).share_memory()
    assert all(buffer.is_shared() for buffer in shared.buffers())
    assert_same_buffers(shared, expected)


def test_fsdp_from_meta(expected, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = on_meta()
        mesh = init_device_mesh("cpu", (1,))
        scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        for block in model.transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=scalars)
        model.to_empty(device="cpu")
        model.reset_parameters()
        assert_same_buffers(model, expected)
        image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        ids = torch.tensor([[1, 2, 3, 0, 0, 0]] * 2)
        batch = {"text_ids": ids, "text_masks": (ids > 0).long(), "image": image}
        labels = torch.full_like(ids, -100)
        labels[:, 1] = 2
        batch |= {"text_ids_mlm": ids, "text_labels_mlm": labels, "vqa_targets": torch.rand(2, 5)}
        batch |= {"image_0": image, "image_1": image, "answers": torch.tensor([0, 1])}
        assert model(compute_losses, batch)["loss"].isfinite()
    finally:
        dist.destroy_process_group()


def test_index_copies_its_matrix():
    matrix = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    index = RelativePositionIndex(matrix, 4)
    matrix.fill_(99)
    assert index.matrix.tolist() == [[0, 1], [2, 3]]


def test_index_without_values_is_refused():
    with pytest.raises(ValueError, match="matrix: on the meta device"):
        RelativePositionIndex(torch.zeros(2, 2, dtype=torch.int32, device="meta"), 4)
