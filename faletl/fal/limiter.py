"""Limiter: when the next request may be sent, and when to stop asking. One for each client.

The rate falls with each 429 and grows again slowly, as in TCP (additive increase, multiplicative
decrease). A 429 concerns the account, not one request, so it slows down and delays all threads alike.
When fal no longer answers, the circuit opens and no request is sent any more.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from faletl.errors import CircuitOpenError, FaletlError
from faletl.windows import instant

MAX_FAILURES = 20
"""The number of failed tries in a row, over all requests, that opens the circuit; of one request, the
number of 429 that ends it."""

FIRST_PAUSE_SECONDS = 0.5
"""The pause after the first failure, which then doubles with each further `FAILURES_PER_DOUBLING`."""

FAILURES_PER_DOUBLING = 4
"""About the number of threads that fail at the same time."""

SUCCESSES_TO_GROW = 200
"""Answers until the rate has grown by half of the rate that fal refused."""

REFUSED_AGAIN = 4
"""The divisor of the rate when a request is refused right after another: the limit may be per minute."""

TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on asking.

    `tries` and `deadline_seconds` are those of one request. `retry_after_seconds` is the longest wait
    that fal may ask for, `pause_seconds` the longest that we choose ourselves. `give_up_seconds` is the
    longest time without any answer from fal.
    """

    tries: int
    deadline_seconds: float
    retry_after_seconds: int
    give_up_seconds: float = 120
    pause_seconds: float = 20


class Limiter:
    """Space out the requests of all threads of a client: at most `per_second`, 0 for no limit.

    Each request takes a turn, and then reports that fal `answered`, or that it `failed`.
    """

    def __init__(
        self, per_second: float, patience: Patience, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.circuit: CircuitOpenError | None = None
        """The error of the open circuit; None while requests may be sent."""

        self._max_rate = per_second or math.inf
        self._rate = self._max_rate
        self._min_rate = min(self._max_rate, 1 / (patience.pause_seconds or 1e-6))
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._next: float | None = None  # no request may be sent before this; None before the first
        self._sent = deque[float]()  # the moments of the last second in which requests were sent
        # The number of answers at the current rate, and since when they are counted.
        self._counting_since, self._answers = 0.0, 0
        self._cut_at = -math.inf
        self._target: float | None = None  # half of the refused rate, until a request passes again
        self._growth = 0.0
        self._failures, self._failing_since = 0, 0.0
        self._answered_at = -math.inf

    def now(self) -> float:
        """Return the current moment, by the limiter's own clock."""
        return self._clock()

    def turn(self) -> float:
        """Take a turn if there is one, and return 0; else return the seconds until there may be one."""
        with self._lock:
            now = self._clock()
            if self._next is None:
                self._next = self._counting_since = now
            if now < self._next:
                return self._next - now
            self._counting_since += now - self._next  # no request was waiting: this shows no limit
            self._next = now + 1 / self._rate
            self._sent.append(now)
            while self._sent[0] <= now - 1:
                self._sent.popleft()
            return 0

    def seconds_to_wait(self) -> float:
        """Return the seconds until a request may be sent, 0 for now."""
        with self._lock:
            return max(0.0, (self._next or 0.0) - self._clock())

    def answered(self, sent_at: float) -> None:
        """Record that fal answered the request that was sent at this moment of the clock."""
        with self._lock:
            self._failures, self._answered_at = 0, self._clock()
            self._answers += 1
            if self._target is None:
                self._rate = min(self._max_rate, self._rate + self._growth)
            elif sent_at > self._cut_at:
                self._recover(self._target)

    def failed(self, sent_at: float, error: FaletlError) -> bool:
        """Record that fal refused the request for now (429), failed at it, or could not be reached.

        Returns whether this is the first failure in a row. May open the circuit.
        """
        retry_after = error.facts.get("retry_after")
        wait = retry_after if isinstance(retry_after, int) else 0
        with self._lock:
            now = self._clock()
            self._failures += 1
            if self._failures == 1:
                self._failing_since = max(sent_at, self._answered_at)
            if error.facts.get("status") == TOO_MANY_REQUESTS:
                self._slow_down(now, sent_at)
                pause = 1 / self._rate
            else:
                pause = FIRST_PAUSE_SECONDS * 2 ** (self._failures / FAILURES_PER_DOUBLING)
            pause = max(wait, min(pause, self._patience.pause_seconds))
            self._next = max(self._next or 0.0, now + pause)
            if self.circuit is None:
                self.circuit = self._opened(now + pause, error, wait)
            return self._failures == 1

    def _slow_down(self, now: float, sent_at: float) -> None:
        if sent_at <= self._cut_at:
            return  # it was sent at the rate before the last cut
        if self._target is None:
            sent_in_last_second = sum(at > now - 1 for at in self._sent)
            refused = self._rate if self._rate < math.inf else max(1, sent_in_last_second)
            self._rate = self._target = max(self._min_rate, refused / 2)
        else:
            self._rate = max(self._min_rate, self._rate / REFUSED_AGAIN)
        self._cut_at = now

    def _recover(self, target: float) -> None:
        """Continue at the rate at which fal answered, waits included: at most half of the refused rate.

        The first few answers are not enough for a rate, so it is at least an eighth of that half.
        """
        now = self._clock()
        seconds = max(now - self._counting_since, 1e-6)
        self._rate = min(target, max(self._answers / seconds, target / 8))
        self._growth = target / SUCCESSES_TO_GROW
        self._target, self._counting_since, self._answers = None, now, 0

    def _opened(self, next_try: float, error: FaletlError, wait: int) -> CircuitOpenError | None:
        """Return the error of an open circuit if it must open now."""
        is_too_long = wait > self._patience.retry_after_seconds
        silence = next_try - self._failing_since
        is_silent = self._failures >= MAX_FAILURES or silence > self._patience.give_up_seconds
        if not (is_too_long or is_silent):
            return None
        tries = f"{self._failures} tries in a row" if self._failures > 1 else "the last try"
        return CircuitOpenError(
            f"faletl stopped asking fal: {tries} failed; {error.message}{_moment_after(wait)}",
            **error.facts,
        )


def _moment_after(wait: int) -> str:
    """Return the moment after this many seconds, in parentheses; empty for 0, or beyond the calendar."""
    try:
        at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=wait)
    except OverflowError:
        return ""
    return f" ({instant(at)})" if wait else ""
