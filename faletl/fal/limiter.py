"""Limiter: when the next request may be sent, and when to stop asking. One for each client.

The rate falls with each 429 and grows again slowly, as TCP does it (additive increase, multiplicative
decrease). A 429 concerns the account, not one request: it slows down and holds all threads alike. When
fal answers nothing any more, the circuit opens and nobody asks again.
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
"""Tries in a row that may fail, over all requests; of one request, as often as fal may answer 429."""

FIRST_PAUSE_SECONDS = 0.5
"""The pause after the first failure, which then doubles with each further `FAILURES_PER_DOUBLING`."""

FAILURES_PER_DOUBLING = 4
"""As many as threads usually fail at the same time."""

SUCCESSES_TO_GROW = 200
"""Answers until the rate has grown by half of what it was when fal refused it."""

REFUSED_AGAIN = 4
"""A request that is refused right after another quarters the rate: the limit may be one per minute."""

TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on asking.

    `tries` and `deadline_seconds` are those of one request. `retry_after_seconds` is the longest wait
    that fal may ask for, `pause_seconds` the longest that we choose ourselves. `give_up_seconds` is how
    long fal may answer nothing at all.
    """

    tries: int
    deadline_seconds: float
    retry_after_seconds: int
    give_up_seconds: float = 120
    pause_seconds: float = 20


class Limiter:
    """Spaces out the requests of all threads of a client: at most `per_second`, 0 for no limit.

    Each request takes a turn, and then reports whether fal `answered`, or that it `failed`.
    """

    def __init__(
        self, per_second: float, patience: Patience, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.circuit: CircuitOpenError | None = None
        """Why nobody may ask any more, once that is so."""

        self._most = per_second or math.inf
        self._rate = self._most
        self._least = min(self._most, 1 / (patience.pause_seconds or 1e-6))
        self._patience = patience
        self._clock = clock
        self._lock = threading.Lock()
        self._next: float | None = None  # no request may be sent before; None until the first was
        self._sent = deque[float]()  # the moments of the last second in which requests were sent
        # Since when how many were answered, at the rate that holds now.
        self._counting_since, self._answers = 0.0, 0
        self._cut_at = -math.inf
        self._target: float | None = None  # half of the refused rate, until a request passes again
        self._growth = 0.0
        self._failures, self._failing_since = 0, 0.0
        self._answered_at = -math.inf

    def now(self) -> float:
        """The moment, by the limiter's own clock."""
        return self._clock()

    def turn(self) -> float:
        """Take a turn if there is one, and return 0; else return the seconds until there may be one."""
        with self._lock:
            now = self._clock()
            if self._next is None:
                self._next = self._counting_since = now
            if now < self._next:
                return self._next - now
            self._counting_since += now - self._next  # nobody wanted to ask: that shows no limit
            self._next = now + 1 / self._rate
            self._sent.append(now)
            while self._sent[0] <= now - 1:
                self._sent.popleft()
            return 0

    def held(self) -> float:
        """The seconds until a request may be sent, 0 for now."""
        with self._lock:
            return max(0.0, (self._next or 0.0) - self._clock())

    def answered(self, sent_at: float) -> None:
        """Fal answered the request that was sent at that moment of the clock."""
        with self._lock:
            self._failures, self._answered_at = 0, self._clock()
            self._answers += 1
            if self._target is None:
                self._rate = min(self._most, self._rate + self._growth)
            elif sent_at > self._cut_at:
                self._recover(self._target)

    def failed(self, sent_at: float, error: FaletlError) -> bool:
        """Fal refused the request for now (429), broke down over it, or could not be reached.

        Returns whether it is the first failure in a row. May open the circuit.
        """
        asked = error.facts.get("retry_after")
        wait = asked if isinstance(asked, int) else 0
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
            return  # it was sent at a rate that was cut meanwhile
        if self._target is None:
            lately = sum(at > now - 1 for at in self._sent)
            refused = self._rate if self._rate < math.inf else max(1, lately)
            self._rate = self._target = max(self._least, refused / 2)
        else:
            self._rate = max(self._least, self._rate / REFUSED_AGAIN)
        self._cut_at = now

    def _recover(self, target: float) -> None:
        """Go on at the rate at which fal did answer, waits included; at half of the refused one at most.

        Some first answers make no rate: it is an eighth of that at least.
        """
        now = self._clock()
        seconds = max(now - self._counting_since, 1e-6)
        self._rate = min(target, max(self._answers / seconds, target / 8))
        self._growth = target / SUCCESSES_TO_GROW
        self._target, self._counting_since, self._answers = None, now, 0

    def _opened(self, next_try: float, error: FaletlError, wait: int) -> CircuitOpenError | None:
        """The error of an open circuit, if it is to open now."""
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
    """The moment after that many seconds, in parentheses; nothing for none, or for an eternity."""
    try:
        at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=wait)
    except OverflowError:
        return ""
    return f" ({instant(at)})" if wait else ""
