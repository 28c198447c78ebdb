"""Limits of requests as servers keep them, on any clock: what fal may do, as it documents none."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

Limit = Callable[[float], int | None]
"""What becomes of a request at that moment: None if it is let through, else the seconds to wait, 0 where
the server does not tell them."""


def fixed(most: int, seconds: float, is_told: bool) -> Limit:
    """At most so many requests in each window of the clock."""
    window, count = -1, 0

    def limit(now: float) -> int | None:
        nonlocal window, count
        if (current := int(now // seconds)) != window:
            window, count = current, 0
        if count < most:
            count += 1
            return None
        return math.ceil((window + 1) * seconds - now) if is_told else 0

    return limit


def sliding(most: int, seconds: float, is_told: bool) -> Limit:
    """At most so many requests in any span of that length."""
    passed = deque[float]()

    def limit(now: float) -> int | None:
        while passed and passed[0] <= now - seconds:
            passed.popleft()
        if len(passed) < most:
            passed.append(now)
            return None
        return math.ceil(passed[0] + seconds - now) if is_told else 0

    return limit


def token_bucket(per_second: float, size: int, is_told: bool) -> Limit:
    """A bucket of tokens that fills up at that rate; each request takes one."""
    tokens, last = float(size), -math.inf

    def limit(now: float) -> int | None:
        nonlocal tokens, last
        tokens, last = min(size, tokens + (now - last) * per_second), now
        if tokens >= 1:
            tokens -= 1
            return None
        return math.ceil((1 - tokens) / per_second) if is_told else 0

    return limit
