"""One training at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from vlmo.files import named_in_errors
from vlmo.training.parallel import on_first

LOCK = "training.lock"

# Paths and processes: the locks of POSIX do not keep a process from locking its own file again. A
# forked process has a copy of this, and no lock.
_held: set[tuple[str, int]] = set()


class FolderLock:
    """Keeps other trainings out of a folder; of several ranks the first one holds it.

    The lock is that of the kernel on an open file. It ends with the process, however that ends, and
    the loader's workers do not inherit it. The file names host and process, for the message. Where
    a file system has no locks, host and process alone count: one that is gone does not hold it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LOCK
        self._descriptor: int | None = None

    def take(self) -> None:
        """Make the folder if it is missing and lock it, unless it is locked; all ranks call this.

        Raises:
            OSError: on all ranks; another training holds the lock, or the folder cannot be written.
        """
        on_first(self._take)

    def release(self) -> None:
        """Let others in. Not a collective."""
        if self._descriptor is None:
            return
        # Before others can have the lock, or they would lock a file that is gone.
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        _held.discard(self._entry())

    def _take(self) -> None:
        if self._descriptor is not None:
            return
        if self._entry() in _held:
            raise self._refusal(_Holder(socket.gethostname(), os.getpid()))
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
                # Between opening and locking, the one before may have taken the file away.
                if _is_file(descriptor, self._path):
                    self._sign(descriptor)
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._descriptor = descriptor
        _held.add(self._entry())

    def _entry(self) -> tuple[str, int]:
        return os.path.realpath(self._path), os.getpid()

    def _sign(self, descriptor: int) -> None:
        holder = {"host": socket.gethostname(), "process": os.getpid()}
        try:
            with named_in_errors(self._path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, (json.dumps(holder) + "\n").encode())
        except OSError:
            self._path.unlink()
            raise

    def _lock(self, descriptor: int) -> None:
        """Raise if another process holds the lock."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _Holder.read(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(holder) from error
            # No locks here.
            if holder is not None and holder.may_live():
                raise self._refusal(holder) from error

    def _refusal(self, holder: _Holder | None) -> OSError:
        who = "another process" if holder is None else str(holder)
        return OSError(
            f"output: {who} is training in {self._folder} ({LOCK}); wait for it, stop it, or "
            "choose another folder"
        )


class _Holder:
    """Who holds a lock."""

    def __init__(self, host: str, process: int):
        self.host, self.process = host, process

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @classmethod
    def read(cls, descriptor: int) -> _Holder | None:
        """As the file tells; None if it does not."""
        try:
            content = json.loads(os.pread(descriptor, 4096, 0))
            return cls(str(content["host"]), int(content["process"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def may_live(self) -> bool:
        """Whether the process is, or may be, still there."""
        if self.host != socket.gethostname():
            return True
        if self.process == os.getpid():  # of an earlier process of this number
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            return True
        return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
