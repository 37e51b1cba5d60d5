"""The recipes, compared with the supplement and the configurations of unilm."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from vlmo import BEiT3Config, VLMo
from vlmo.tasks.losses import unused_parameters
from vlmo.training.optimizer import parameter_groups
from vlmo.training.recipes import RECIPES, Recipe, recipe

# The supplementary material of the paper: name, lr, batch, steps, epochs, pixels.
SUPPLEMENT = [
    # Text-only pre-training: 500k steps of base and 200k of large.
    ("textmlm_base", 2e-4, 1024, 500_000, None, None),
    ("textmlm_large", None, 1024, 200_000, None, None),
    # Vision-language pre-training: 200k steps, batch 1024, warm-up 2.5k.
    ("pretrain_base", 2e-4, 1024, 200_000, None, 224),
    ("pretrain_large", 5e-5, 1024, 200_000, None, 224),
    # VQA: 10 epochs, batch 128, 480 pixels; Large++ 768.
    ("vqa_base", 3e-5, 128, None, 10, 480),
    ("vqa_large", 1.5e-5, 128, None, 10, 480),
    ("vqa_large_768", 1.5e-5, 128, None, 10, 768),
    # NLVR2: 10 epochs, batch 128, 384 pixels; ablations 224 with both learning rates.
    ("nlvr2_base", 5e-5, 128, None, 10, 384),
    ("nlvr2_large", 3e-5, 128, None, 10, 384),
    ("nlvr2_base_ablation", 5e-5, 128, None, 10, 224),
    ("nlvr2_base_ablation_1e-4", 1e-4, 128, None, 10, 224),
    # COCO retrieval: batch 2048, 20 epochs (base) or 10 (large), 384 pixels.
    ("coco_retrieval_base", 2e-5, 2048, None, 20, 384),
    ("coco_retrieval_large", 1e-5, 2048, None, 10, 384),
    # Flickr30k retrieval from the COCO model: 40 epochs; ablations 10 epochs, 1024, 5e-5, 224.
    ("flickr30k_retrieval_base", 1e-5, 2048, None, 40, 384),
    ("flickr30k_retrieval_large", 1e-5, 2048, None, 40, 384),
    ("flickr30k_retrieval_base_ablation", 5e-5, 1024, None, 10, 224),
]
# vlmo/config.py and README.md of microsoft/unilm: name, lr, batch, steps, epochs,
# warm-up (steps or share), pixels, drop path.
CODE = [
    ("textmlm_base_code", 2e-4, 1024, 200_000, None, 2500, None, 0.1),
    ("textmlm_base_plus", 2e-4, 1024, 200_000, None, 2500, None, 0.1),
    ("pretrain_base", 2e-4, 1024, 200_000, None, 2500, 224, 0.1),
    ("pretrain_base_plus", 1e-4, 1024, 200_000, None, 2500, 224, 0.1),
    ("pretrain_large", 5e-5, 1024, 200_000, None, 2500, 224, 0.1),
    ("vqa_base", 3e-5, 128, None, 10, 0.1, 480, 0.15),
    ("vqa_base_plus", 3e-5, 128, None, 10, 0.1, 480, 0.15),
    ("vqa_large", 1.5e-5, 128, None, 10, 0.1, 480, 0.15),
    ("nlvr2_base", 5e-5, 128, None, 10, 0.1, 384, 0.1),
    ("nlvr2_base_plus", 3e-5, 128, None, 10, 0.1, 384, 0.2),
    ("nlvr2_large", 3e-5, 128, None, 10, 0.1, 384, 0.15),
    ("coco_retrieval_base_code", 3e-5, 3072, 3000, None, 300, 384, 0.2),
    ("coco_retrieval_base_plus", 3e-5, 3072, 3000, None, 300, 384, 0.2),
    ("coco_retrieval_large_code", 2e-5, 3072, 3000, None, 300, 384, 0.2),
    ("flickr30k_retrieval_base_code", 3e-5, 3072, 1500, None, 150, 384, 0.15),
    ("flickr30k_retrieval_base_plus", 3e-5, 3072, 1500, None, 150, 384, 0.2),
    ("flickr30k_retrieval_large_code", 2e-5, 3072, 1500, None, 150, 384, 0.2),
]
# The commands of beit3/get_started of unilm: name, lr, batch, epochs, warm-up epochs, pixels, drop
# path, layer decay, weight decay, factor of the head's lr, second beta.
BEIT3 = [
    ("beit3_vqa_base", 3e-5, 128, 10, 1, 480, 0.1, 1.0, 0.01, 20, 0.98),
    ("beit3_vqa_large", 2e-5, 128, 10, 1, 480, 0.15, 1.0, 0.01, 20, 0.98),
    ("beit3_nlvr2_base", 7e-4, 256, 20, 5, 224, 0.2, 0.65, 0.2, 1, 0.999),
    ("beit3_nlvr2_large", 3e-4, 256, 20, 5, 224, 0.2, 0.85, 0.2, 1, 0.999),
    ("beit3_coco_retrieval_base", 2e-4, 3072, 15, 3, 384, 0.2, 0.65, 0.05, 1, 0.999),
    ("beit3_coco_retrieval_large", 5e-5, 3072, 15, 3, 384, 0.2, 0.85, 0.05, 1, 0.999),
    ("beit3_flickr30k_retrieval_base", 1e-4, 3072, 20, 5, 384, 0.2, 0.65, 0.05, 1, 0.999),
    ("beit3_flickr30k_retrieval_large", 5e-5, 3072, 20, 5, 384, 0.2, 0.85, 0.05, 1, 0.999),
]
PUBLISHED = [
    name
    for name, found in RECIPES.items()
    if found.size not in ("small", "tiny") and not found.is_beit3
]


@pytest.mark.parametrize("row", SUPPLEMENT, ids=lambda row: row[0])
def test_numbers_of_the_supplement(row):
    name, lr, batch, steps, epochs, pixels = row
    found = RECIPES[name]
    assert found.source == "supplement"
    assert (found.batch_size, found.steps, found.epochs) == (batch, steps, epochs)
    assert lr is None or found.lr == lr
    assert pixels is None or found.image_size == pixels


@pytest.mark.parametrize("row", CODE, ids=lambda row: row[0])
def test_numbers_of_the_official_configurations(row):
    name, lr, batch, steps, epochs, warmup, pixels, drop_path = row
    found = RECIPES[name]
    assert (found.lr, found.batch_size, found.steps, found.epochs) == (lr, batch, steps, epochs)
    assert warmup in (found.warmup, found.warmup_share)
    assert found.drop_path == drop_path
    assert pixels is None or found.image_size == pixels


@pytest.mark.parametrize("row", BEIT3, ids=lambda row: row[0])
def test_numbers_of_the_commands_of_beit3(row):
    name, lr, batch, epochs, warmup, pixels, drop_path, decay, weight_decay, head, beta2 = row
    found = RECIPES[name]
    assert (found.lr, found.batch_size, found.epochs, found.steps) == (lr, batch, epochs, None)
    assert found.warmup_share == pytest.approx(warmup / epochs)
    assert (found.image_size, found.drop_path) == (pixels, drop_path)
    assert (found.layer_decay, found.weight_decay) == (decay, weight_decay)
    assert (found.head_lr_scale, found.beta2) == (head, beta2)
    assert (found.schedule, found.min_lr, found.clip_norm) == ("cosine", 1e-6, None)
    assert (found.text_length, found.source) == (64, "code")
    published = BEiT3Config.large if name.endswith("large") else BEiT3Config.base
    same = dict(tasks=found.tasks, image_size=pixels, drop_path=drop_path)
    assert found.config() == published(**same)


def test_a_published_embedding_has_rows_for_every_vocabulary():
    found = RECIPES["beit3_vqa_base"]
    assert [found.config(vocab_size=n).vocab_size for n in (40, 64002, 250002)] == [
        *(64010, 64010, 250002)
    ]
    assert RECIPES["digits_beit3_vqa"].config(vocab_size=40).vocab_size == 40


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_every_official_configuration_has_in_common(name):
    found = RECIPES[name]
    assert found.weight_decay == 0.01
    assert found.clip_norm is None
    assert found.text_length == (196 if found.stage == "textmlm" else 40)
    assert found.text_capacity == 196
    assert found.head_lr_scale == (20 if found.stage == "vqa" else 1)
    assert found.mask_share == (0.15 if found.stage in ("textmlm", "pretrain") else None)
    assert found.itc_grad_scale == 1


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_valid_and_start_from_what_exists(name):
    found = RECIPES[name]
    config = found.config()
    assert config.tasks == found.tasks
    assert config.image_size == found.image_size
    assert found.initial_from in (None, "BEiT", "BEiT-3", *RECIPES)
    if found.initial_from in RECIPES:
        assert RECIPES[found.initial_from].size == found.size
    dims = {"base": 768, "base_plus": 544, "large": 1024, "small": 384, "tiny": 96}
    assert config.dim == dims[found.size.removeprefix("beit3_")]


def test_flickr30k_starts_from_coco():
    for size in ("base", "large"):
        assert RECIPES[f"flickr30k_retrieval_{size}"].initial_from == f"coco_retrieval_{size}"


def test_stage_2_trains_exactly_the_official_parameters():
    """The list of run.py:153, as patterns over the keys of the base model."""
    found = recipe("textmlm_base")
    with torch.device("meta"):
        model = VLMo(found.config())
    names = [name for name, _ in model.named_parameters()]
    trained = {name for name in names if found.trains(name)}
    expected = {
        "relative_position_bias_table",
        "token_type_embeddings.weight",
        "text_embeddings.word_embeddings.weight",
        "text_embeddings.position_embeddings.weight",
        "text_embeddings.token_type_embeddings.weight",
        "text_embeddings.LayerNorm.weight",
        "text_embeddings.LayerNorm.bias",
        "transformer.norm.weight",
        "transformer.norm.bias",
        "mlm_score.bias",
        "mlm_score.decoder.weight",
        *(
            f"mlm_score.transform.{m}.{p}"
            for m in ("dense", "LayerNorm")
            for p in ("weight", "bias")
        ),
    }
    for block in range(12):
        for part in ("norm2_text", "mlp_text.fc1", "mlp_text.fc2"):
            expected |= {f"transformer.blocks.{block}.{part}.{p}" for p in ("weight", "bias")}
    assert trained == expected
    # Of these, base has no use for learned text positions, and no loss reaches them.
    assert trained & unused_parameters(model.config) == {
        "text_embeddings.position_embeddings.weight"
    }


@pytest.mark.parametrize("name", ["vqa_base", "pretrain_base_plus"])
def test_groups_of_the_official_optimizer(name):
    """vlmo_utils.set_schedule: what is decayed, and where the learning rate is multiplied."""
    found = recipe(name)
    with torch.device("meta"):
        model = VLMo(found.config())
    groups = parameter_groups(model, lr=found.lr, head_lr_scale=found.head_lr_scale)
    names = {id(parameter): n for n, parameter in model.named_parameters()}
    rules = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert len(rules) == len(names)
    block = "transformer.blocks.11."
    for key in (f"{block}norm1.weight", f"{block}attn.q_bias", "transformer.norm.weight"):
        assert rules[key] == (0.0, found.lr)
    for key in (f"{block}norm2_imag.weight", f"{block}attn.qkv.weight", "transformer.cls_token"):
        assert rules[key] == (0.01, found.lr)
    if name == "vqa_base":
        assert rules["relative_position_bias_table"] == (0.0, found.lr)
        assert rules["transformer.blocks.3.gamma_1"] == (0.01, found.lr)
        assert rules["vqa_classifier.0.weight"] == (0.01, 20 * found.lr)
        assert rules["vqa_classifier.1.weight"] == (0.01, 20 * found.lr)  # the LayerNorm's
        assert rules["vqa_classifier.3.bias"] == (0.0, 20 * found.lr)
    else:
        assert rules["logit_scale"] == rules["transformer.pos_embed"] == (0.01, found.lr)
        scalars = [g for g in groups if any(p.dim() == 0 for p in g["params"])]
        assert [len(g["params"]) for g in scalars] == [2]  # alone, for FSDP2


def test_lengths_and_warmups():
    tuned = recipe("vqa_base")
    assert tuned.total_steps(700) == 7000
    assert tuned.warmup_steps(7000) == 700
    assert recipe("pretrain_base").total_steps(1) == 200_000
    assert recipe("pretrain_base").warmup_steps(200_000) == 2500


def test_a_change_of_length_replaces_the_other_measure():
    changed = recipe("vqa_base").replace(steps=5, warmup=2)
    assert (changed.steps, changed.epochs) == (5, None)
    assert (changed.warmup, changed.warmup_share) == (2, None)
    back = changed.replace(epochs=1)
    assert (back.steps, back.epochs) == (None, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stage="vision"), "stage: 'vision' is not one of"),
        (dict(size="huge"), "size: 'huge' is not one of"),
        (dict(lr=0.0), "lr: 0.0 is not positive"),
        (dict(batch_size=-1), "batch_size: -1 is not positive"),
        (dict(epochs=3), "steps, epochs: 300, 3 is not one of both"),
    ],
)
def test_bad_recipes(changes, message):
    fields = {f.name: getattr(recipe("digits_textmlm"), f.name) for f in dataclasses.fields(Recipe)}
    with pytest.raises(ValueError, match=message):
        Recipe(**{**fields, **changes})


def test_an_unknown_recipe_is_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"recipe: 'vqa_bas' is unknown; did you mean vqa_base"):
        recipe("vqa_bas")


def test_the_table_shows_every_recipe_and_needs_no_torch():
    code = (
        "import sys; from vlmo.commands.app import app; app(['recipes'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    assert set(RECIPES) <= set(rows)
    row = rows["coco_retrieval_base"]
    assert row[1:] == "2e-05 2048 20 epochs 10 % 384 0.2 pretrain_base supplement".split()


@pytest.mark.parametrize("change", [{"official_masking": True}, {"itc_grad_scale": 0.5}])
def test_changes_without_an_effect_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: vqa"):
        recipe("digits_vqa").replace(**change)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("retrieval_small", dict(losses=("itc", "itm")), "a BEiT-3, which has no itc or itm for"),
        (
            "pretrain_small",
            {},
            "no mlm or itc or itm for the stage 'pretrain'; its losses are irtr",
        ),
        ("textmlm_small", {}, "size: 'beit3_base' is a BEiT-3, which has no textmlm"),
        ("retrieval_small", dict(itc_grad_scale=0.5), "itc_grad_scale: is for VLMo only"),
        ("vqa_small", dict(separate_attention=True), "separate_attention: is for VLMo only"),
    ],
)
def test_what_beit3_does_not_have_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(name).replace(size="beit3_base", **changes)
    assert recipe("retrieval_small").replace(size="beit3_base").is_beit3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layer_decay=0.5), "layer_decay: 0.5 is for BEiT-3, not for VLMo"),
        (dict(schedule="step"), "schedule: 'step' is not one of"),
        (dict(min_lr=1e-9), "min_lr: 1e-09 does not suit a linear schedule"),
        (dict(beta2=1.0), r"beta2: 1.0 is not within \[0, 1\)"),
    ],
)
def test_optimisers_that_do_not_exist(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("vqa_base").replace(**changes)
