"""Whether fal's feeds agree with each other, and with what fal promises: statuses and their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import BILLING_KEY, BillingEvent, Calls, Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import QUARANTINE
from tests import truth
from tests.conftest import Query, all_tables, ask, settings_for
from tests.truth import FLUX, VIDEO, VOICE, Account, charges, line, quotient

Row = tuple[Any, ...]
DAY = timedelta(days=1)
SETTLED, CLOSED, OPEN = truth.day(21), truth.day(22), truth.day(23)
"""What the days are to a run at `truth.NOW`: ended 34 hours ago, ended 10 hours ago, and today."""


def at(text: str) -> datetime:
    """An instant of November 2026: `22T05`."""
    return datetime.fromisoformat(f"2026-11-{text}:00:00+00:00")


# --- Usage and billing events ---------------------------------------------------------------------

COMPARED = (
    "select usage_date, endpoint_id, usage_cost_total, events_cost_total, difference, charge_count, "
    "status, reason from reports.rpt_reconciliation order by all"
)


def compared(account: Account, judged: Callable[[date, str], tuple[str, str | None]]) -> list[Row]:
    """What rpt_reconciliation must hold of an account in dollars, by what is judged of its days."""
    usage: dict[tuple[date, str], Decimal] = {}
    for one in account.lines:
        key = (one.hour.date(), one.endpoint_id)
        usage[key] = usage.get(key, Decimal(0)) + one.cost_total
    events: dict[tuple[date, str], list[Decimal]] = {}
    for event in account.billing_events(at("01T00"), at("30T00")):
        events.setdefault((event.timestamp.date(), event.endpoint_id), []).append(event.cost_total)
    rows = []
    for key in sorted(usage.keys() | events.keys()):
        status, reason = judged(*key)
        told = events.get(key)
        is_whole = (key in usage and told is not None) or status in ("matched", "differs")
        difference = usage.get(key, Decimal(0)) - sum(told or [], Decimal(0))
        rows.append(
            (
                *key, usage.get(key), sum(told) if told else None, difference if is_whole else None,
                len(told) if told else None, status, reason,
            )
        )  # fmt: skip
    return rows


def without(events: Iterable[BillingEvent], endpoint_id: str) -> list[BillingEvent]:
    """The charges of all other endpoints."""
    return [one for one in events if one.endpoint_id != endpoint_id]


def test_closed_days_that_agree_match_and_the_open_day_is_open(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines.append(line(at("23T05"), FLUX, "7"))
    pipeline.run(settings)
    assert query(COMPARED) == compared(
        account, lambda day, _: ("open", "day still open") if day == OPEN else ("matched", None)
    )


def test_a_missing_event_settles_into_a_difference_though_a_read_finds_nothing_new(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.events = without(charges(account.lines), VOICE)
    pipeline.run(settings)

    def judged(day: date, endpoint_id: str) -> tuple[str, str | None]:
        if endpoint_id != VOICE:
            return "matched", None
        return ("differs", "no charges") if day in settled else ("settling", "day not settled")

    settled = {SETTLED}
    assert query(COMPARED) == compared(account, judged)
    assert query("select count(*) from reports.rpt_reconciliation where events_cost_total = 0") == [(0,)]
    clock.shift(DAY)
    for resource, is_settled in (("usage", False), ("billing_events", True)):
        report = pipeline.run(settings, Asked(CLOSED, OPEN, [resource]))
        assert [outcome.outcome for outcome in report.outcomes] == ["unchanged"]
        settled = {SETTLED, CLOSED} if is_settled else {SETTLED}  # when both feeds are
        assert query(COMPARED) == compared(account, judged)
        assert verify(settings).findings == []
    again = pipeline.run(settings, Asked(CLOSED, OPEN, ["usage"]))
    assert again.build is None  # that it has settled is news only once
    before = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == before

    account.events = None
    clock.shift(2 * DAY)
    pipeline.run(settings)
    assert query(COMPARED) == compared(account, lambda *_: ("matched", None))


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [("usage", "billing events not loaded"), ("billing_events", "usage not loaded")],
)
def test_days_of_one_feed_alone_are_open(
    loaded: str, reason: str,
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query,
) -> None:  # fmt: skip
    pipeline.run(settings, Asked(resources=[loaded]))
    lines, account.lines = account.lines, account.lines if loaded == "usage" else []
    account.events = [] if loaded == "usage" else charges(lines)
    assert query(COMPARED) == compared(account, lambda *_: ("open", reason))


def set_aside(settings: Settings, resource: str, day: date, *, resolved: bool = False) -> None:
    """Set a row of the day aside, as a load would that refuses its window; or resolve all of them."""
    with open_warehouse(settings).lease("a test") as lease, lease.connection.begin():
        lease.connection.execute(sa.delete(QUARANTINE))
        lease.connection.execute(
            sa.insert(QUARANTINE).values(
                load_id="x", account="acme", resource=resource, page=1, row=1, reason="broken",
                window_start=datetime(day.year, day.month, day.day, tzinfo=UTC),
                fencing_token=lease.token, resolved_at=truth.NOW if resolved else None,
            )
        )  # fmt: skip


def test_rows_set_aside_are_a_reason_from_the_next_build_on(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    pipeline.run(settings, Asked(resources=["usage"]))
    reasons = "select distinct usage_date, reason from reports.rpt_reconciliation order by 1"
    before = [(day, "billing events not loaded") for day in (SETTLED, CLOSED)]
    for resolved in (False, True):
        set_aside(settings, "billing_events", CLOSED, resolved=resolved)
        verdict = verify(settings)
        assert (verdict.findings, verdict.is_complete) == ([], False)
        report = pipeline.run(settings, Asked(SETTLED, CLOSED, ["usage"]))  # finds nothing new
        assert (report.build, report.published) == (None, None)
        assert pipeline.publish(settings).exit_code == 0
        build = pipeline.build(settings).build
        assert build is not None
        assert build.days == 1
        assert pipeline.build(settings).build is None
        pipeline.publish(settings)
        verdict = verify(settings)
        assert (verdict.findings, verdict.is_complete) == ([], True)
        aside = [before[0], (CLOSED, "billing events quarantined")]
        assert query(reasons) == (before if resolved else aside)


def test_rows_of_usage_set_aside_are_the_reason_of_a_difference(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.events = without(charges(account.lines), VOICE)
    pipeline.run(settings)
    set_aside(settings, "usage", SETTLED)
    pipeline.build(settings)
    pipeline.publish(settings)

    def judged(day: date, endpoint_id: str) -> tuple[str, str | None]:
        if endpoint_id != VOICE:
            return "matched", None
        return ("differs", "usage quarantined") if day == SETTLED else ("settling", "day not settled")

    assert query(COMPARED) == compared(account, judged)


def test_other_differences_have_the_first_reason_that_is_known(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    known = [replace(one, unit="images") for one in charges(account.lines)]
    account.lines.append(line(at("21T05"), "x/strange", "2", "0.5", unit="moon phases"))
    strange = replace(known[0], endpoint_id="x/strange", cost_total=Decimal(3), request_id="s")
    alone = replace(known[0], endpoint_id="x/alone", request_id="a")
    untold = replace(alone, endpoint_id="x/untold", unit=None)
    twice = replace(alone, endpoint_id="x/twice")
    account.events = [*known, strange, alone, untold, twice, twice]
    pipeline.run(settings)
    account.lines[0] = line(account.lines[0].hour, FLUX, "4")
    pipeline.run(settings, Asked(SETTLED, CLOSED))
    reasons = {
        (SETTLED, FLUX): "restated",
        (SETTLED, "x/strange"): "unit unknown",
        (SETTLED, "x/alone"): "no usage",
        (SETTLED, "x/untold"): "unit unknown",
        (SETTLED, "x/twice"): "charges repeated",
    }
    assert query(COMPARED) == compared(
        account,
        lambda *key: ("differs", reasons[key]) if key in reasons else ("matched", None),
    )


@pytest.mark.parametrize(("nano", "status"), [(13, "matched"), (14, "differs"), (-14, "differs")])
def test_half_a_nano_dollar_for_each_line_of_usage_and_each_charge_is_let_pass(
    nano: int, status: str,
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query,
) -> None:  # fmt: skip
    events = charges(account.lines)  # nine lines of FLUX a day, two charges of each
    events[0] = replace(events[0], cost_total=events[0].cost_total + Decimal(nano).scaleb(-9))
    account.events = events
    pipeline.run(settings)
    assert query(
        "select difference, status from reports.rpt_reconciliation "
        f"where usage_date = '2026-11-21' and endpoint_id = '{FLUX}'"
    ) == [(Decimal(-nano).scaleb(-9), status)]


def test_usage_that_is_free_needs_no_event(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines = [line(at("22T05"), FLUX, "3", "0")]
    account.events = []
    pipeline.run(settings)
    assert query(COMPARED) == [(CLOSED, FLUX, 0, None, 0, None, "matched", None)]


def test_usage_in_another_currency_is_never_compared(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    euro = line(at("21T05"), VIDEO, "2", "0.5", currency="EUR")
    account.lines = [euro, line(at("21T06"), FLUX), replace(euro, endpoint_id=FLUX)]
    account.events = [*charges(account.lines), replace(charges([line(at("21T05"), VIDEO)])[1])]
    pipeline.run(settings)
    dollar = line(at("21T06"), FLUX).cost_total
    event = account.events[-1].cost_total
    columns = "endpoint_id, currency, usage_cost_total, events_cost_total, difference, status, reason"
    assert query(f"select {columns} from reports.rpt_reconciliation order by all") == [
        (FLUX, "EUR", 1, None, None, "open", "other currency"),
        (FLUX, "USD", dollar, dollar, 0, "matched", None),
        (VIDEO, "EUR", 1, None, None, "open", "other currency"),
        (VIDEO, "USD", None, event, -event, "differs", "other currency"),
    ]


# --- What fal promises ----------------------------------------------------------------------------

BROKEN = "acme/always-fails"
FREE_FAILURES, FREE_QUEUES = "failed requests are free", "queue time is free"
RUN_SECONDS = "billed seconds were run"


def rules(query: Query, rule: str, endpoint_id: str) -> list[Row]:
    """Day, promised, observed, margin, ratio and status of the rule."""
    return query(
        "select usage_date, promised, observed, margin, ratio, status from reports.rpt_billing_rules "
        f"where rule = '{rule}' and endpoint_id = '{endpoint_id}' order by usage_date"
    )


def test_failed_requests_that_were_charged_are_told_once_their_day_has_settled(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [
        Calls(at(hour), BROKEN, user_error_count=1, timeout_error_count=3) for hour in ("21T05", "22T05")
    ]
    account.events = charges(account.lines)
    for hour in ("21T05", "22T05"):
        account.events += [
            replace(one, request_id=f"{number} {one.request_id}")
            for number in range(3)
            for one in charges([line(at(hour), BROKEN)])
        ]
    pipeline.run(settings)
    ratio = quotient(Decimal(3), Decimal(1))
    assert rules(query, FREE_FAILURES, BROKEN) == [
        (SETTLED, 1, 3, 0, ratio, "broken"),
        (CLOSED, 1, 3, 0, ratio, "unknown"),
    ]
    # A request in each of three hours with three lines, of which the first is at midnight.
    good = quotient(Decimal(3), Decimal(9))
    assert rules(query, FREE_FAILURES, FLUX) == [
        (day, 9, 3, 1, good, "kept") for day in (SETTLED, CLOSED)
    ]
    clock.shift(DAY)
    pipeline.run(settings, Asked(CLOSED, OPEN))
    assert rules(query, FREE_FAILURES, BROKEN)[1] == (CLOSED, 1, 3, 0, ratio, "broken")
    assert verify(settings).findings == []


def test_requests_near_midnight_may_count_to_another_day(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    late = [
        replace(one, timestamp=at("22T00") - timedelta(minutes=minutes), request_id=f"{minutes}")
        for minutes in (2, 9, 11)
        for one in charges([line(at("21T23"), BROKEN)])
    ]
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [Calls(at("21T05"), BROKEN, success_count=1, durations=(Decimal(1),))]
    account.events = [*charges(account.lines), *late]
    pipeline.run(settings)
    assert rules(query, FREE_FAILURES, BROKEN) == [(SETTLED, 1, 3, 2, 3, "kept")]


def test_what_only_fails_and_is_not_charged_keeps_the_rule_and_nothing_is_said_of_its_queue(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [Calls(at(hour), BROKEN, timeout_error_count=3) for hour in ("21T05", "22T05")]
    pipeline.run(settings)
    assert rules(query, FREE_FAILURES, BROKEN) == [
        (SETTLED, 0, 0, 0, None, "kept"),
        (CLOSED, 0, None, 0, None, "unknown"),  # a charge may still come
    ]
    assert rules(query, FREE_QUEUES, BROKEN) == []


def test_seconds_that_count_for_billing_are_compared_with_those_that_requests_ran(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.catalogue += [{"endpoint_id": "x/queued"}, {"endpoint_id": "x/prompt"}]
    seconds = (Decimal("1.5"), Decimal("2.5"), Decimal(7))
    account.failing = [
        Calls(at("21T05"), "x/queued", 3, total_billable_duration=Decimal(22), durations=seconds),
        Calls(
            at("21T05"),
            "x/prompt",
            3,
            total_billable_duration=sum(seconds, Decimal(0)),
            durations=seconds,
        ),
    ]
    pipeline.run(settings)
    queued, prompt = (quotient(Decimal(billed), Decimal(3)) for billed in (22, 11))
    assert queued is not None
    assert prompt is not None
    assert rules(query, FREE_QUEUES, "x/queued") == [
        (SETTLED, 7, queued, 0, quotient(queued, Decimal(7)), "broken")
    ]
    assert rules(query, FREE_QUEUES, "x/prompt") == [
        (SETTLED, 7, prompt, 0, quotient(prompt, Decimal(7)), "kept")
    ]


@pytest.mark.parametrize(("run", "status"), [("39", "broken"), ("40", "kept")])
def test_compute_seconds_that_are_billed_were_run(
    run: str, status: str,
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query,
) -> None:  # fmt: skip
    account.lines.append(line(at("21T05"), "x/gpu", "40", "0.001", unit=" Compute seconds"))
    account.failing = [Calls(at("21T05"), "x/gpu", 1, total_billable_duration=Decimal(run))]
    pipeline.run(settings)
    assert rules(query, RUN_SECONDS, "x/gpu") == [
        (SETTLED, Decimal(run), 40, 0, quotient(Decimal(40), Decimal(run)), status)
    ]
    assert rules(query, RUN_SECONDS, FLUX) == []


def test_rules_are_unknown_where_a_feed_is_not_loaded_or_the_day_is_open(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    account.lines += [
        line(at("21T05"), "x/gpu", "40", "0.001", unit="compute seconds"), line(at("23T05"), FLUX)
    ]  # fmt: skip
    statuses = "select distinct rule, status from reports.rpt_billing_rules"
    unknown = [(FREE_FAILURES, "unknown"), (FREE_QUEUES, "unknown")]
    settings = settings_for(sandbox.url, tmp_path, key=BILLING_KEY)
    pipeline.run(settings)  # analytics are left out
    assert ask(settings, f"{statuses} order by all") == [(RUN_SECONDS, "unknown"), *unknown]
    assert ask(settings, "select count(promised), count(ratio) from reports.rpt_billing_rules") == [
        (0, 0)
    ]
    pipeline.run(settings_for(sandbox.url, tmp_path))
    assert ask(settings, f"{statuses} where usage_date = '2026-11-23' order by all") == unknown
