"""Stopping a training from outside: a signal lets the running step end and the state be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The number of the signal that came, 0 before one does."""

    number = 0


class Interrupted(Exception):
    """A training was told to stop, and has saved its state.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT for the block instead of ending at once; a second one ends at once.

    Outside the main thread, which alone can say so, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {name: signal.getsignal(name) for name in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        for name in SIGNALS:
            signal.signal(name, note)
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
