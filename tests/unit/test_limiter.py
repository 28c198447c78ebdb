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
from hypothesis import given
from hypothesis import strategies as st

from faletl.errors import ApiUnavailableError, FaletlError
from faletl.fal.limiter import MAX_FAILURES, Limiter, Patience
from tests.limits import Limit, fixed, sliding, token_bucket

RUN = Patience(tries=6, deadline_seconds=120, retry_after_seconds=120)
REQUESTS = 190
"""Of a first load of 30 days with one batch of endpoint ids."""


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


LIMITS: dict[str, Callable[[bool], Limit]] = {
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


def test_limiter_is_not_slow_for_long_after_a_server_that_was_gone_for_a_minute() -> None:
    """It had answered two requests then: these make no rate."""
    answered = iter(range(2))
    begun: list[float] = []

    def restarting(now: float) -> int | None:
        begun.append(now)
        return None if next(answered, None) is not None or now - begun[0] > 60 else 0

    play = Play(restarting)
    seconds = play.run()
    assert play.answered == REQUESTS
    assert seconds < 60 + 300


def every(seconds: float) -> Limit:
    """A server that is gone: it asks everybody to come back later, or says nothing for 0."""
    return lambda _now: int(seconds)


class Hand:
    """A limiter on a clock that the test moves."""

    def __init__(self, per_second: float = 5) -> None:
        self.now = 1000.0
        self.limiter = Limiter(per_second, RUN, clock=lambda: self.now)

    def send(self) -> float:
        """Wait for the next turn and take it; the moment it came."""
        while wait := self.limiter.turn():
            self.now += wait
        return self.now

    def gap(self) -> float:
        """How long after a turn the next one is."""
        before = self.send()
        return self.send() - before


def test_limiter_halves_the_rate_once_for_all_requests_that_were_under_way() -> None:
    hand = Hand()
    sent = [hand.send() for _ in range(4)]
    for at in sent:
        hand.limiter.failed(at, refused())
    assert hand.gap() == pytest.approx(1 / 2.5)


def test_limiter_quarters_the_rate_of_what_is_refused_again() -> None:
    hand = Hand()
    hand.limiter.failed(hand.send(), refused())
    hand.limiter.failed(hand.send(), refused())
    assert hand.gap() == pytest.approx(4 / 2.5)


def test_limiter_goes_no_slower_than_the_longest_pause_of_our_own() -> None:
    hand = Hand()
    for _ in range(MAX_FAILURES - 1):
        hand.limiter.failed(hand.send(), refused())
        hand.limiter.circuit = None  # the two minutes are not what this is about
    assert hand.gap() == pytest.approx(RUN.pause_seconds)


def test_limiter_grows_back_to_its_rate_with_answers_and_no_further() -> None:
    hand = Hand()
    for _ in range(10):
        hand.limiter.answered(hand.send())
    hand.limiter.failed(hand.send(), refused())
    gaps = []
    for _ in range(400):
        gaps.append(hand.gap())
        hand.limiter.answered(hand.now)
    assert gaps[0] > 0.3
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == pytest.approx(1 / 5)
    assert gaps[100] > 1 / 5


@pytest.mark.parametrize("wait", [1, 30, 119])
def test_limiter_holds_everybody_as_long_as_fal_asks(wait: int) -> None:
    hand = Hand()
    at = hand.send()
    hand.limiter.failed(at, refused(wait))
    assert hand.limiter.seconds_to_wait() == pytest.approx(wait)
    assert hand.send() - at >= wait


def test_limiter_without_a_rate_halves_what_was_sent_of_late() -> None:
    hand = Hand(per_second=0)
    for _ in range(40):
        hand.send()
        hand.now += 0.025
    hand.limiter.failed(hand.send(), refused())
    assert 1 / 25 < hand.gap() < 1 / 15


def test_limiter_counts_no_time_in_which_nobody_asked() -> None:
    """An idle client does not look like one that fal keeps waiting."""
    hand = Hand()
    for _ in range(20):
        hand.limiter.answered(hand.send())
    hand.now += 3600
    hand.limiter.failed(hand.send(), refused())
    hand.limiter.answered(hand.send())
    assert hand.gap() < 1 / 2


@given(
    latency=st.floats(0.01, 2),
    threads=st.integers(1, 8),
    wait=st.sampled_from([0, 1, 20, 100, 121, 9999]),
    seed=st.integers(0, 99),
)
def test_limiter_opens_the_circuit_of_a_server_that_is_gone_in_time(
    latency: float, threads: int, wait: int, seed: int
) -> None:
    play = Play(every(wait), latency, threads=threads, seed=seed)
    seconds = play.run()
    assert play.limiter.circuit is not None
    assert seconds < 125
    assert len(play.sent) <= MAX_FAILURES + threads
    asked = play.limiter.circuit.facts["retry_after"]
    assert asked == (wait or None)


@pytest.mark.parametrize("status", [500, 503])
def test_limiter_lets_a_server_come_back_within_a_minute(status: int) -> None:
    """As after a restart: twenty tries in a row are not used up in some seconds."""
    hand = Hand()
    begun = hand.send()
    for _ in range(MAX_FAILURES - 1):
        hand.limiter.failed(hand.send(), refused(status=status))
    assert hand.limiter.circuit is None
    assert 60 < hand.now - begun < 110
    hand.limiter.failed(hand.send(), refused(status=status))
    assert hand.limiter.circuit is not None


def test_limiter_of_a_very_low_rate_does_not_take_its_own_pauses_for_silence() -> None:
    hand = Hand(per_second=1 / 300)
    hand.limiter.failed(hand.send(), refused(status=503))
    assert hand.limiter.circuit is None


def test_limiter_counts_failures_since_the_last_answer_alone() -> None:
    hand = Hand()
    slow = hand.send()
    for _ in range(3 * MAX_FAILURES):
        hand.limiter.failed(hand.send(), refused(status=503))
        hand.now += 5
        hand.limiter.answered(hand.send())
    hand.limiter.failed(slow, refused(status=503))  # it was sent minutes before the others were answered
    assert hand.limiter.circuit is None
