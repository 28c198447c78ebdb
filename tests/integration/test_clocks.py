"""Clocks that jump, days that zones make shorter or longer, days that come every four years."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.operations.verify import verify
from faletl.sandbox import Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import Query
from tests.truth import FLUX, Account, charges, line

FEEDS = Asked(resources=["usage", "billing_events"])
DAY = timedelta(days=1)

JUMPS = [-DAY, timedelta(hours=1), datetime(2028, 1, 1, tzinfo=UTC) - truth.NOW]


def test_a_clock_that_jumps_while_runs_go_on_leaves_no_gap_and_no_double(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings, query: Query
) -> None:
    today = truth.NOW.replace(hour=0, minute=0)
    account.lines += [line(today + timedelta(hours=hour), "x/today") for hour in range(24)]
    for number, jump in enumerate(JUMPS):
        now = truth.NOW + timedelta(hours=number)
        clock.move_to(now, tick=False)
        before = len(sandbox.requests)

        def jump_at_the_third(_: Request, before: int = before, to: datetime = now + jump) -> None:
            if len(sandbox.requests) == before + 3:
                clock.move_to(to, tick=False)

        sandbox.fault = jump_at_the_third
        assert pipeline.run(settings, FEEDS).exit_code == 0
        asked = [one for one in sandbox.requests[before:] if "start" in one.query]
        assert datetime.now(UTC) == now + jump
        # All windows are those of the plan, which was made before.
        assert {end for one in asked for end in one.query["end"]} <= {
            f"{day}T00:00:00Z" for day in (truth.day(22), truth.day(23))
        } | {f"{now.replace(minute=0):%Y-%m-%dT%H:%M:%SZ}"}
        assert len(asked) >= 4
    sandbox.fault = None
    clock.move_to(truth.NOW + DAY, tick=False)
    assert pipeline.run(settings, FEEDS).exit_code == 0
    spent = sum(one.cost_total for one in account.lines)
    for table in ("marts.fct_usage", "marts.fct_billing_event", "reports.rpt_spend_daily"):
        assert query(f"select sum(cost_total) from {table}") == [(spent,)]
    assert query("select count(*) from marts.fct_billing_event") == [(len(charges(account.lines)),)]
    ledger = (
        "select resource, window_start::date, window_end::date, is_provisional from ops.loads "
        "where is_current and window_start < '2026-11-24 00:00:00+00' order by all"
    )
    assert query(ledger) == [
        (resource, truth.day(day), truth.day(day + 1), False)
        for resource in ("billing_events", "usage")
        for day in (21, 22, 23)
    ]
    assert verify(settings).findings == []


def test_a_clock_that_was_ahead_is_put_right_by_the_next_run(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    """A day that had not ended looked closed to it, and what had not happened yet is no zero."""
    today = truth.NOW.replace(hour=0, minute=0)
    account.lines = [line(today + timedelta(hours=hour)) for hour in range(9)]
    clock.shift(DAY)
    assert pipeline.run(settings, FEEDS).exit_code == 0
    account.lines += [line(today + timedelta(hours=hour)) for hour in range(9, 30)]
    clock.shift(timedelta(hours=1) - DAY)
    assert pipeline.run(settings, FEEDS).exit_code == 0
    hours = "select max(used_at), sum(cost_total) from marts.fct_usage"
    assert query(hours) == [((today + timedelta(hours=10)).replace(tzinfo=None), 11 * Decimal("0.025"))]


def test_what_comes_after_the_watch_is_found_where_its_day_is_named_and_told(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    day = Asked(truth.day(21), truth.day(22), ["usage"])
    assert pipeline.run(settings, day).exit_code == 0
    before = query("select sum(cost_total) from reports.rpt_spend_daily")[0][0]
    account.lines.append(line(account.lines[0].hour, "x/late", "3"))
    clock.shift(100 * DAY)
    assert pipeline.run(settings, day).exit_code == 0
    late = Decimal("0.075")
    assert query("select sum(cost_total) from reports.rpt_spend_daily") == [(before + late,)]
    changes = "select endpoint_id, cost_total_before, cost_total_after from ops.restatements"
    assert query(changes) == [("x/late", 0, late)]
    clock.shift(100 * DAY)  # it was read after the watch: nothing but its name brings it back
    [due] = pipeline.dry_run(settings, Asked(resources=["usage"]))
    assert day.start not in {window.day for window in due.windows}


@pytest.fixture
def _los_angeles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "America/Los_Angeles")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_los_angeles")
def test_days_are_those_of_utc_where_clocks_change_and_in_leap_years(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    """There clocks go forward on 12 March 2028, and back on 5 November."""
    clock.move_to(datetime(2028, 11, 8, 2, tzinfo=UTC), tick=False)
    spans = [(date(2028, 2, 28), date(2028, 3, 14)), (date(2028, 11, 5), date(2028, 11, 7))]
    days = [start + n * DAY for start, end in spans for n in range((end - start).days)]
    account.lines = [
        line(datetime(day.year, day.month, day.day, hour, tzinfo=UTC), FLUX, str(hour + 1))
        for day in days
        for hour in range(24)
    ]
    for start, end in spans:
        assert pipeline.run(settings, Asked(start, end, ["usage"])).exit_code == 0
    of_a_day = sum(range(1, 25))
    daily = query("select usage_date, quantity from reports.rpt_spend_daily order by 1")
    assert daily == [(day, of_a_day) for day in days]
    assert date(2028, 2, 29) in days
    assert query("select count(distinct used_at) from marts.fct_usage") == [(24 * len(days),)]
    monthly = "select usage_month, quantity from reports.rpt_spend_monthly where quantity > 0 order by 1"
    assert query(monthly) == [
        (date(2028, month, 1), number * of_a_day) for month, number in ((2, 2), (3, 13), (11, 2))
    ]
