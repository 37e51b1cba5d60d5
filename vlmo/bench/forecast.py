"""How long a case will take, foretold by the roof and by what earlier cases took."""

from __future__ import annotations

from vlmo.bench.cost import Cost
from vlmo.bench.roofline import Roof
from vlmo.bench.suite import Case

# Of the time at the roof, that a call of a contender takes of which nothing is known yet.
_PACE = 2.0
# In the place of a contender: the results that contenders are held against.
EXPECTATION = "expectation"


class Forecast:
    """Seconds of calls and checks.

    A call takes the time that the roof allows, times the pace of the contender: the same ratio in
    the latest call of it in this suite and dtype. Where there is none, its worst pace in another
    dtype stands in, or one of 2. A check is a call and what it takes besides, such as compiling,
    which does not depend on the size.

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
        self._paces[self._key(case, contender)] = seconds / self._fastest(case, cost)

    def checked(self, case: Case, contender: str, cost: Cost, seconds: float) -> None:
        """Learn from a check, which has the first call in it: the pace may only become worse."""
        seconds -= self._besides.get((case.suite, contender), 0.0)
        known = self._paces.get(self._key(case, contender), 0.0)
        self.called(case, contender, cost, max(seconds, known * self._fastest(case, cost)))

    def prepared(self, case: Case, contender: str, cost: Cost, seconds: float) -> None:
        """Learn, after a call, what the check and the rest took besides one."""
        key = case.suite, contender
        besides = seconds - self.call(case, contender, cost)
        self._besides[key] = max(self._besides.get(key, 0.0), besides)

    def _fastest(self, case: Case, cost: Cost) -> float:
        return cost.flops / self._roof.attainable_tflops(cost, _dtype(case)) / 1e12

    def _pace(self, case: Case, contender: str) -> float:
        suite, who, dtype = self._key(case, contender)
        known = self._paces.get((suite, who, dtype))
        others = [pace for key, pace in self._paces.items() if key[:2] == (suite, who)]
        return max(others, default=_PACE) if known is None else known

    @staticmethod
    def _key(case: Case, contender: str) -> tuple[str, str, str]:
        return case.suite, contender, _dtype(case)


def _dtype(case: Case) -> str:
    return str(case.labels["dtype"])
