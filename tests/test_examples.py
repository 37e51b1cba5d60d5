"""Every program of examples/ runs and prints the expected output."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "moe_ffn.py": [r"output: \(2, 237, 192\)", r"output and all gradients agree: True"],
    "shared_attention.py": [
        r"3 sequences, 73 tokens; padded they would be 87",
        r"gradient of the table: \(78, 3\)",
        r"agrees with PyTorch: True",
    ],
    "similarity.py": [r"a red square( +-?0\.\d{4}){2}\n", r"a green square( +-?0\.\d{4}){2}\n"],
    "training_step.py": [r"step 4: mlm_loss \S+, itc_loss \S+, itm_loss \S+, loss \d+\.\d{3}\n"],
    "backends.py": [
        r"cpu +can run\n",
        r"agrees with the reference: True",
        r"backend 'cuda' cannot run this call",
        r"compiled agrees: True",
    ],
}


def test_all_examples_are_known():
    assert PRINTED.keys() == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", PRINTED)
def test_example(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.delenv("VLMO_KERNELS", raising=False)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern in PRINTED[name]:
        assert re.search(pattern, printed), f"{pattern}\nis not in\n{printed}"


def test_a_run_and_its_images_are_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["similarity.py", "runs/none", "a.png"])
    with pytest.raises(FileNotFoundError, match="runs/none"):
        runpy.run_path(str(EXAMPLES / "similarity.py"), run_name="__main__")
