"""How long a case will take, foretold by the roof and by what earlier cases took."""

from __future__ import annotations

import statistics

from vlmo.bench.cost import Cost
from vlmo.bench.roofline import Roof
from vlmo.bench.suite import Case

# A contender of which nothing is known yet is taken to need so many times the median of the others.
_CAUTION = 1.5
# A clock may not have moved.
_LEAST_SECONDS = 1e-9
# In the place of a contender: the results that contenders are held against.
EXPECTATION = "expectation"


class Forecast:
    """Seconds of calls and checks.

    A call takes the time that the roof allows, times the pace of the contender: the same ratio in
    the latest call of it in this suite and dtype. Where there is none, the lower of two stands in:
    its worst pace in another dtype, and one and a half times the median of other contenders, for
    the roof itself may have been measured while the machine was busy. That may be too low, which
    the check then shows. A check is a call and what it takes besides, such as compiling, which does
    not depend on the size.

    Args:
        roof: of the machine.
    """

    def __init__(self, roof: Roof) -> None:
        self._roof = roof
        self._paces: dict[tuple[str, str, str], float] = {}
        self._besides: dict[tuple[str, str], float] = {}

    def call(self, case: Case, contender: str, cost: Cost) -> float:
        """Seconds of a call."""
        return self._fastest(case, cost) * self._pace(case, contender)

    def check(self, case: Case, contender: str, cost: Cost) -> float:
        """Seconds of the check and of whatever else happens once in a case."""
        besides = self._besides.get((case.suite, contender), 0.0)
        return self.call(case, contender, cost) + besides

    def called(self, case: Case, contender: str, cost: Cost, seconds: float) -> None:
        """Learn from a call."""
        pace = max(seconds, _LEAST_SECONDS) / self._fastest(case, cost)
        self._paces[self._key(case, contender)] = pace

    def checked(self, case: Case, contender: str, cost: Cost, seconds: float) -> None:
        """Learn from a check, which has the first call in it: a known pace only becomes worse."""
        seconds -= self._besides.get((case.suite, contender), 0.0)
        known = self.call(case, contender, cost) if self._known(case, contender) else 0.0
        self.called(case, contender, cost, max(seconds, known))

    def prepared(self, case: Case, contender: str, cost: Cost, seconds: float) -> None:
        """Learn, after a call, what the check and the rest took besides one."""
        besides = max(0.0, seconds - self.call(case, contender, cost))
        self._besides[case.suite, contender] = besides

    def _fastest(self, case: Case, cost: Cost) -> float:
        return cost.flops / self._roof.attainable_tflops(cost, _dtype(case)) / 1e12

    def _pace(self, case: Case, contender: str) -> float:
        latest = self._paces.get(self._key(case, contender))
        if latest is not None:
            return latest
        likely = [max(known)] if (known := self._known(case, contender)) else []
        others = self._others(case, contender)
        if others:
            likely.append(_CAUTION * statistics.median_low(others))
        return min(likely, default=_CAUTION)

    def _others(self, case: Case, contender: str) -> list[float]:
        """Paces of other contenders in the dtype of a case, or in any."""
        found = {
            key: pace
            for key, pace in self._paces.items()
            if key[1] != EXPECTATION and key[:2] != (case.suite, contender)
        }
        same = [pace for (*_, dtype), pace in found.items() if dtype == _dtype(case)]
        return same or [*found.values()]

    def _known(self, case: Case, contender: str) -> list[float]:
        """Paces of a contender in all dtypes."""
        wanted = case.suite, contender
        return [pace for (*key, _), pace in self._paces.items() if tuple(key) == wanted]

    @staticmethod
    def _key(case: Case, contender: str) -> tuple[str, str, str]:
        return case.suite, contender, _dtype(case)


def _dtype(case: Case) -> str:
    return str(case.labels["dtype"])
