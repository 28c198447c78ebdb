"""Accounts with a limit of requests: the real client and real runs against servers that keep one.

Time runs `FASTER` for the client and the servers alike, so that minutes take seconds. No time is
measured: what counts is that a run ends complete, and how many of its requests were refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import time_machine

from faletl import pipeline
from faletl.fal import client as client_module
from faletl.fal.client import FalClient
from faletl.fal.limiter import Limiter
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import ask, settings_for
from tests.limits import Limit, fixed, sliding, token_bucket

FASTER = 25
DEFAULT_RATE = 5


def fast_clock() -> float:
    """Seconds that go by faster."""
    return time.monotonic() * FASTER


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = FalClient._sleep
    monkeypatch.setattr(client_module, "Limiter", partial(Limiter, clock=fast_clock))
    monkeypatch.setattr(FalClient, "_sleep", lambda client, seconds: wait(client, seconds / FASTER))


class Limited:
    """A hook that refuses requests by a limit, and counts."""

    def __init__(self, limit: Limit) -> None:
        self.refused = 0
        self.asked = 0
        self._limit = limit
        self._lock = threading.Lock()

    def __call__(self, _: Request) -> Fault | None:
        with self._lock:
            self.asked += 1
            wait = self._limit(fast_clock())
            if wait is None:
                return None
            self.refused += 1
        return Fault(status=429, headers={"retry-after": str(wait)} if wait else {})


LIMITS: dict[str, Callable[[bool], Limit]] = {
    "fixed": lambda is_told: fixed(1, 1, is_told),
    "sliding": lambda is_told: sliding(10, 10, is_told),
    "bucket": lambda is_told: token_bucket(1, 3, is_told),
}


@pytest.mark.parametrize("is_told", [True, False], ids=["Retry-After", "not told"])
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_a_run_at_the_default_rate_ends_complete_though_fal_takes_one_request_a_second(
    limit: Callable[[bool], Limit], is_told: bool, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account, limited = truth.two_days(), Limited(limit(is_told))
    with Sandbox(account, fault=limited) as sandbox:
        settings = settings_for(sandbox.url, tmp_path, rate=DEFAULT_RATE)
        report = pipeline.run(settings, Asked(truth.day(5), truth.day(23)))
    assert (report.exit_code, report.failures) == (0, [])
    days = "select resource, count(*) from ops.loads where is_current group by resource order by all"
    loaded = dict(ask(settings, days))
    assert (loaded["usage"], loaded["billing_events"]) == (18, 18)
    assert 0 < limited.refused < 0.1 * limited.asked, (limited.refused, limited.asked)


def test_a_client_without_a_limit_of_its_own_slows_down_where_fal_has_one() -> None:
    limited = Limited(token_bucket(20, 10, is_told=False))
    with (
        Sandbox(truth.Account(), fault=limited) as sandbox,
        FalClient(settings_for(sandbox.url, Path(), rate=0)) as client,
    ):
        for _ in range(300):
            client.get("/models", {}, len)
    assert 0 < limited.refused < 0.1 * limited.asked, (limited.refused, limited.asked)
