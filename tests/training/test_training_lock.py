"""A folder is locked to one training at a time."""

import errno
import fcntl
import json
import multiprocessing
import os
import socket

import pytest

from processes import command
from training_cases import run, shrink_digits, small
from vlmo.training.lock import LOCK, FolderLock

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)


@pytest.fixture
def other(tmp_path):
    """Another process that trains in ``tmp_path / "run"``; gives its number."""
    here, there = FORK.Pipe()

    def hold():
        lock = FolderLock(tmp_path / "run")
        lock.take()
        there.send("locked")
        there.recv()
        os._exit(0)  # as a kill: the file stays

    process = FORK.Process(target=hold)
    process.start()
    assert here.poll(60)
    yield process
    process.kill()
    process.join()


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_training_is_refused(tmp_path, other, monkeypatch, capsys):
    before = content(tmp_path / "run")
    arguments = ["train", "digits_textmlm", "--data", "digits", "--output", tmp_path / "run"]
    assert command(monkeypatch, *arguments, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert f"process {other.pid} on {socket.gethostname()} is training in {tmp_path}" in error
    assert error.count("\n") == 1
    assert content(tmp_path / "run") == before


def test_nothing_is_left_of_the_lock_of_a_process_that_is_gone(tmp_path, other):
    other.kill()
    other.join()
    assert (tmp_path / "run" / LOCK).exists()
    run(small("textmlm", steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()


def test_an_error_lets_others_in(tmp_path):
    run(small("textmlm", steps=1), tmp_path)
    with pytest.raises(ValueError, match="another training"):
        run(small("textmlm", steps=1, lr=2e-3), tmp_path)
    assert not (tmp_path / LOCK).exists()
    run(small("textmlm", steps=1), tmp_path)


def test_a_process_does_not_lock_a_folder_twice(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    with pytest.raises(OSError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path / "." / ".." / tmp_path.name).take()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    lock.release()
    lock.release()
    FolderLock(tmp_path).take()


@pytest.fixture
def no_locks(monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", missing)


def test_without_locks_host_and_process_count(tmp_path, no_locks):
    def holder(host, process):
        (tmp_path / LOCK).write_text(json.dumps({"host": host, "process": process}))

    holder(socket.gethostname(), os.getppid())
    with pytest.raises(OSError, match=f"process {os.getppid()} on"):
        FolderLock(tmp_path).take()
    holder("another-host", 1)
    with pytest.raises(OSError, match="process 1 on another-host"):
        FolderLock(tmp_path).take()
    gone = FORK.Process(target=str)
    gone.start()
    gone.join()
    for stale in (gone.pid, os.getpid()):  # the latter of an earlier process of this number
        holder(socket.gethostname(), stale)
        lock = FolderLock(tmp_path)
        lock.take()
        lock.release()
    (tmp_path / LOCK).write_text("half a l")
    FolderLock(tmp_path).take()


def test_a_training_that_began_in_the_meantime(tmp_path, monkeypatch):
    """In a folder that did not exist when this one looked."""
    from vlmo.training import trainer

    def prepare_slowly(*args):
        materials = prepare(*args)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.json").write_text("{}")
        return materials

    prepare = trainer.prepare
    monkeypatch.setattr(trainer, "prepare", prepare_slowly)
    with pytest.raises(OSError, match=r"another training has begun in .* in the meantime"):
        run(small("textmlm", steps=1), tmp_path / "run")
    assert content(tmp_path / "run") == {"recipe.json": b"{}"}
