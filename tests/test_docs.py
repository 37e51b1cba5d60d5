"""Every snippet of README.md and docs/ runs unchanged, on small data with the same names."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

from processes import command
from test_data_arrow import PAIRS, QUESTIONS, STATEMENTS, TEXTS, UNLABELLED, write
from test_spm import trained as trained_spm
from vlmo import BEiT3, VLMo, save_checkpoint
from vlmo.commands.app import app
from vlmo.data import TextTokenizer, load_vocabulary, sources, train_wordpiece
from vlmo.data.arrow import DATASETS
from vlmo.training import recipes

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = r"(from|import) |(open_data|Predictor\.load)\("
RECORD = r"\{"
COMMAND = r"(vlmo|torchrun|make|pip|python|[A-Z_]+=\S+) "
# Shown, not run: pieces of a formula, of a folder, of a file.
ILLUSTRATIONS = (r"index\[q, k\] = ", r"mydata/")
# What stands for names in capitals.
NAMES = {
    "RECIPE": "digits_retrieval",
    "SOURCE": "digits",
    "ARROW_FOLDER": "arrow/",
    "FOLDER": "runs/digits_retrieval",
    "MODEL": "runs/digits_retrieval",
    "TASK": "retrieval",
    "SPLIT": "val",
    "DATA": "pairs.jsonl",
}
# Commands that tests of their own run: they are only parsed here.
ELSEWHERE = ("demo",)
# The import of a snippet that tests/model/test_peft.py runs, the one test that needs PEFT.
PEFT = "from peft import"
TINY = dict(steps=1, warmup=0, batch_size=2, image_size=32, text_length=12, text_capacity=12)
WORDS = "a an dog cat animal red car sleeping one line another what how many who both are is show"


class Snippet(NamedTuple):
    """A block of code, or a command within a sentence."""

    page: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"

    def is_a(self, kind: str) -> bool:
        return re.match(kind, self.text) is not None

    @property
    def commands(self) -> list[list[str]]:
        return [shlex.split(line, comments=True) for line in self.text.splitlines() if line]


def snippets(page: Path) -> list[Snippet]:
    """Fenced and indented blocks, and commands in backticks, in their order."""
    found: list[Snippet] = []
    block: list[str] = []
    prose, fenced = [], False
    for number, line in enumerate([*page.read_text().splitlines(), ""], 1):
        fence = line.startswith("```")
        inside = fenced or line.startswith("    ") or (not line and bool(block))
        prose.append("" if inside else line)
        if inside and not fence:
            block.append(line)
            continue
        if block:
            found += _parts(page.name, number - len(block), block)
        block, fenced = [], fenced != fence
    assert not fenced, f"{page} has a fence without an end"
    text = "\n".join(prose)
    for match in re.finditer(r"`(vlmo [a-z]+\s[^`]+)`", text):
        number = text.count("\n", 0, match.start()) + 1
        found.append(Snippet(page.name, number, " ".join(match[1].split())))
    return sorted(snippet for snippet in found if snippet.text.strip())


def _parts(page: str, line: int, block: list[str]) -> Iterator[Snippet]:
    """A block as it is, or one of commands and of records at its blank lines."""
    text = textwrap.dedent("\n".join(block)).strip("\n")
    whole = Snippet(page, line, text)
    if not whole.is_a(COMMAND) and not whole.is_a(RECORD):
        yield whole
        return
    for part in re.finditer(r"(?:.+\n?)+", text):
        yield Snippet(page, line + text.count("\n", 0, part.start()), part[0])


ALL = {page.name: snippets(page) for page in PAGES}


def test_every_snippet_is_of_a_known_kind():
    for snippet in (snippet for found in ALL.values() for snippet in found):
        kinds = [kind for kind in (PYTHON, RECORD, COMMAND) if snippet.is_a(kind)]
        kinds = kinds or [kind for kind in ILLUSTRATIONS if snippet.is_a(kind)]
        assert len(kinds) == 1, f"{snippet.place}: {snippet.text}"
    assert sum(map(len, ALL.values())) > 30


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """The working folder that the documents have in mind; the sizes of all recipes are tiny."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sources, "_DIGIT_SIZES", {"train": 256, "val": 8, "test": 8})
        patch.setattr(sources, "_DIGIT_GALLERY", 8)
        patch.setitem(recipes.SIZES, "base", recipes.tiny)
        patch.setitem(recipes.SIZES, "small", recipes.tiny)
        patch.setitem(recipes.SIZES, "beit3_base", recipes.beit3_tiny)
        for name, found in recipes.RECIPES.items():
            patch.setitem(recipes.RECIPES, name, found.replace(**TINY))
        _write_pictures(folder)
        _write_arrow(folder / "arrow")
        tokenizer = _write_models(folder)
        _write_beit3(folder)
        _write_records(folder)
        assert tokenizer.vocab_size > 20
        yield folder


def _write_pictures(folder: Path) -> None:
    names = ["photo.jpg", "photo.png", "other.jpg", "cat.jpg", "dog.jpg", "0001.jpg"]
    names += re.findall(r'"(?:image|image_0|image_1)": "([^"]+)"', "".join(_texts()))
    random = np.random.default_rng(0)
    for name in dict.fromkeys(names):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def _texts() -> list[str]:
    return [snippet.text for found in ALL.values() for snippet in found]


