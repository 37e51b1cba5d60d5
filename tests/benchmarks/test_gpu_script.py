"""benchmarks/gpu.sh with substitutes for Python and compute-sanitizer, without a GPU."""

import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.tags import Tag

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
wheel = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "wheel.py")))
SECTIONS = ["tests", "sanitizer", "bench", "tune", "profile"]

# Answers what the script asks of its Python; FAIL is a part of the command line that is to fail,
# HANG one that is not to end.
PYTHON = f"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[[ -n ${{FAIL:-}} && "$*" == *"$FAIL"* ]] && exit 1
[[ -n ${{HANG:-}} && "$*" == *"$HANG"* ]] && echo $$ >"$CALLS.hanging" && exec sleep 1000
case "$*" in
    - ) cat >/dev/null && echo a GPU ;;
    *"as k"*) echo {ROOT}/kernels ;;
    *vlmo.__path__*) echo {ROOT}/vlmo ;;
    *--collect-only*) printf 'tests/test_%s.py::test[a b]\\n' one two three ;;
    *wheel.py*) shift && exec "$REAL_PYTHON" {ROOT}/benchmarks/wheel.py "$@" ;;
esac
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$2 ${*:3}" >>"$CALLS.limits"
exec "$REAL_TIMEOUT" "$@"
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs the script; calls and calls.limits are what it has started, and its time limits."""

    environment = os.environ | dict(
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        PYTHON=f"{tmp_path}/bin/python",
        CALLS=f"{tmp_path}/calls",
        REAL_PYTHON=sys.executable,
        REAL_TIMEOUT=shutil.which("timeout"),
    )

    class Gpu:
        folder = tmp_path
        output = tmp_path / "output"

        def start(self, *arguments, **more):
            return subprocess.Popen(
                ["bash", str(SCRIPT), *map(str, arguments)],
                env=environment | more,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        def run(self, *arguments, **more):
            process = self.start(*arguments, **more)
            out, error = process.communicate()
            return process.returncode, out, error

        def lines(self, name):
            path = tmp_path / name
            return path.read_text().splitlines() if path.exists() else []

        @property
        def summary(self):
            lines = self.lines("output/summary.txt")
            return [re.sub(r" \(\d+ s\)$", "", line) for line in lines]

    programs = dict(python=PYTHON, timeout=TIMEOUT)
    programs["compute-sanitizer"] = '#!/usr/bin/env bash\nexec "${@:7}"\n'
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return Gpu()


def test_bad_arguments_start_nothing(gpu):
    status, _, error = gpu.run()
    assert status == 2
    for word in ("OUTPUT [SECTION...]", "WHEELS", "MINUTES_OF_BENCH", "Limits in seconds"):
        assert word in error
    assert "pipefail" not in error
    assert gpu.run(gpu.output, "tests", "benchmarks") == (2, "", "gpu.sh: no section benchmarks\n")
    assert not gpu.lines("calls")


def test_all_sections_pass(gpu):
    status, out, _ = gpu.run(gpu.output)
    assert status == 0, out
    assert gpu.summary == [f"{section}: passed" for section in SECTIONS]
    calls = [call for call in gpu.lines("calls") if call.startswith("-m pytest")]
    named = [call for call in calls if "-m gpu" not in call and "benchmarks" not in call]
    calls = [call for call in calls if "benchmarks" not in call]
    assert len(calls) - len(named) == 5  # that collects, and four under compute-sanitizer
    tests = [f"tests/test_{name}.py::test[a b]" for name in ("one", "two", "three")]
    assert sorted(t for t in tests for call in named if t in call) == sorted(tests)
    assert not list(gpu.output.glob("tests*.txt"))


def test_limits_are_those_of_the_header(gpu):
    (line,) = re.findall(r"^# Limits in seconds: (.*)\.$", SCRIPT.read_text(), re.MULTILINE)
    told, total = line.split(": ")
    limits = {}
    for part in told.split(", "):
        section, formula = part.split(" ", 1)
        limits[section] = sum(math.prod(map(int, t.split(" * "))) for t in formula.split(" + "))
    assert list(limits) == SECTIONS
    assert sum(limits.values()) == int(total) <= 25 * 60

    for section, limit in limits.items():
        (gpu.folder / "calls.limits").unlink(missing_ok=True)
        assert gpu.run(gpu.output, section)[0] == 0
        began = [line.split(" ", 2) for line in gpu.lines("calls.limits")]
        # The shards of the tests run side by side.
        shards = {int(seconds) for seconds, program, _ in began if program == "xargs"}
        others = [int(seconds) for seconds, program, _ in began if program != "xargs"]
        assert sum(shards) + sum(others) == limit
        assert limit <= 600


def test_a_section_that_fails_leaves_the_others(gpu):
    status, _, _ = gpu.run(gpu.output, FAIL="tune.py")
    assert status == 1
    verdicts = dict.fromkeys(SECTIONS, "passed") | {"tune": "FAILED"}
    assert gpu.summary == [f"{section}: {verdict}" for section, verdict in verdicts.items()]


def test_tests_that_cannot_be_collected_fail(gpu):
    assert gpu.run(gpu.output, "tests", FAIL="--collect-only")[0] == 1
    assert gpu.summary == ["tests: FAILED"]
    assert gpu.lines("output/tests.log")[-1] == "nothing was collected"


def runs(process: str) -> bool:
    """Whether it does, and is not only waiting for its end to be noticed."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("hanging", ["--collect-only", "test_two.py", "--benchmark-enable"])
