"""Stops a training on a signal: the current step is completed and the state is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The number of the signal that was received; 0 before."""

    number = 0


class Interrupted(Exception):
    """A training was stopped by a signal and has saved its state.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT inside the block instead of exiting; a second signal exits at once.

    Only the main thread can install signal handlers; in other threads this has no effect.
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
