"""Loading of models: digests of vocabulary and answers, complete and finite tensors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evaluation_cases import TOKENIZER, model_of
from vlmo import Predictor, save_checkpoint
from vlmo.checkpoint.formats import CheckpointError
from vlmo.data import ANSWERS
from vlmo.run_folder import Digests, digest, digests_of, load_model

WORDS = TOKENIZER.tokens(range(TOKENIZER.vocab_size))
OURS = Digests(digest(WORDS), digest(ANSWERS))
SWAPPED = [ANSWERS[1], ANSWERS[0], *ANSWERS[2:]]


def run_folder(folder: Path, *, records: bool = True, recipe: dict | None = None) -> Path:
    """What a VQA training leaves, with digests in the metadata, in recipe.json or nowhere."""
    folder.mkdir()
    digests = OURS._asdict() if records else {}
    for name in ("model.safetensors", "best.pt"):
        save_checkpoint(model_of(("vqa",)), folder / name, **digests)
    TOKENIZER.save_vocabulary(folder / "vocab.txt")
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    (folder / "recipe.json").write_text(json.dumps(recipe or {}))
    return folder


def with_recipe(folder: Path) -> Path:
    """A run folder made before digests stood in the metadata."""
    run = {"vocabulary": OURS.vocabulary, "answers": OURS.answers}
    return run_folder(folder, records=False, recipe={"run": run})


def swap_two_words(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[-1], lines[-2] = lines[-2], lines[-1]
    path.write_text("\n".join(lines) + "\n")


def test_a_digest_depends_on_every_word_and_their_order():
    assert digest(["a", "b"]) == digest(("a", "b"))
    found = {digest(words) for words in (["a", "b"], ["b", "a"], ["a", "c"], ["a"], ["ab"])}
    assert len(found) == 5
    assert all(len(word) == 16 and set(word) <= set("0123456789abcdef") for word in found)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin"])
def test_digests_are_in_the_metadata_of_either_format(tmp_path, name):
    model, path = model_of(("vqa",)), tmp_path / name
    save_checkpoint(model, path, vocabulary="0123", answers="4567")
    assert digests_of(path) == Digests("0123", "4567")
    save_checkpoint(model, path, vocabulary="0123")
    assert digests_of(path) == Digests("0123", None)
    save_checkpoint(model, path)
    assert digests_of(path) == Digests(None, None)
    # The official code and we ourselves see the same tensors as ever.
    if path.suffix == ".safetensors":
        assert set(load_file(path)) == set(model.state_dict())


def test_digests_of_older_runs_are_those_of_the_recipe(tmp_path):
    folder = with_recipe(tmp_path / "run")
    for source in (folder, folder / "model.safetensors", folder / "best.pt"):
        assert digests_of(source) == OURS
    (folder / "model.safetensors").unlink()
    assert digests_of(folder) == OURS
    assert digests_of(run_folder(tmp_path / "bare", records=False)) == Digests(None, None)
    save_checkpoint(model_of(("vqa",)), folder / "new.pt", vocabulary="0", answers="1")
    assert digests_of(folder / "new.pt") == Digests("0", "1")


def test_digests_need_files_that_can_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        digests_of(tmp_path / "nowhere")
    folder = with_recipe(tmp_path / "run")
    for content in ("{", "[" * 100_000, '"\\ud800'):
        (folder / "recipe.json").write_text(content)
        with pytest.raises(ValueError, match=r"recipe\.json is not JSON"):
            digests_of(folder)
    for content in ("[]", '{"run": 3}', '{"run": {"answers": 3}}'):
        (folder / "recipe.json").write_text(content)
        assert digests_of(folder) == Digests(None, None)


@pytest.mark.parametrize("make", [run_folder, with_recipe], ids=["metadata", "recipe.json"])
@pytest.mark.parametrize("source", ["run", "run/best.pt"])
def test_answers_in_another_order_are_refused(tmp_path, make, source):
    folder = make(tmp_path / "run")
    path = tmp_path / "shuffled.json"
    path.write_text(json.dumps(SWAPPED))
    assert load_model(tmp_path / source).answers == list(ANSWERS)
    weights = r"best\.pt" if source.endswith("pt") else r"model\.safetensors"
    for answers, named in ((path, r"shuffled\.json"), (SWAPPED, "the list")):
        with pytest.raises(ValueError, match=rf"answers: .*{named} has other answers.*{weights}"):
            Predictor.load(tmp_path / source, answers=answers, device="cpu")
    (folder / "answers.json").write_text(json.dumps(SWAPPED))
    with pytest.raises(ValueError, match=rf"answers: .*answers\.json has other .*{weights}"):
        load_model(tmp_path / source)
    assert load_model(tmp_path / source, answers=ANSWERS).answers == list(ANSWERS)


@pytest.mark.parametrize("make", [run_folder, with_recipe], ids=["metadata", "recipe.json"])
def test_a_vocabulary_in_another_order_is_refused(tmp_path, make):
    folder = make(tmp_path / "run")
    shutil.copy(folder / "vocab.txt", tmp_path / "other.txt")
    swap_two_words(tmp_path / "other.txt")
    with pytest.raises(ValueError, match=r"other\.txt has other tokens.*model\.safetensors"):
        load_model(folder, vocabulary=tmp_path / "other.txt")
    swap_two_words(folder / "vocab.txt")
    with pytest.raises(ValueError, match=r"vocab\.txt has other tokens.*model\.safetensors"):
        load_model(folder)


def test_without_digests_numbers_are_compared(tmp_path):
    folder = run_folder(tmp_path / "run", records=False)
    assert load_model(folder, answers=SWAPPED).answers == SWAPPED
    with pytest.raises(ValueError, match=r"1 answers, the model has 12 \(.*model\.safetensors\)"):
        load_model(folder, answers=["yes"])


def test_answers_are_read_in_any_unicode_and_other_encodings_are_named(tmp_path):
    folder = run_folder(tmp_path / "run")
    path = tmp_path / "answers.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(ANSWERS), encoding=encoding)
        assert load_model(folder, answers=path).answers == list(ANSWERS)
    path.write_bytes('["a",\n"é"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"answers\.json, line 2: is not UTF-8"):
        load_model(folder, answers=path)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = model_of(("vqa",))
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            model.transformer.blocks[1].attn.q_bias[3] = value
        save_checkpoint(model, tmp_path / "bad.safetensors")
        message = r"bad\.safetensors: 1 of \d+ tensors .* transformer\.blocks\.1\.attn\.q_bias"
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "bad.safetensors")


def test_a_file_without_tensors_that_the_heads_need_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model_of(("itc", "itm")), path)
    with pytest.raises(CheckpointError, match=r"lacks 6 tensors .* vqa needs: vqa_classifier"):
        load_model(path, tasks=("vqa",))
    remove(path, "pooler.")
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .* itc, itm needs: pooler"):
        load_model(path)
    remove(path, "itm_score.")
    assert load_model(path).model.config.tasks == ("itc",)  # for which nothing reads the pooler


def remove(path: Path, prefix: str) -> None:
    """Take tensors out of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    save_file(kept, path, metadata=metadata)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "so it is no run folder$"),
        (["training.pt", "recipe.json"], "its training has not ended"),
        (["model.safetensors.index.json", "config.json"], "in several files"),
        (["config.json", "pytorch_model.bin"], "as a model of Hugging Face has"),
        (["last.ckpt", "vlmo.pt"], "name one of its files: last.ckpt, vlmo.pt"),
    ],
)
def test_a_folder_without_weights_is_described(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=message):
        load_model(tmp_path)