def test_interruption_ends_what_runs_and_is_told(hanging, gpu):
    process = gpu.start(gpu.output, HANG=hanging)
    while not any(gpu.lines("calls.hanging")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 1
    section = "bench" if hanging == "--benchmark-enable" else "tests"
    before = SECTIONS[: SECTIONS.index(section)]
    assert gpu.summary == [*(f"{name}: passed" for name in before), f"{section}: interrupted"]
    (number,) = gpu.lines("calls.hanging")
    deadline = time.monotonic() + 60
    while runs(number) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(number)
    # What is left goes on from there.
    assert gpu.run(gpu.output, "tune")[0] == 0
    assert gpu.summary[-1] == "tune: passed"


def test_a_wheel_that_does_not_fit_is_told_before_anything_runs(gpu):
    name = "vlmo-0.1.0-cp39-cp39-linux_x86_64.whl"
    (gpu.folder / name).touch()
    status, _, error = gpu.run(gpu.output, FAIL="import vlmo.kernels, vlmo._C", WHEELS=gpu.folder)
    assert status == 2
    assert error.startswith(f"{gpu.folder}: no wheel fits Python ") and name in error
    assert not any(call.startswith("-m") for call in gpu.lines("calls"))
    assert not gpu.summary


LINUX, MANY = Tag("cp312", "cp312", "linux_x86_64"), Tag("cp312", "cp312", "manylinux_2_28_x86_64")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["0.1.0-cp311-cp311-linux_x86_64", "0.1.0-cp312-cp312-linux_x86_64"], 1),
        (["0.10.0-cp312-cp312-linux_x86_64", "0.9.0-cp312-cp312-linux_x86_64"], 0),
        (["0.2.0-cp311-cp311-linux_x86_64", "0.1.0-cp312-cp312-linux_x86_64"], 1),
        (["0.1.0-cp312-cp312-manylinux_2_28_x86_64", "0.1.0-cp312-cp312-linux_x86_64"], 0),
        (["0.1.0-cp312-cp312-linux_aarch64", "0.1.0-cp312-cp312-linux_x86_64", "bad"], 1),
    ],
)
def test_the_newest_wheel_that_fits_is_chosen(names, chosen, tmp_path):
    paths = [tmp_path / f"vlmo-{name}.whl" for name in names]
    for path in (*paths, tmp_path / "other-9.0.0-cp312-cp312-linux_x86_64.whl"):
        path.touch()
    assert wheel.choose(tmp_path, [MANY, LINUX]) == paths[chosen]


def test_what_is_there_and_what_is_wanted_is_told(tmp_path):
    with pytest.raises(LookupError, match=r"no wheel fits Python .*manylinux.*; there is no wheel"):
        wheel.choose(tmp_path, [MANY, LINUX])
    (tmp_path / "vlmo-0.1.0-cp311-cp311-linux_x86_64.whl").touch()
    with pytest.raises(LookupError, match=r"there is vlmo-0\.1\.0-cp311-cp311-linux_x86_64\.whl"):
        wheel.choose(tmp_path, [MANY, LINUX])
