"""One training per folder at a time: a lock that ends with the process that holds it."""

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

# Paths and process ids: POSIX locks do not stop a process from locking its own file again. A forked
# process inherits a copy of this set, but not the lock.
_held: set[tuple[str, int]] = set()


class FolderLock:
    """Keeps other trainings out of a folder; of several ranks, the first one holds the lock.

    It is the kernel's lock on an open file. It ends with the process, however that ends, and the
    workers of the loader do not inherit it. The file names host and process, for the error message.
    On a file system without locks only host and process count: a process that no longer exists does
    not hold the lock.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LOCK
        self._descriptor: int | None = None

    def take(self) -> None:
        """Create the folder if it is missing and lock it; a collective call.

        Raises:
            OSError: on all ranks; another training holds the lock, or the folder is not writable.
        """
        on_first(self._take)

    def release(self) -> None:
        """Release the lock. Not a collective call."""
        if self._descriptor is None:
            return
        # Delete the file before another process can lock it; otherwise that lock would be on a
        # deleted file.
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
                # The previous holder may have deleted the file between the calls that open and lock
                # it.
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
            # The file system has no locks.
            if holder is not None and holder.may_live():
                raise self._refusal(holder) from error

    def _refusal(self, holder: _Holder | None) -> OSError:
        who = "another process" if holder is None else str(holder)
        return OSError(
            f"output: {who} is training in {self._folder} ({LOCK}); wait for it, stop it, or "
            "choose another folder"
        )


class _Holder:
    """The process that holds a lock."""

    def __init__(self, host: str, process: int):
        self.host, self.process = host, process

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @classmethod
    def read(cls, descriptor: int) -> _Holder | None:
        """Read the holder from the lock file; None if the file does not name one."""
        try:
            content = json.loads(os.pread(descriptor, 4096, 0))
            return cls(str(content["host"]), int(content["process"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def may_live(self) -> bool:
        """Whether the process exists or may exist."""
        if self.host != socket.gethostname():
            return True
        if self.process == os.getpid():  # an earlier process had the same id
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # the process belongs to another user
            return True
        return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one with that path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
