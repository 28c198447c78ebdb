"""A machine's clock that was ahead of fal's for a run, and is right again."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.landing import extracts
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.resources import ANALYTICS
from faletl.sandbox import Request, Sandbox
from faletl.sandbox.server import Fault
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import horizons, open_warehouse
from faletl.warehouse.ledger import known_ids
from faletl.warehouse.tables import UNKNOWN_ENDPOINTS
from faletl.windows import Window
from tests import truth
from tests.conftest import Query, all_tables, opened
from tests.truth import FLUX, Account, line

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
AHEAD = 3 * DAY
SNAPSHOTS = Asked(resources=["models", "prices", "credits"])
PRICE = f"select unit_price from marts.dim_price where endpoint_id = '{FLUX}' and is_current"
BALANCE = "select current_balance from reports.rpt_credit_runway order by balance_date desc limit 1"


@pytest.fixture
def _fal_is_right(clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fal's clock goes on from the present one, whatever becomes of this machine's."""
    del clock
    started = datetime.now(UTC)

    def date(_: BaseHTTPRequestHandler, timestamp: float | None = None) -> str:
        del timestamp
        ahead = datetime.now(UTC) - started
        return format_datetime(started + ahead % DAY, usegmt=True)

    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", date)


def run_ahead(clock: time_machine.Traveller, settings: Settings, asked: Asked = EVERYTHING_DUE) -> None:
    """Run while the clock is ahead; an hour later it is right."""
    clock.shift(AHEAD)
    assert pipeline.run(settings, asked).exit_code == 0
    clock.shift(HOUR - AHEAD)


def set_anew(account: Account, price: str, balance: int) -> None:
    """Fal has another price and another balance from now on."""
    account.list_price(FLUX, price)
    account.balance = Decimal(balance)


def figures(query: Query) -> tuple[Any, ...]:
    """The current price and the newest balance that readers see."""
    [(price,)], [(balance,)] = query(PRICE), query(BALANCE)
    return price, balance


# --- Snapshots ------------------------------------------------------------------------------------


