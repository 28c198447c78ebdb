"""The limiter, on a clock of its own: four threads and a server are played event by event.

What is measured is what an account with a limit feels: how many requests are refused, and how long all
of them take. The real client keeps to the same limiter in tests/integration/test_limits.py.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from faletl.errors import ApiUnavailableError, FaletlError
from faletl.limiter import Limiter, Patience
from tests.limits import Limit, fixed, sliding, token_bucket

RUN = Patience(tries=6, deadline_seconds=120, retry_after_seconds=120)
REQUESTS = 190
"""Of a first load of 30 days with one batch of endpoint ids."""

Serve = Callable[[float], float | None]
"""What a server makes of a request at that moment: None for an answer, else the seconds to wait."""


def refused(wait: float = 0, status: int = 429) -> FaletlError:
    """The error of a refused request, with what fal asked for."""
    return ApiUnavailableError("refused", status=status, retry_after=int(wait) or None)


@dataclass
class Play:
    """Requests of some threads to a server that refuses some, on a clock that jumps between events."""

    serve: Limit
    latency: float = 0.02
    per_second: float = 5
    threads: int = 4
    seed: int = 1
    now: float = 0
    sent: list[float] = field(default_factory=list)
    refused: int = 0
    answered: int = 0

    def __post_init__(self) -> None:
        self._chance = Random(self.seed)  # noqa: S311  # repeatable
        self.now = self._begun = self._chance.uniform(0, 60)
        self.limiter = Limiter(self.per_second, RUN, clock=lambda: self.now)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def run(self, requests: int = REQUESTS) -> float:
        """Play until all requests are answered, or the circuit is open; return the seconds it took."""
        self._left = requests
        for _ in range(self.threads):
            self._begin()
        while self._events and self.limiter.circuit is None:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.now - self._begun

    def _at(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def _begin(self) -> None:
        if self._left:
            self._left -= 1
            self._ask()

    def _ask(self) -> None:
        if wait := self.limiter.turn():
            self._at(wait, self._ask)
            return
        sent_at = self.limiter.now()
        self.sent.append(sent_at)
        half = self.latency * self._chance.uniform(0.25, 0.75)
        self._at(half, lambda: self._arrive(sent_at, half))

    def _arrive(self, sent_at: float, half: float) -> None:
        wait = self.serve(self.now)
        self._at(half, lambda: self._hear(sent_at, wait))

    def _hear(self, sent_at: float, wait: int | None) -> None:
        if wait is None:
            self.answered += 1
            self.limiter.answered(sent_at)
            self._begin()
        else:
            self.refused += 1
            self.limiter.failed(sent_at, refused(wait))
            self._ask()


LIMITS = {
    "one in a second": lambda is_told: fixed(1, 1, is_told),
    "ten in ten seconds": lambda is_told: fixed(10, 10, is_told),
    "one in any second": lambda is_told: sliding(1, 1, is_told),
    "ten in any ten seconds": lambda is_told: sliding(10, 10, is_told),
    "a bucket of three": lambda is_told: token_bucket(1, 3, is_told),
    "a bucket of ten": lambda is_told: token_bucket(1, 10, is_told),
}


@pytest.mark.parametrize("is_told", [True, False], ids=["Retry-After", "not told"])
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("latency", [0.02, 0.4])
def test_limiter_has_few_requests_refused_by_a_limit_of_one_a_second(
    limit: Callable[[bool], Limit], is_told: bool, latency: float
) -> None:
    for seed in range(5):
        play = Play(limit(is_told), latency, seed=seed)
        seconds = play.run()
        assert play.answered == REQUESTS
        assert play.refused < 0.05 * len(play.sent)
        assert seconds < 2.5 * REQUESTS
