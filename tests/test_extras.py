"""Features that work without the optional packages."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy

# Of the extra "train" but not of "demo", whose training is the first thing that a user runs.
BLOCKED = ("pyarrow", "tensorboard")
CODE = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))
from vlmo.commands.app import app
import vlmo.commands.predict, vlmo.commands.evaluate, vlmo.demo.program
app("train digits_textmlm --data digits --steps 1 --batch-size 4 --warmup 0 --output OUT".split())
"""


def test_digits_train_without_the_extra_of_files(tmp_path):
    code = CODE.replace("OUT", str(tmp_path / "run"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "No TensorBoard log" in " ".join(result.stdout.split())