def test_snapshots_of_a_clock_that_was_ahead_take_no_part_once_it_is_right(
    clock: time_machine.Traveller,
    account: Account,
    settings: Settings,
    query: Query,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
    set_anew(account, "0.03", 20)
    run_ahead(clock, settings, SNAPSHOTS)
    clock.shift(DAY)
    set_anew(account, "0.09", 500)
    caplog.clear()
    assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
    warned = [record for record in caplog.records if "clock that was ahead" in record.message]
    assert [record.levelno for record in warned] == [logging.WARNING]
    assert "2026-11-26T10:30:00Z and 2 more" in warned[0].message
    balances = "select balance from marts.fct_credit_balance order by read_at"
    assert figures(query) == (Decimal("0.09"), 500)
    assert query(balances) == [(Decimal("24.5"),), (500,)]
    caplog.clear()
    for _ in range(4):  # past that instant
        clock.shift(DAY)
        assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
        assert figures(query) == (Decimal("0.09"), 500)
    assert "clock" not in caplog.text
    prices = f"select unit_price from marts.dim_price where endpoint_id = '{FLUX}' order by valid_from"
    assert query(prices) == [(Decimal("0.025"),), (Decimal("0.09"),)]
    assert query("select max(last_seen_at) from marts.dim_account") == [
        ((truth.NOW + HOUR + 5 * DAY).replace(tzinfo=None),)
    ]
    assert verify(settings).findings == []


def test_a_day_that_a_clock_ahead_had_a_snapshot_of_gets_its_own(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    """Prices are read daily: what was read by a wrong clock is none of that day's."""
    run_ahead(clock, settings, SNAPSHOTS)
    set_anew(account, "0.09", 500)
    assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
    clock.move_to(truth.NOW + AHEAD + HOUR, tick=False)
    set_anew(account, "0.025", 400)  # what the wrong clock had seen
    assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
    assert figures(query) == (Decimal("0.025"), 400)


@pytest.mark.usefixtures("_fal_is_right")
def test_neither_a_load_nor_a_rebuild_brings_back_what_lay_in_the_future(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    assert pipeline.run(settings).exit_code == 0
    set_anew(account, "0.03", 20)
    run_ahead(clock, settings)
    set_anew(account, "0.09", 500)
    assert pipeline.run(settings).exit_code == 0
    clock.shift(2 * AHEAD)
    assert pipeline.run(settings).exit_code == 0
    before = all_tables(settings)
    assert pipeline.load(settings).outcomes == []
    for day in (truth.day(23), truth.day(26), None):
        assert rebuild(settings, day).exit_code == 0
        assert all_tables(settings) == before
    assert verify(settings).findings == []


def test_extracts_of_the_future_wait_and_hold_back_no_later_one(
    clock: time_machine.Traveller,
    account: Account,
    settings: Settings,
    query: Query,
    caplog: pytest.LogCaptureFixture,
) -> None:
    everything = Asked(resources=["usage", *SNAPSHOTS.resources])
    assert pipeline.extract(settings, Asked(resources=["usage"])).exit_code == 0
    clock.shift(AHEAD)
    assert pipeline.extract(settings, everything).exit_code == 0
    clock.shift(HOUR - AHEAD)
    account.lines += [line(truth.NOW.replace(hour=9, minute=0), "x/late")]
    set_anew(account, "0.09", 500)
    assert pipeline.extract(settings, everything).exit_code == 0
    report = pipeline.load(settings)
    assert report.exit_code == 0
    assert "not loaded before that instant" in caplog.text
    pipeline.build(settings)
    pipeline.publish(settings)
    assert figures(query) == (Decimal("0.09"), 500)
    spent = sum(one.cost_total for one in account.lines)
    assert query("select sum(cost_total) from reports.rpt_spend_daily") == [(spent,)]


@pytest.mark.usefixtures("_fal_is_right")
def test_a_clock_that_was_behind_for_a_run_takes_nothing_out(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
    for shift in (-AHEAD, AHEAD + DAY):
        clock.shift(shift)
        set_anew(account, "0.09", 500)
        assert pipeline.run(settings, SNAPSHOTS).exit_code == 0
    assert query("select count(*) from marts.fct_credit_balance") == [(3,)]
    assert figures(query) == (Decimal("0.09"), 500)


# --- Days -----------------------------------------------------------------------------------------


def test_days_of_a_clock_that_was_ahead_are_neither_closed_nor_restated(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    today = truth.NOW.replace(hour=0, minute=0)
    assert pipeline.run(settings).exit_code == 0
    account.lines += [line(today + hour * HOUR, "x/today") for hour in range(9)]
    run_ahead(clock, settings)
    account.lines += [line(today + hour * HOUR, "x/today") for hour in range(9, 24)]
    assert pipeline.run(settings).exit_code == 0
    days = (
        "select window_start::date, is_provisional, is_settled from ops.loads where resource = 'usage' "
    )
    assert query(f"{days} and is_current order by 1")[-2:] == [
        (truth.day(22), False, False), (truth.day(23), True, False),
    ]  # fmt: skip
    newest = "select max(last_read_at) from ops.loads where is_current and resource = 'usage'"
    assert query(newest) == [(truth.NOW + HOUR,)]
    assert query("select count(*) from ops.restatements") == [(0,)]
    reach = "select loaded_until from reports.rpt_freshness where resource = 'usage'"
    assert query(reach) == [((today + 11 * HOUR).replace(tzinfo=None),)]
    clock.shift(2 * AHEAD)
    assert pipeline.run(settings).exit_code == 0
    spent = sum(one.cost_total for one in account.lines)
    assert query("select sum(cost_total) from reports.rpt_spend_daily") == [(spent,)]
    assert query("select count(*) from ops.restatements") == [(0,)]


def test_what_failed_of_windows_of_the_future_is_over_once_the_clock_is_right(
    clock: time_machine.Traveller, settings: Settings, sandbox: Sandbox, query: Query
) -> None:
    assert pipeline.run(settings).exit_code == 0

    def break_pages(request: Request) -> Fault | None:
        is_of_future = "2026-11-26" in str(request.query.get("end")) or "pricing" in request.path
        return Fault(body=b'{"odd":1}') if is_of_future else None

    clock.shift(AHEAD)
    sandbox.fault = break_pages
    assert pipeline.run(settings).exit_code == 3
    failures = "select resource, window_start::date from ops.failures order by all"
    with opened(settings) as connection:
        assert {
            start for _, start in connection.execute(failures.removesuffix(" order by all")).fetchall()
        }
    sandbox.fault = None
    clock.shift(HOUR - AHEAD)
    assert pipeline.run(settings).exit_code == 0
    assert query(failures) == []
    assert query("select count(*) from ops.alerts where resolved_at is null") == [(0,)]


def test_the_horizon_of_a_first_run_by_a_clock_far_ahead_counts_for_nothing(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    clock.shift(40 * DAY)
    assert pipeline.run(settings).exit_code == 0
    clock.shift(HOUR - 40 * DAY)
    assert pipeline.run(settings).exit_code == 0
    spent = sum(one.cost_total for one in account.lines)
    assert query("select sum(cost_total) from reports.rpt_spend_daily") == [(spent,)]
    with open_warehouse(settings).reading() as connection:
        assert connection is not None
        assert {row.first_day for row in horizons.held(connection, "acme").values()} == {truth.day(21)}


def test_an_id_that_was_unknown_by_a_clock_ahead_is_asked_for_again(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    assert pipeline.run(settings).exit_code == 0
    unknown = UNKNOWN_ENDPOINTS.fullname
    with opened(settings) as connection:
        connection.execute(f"delete from {unknown}")
        for name, at in (("x/lately", truth.NOW - DAY), ("x/ahead", truth.NOW + AHEAD)):
            connection.execute(f"insert into {unknown} values ('acme', 'analytics', '{name}', '{at}')")
        connection.commit()
    with open_warehouse(settings).reading() as connection:
        assert connection is not None
        window = Window.of_day(truth.day(22))
        known = known_ids(connection, "acme", ANALYTICS, window, truth.NOW)
    assert known.unknown == {"x/lately"}


def test_pages_of_the_future_are_not_gone_on_with(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    """Nobody knows how old they are: a day may not have ended when they were landed."""
    window = Window.of_day(truth.day(22))
    for at in (truth.NOW - HOUR / 2, truth.NOW + AHEAD):
        extracts.begin(settings, "acme", "usage", window, at).close()
    resumed = extracts.resume(settings, "acme", "usage", window, truth.NOW - HOUR)
    assert resumed is not None
    assert resumed.started_at == truth.NOW - HOUR / 2
    resumed.close()
