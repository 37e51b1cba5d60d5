"""Triton's interpreter with all programs of a launch running concurrently.

The interpreter runs programs sequentially, so a program never observes an unfinished one, and a
missing wait remains undetected. Here each program is a thread. One thread at a time runs, and may
be preempted before every store and every atomic operation; the next thread is chosen by a seeded
random number generator, so the interleaving is the same in every run and on every machine. A
program that twice reads the same value with an atomic operation that adds nothing is waiting for a
change of it. If all programs wait, the launch fails with a deadlock.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections import Counter
from collections.abc import Callable

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

_TURNS = 200_000  # limit per launch; a launch with more turns would not end


class Hang(Exception):
    """No program can continue."""


class _Stopped(BaseException):
    """Ends a program when another has failed."""


class _Launch:
    """The programs of a launch, and the one that runs.

    Args:
        places: position of each program in the grid.
        seed: seed of the interleaving. The program that executes the launch's atomic operation with
            this number is delayed from then on: it runs only if no other program can continue.
    """

    def __init__(self, places: list[tuple[int, int, int]], seed: int) -> None:
        self.places, self.seed = places, seed
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.ready = set(range(len(places)))
        self.waiting: dict[int, int] = {}  # programs, and the address on which they wait
        self.held_back: int | None = None
        self.turn: int | None = None
        self.turns = self.atomics = self.waits = 0
        self.failure: BaseException | None = None
        self.mine = threading.local()

    def run(self, program: Callable[[], None]) -> None:
        threads = [threading.Thread(target=self._one, args=(i, program)) for i in self.ready]
        with self.changed:
            for thread in threads:
                thread.start()
            self._choose()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def pause(self) -> None:
        """Let other programs run."""
        with self.changed:
            self.ready.add(self.mine.number)
            self._choose()
            self._await_turn()

    def before_atomic(self) -> None:
        self.pause()
        if self.atomics == self.seed:
            self.held_back = self.mine.number
        self.atomics += 1

    def changed_at(self, address: int) -> None:
        """Wake the programs that wait for a change at this address."""
        for number in [n for n, at in self.waiting.items() if at == address]:
            del self.waiting[number]
            self.ready.add(number)
        self.mine.seen = None

    def read_at(self, address: int, value: int) -> bool:
        """Whether the program may continue with a value that it has read with acquire semantics.

        Otherwise it has read the same value before, has now waited for a change, and must read it
        again.
        """
        if self.mine.seen != (address, value):
            self.mine.seen = (address, value)
            return True
        with self.changed:
            self.waits += 1
            self.waiting[self.mine.number] = address
            self._choose()
            self._await_turn()
        return False

    def _one(self, number: int, program: Callable[[], None]) -> None:
        self.mine.number, self.mine.seen = number, None
        try:
            with self.changed:
                self._await_turn()
            program()
            with self.changed:
                self._choose()
        except _Stopped:
            pass
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def _choose(self) -> None:
        """Choose the next program among those that are ready."""
        self.turns += 1
        ready = sorted(self.ready - {self.held_back}) or sorted(self.ready)
        if not ready and not self.waiting:
            return  # this was the last
        if not ready or self.turns > _TURNS:
            why = "all programs wait" if not ready else f"{_TURNS} turns are not enough"
            self.failure = self.failure or Hang(why)
        else:
            self.turn = self.random.choice(ready)
            self.ready.remove(self.turn)
            interpreter_builder.set_grid_idx(*self.places[self.turn])
        self.changed.notify_all()

    def _await_turn(self) -> None:
        self.changed.wait_for(lambda: self.failure is not None or self.turn == self.mine.number)
        if self.failure is not None:
            raise _Stopped


class Interleaved:
    """Patch Triton until ``patch``, a ``pytest.MonkeyPatch``, is undone.

    Attributes:
        seed: seed of the next launches.
        waits: for each kernel, how often a program has waited for another.
    """

    def __init__(self, patch) -> None:
        self.seed = 0
        self.waits: Counter[str] = Counter()
        self._launch: _Launch | None = None
        patch.setattr(GridExecutor, "__call__", self._executor(GridExecutor.__call__))
        for name, wrap in (("masked_store", self._store), ("atomic_rmw", self._atomic)):
            name = f"create_{name}"
            patch.setattr(InterpreterBuilder, name, wrap(getattr(InterpreterBuilder, name)))

    def _executor(self, call):
        def execute(executor, *args, **kwargs):
            executor.fn = _Gathered(executor.fn, self._run)
            return call(executor, *args, **kwargs)

        return execute

    def _run(self, name: str, places: list[tuple[int, int, int]], program) -> None:
        self._launch = _Launch(places, self.seed)
        try:
            self._launch.run(program)
        finally:
            self.waits[name] += self._launch.waits
            self._launch = None

    def _store(self, create):
        def store(builder, *args):
            if self._launch is not None:
                self._launch.pause()
            return create(builder, *args)

        return store

    def _atomic(self, create):
        def atomic(builder, op, pointer, value, mask, semantics, scope):
            launch = self._launch
            if launch is None:
                return create(builder, op, pointer, value, mask, semantics, scope)
            launch.before_atomic()
            address = int(pointer.data.flat[0])
            while True:
                result = create(builder, op, pointer, value, mask, semantics, scope)
                if value.data.any():
                    launch.changed_at(address)
                    return result
                if launch.read_at(address, int(result.data.flat[0])):
                    return result

        return atomic


class _Gathered:
    """A substitute for a kernel that collects the programs of a grid, and then runs all of them."""

    def __init__(self, fn, run) -> None:
        self._fn, self._run = fn, run
        self._places: list[tuple[int, int, int]] = []
        # The interpreter reads this attribute.
        self.__signature__ = inspect.signature(fn)
        self.__name__, self.__globals__ = fn.__name__, fn.__globals__

    def __call__(self, **args) -> None:
        self._places.append(interpreter_builder.grid_idx)
        x, y, z = interpreter_builder.grid_dim
        if len(self._places) == x * y * z:
            self._run(self.__name__, self._places, lambda: self._fn(**args))
