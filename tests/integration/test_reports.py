"""The reports that answer people's questions, against figures worked out from the served account."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import SettingsError
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import BILLING_KEY, Calls, Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import Query, all_tables, ask, settings_for
from tests.truth import FLUX, NOW, VIDEO, VOICE, Account, line, quotient

DAY = timedelta(days=1)
Row = tuple[Any, ...]


def spent(account: Account, start: date, end: date, **asked: str) -> Decimal:
    """What the days from `start` to before `end` cost, of lines with those attributes."""
    return sum(
        (
            one.cost_total
            for one in account.lines
            if start <= one.hour.date() < end and all(getattr(one, k) == v for k, v in asked.items())
        ),
        Decimal(0),
    )


def use(account: Account, now: datetime, quantity: str = "3") -> None:
    """An hour's usage of three endpoints yesterday."""
    at = now.replace(hour=9, minute=0) - DAY
    account.lines += [
        line(at, FLUX, quantity, "0.025", percent_discount="10"),
        line(at, VIDEO, quantity, "0.4", unit="second"),
        line(at, VOICE, "16.374837", "0.02", unit="1000 characters "),
    ]


# --- Price changes --------------------------------------------------------------------------------


def test_price_changes_stand_beside_the_spend_at_stake(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    story = [(FLUX, "0.05", "images"), (FLUX, "0.025", "images"), (VOICE, "1.5", "minutes"), None,
             (FLUX, "0", "images"), (FLUX, "0.03", "images")]  # fmt: skip
    before = {FLUX: (Decimal("0.025"), "images"), VOICE: (Decimal("0.02"), "1000 characters")}
    changes: list[Row] = []
    needed = Asked(resources=["usage", "prices"])
    pipeline.run(settings, needed)
    for number, change in enumerate(story, start=1):
        clock.shift(timedelta(days=9, hours=5))
        now = datetime.now(UTC)
        use(account, now, str(number))
        if change is not None:
            endpoint, price, unit = change
            account.list_price(endpoint, price, unit)
            was, was_unit = before[endpoint]
            ratio = quotient(Decimal(price), was) if unit == was_unit else None
            changes.append((endpoint, now, was_unit, unit, was, Decimal(price), ratio))
            before[endpoint] = Decimal(price), unit
        assert pipeline.run(settings, needed).exit_code == 0
    today = datetime.now(UTC).date()
    assert query(
        "select endpoint_id, changed_at, previous_unit, unit, previous_unit_price, unit_price, "
        "change_ratio, spend_last_30_days, spend_30_days_before, is_current "
        "from reports.rpt_price_changes order by changed_at"
    ) == [
        (
            endpoint, at.replace(tzinfo=None), *rest,
            spent(account, today - 29 * DAY, today + DAY, endpoint_id=endpoint),
            spent(account, at.date() - 30 * DAY, at.date(), endpoint_id=endpoint),
            (before[endpoint][0], before[endpoint][1]) == (rest[3], rest[1]) and at == max(
                c[1] for c in changes if c[0] == endpoint
            ),
        )
        for endpoint, at, *rest in changes
    ]  # fmt: skip


def test_spend_in_another_currency_than_the_price_is_not_at_stake(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines.append(line(account.lines[0].hour, FLUX, "100", currency="EUR"))
    pipeline.run(settings)
    account.list_price(FLUX, "0.05")
    clock.shift(DAY)
    pipeline.run(settings)
    at_stake = sum(
        one.cost_total for one in account.lines if (one.endpoint_id, one.currency) == (FLUX, "USD")
    )
    assert query(
        "select currency, spend_last_30_days, spend_30_days_before from reports.rpt_price_changes"
    ) == [("USD", at_stake, at_stake)]


# --- Unit economics -------------------------------------------------------------------------------

BROKEN = "acme/always-fails"


def economics(account: Account, currency: str = "USD") -> list[Row]:
    """What rpt_unit_economics must hold of an account with one currency."""
    sums: dict[tuple[date, str], list[Decimal]] = {}
    for one in account.lines:
        held = sums.setdefault((one.hour.date(), one.endpoint_id), [Decimal(0)] * 5)
        held[0] += one.cost_total
    for calls in account.calls(datetime.min.replace(tzinfo=UTC), NOW):
        held = sums.setdefault((calls.hour.date(), calls.endpoint_id), [Decimal(0)] * 5)
        counts = (calls.request_count, calls.success_count, calls.user_error_count, calls.error_count)
        for place, count in enumerate(counts, start=1):
            held[place] += count
    return sorted(
        (
            account.account, day, endpoint, currency, *held,
            quotient(held[0], held[1]), quotient(held[0], held[2]),
            *(quotient(count, held[1]) for count in held[2:]),
        )
        for (day, endpoint), held in sums.items()
    )  # fmt: skip


ECONOMICS = (
    "select account, usage_date, endpoint_id, currency, cost_total, request_count, success_count, "
    "user_error_count, error_count, cost_per_request, cost_per_success, success_rate, user_error_rate, "
    "error_rate from reports.rpt_unit_economics order by all"
)


def test_requests_and_successes_have_their_cost_and_failures_their_rate(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    hour = account.lines[0].hour
    account.failing = [
        Calls(hour, BROKEN, user_error_count=1, timeout_error_count=2),
        Calls(hour, FLUX, user_error_count=5, runtime_error_count=1),
    ]
    pipeline.run(settings)
    assert query(ECONOMICS) == economics(account)
    assert query(
        f"select cost_per_success, success_rate from reports.rpt_unit_economics "
        f"where endpoint_id = '{BROKEN}'"
    ) == [(None, Decimal(0))]  # fmt: skip
    assert query(
        "select usage_date, p50_duration, p95_duration from reports.rpt_unit_economics "
        f"where endpoint_id = '{VOICE}' order by 1"
    ) == query(
        "select usage_date, p50_duration, p95_duration from marts.fct_latency "
        f"where endpoint_id = '{VOICE}' order by 1"
    ) != []  # fmt: skip


def test_spend_without_analytics_is_shown_with_unknown_requests(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path, key=BILLING_KEY)
    pipeline.run(settings)
    assert ask(
        settings,
        "select sum(cost_total), count(request_count), count(cost_per_request), count(success_rate) "
        "from reports.rpt_unit_economics",
    ) == [(sum(one.cost_total for one in account.lines), 0, 0, 0)]


def test_costs_in_two_currencies_are_not_added_up_per_request(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    euro = line(account.lines[0].hour, FLUX, "100", currency="EUR")
    account.lines.append(euro)
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [Calls(euro.hour, BROKEN, timeout_error_count=2)]
    pipeline.run(settings)
    rows = query(
        "select currency, cost_total, request_count, cost_per_request from reports.rpt_unit_economics "
        f"where endpoint_id = '{FLUX}' and usage_date = '2026-11-21' order by 1"
    )
    dollars = spent(account, truth.day(21), truth.day(22), endpoint_id=FLUX, currency="USD")
    requests = rows[0][2]
    assert rows == [
        ("EUR", euro.cost_total, requests, quotient(euro.cost_total, Decimal(requests))),
        ("USD", dollars, requests, quotient(dollars, Decimal(requests))),
    ]
    # What cost nothing cannot be told a currency here.
    assert query(
        f"select currency, cost_total from reports.rpt_unit_economics where endpoint_id = '{BROKEN}'"
    ) == [("XXX", 0)]  # fmt: skip


# --- Credits --------------------------------------------------------------------------------------


def average(account: Account, days: Iterable[date]) -> Decimal | None:
    """What those days cost on average in dollars."""
    costs = [spent(account, day, day + DAY, currency="USD") for day in days]
    return quotient(sum(costs, Decimal(0)), Decimal(len(costs)))


def test_credits_last_as_long_as_the_full_days_before_say(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines.append(line(account.lines[0].hour, FLUX, "1000", currency="EUR"))
    first = truth.day(21)
    readings: list[tuple[date, Decimal]] = []
    for number, passed in enumerate((0, 1, 1, 5, 20, 3), start=1):
        clock.move_to(datetime.now(UTC).replace(hour=10) + passed * DAY)
        now = datetime.now(UTC)
        use(account, now + DAY, str(number))  # today: not over, never part of a burn
        account.balance = Decimal(100) - 10 * number
        pipeline.run(settings, Asked(resources=["usage", "credits"]))  # an earlier reading of the day
        clock.shift(timedelta(hours=3))
        use(account, now, str(number))  # yesterday, late
        account.balance -= Decimal("1.25")
        again = pipeline.run(settings, Asked(start=first, resources=["usage", "credits"]))
        assert again.exit_code == 0
        readings.append((now.date(), account.balance))
    assert query(
        "select account, currency, balance_date, current_balance, burn_7_days, burn_30_days, days_left, "
        "empty_on from reports.rpt_credit_runway order by balance_date"
    ) == [("acme", "USD", *reading, *runway(account, *reading, first)) for reading in readings]


def runway(account: Account, today: date, balance: Decimal, first: date) -> Row:
    """Burns, days left and last day, of an account whose days are loaded since `first`."""
    days = [first + n * DAY for n in range((today - first).days)]
    week = average(account, [day for day in days if day >= today - 7 * DAY])
    month = average(account, [day for day in days if day >= today - 30 * DAY])
    left = quotient(balance, week or month or Decimal(0))
    assert left is not None
    return week, month, left, today + timedelta(days=int(left))


def test_credits_that_nothing_is_spent_of_last_for_ever(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    runways = "select burn_7_days, burn_30_days, days_left, empty_on from reports.rpt_credit_runway"
    account.lines.clear()
    pipeline.run(settings)
    assert query(runways) == [(0, 0, None, None)]
    account.lines = [line(NOW - DAY, FLUX, "0.000000001", "0.001")]
    pipeline.run(settings, Asked(start=truth.day(21)))
    assert query(f"{runways} where empty_on is null and days_left > 40000000") != []


@pytest.mark.parametrize("balance", ["-0.18", "-999999999999999.999999999999", "0"])
def test_credits_of_which_nothing_is_left_last_no_day(
    balance: str, clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.balance = Decimal(balance)
    runways = (
        "select current_balance, burn_7_days > 0, days_left, empty_on from reports.rpt_credit_runway"
    )
    lines, account.lines = account.lines, []  # without any spend
    assert pipeline.run(settings).exit_code == 0
    assert query(f"{runways} where burn_30_days = 0") == [(Decimal(balance), False, 0, NOW.date())]
    account.lines = lines
    assert pipeline.run(settings, Asked(start=truth.day(21))).exit_code == 0
    assert query(runways) == [(Decimal(balance), True, 0, NOW.date())]
    assert query("select balance from marts.fct_credit_balance") == [(Decimal(balance),)]


def test_without_a_balance_there_is_no_reading_and_the_run_is_well(
    clock: time_machine.Traveller, account: Account, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = b'{"username": "acme", "credits": null}'

    def fault(request: Request) -> Fault | None:
        is_asked = request.path == "/account/billing" and "expand" in request.query
        return Fault(body=body) if is_asked else None

    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        assert pipeline.run(settings).exit_code == 0
        clock.shift(timedelta(hours=1))
        assert pipeline.run(settings).exit_code == 0
    assert caplog.text.count("fal sent no current_balance, so there is nothing to load") == 2
    assert ask(settings, "select count(*) from raw.credits") == [(0,)]
    assert ask(settings, "select count(*) from reports.rpt_credit_runway") == [(0,)]
    assert ask(settings, "select count(*) from ops.quarantine") == [(0,)]
    assert verify(settings).findings == []


def test_a_day_that_closes_without_more_rows_counts_as_a_full_one(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    burn = "select burn_7_days from reports.rpt_credit_runway where balance_date = '2026-11-24'"
    pipeline.run(settings)  # the 23rd is open, and costs nothing

    def refuse(request: Request) -> Fault | None:
        is_usage = request.path == "/models/usage" and request.query["start"][0] >= "2026-11-23"
        return Fault(status=400) if is_usage else None

    clock.shift(DAY)
    with Sandbox(account, fault=refuse) as server:
        pipeline.run(settings.model_copy(update={"api_url": server.url}))
    cost = sum((one.cost_total for one in account.lines), Decimal(0))
    assert ask(settings, burn) == [(quotient(cost, Decimal(2)),)]
    clock.shift(60)
    report = pipeline.run(settings, Asked(resources=["usage", "billing_events"]))
    usage = [outcome for outcome in report.outcomes if outcome.resource == "usage"]
    assert {str(outcome.window)[:10]: outcome.outcome for outcome in usage} == {
        "2026-11-23": "unchanged", "2026-11-24": "loaded"
    }  # fmt: skip
    assert ask(settings, burn) == [(quotient(cost, Decimal(3)),)]
    assert verify(settings).findings == []
    before = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == before


# --- Units and list prices ------------------------------------------------------------------------

SEEN_UNITS = {
    "images": ("image", "image", "image", 1),
    " Image": ("image", "image", "image", 1),
    "1000 characters ": ("1000 characters", "text", "character", 1000),
    "1m tokens": ("1000000 tokens", "token", "token", 1_000_000),
    "1M tokens": ("1000000 tokens", "token", "token", 1_000_000),
    "1,000 tokens": ("1000 tokens", "token", "token", 1000),
    "5 seconds": ("5 seconds", "time", "second", 5),
    "10 minutes": ("10 minutes", "time", "second", 600),
    "30 frames": ("30 frames", "other", "frame", 30),
    "1 image": ("image", "image", "image", 1),
    "3 units": ("3 units", "other", None, None),
    "999,999,999 megapixels": ("999999999 megapixels", "pixel", "pixel", 999_999_999_000_000),
    "2k images": ("2k images", "other", None, None),
    "minute of video ": ("minute of video", "time", "second", 60),
    "megapixels": ("megapixel", "pixel", "pixel", 1_000_000),
    "units": ("unit", "other", None, None),
    "": ("unspecified", "other", None, None),
    "1": ("1", "other", None, None),
    "moon phases ": ("moon phases ", "other", None, None),
}


def test_units_stay_as_billed_beside_what_they_mean(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines = [
        line(NOW - DAY, f"x/{number}", "7", "0.3", unit=unit) for number, unit in enumerate(SEEN_UNITS)
    ]
    account.listed.clear()
    pipeline.run(settings)
    units = query("select unit, canonical_unit, family, base_unit, factor from marts.dim_unit")
    no_unit = {"unknown": ("unknown", "other", None, None)}  # of charges for which fal tells none
    assert {row[0]: row[1:] for row in units} == SEEN_UNITS | no_unit
    each = query(
        "select unit, base_unit, cost_per_base_unit, price_comparison from reports.rpt_spend_daily"
    )
    with_factor = {
        unit: (base, quotient(Decimal("2.1"), 7 * Decimal(factor)) if factor else None, "no list price")
        for unit, (_, _, base, factor) in SEEN_UNITS.items()
    }
    assert {row[0]: row[1:] for row in each} == with_factor


def test_a_table_of_ones_own_tells_what_units_mean(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    account.lines = [
        line(NOW - DAY, FLUX, "7", "0.3", unit="Moon Phases"),
        line(NOW - DAY, VOICE),
        *(line(NOW - DAY, VIDEO, unit=unit) for unit in ("3 moon phases", "12 frames", "24 frames")),
    ]
    units = tmp_path / "units.csv"
    header = "unit,canonical_unit,family,base_unit,factor\n"
    units.write_text(
        f"{header}moon phases,moon phase,time,second,637861\nimages,picture,image,,\n"
        "12 frames,half a second,time,,\n"
    )
    settings = settings_for(sandbox.url, tmp_path, units=units)
    pipeline.run(settings)
    meant = (
        "select unit, canonical_unit, family, base_unit, factor from marts.dim_unit "
        "where unit <> '1000 characters' and unit <> 'unknown' order by all"
    )
    assert ask(settings, meant) == [
        ("12 frames", "half a second", "time", None, None),  # a line goes before the rule
        ("24 frames", "24 frames", "other", "frame", 24),
        ("3 moon phases", "3 moon phases", "time", "second", 3 * 637861),
        ("Moon Phases", "moon phase", "time", "second", 637861),
        ("images", "picture", "image", None, None),
    ]
    for wrong, told in (
        ("moon,,time,,", "has no canonical_unit"),
        ("moon,moon,cheese,,", "has the family 'cheese'"),
        ("moon,moon,time,second,", "only one of base_unit and factor"),
        ("moon,moon,time,second,0.5", "the factor '0.5'"),
        ("moon,moon,time,second,0", "the factor '0'"),
    ):
        units.write_text(f"{header}{wrong}\n")
        with pytest.raises(SettingsError, match=f"the unit 'moon' .*{told}"):
            pipeline.build(settings)


def test_prices_that_cannot_be_compared_say_why(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines = [
        line(NOW - DAY, FLUX, "2", "0.02"),
        line(NOW - DAY, FLUX, "2", "0.02", unit="megapixels"),
        line(NOW - DAY, FLUX, "2", "0.02", currency="EUR"),
        line(NOW - DAY, VIDEO, "2", "0.4", unit="second"),
        line(NOW - DAY, VOICE, "0", "0.02", unit="1000 characters"),
    ]
    pipeline.run(settings)
    assert query(
        "select endpoint_id, unit, currency, price_comparison, price_difference "
        "from reports.rpt_spend_daily order by all"
    ) == [
        (FLUX, "images", "EUR", "currencies differ", None),
        (FLUX, "images", "USD", "compared", Decimal("-0.005")),
        (FLUX, "megapixels", "USD", "units differ", None),
        (VOICE, "1000 characters", "USD", "no effective price", None),
        (VIDEO, "second", "USD", "no list price", None),
    ]