def _write_arrow(folder: Path) -> None:
    folder.mkdir()
    kinds = {"wikibk": TEXTS, "nlvr2": STATEMENTS, "vqa": QUESTIONS, "vqa-test-dev": UNLABELLED}
    for name, files in DATASETS.items():
        for split, stems in files.items():
            columns = kinds.get(name, PAIRS)
            if name == "vqa" and split == "test":
                columns = UNLABELLED
            write(folder, columns, *stems)


def _write_models(folder: Path) -> TextTokenizer:
    """Files by the names of the published ones, and run/, a model with every head."""
    tokenizer = TextTokenizer(train_wordpiece([WORDS], 60), 12)
    tokenizer.save_vocabulary(folder / "vocab.txt")
    lengths = dict(max_text_length=12, text_capacity=12)
    config = recipes.tiny(**lengths, vocab_size=tokenizer.vocab_size, vqa_labels=3)
    published = {
        "vlmo_base_patch16_224.pt": ("mlm", "itc", "itm"),
        "vlmo_base_patch16_384_coco.pt": ("irtr",),
        "vlmo_base_patch16_480_vqa.pt": ("vqa",),
        "run/model.safetensors": ("mlm", "itc", "itm", "vqa", "nlvr2"),
    }
    for name, tasks in published.items():
        (folder / name).parent.mkdir(exist_ok=True)
        torch.manual_seed(0)
        save_checkpoint(VLMo(config.replace(tasks=tasks)), folder / name)
    tokenizer.save_vocabulary(folder / "run" / "vocab.txt")
    for place in (folder, folder / "run"):
        (place / "answers.json").write_text(json.dumps(["red", "2", "blue"]))
    images = VLMo(config).transformer.state_dict()
    beit = {
        key.replace("_imag.", "."): value
        for key, value in images.items()
        if "_text." not in key and "_vl." not in key
    }
    torch.save({"model": beit}, folder / "beit_base_patch16_224_pt22k_ft22kto1k.pth")
    return tokenizer


def _write_beit3(folder: Path) -> None:
    """A SentencePiece model, and files of BEiT-3 by the names of the published ones."""
    (folder / "beit3.spm").write_bytes(trained_spm())
    tokens = load_vocabulary(folder / "beit3.spm").get_vocab_size()
    published: dict[str, tuple[str, ...]] = {
        "beit3_base_patch16_224.pth": (),
        "beit3_base_itc_patch16_224.pth": ("irtr",),
        "beit3_base_patch16_384_coco_retrieval.pth": ("irtr",),
        "beit3_base_patch16_480_vqa.pth": ("vqa",),
    }
    for name, tasks in published.items():
        torch.manual_seed(0)
        config = recipes.beit3_tiny(vocab_size=tokens, vqa_labels=3, tasks=tasks)
        save_checkpoint(BEiT3(config), folder / name)


def _write_records(folder: Path) -> None:
    caption = {"image": "photo.jpg", "caption": "a red car"}
    (folder / "pairs.jsonl").write_text(json.dumps(caption))
    (folder / "captions.jsonl").write_text(json.dumps({"text": "a red car"}))
    (folder / "mydata").mkdir()
    (folder / "mydata" / "train.jsonl").write_text(json.dumps(caption | {"image": "../photo.jpg"}))


def run(monkeypatch, name: str) -> None:
    """The snippets of a page, one after the other in the same names."""
    space: dict[str, object] = {}
    for snippet in ALL[name]:
        if PEFT in snippet.text:
            continue
        if snippet.is_a(PYTHON):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(snippet.text, snippet.place, "exec"), space)
        elif snippet.is_a(COMMAND):
            for words in snippet.commands:
                assert run_command(monkeypatch, words) == 0, f"{snippet.place}: {' '.join(words)}"


def run_command(monkeypatch, words: list[str]) -> int:
    """Exit code of a command line; what torchrun starts runs alone."""
    if words[0] in ("make", "pip", "python") or "=" in words[0]:
        return 0
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    assert words[0] == "vlmo"
    arguments = [NAMES.get(word, word) for word in words[1:]]
    if arguments[0] == "--install-completion":  # would change the shell of whoever runs this
        return 0
    if arguments[0] in ELSEWHERE:
        get_command(app).make_context("vlmo", arguments)
        return 0
    return command(monkeypatch, *arguments)


def test_readme(world, monkeypatch):
    try:
        run(monkeypatch, "README.md")
    finally:
        shutil.rmtree("runs")  # which other pages make in another way


@pytest.fixture(scope="module")
def trained(world) -> None:
    """The runs that docs/training.md makes, and others of its kinds."""
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "training.md")
        assert command(patch, "train", "digits_retrieval", "--data", "digits") == 0
        options = ["--data", "arrow/", "--init", "runs/pretrain_base"]
        assert command(patch, "train", "coco_rerank_base", *options) == 0


def test_training(trained):
    for name in ("textmlm_base", "pretrain_base", "vqa_base", "coco_retrieval_base"):
        assert Path("runs", name, "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", sorted(ALL.keys() - {"README.md", "training.md"} - {n for n in ALL if not ALL[n]})
)
def test_page(trained, monkeypatch, name):
    run(monkeypatch, name)
