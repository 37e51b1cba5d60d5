"""The command line: output and errors."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from vlmo import __version__
from vlmo.commands import app as cli
from vlmo.commands.app import app, main
from vlmo.kernels import BACKEND_NAMES, why_not


def vlmo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vlmo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.heavy
def test_info_shows_what_can_run_and_why_not_the_rest():
    result = vlmo("info")
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout
    assert "yes" in result.stdout
    words = set(result.stdout.split())
    for operation in ("moe_ffn", "shared_attention", "routing_index"):
        assert operation in words
        for backend in BACKEND_NAMES:
            assert backend in words
            reason = why_not(operation, backend, device="cpu")
            # The table may break a sentence into lines, but not a word.
            assert set((reason or "").split()) <= words


def test_help_does_not_import_torch():
    code = "import sys; from vlmo.commands.app import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--backend", "numpy"], "'numpy' is not a backend"),
        (["demo", "--output", __file__], "exists"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vlmo", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_backend_that_cannot_run_is_refused_with_its_reason(tmp_path, monkeypatch, capsys):
    reason = why_not("moe_ffn", "cuda", device="cpu")
    assert reason is not None
    arguments = ["demo", "--backend", "cuda", "--device", "cpu", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["vlmo", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_variable_is_refused_before_a_folder_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLMO_KERNELS", "Triton")
    monkeypatch.setattr(sys, "argv", ["vlmo", "demo", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("vlmo: VLMO_KERNELS: 'Triton' is not a backend")
    assert not (tmp_path / "out").exists()


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"vlmo {__version__}\n")


def test_shell_completion_knows_the_commands(monkeypatch):
    monkeypatch.setenv("_VLMO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "vlmo e")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(app, [], prog_name="vlmo")
    assert result.stdout.split() == ["evaluate"]


def _commands() -> dict[tuple[str, ...], Any]:
    whole: Any = get_command(app)
    return {(name,): command for name, command in whole.commands.items()}


@pytest.mark.parametrize(
    ("names", "command"),
    [pytest.param(*item, id=" ".join(item[0])) for item in _commands().items()],
)
def test_help_shows_every_default(names, command):
    """Rich drops a default that is written in brackets into the help text, as markup."""
    page = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "300"}).stdout
    for option in command.params:
        assert "default:" not in (option.help or ""), f"{option.name}: use show_default="
        if isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})]" in page


@pytest.mark.parametrize(
    "arguments", [["demo", "--steps", "0"], ["demo", "--device", "tpu"], ["x"]]
)
def test_wrong_options_exit_with_2(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 GiB for an array"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nstack"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB."),
    ],
)
def test_a_lack_of_memory_is_one_line(monkeypatch, capsys, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    reason = str(error).splitlines()[0]
    assert told == f"vlmo: there is not enough memory: {reason}\n"
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main()
