"""Triton's interpreter with all programs of a launch under way at once.

The interpreter runs one program after the other, so a program never meets another that is not done:
a wait that is missing goes unnoticed. Here each program is a thread. One at a time has the turn,
and may lose it before every store and every atomic operation; who gets it next is drawn from a
seed. So things happen in the same order in every run and on every machine. A program that reads the
same number twice with an atomic operation that adds nothing waits for a change of it. Where all
wait, the launch has hung: it fails.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections import Counter
from collections.abc import Callable

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

_TURNS = 200_000  # of a launch; one that takes more will not end


class Hang(Exception):
    """No program can go on."""


class _Stopped(BaseException):
    """Ends a program when another has failed."""


class _Launch:
    """The programs of one launch, and who of them has the turn.

    Args:
        places: of each program in the grid.
        seed: of the order of the turns. The program that makes the launch's atomic operation of
            this number is held back from then on: it gets the turn only if no other can go on.
    """

    def __init__(self, places: list[tuple[int, int, int]], seed: int) -> None:
        self.places, self.seed = places, seed
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.ready = set(range(len(places)))
        self.waiting: dict[int, int] = {}  # programs, and the address of which they want a change
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
        """Let others take the turn."""
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
        """Whether the program may go on with a value that it has read with acquire semantics.

        Else it has read it before, has waited for a change, and has to read it again.
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
        """Give the turn to a program that is ready."""
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
    """Change Triton for as long as ``patch``, a ``pytest.MonkeyPatch``, lasts.

    Attributes:
        seed: of the launches to come.
        waits: how often a program of each kernel has had to wait for another.
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
    """Stands for a kernel: gathers the programs of a grid, and runs all when it has the last."""

    def __init__(self, fn, run) -> None:
        self._fn, self._run = fn, run
        self._places: list[tuple[int, int, int]] = []
        # What the interpreter looks at.
        self.__signature__ = inspect.signature(fn)
        self.__name__, self.__globals__ = fn.__name__, fn.__globals__

    def __call__(self, **args) -> None:
        self._places.append(interpreter_builder.grid_idx)
        x, y, z = interpreter_builder.grid_dim
        if len(self._places) == x * y * z:
            self._run(self.__name__, self._places, lambda: self._fn(**args))
