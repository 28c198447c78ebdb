"""Laws that no cut, order, interruption or repetition may break: the tables are the same."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal, localcontext
from pathlib import Path

import time_machine
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from faletl import pipeline
from faletl.config import Settings
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import BillingEvent, Calls, Conduct, Fault, Request, Sandbox, UsageLine
from faletl.selection import Asked
from tests import truth
from tests.conftest import all_tables, ask, settings_for
from tests.property.accounts import accounts, lines
from tests.truth import FLUX, KEY, NOW, VIDEO, Account, line

# Every example is a whole run or several, over HTTP, into a warehouse of its own.
a_few = hypothesis_settings(
    max_examples=4,  # the first is the simplest there is
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def run_to_the_end(
    account: Account,
    folder: Path,
    *,
    page_size: int = 1000,
    fault: Callable[[Request], Fault | None] | None = None,
    conduct: Conduct | None = None,
) -> Settings:
    """One run against the account; it must succeed, but may hold what fal no longer shows."""
    with Sandbox(account, page_size=page_size, fault=fault, conduct=conduct) as server:
        settings = settings_for(server.url, folder)
        report = pipeline.run(settings)
        assert report.exit_code in ((0, 3) if conduct else (0,)), report.failures
    return settings


def check_against_truth(account: Account, settings: Settings, until: datetime = NOW) -> None:
    """Quantities and costs by hour and by day are those of the served lines, to the 12th decimal."""
    daily = ask(
        settings,
        "select account, usage_date, endpoint_id, unit, currency, quantity, cost_subtotal, "
        "cost_discount, cost_total, effective_unit_price from reports.rpt_spend_daily",
    )
    assert {row[:5]: row[5:] for row in daily} == truth.spend_daily(account, until)
    hourly = ask(
        settings,
        "select account, used_at, endpoint_id, unit, unit_price, percent_discount, currency, "
        "credential_id, quantity, cost_total from marts.fct_usage",
    )
    assert {row[:8]: row[8:] for row in hourly} == truth.spend_by_hour(account, until)
    charged = ask(
        settings,
        "select account, requested_at, request_id, endpoint_id, credential_id, cost_total "
        "from marts.fct_billing_event",
    )
    assert Counter(charged) == truth.charged(account, until)


@a_few
@given(account=accounts, page_size=st.integers(1, 7), order=st.randoms(use_true_random=False))
def test_how_fal_cuts_and_orders_its_pages_does_not_matter(
    account: Account, page_size: int, order: object
) -> None:
    shuffled = replace(account, lines=list(account.lines))
    order.shuffle(shuffled.lines)  # type: ignore[attr-defined]  # a random.Random
    with (
        time_machine.travel(NOW, tick=False),
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
    ):
        whole = run_to_the_end(account, Path(one))
        cut = run_to_the_end(shuffled, Path(other), page_size=page_size)
        assert all_tables(cut) == all_tables(whole)
        assert digests(cut) == digests(whole)
        check_against_truth(account, whole)


EDGES = ("0", "1e-12", "0.333333333333", "1", "999999999999999.999999999999", "999999999999999", "1e14")
"""Amounts at the edges of what is taken in."""

edges = st.sampled_from(EDGES).map(Decimal)
hours_of_two_months = st.sampled_from(
    [datetime(2026, *day, 5, tzinfo=NOW.tzinfo) for day in ((11, 30), (12, 1))]
)
extreme_lines = st.builds(
    UsageLine,
    hour=hours_of_two_months,
    endpoint_id=st.sampled_from([FLUX, VIDEO]),
    unit=st.sampled_from(["images", "999,999,999 megapixels", "compute seconds"]),
    quantity=edges,
    unit_price=edges,
    percent_discount=st.sampled_from([None, Decimal(0), Decimal(100), Decimal("33.333333333333")]),
    cost_subtotal=edges,
    cost_discount=edges,
    cost_total=edges,
    currency=st.just("USD"),
    credential=st.just(KEY),
)
extreme_charges = st.builds(
    BillingEvent,
    timestamp=hours_of_two_months,
    request_id=st.uuids().map(str),
    endpoint_id=st.sampled_from([FLUX, VIDEO]),
    unit=st.sampled_from(["images", None]),
    quantity=edges,
    unit_price=edges,
    percent_discount=st.none(),
    cost_subtotal=edges,
    cost_discount=st.just(Decimal(0)),
    cost_total=st.sampled_from(["0", "1e-9", "1e-12", "9000000000"]).map(Decimal),
    credential=st.just(KEY),
)
extreme_accounts = st.builds(
    Account,
    lines=st.lists(
        extreme_lines,
        min_size=6,
        max_size=30,
        unique_by=lambda one: (  # lines of one key would be one row, and that too large
            one.hour,
            one.endpoint_id,
            one.unit,
            one.unit_price,
            one.percent_discount or 0,
        ),
    ),
    events=st.lists(extreme_charges, max_size=20),
    failing=st.lists(
        st.builds(
            Calls,
            hour=st.just(datetime(2026, 12, 1, 5, tzinfo=NOW.tzinfo)),
            endpoint_id=st.sampled_from([FLUX, VIDEO]),
            success_count=st.sampled_from([0, 1, 10**15]),
            durations=st.tuples(edges, edges),
        ),
        max_size=1,
    ),
    balance=edges | edges.map(lambda amount: -amount),
)


@hypothesis_settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(account=extreme_accounts, prices=st.tuples(edges, edges))
def test_no_amount_that_is_taken_in_ends_a_build(
    account: Account, prices: tuple[Decimal, Decimal]
) -> None:
    with tempfile.TemporaryDirectory() as folder, time_machine.travel(NOW, tick=False) as clock:
        clock.move_to(datetime(2026, 12, 1, 10, 30, tzinfo=NOW.tzinfo))
        days = Asked(date(2026, 11, 30), date(2026, 12, 2))
        with Sandbox(account) as server:
            settings = settings_for(server.url, Path(folder))
            for number, price in enumerate(prices):
                account.list_price(FLUX, str(price))
                clock.shift(timedelta(days=number))
                report = pipeline.run(settings, days)
                assert report.exit_code == 0, report.failures
        held = ask(settings, "select sum(quantity), sum(cost_total) from marts.fct_usage")
        with localcontext(prec=60):
            quantity = sum((one.quantity for one in account.lines), Decimal(0))
            assert held == [(quantity, sum((one.cost_total for one in account.lines), Decimal(0)))]
        assert verify(settings).findings == []


@dataclass(frozen=True)
class Change:
    """What fal does between two runs: days pass, rows come late, are restated, or taken back.

    While the next run is under way, fal may show less than there is.
    """

    passed: timedelta
    late: tuple[UsageLine, ...]
    restated: int | None
    taken_back: int | None
    shown: Conduct | None = None

    def apply(self, account: Account) -> None:
        """Change what is served."""
        if account.lines and self.restated is not None:
            at = self.restated % len(account.lines)
            old = account.lines[at]
            account.lines[at] = line(
                old.hour, old.endpoint_id, old.quantity + Decimal("1.5"), str(old.unit_price),
                unit=old.unit, currency=old.currency, credential=old.credential,
            )  # fmt: skip
        if account.lines and self.taken_back is not None:
            at = self.taken_back % len(account.lines)
            others = [one for number, one in enumerate(account.lines) if number != at]
            day = account.lines[at].hour.date()
            # A day that loses all of its charges is held (tests/integration/test_holds.py).
            if any(one.hour.date() == day and one.currency == "USD" for one in others):
                account.lines[:] = others
        account.lines += self.late


LESS_SHOWN = (
    None,
    Conduct(brown_outs=[(NOW, NOW + timedelta(days=100))]),
    Conduct(retention_days=1),
)

a_story = hypothesis_settings(a_few, max_examples=2)

changes = st.builds(
    Change,
    passed=st.sampled_from([timedelta(minutes=1), timedelta(hours=1), timedelta(days=2)]),
    late=st.lists(lines, max_size=2).map(tuple),
    restated=st.none() | st.integers(0, 50),
    taken_back=st.none() | st.integers(0, 50),
    shown=st.sampled_from(LESS_SHOWN),
)


@a_story
@given(account=accounts, story=st.lists(changes, min_size=1, max_size=3))
@example(
    account=truth.two_days(),
    story=[
        Change(timedelta(minutes=1), (), restated=3, taken_back=4),
        Change(timedelta(hours=1), (), restated=3, taken_back=4, shown=LESS_SHOWN[1]),
    ],
)
def test_any_interleaving_of_restatements_and_runs_ends_as_one_clean_read(
    account: Account, story: list[Change]
) -> None:
    account = replace(account, lines=list(account.lines))
    with (
        time_machine.travel(NOW, tick=False) as clock,
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
    ):
        settings = run_to_the_end(account, Path(one))
        for change in story:
            clock.shift(change.passed)
            change.apply(account)
            run_to_the_end(account, Path(one), conduct=change.shown)
        clock.shift(60)
        now = NOW + sum((change.passed for change in story), timedelta(seconds=60))
        with Sandbox(account, page_size=3) as server:
            for folder in (one, other):
                report = pipeline.run(
                    settings_for(server.url, Path(folder)),
                    Asked(start=truth.day(21), resources=["usage", "billing_events"]),
                )
                assert report.exit_code == 0, report.failures
        check_against_truth(account, settings, now)
        fresh = all_tables(settings_for("http://127.0.0.1:9", Path(other)))
        for name in (
            "raw.usage", "raw.billing_events", "marts.fct_usage", "marts.fct_billing_event",
            "marts.dim_credential",
        ):  # fmt: skip
            assert all_tables(settings)[name] == fresh[name]
        day_by_day = all_tables(settings)
        pipeline.build(settings, full=True)
        pipeline.publish(settings)
        assert all_tables(settings) == day_by_day
        rebuild(settings)
        assert all_tables(settings) == day_by_day
        assert verify(settings).findings == []


@a_few
@given(order=st.permutations(range(3)))
def test_the_order_in_which_days_are_loaded_does_not_matter(order: list[int]) -> None:
    account = truth.two_days()
    with (
        time_machine.travel(NOW, tick=False),
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        Sandbox(account, page_size=4) as server,
    ):
        at_once, in_turn = (settings_for(server.url, Path(f)) for f in (one, other))
        pipeline.run(at_once, Asked(start=truth.day(21), end=truth.day(24), resources=["usage"]))
        for offset in order:
            first = truth.day(21 + offset)
            pipeline.run(in_turn, Asked(start=first, end=first + timedelta(days=1), resources=["usage"]))
        assert all_tables(in_turn) == all_tables(at_once)


@a_few
@given(
    account=accounts,
    broken=st.dictionaries(
        st.integers(0, 30),
        st.sampled_from(
            [
                Fault(status=500),
                Fault(status=429, headers={"retry-after": "0"}),
                Fault(drop=True),
                Fault(truncate_to=30),
                Fault(status=403, body=b"<html>down</html>"),
                Fault(body=b""),
                Fault(body=b'{"time_series":[{"bucket":'),
            ]
        ),
        max_size=6,
    ),
)
def test_transport_faults_that_pass_leave_no_trace(account: Account, broken: dict[int, Fault]) -> None:
    asked = iter(range(10**6))

    def fault(_request: Request) -> Fault | None:
        return broken.get(next(asked))

    with time_machine.travel(NOW, tick=False), tempfile.TemporaryDirectory() as folder:
        settings = run_to_the_end(account, Path(folder), page_size=3, fault=fault)
        check_against_truth(account, settings)


def digests(settings: Settings) -> list[tuple[object, ...]]:
    """The fingerprints of what is loaded, which must not depend on how it came."""
    return ask(
        settings,
        "select resource, window_start, digest from ops.loads where is_current order by all",
    )
