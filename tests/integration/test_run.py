"""The whole line against a served account: every figure, every run, every step."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import CheckFailedError, DataRefusedError, UnprovenError
from faletl.line.release import is_behind, is_news
from faletl.line.report import Report
from faletl.operations.verify import verify
from faletl.resources import RESOURCES
from faletl.sandbox import BILLING_KEY, READONLY_KEY, Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import Query, all_tables, ask, opened, settings_for, total
from tests.faults import PROVEN
from tests.truth import FLUX, VIDEO, VOICE, Account, line, rounded


def test_every_figure_of_a_run_is_that_of_the_served_account(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    report = pipeline.run(settings)

    assert report.exit_code == 0, report.failures
    daily = {
        row[:5]: row[5:]
        for row in query(
            "select account, usage_date, endpoint_id, unit, currency, quantity, cost_subtotal, "
            "cost_discount, cost_total, effective_unit_price from reports.rpt_spend_daily"
        )
    }
    assert daily == truth.spend_daily(account)
    hourly = {
        row[:8]: row[8:]
        for row in query(
            "select account, used_at, endpoint_id, unit, unit_price, percent_discount, currency, "
            "credential_id, quantity, cost_total from marts.fct_usage"
        )
    }
    assert hourly == truth.spend_by_hour(account)


RECORDED = "cbaa1490de30137b213bf356bebf9b2afd95efa836dbbf10c61ae7d37e05938e"
"""Of what raw holds of the served account, with the digests in its ledger."""


def test_the_same_rows_have_the_same_digest_on_each_python_and_in_each_warehouse(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    assert pipeline.run(settings).exit_code == 0
    ledger = "select resource, window_start, rows, digest from ops.loads order by all"
    raw = [(name, rows) for name, rows in all_tables(settings).items() if name.startswith("raw.")]
    held = repr((ask(settings, ledger, opened), sorted(raw)))
    assert hashlib.sha256(held.encode()).hexdigest() == RECORDED


def test_a_second_run_asks_little_and_changes_nothing_but_credits(
    clock: time_machine.Traveller, settings: Settings, sandbox: Sandbox
) -> None:
    pipeline.run(settings)
    before = all_tables(settings)
    asked = len(sandbox.requests)
    clock.shift(60)
    report = pipeline.run(settings)

    assert report.exit_code == 0
    assert sorted(request.path for request in sandbox.requests[asked:]) == [
        "/account/billing",  # the account's label
        "/account/billing",  # the balance, a level of each run
        "/models/analytics",  # today, which is open: hours
        "/models/analytics",  # and the day
        "/models/billing-events",
        "/models/usage",  # rows
        "/models/usage",  # their control total
        "/models/usage",  # and that of the events
    ]
    after = all_tables(settings)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "raw.credits",
        "staging.stg_fal__credits",
        "marts.fct_credit_balance",
        "marts.dim_account",
    }


def test_naming_days_fetches_them_again_and_changes_nothing(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings)
    before = all_tables(settings)
    loads = ask(settings, "select load_id from ops.loads where resource <> 'credits' order by all")
    clock.shift(60)
    report = pipeline.run(settings, Asked(start=truth.day(21), resources=["usage", "models", "prices"]))

    assert {outcome.outcome for outcome in report.outcomes} == {"unchanged"}
    assert len(report.outcomes) == 5  # three days, models, prices
    assert report.build is None
    assert report.published is None
    assert all_tables(settings) == before
    assert (
        ask(settings, "select load_id from ops.loads where resource <> 'credits' order by all") == loads
    )


def test_late_and_restated_rows_replace_their_window(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    pipeline.run(settings)
    at = datetime.fromisoformat("2026-11-22T05:00:00+00:00")
    account.lines.append(line(at, VIDEO, "8", "0.4", unit="second"))  # late
    account.lines[15] = line(account.lines[15].hour, FLUX, "30", "0.025")  # restated
    del account.lines[16]  # taken back
    clock.shift(timedelta(days=1))
    report = pipeline.run(settings)

    assert report.exit_code == 0
    assert total(settings) == sum(one.cost_total for one in account.lines)
    ledger = ask(
        settings,
        "select window_start::date, count(*), count(*) filter (where is_current) from ops.loads "
        "where resource = 'usage' group by 1 order by 1",
    )
    assert ledger == [
        (truth.day(21), 1, 1),
        (truth.day(22), 2, 1),
        (truth.day(23), 1, 1),
        (truth.day(24), 1, 1),
    ]


def test_an_open_day_is_read_to_its_last_settled_hour_and_closed_later(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    today = truth.NOW.replace(hour=0, minute=0)
    account.lines += [line(today + timedelta(hours=hour)) for hour in (0, 9, 10)]
    pipeline.run(settings)
    provisional = (
        "select window_end, is_provisional from ops.loads "
        "where is_current and resource = 'usage' and window_start::date = '2026-11-23'"
    )
    assert ask(settings, provisional) == [(today + timedelta(hours=10), True)]
    assert total(settings) == sum(row[3] for row in truth.spend_daily(account).values())

    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    assert ask(settings, provisional) == [(today + timedelta(days=1), False)]
    assert total(settings) == sum(one.cost_total for one in account.lines)


def test_steps_one_by_one_end_in_the_same_tables_as_a_run(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    at_once, by_steps = (settings_for(sandbox.url, tmp_path / name) for name in ("once", "steps"))
    pipeline.run(at_once)
    assert pipeline.extract(by_steps).exit_code == 0
    assert pipeline.load(by_steps).exit_code == 0
    pipeline.build(by_steps)
    pipeline.publish(by_steps)

    assert all_tables(by_steps) == all_tables(at_once)
    assert pipeline.load(by_steps).outcomes == []


def test_news_of_one_resource_are_none_of_another(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings)
    assert not is_behind(settings)
    clock.shift(60)
    pipeline.extract(settings, Asked(resources=["credits"]))
    pipeline.load(settings)
    assert is_behind(settings)
    assert [name for name in RESOURCES if is_news(settings, name)] == ["credits"]


def test_prices_keep_their_history_in_touching_intervals(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    first = truth.NOW.replace(tzinfo=None)
    pipeline.run(settings)
    account.list_price(FLUX, "0.05")
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    account.list_price(FLUX, "0.06", "megapixels")
    del account.listed[VOICE]
    clock.shift(timedelta(days=1))
    pipeline.run(settings)

    history = query(
        "select endpoint_id, valid_from, valid_to, unit, unit_price, change_ratio, is_current, is_stale "
        "from marts.dim_price order by all"
    )
    second, third = first + timedelta(days=1), first + timedelta(days=2)
    assert history == [
        (FLUX, first, second, "images", Decimal("0.025"), None, False, False),
        (FLUX, second, third, "images", Decimal("0.05"), Decimal(2), False, False),
        (FLUX, third, None, "megapixels", Decimal("0.06"), None, True, False),
        (VOICE, first, None, "1000 characters", Decimal("0.02"), None, True, True),
    ]


def test_a_price_that_changes_within_a_day_leaves_both_snapshots(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    pipeline.run(settings)
    account.list_price(FLUX, "0.05")
    clock.shift(timedelta(hours=2))
    pipeline.run(settings, Asked(start=truth.day(22), resources=["prices"]))

    assert query("select count(*) from marts.dim_price where endpoint_id = 'fal-ai/flux/dev'") == [(2,)]


def test_list_price_is_shown_beside_the_bill_and_never_enters_it(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.list_price(FLUX, "0.5")  # the bill says 0.025
    pipeline.run(settings)
    shown = query(
        "select unit, effective_unit_price, list_unit_price, list_unit, price_difference, "
        "is_list_price_assumed from reports.rpt_spend_daily "
        "where endpoint_id = 'fal-ai/flux/dev' and usage_date = '2026-11-22' order by unit"
    )
    assert shown == [
        ("images", rounded(Decimal("0.025")), Decimal("0.5"), "images", Decimal("-0.475"), True),
        ("megapixels", Decimal("0.03"), Decimal("0.5"), "images", None, True),
    ]
    assert total(settings) == sum(one.cost_total for one in account.lines)


def test_units_that_mean_the_same_are_compared(
    clock: time_machine.Traveller, settings: Settings, query: Query
) -> None:
    pipeline.run(settings)
    assert query(
        "select distinct unit, list_unit, price_difference from reports.rpt_spend_daily "
        "where endpoint_id = 'fal-ai/kokoro'"
    ) == [("1000 characters ", "1000 characters", Decimal(0))]


def test_an_endpoint_that_pricing_does_not_know_is_found_by_halving_and_remembered(
    clock: time_machine.Traveller, settings: Settings, sandbox: Sandbox, query: Query
) -> None:
    pipeline.run(settings)  # VIDEO is used, but neither in the catalogue nor in the price list
    assert query("select endpoint_id from ops.unknown_endpoints") == [(VIDEO,)]
    assert query("select count(*) from raw.prices") == [(2,)]

    clock.shift(timedelta(days=1))
    asked = len(sandbox.requests)
    pipeline.run(settings)
    pricing = [request for request in sandbox.requests[asked:] if request.path == "/models/pricing"]
    assert [request.query["endpoint_id"] for request in pricing] == [[FLUX, VOICE]]


def test_two_accounts_in_one_warehouse_never_mix(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    other = truth.two_days()
    other.account = "Ümlaut & Söhne/../x"
    other.lines, other.requests = other.lines[:4], "other/"
    with Sandbox(other, keys={truth.OTHER_KEY: "FULL"}) as server:
        pipeline.run(settings)
        pipeline.run(settings_for(server.url, tmp_path, key=truth.OTHER_KEY))

    spent = dict(
        ask(settings, "select account, sum(cost_total) from reports.rpt_spend_daily group by 1")
    )
    assert spent == {
        "acme": sum(one.cost_total for one in account.lines),
        other.account: sum(one.cost_total for one in other.lines),
    }
    assert len(list((tmp_path / "landing").glob("[!.]*"))) == 2


def test_other_currencies_load_and_are_never_summed_with_dollars(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    euro = line(account.lines[0].hour, FLUX, "3", "0.025", currency="EUR")
    account.lines.append(euro)
    pipeline.run(settings)
    assert query(
        "select currency, sum(cost_total) from reports.rpt_spend_daily group by 1 order by 1"
    ) == [
        ("EUR", euro.cost_total),
        ("USD", sum(one.cost_total for one in account.lines[:-1])),
    ]


def test_an_account_without_usage_is_loaded_with_nothing(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines.clear()
    assert pipeline.run(settings).exit_code == 0
    loads = "select proof, count(*), sum(rows) from ops.loads where resource = 'usage' group by 1"
    assert query(loads) == [("summary", 3, 0)]
    assert query("select count(*) from reports.rpt_spend_daily") == [(0,)]


def test_the_first_and_the_last_microsecond_of_a_day_are_of_that_day(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    edges = (time.min, time.max)
    account.events = [
        replace(event, timestamp=datetime.combine(event.timestamp, edges[number % 2], UTC))
        for number, event in enumerate(truth.charges(account.lines))
    ]
    assert pipeline.run(settings).exit_code == 0
    days = Counter(event.timestamp.date() for event in account.events)
    assert query("select usage_date, count(*) from marts.fct_billing_event group by 1 order by 1") == (
        sorted(days.items())
    )
    assert verify(settings).findings == []


def test_as_many_windows_are_read_at_once_as_asked_for_and_no_more(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path, parallel=2)
    both, third, lock = threading.Barrier(2), threading.Event(), threading.Lock()
    seen, saw_a_third = list[str](), list[bool]()

    def hold_two_and_look_for_a_third(request: Request) -> None:
        if request.path not in PROVEN or request.query.get("limit") == ["1"]:  # who signs in
            return
        with lock:
            seen.append(request.path)
            number = len(seen)
        if number > 2:
            third.set()
        else:
            both.wait(15)  # one alone breaks it, before the client asks again
            saw_a_third.append(third.wait(1))
            both.wait(15)  # whoever is answered may ask again, while the other one still looks

    sandbox.fault = hold_two_and_look_for_a_third
    assert pipeline.run(settings).exit_code == 0
    assert len(seen) > 4
    assert saw_a_third == [False, False]


def test_a_refused_key_ends_at_once_with_2_and_is_bound_to_no_account(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    for key in ("nobody:knows-this-key", READONLY_KEY):
        (folder := tmp_path / key[:5]).mkdir()
        settings = settings_for(sandbox.url, folder, key=key)
        asked = len(sandbox.requests)
        report = pipeline.run(settings)
        assert report.exit_code == 2
        assert "FAL_KEY" in str(report.failures[0][1])
        assert key not in str(report.failures)
        assert len(sandbox.requests) - asked <= 1 + settings.parallel
        assert ask(settings, "select count(*) from ops.accounts", opened) == [(0,)]


def test_a_billing_key_is_enough(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    assert pipeline.run(settings_for(sandbox.url, tmp_path, key=BILLING_KEY)).exit_code == 0


def test_sums_are_one_number_in_every_layer(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    pipeline.run(settings)
    spent = sum(one.cost_total for one in account.lines)
    for table in ("raw.usage", "marts.fct_usage", "reports.rpt_spend_daily"):
        assert query(f"select sum(cost_total) from {table}") == [(spent,)]


# --- Proof ----------------------------------------------------------------------------------------

Broken = Callable[[Request], Fault | None]


def is_summary(request: Request, start: str = "2026-11-22T00:00:00Z") -> bool:
    """Whether the control total of that window is asked for."""
    return request.query.get("expand") == ["summary"] and request.query["start"] == [start]


def summary(cost_total: str) -> Fault:
    """A control total of one line."""
    row = {
        "endpoint_id": FLUX, "unit": "images", "quantity": 1, "unit_price": 0.025,
        "percent_discount": None, "cost_total": float(cost_total), "currency": "USD",
    }  # fmt: skip
    body = {"summary": [row], "next_cursor": None, "has_more": False}
    return Fault(body=json.dumps(body).encode())


def one_row() -> Account:
    """An account with one row of 0.025 USD."""
    account = truth.two_days()
    account.lines = [line(datetime.fromisoformat("2026-11-22T05:00:00+00:00"))]
    return account


def run_broken(
    account: Account, folder: Path, fault: Broken, **given: object
) -> tuple[Report, Settings, Sandbox]:
    """A run against a server that breaks some of its answers."""
    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, folder, **given)
        return pipeline.run(settings, Asked(resources=["usage"])), settings, server


@pytest.mark.parametrize("said", ["0.0250000011", "0.0249999989", "0.03", "0"])
def test_rows_that_do_not_add_up_are_read_once_more_and_then_refused(
    said: str, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    report, settings, server = run_broken(
        one_row(), tmp_path, lambda request: summary(said) if is_summary(request) else None
    )
    assert report.exit_code == 3
    assert [type(error) for _, error in report.failures] == [UnprovenError]
    told = str(report.failures[0][1])
    assert told.startswith("usage, window 2026-11-22: ")
    assert "cost_total 0.025 fetched, " in told
    assert sum(is_summary(request) for request in server.requests) == 2
    assert total(settings) == 0
    assert ask(settings, "select count(*) from ops.loads where resource = 'usage'") == [(2,)]


@pytest.mark.parametrize("said", ["0.0250000005", "0.0249999995"])
def test_half_a_nano_per_row_is_rounding(
    said: str, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    report, settings, _ = run_broken(
        one_row(), tmp_path, lambda request: summary(said) if is_summary(request) else None
    )
    assert report.exit_code == 0
    assert total(settings) == Decimal("0.025")


def test_pages_that_shifted_once_are_read_again(clock: time_machine.Traveller, tmp_path: Path) -> None:
    wrong = iter([summary("99")])
    report, settings, _ = run_broken(
        one_row(), tmp_path, lambda request: next(wrong, None) if is_summary(request) else None
    )
    assert report.exit_code == 0
    assert total(settings) == Decimal("0.025")


def test_two_equal_walks_stand_in_for_a_refused_control_total(
    clock: time_machine.Traveller, account: Account, tmp_path: Path
) -> None:
    def refuse(request: Request) -> Fault | None:
        return Fault(status=403) if request.query.get("expand") == ["summary"] else None

    report, settings, _ = run_broken(account, tmp_path, refuse)
    assert report.exit_code == 0
    assert total(settings) == sum(one.cost_total for one in account.lines)
    proofs = "select distinct proof from ops.loads where resource = 'usage'"
    assert ask(settings, proofs) == [("two walks",)]


def test_an_open_day_that_does_not_add_up_yet_only_warns(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    today = "2026-11-23T00:00:00Z"
    account = one_row()
    account.lines = [line(datetime.fromisoformat(today))]
    report, settings, _ = run_broken(
        account, tmp_path, lambda request: summary("7") if is_summary(request, today) else None
    )
    assert report.exit_code == 0
    assert "still open" in caplog.text
    proofs = "select proof from ops.loads where resource = 'usage' and is_provisional"
    assert ask(settings, proofs) == [("differs",)]


# --- What fal sends now and then ------------------------------------------------------------------


def usage_page(*rows: dict[str, Any], bucket: str = "2026-11-22T05:00:00Z") -> bytes:
    """A page of one bucket."""
    series = [{"bucket": bucket, "results": list(rows)}]
    return json.dumps({"time_series": series, "next_cursor": None, "has_more": False}).encode()


def served_as(rows: bytes, total: Fault) -> Broken:
    """The 22nd is served as these bytes, with that control total."""

    def fault(request: Request) -> Fault | None:
        if is_summary(request):
            return total
        is_it = request.query.get("start") == ["2026-11-22T00:00:00Z"]
        return Fault(body=rows) if is_it else None

    return fault


PLAIN: dict[str, Any] = {
    "endpoint_id": FLUX, "unit": "images", "quantity": 1, "unit_price": 0.025, "percent_discount": None,
    "cost_subtotal": 0.025, "cost_discount": 0, "cost_total": 0.025, "cost": 0.025, "currency": "USD",
}  # fmt: skip


def test_rows_of_before_july_2026_have_their_cost_and_no_subtotal(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    old = {
        name: PLAIN[name]
        for name in ("endpoint_id", "unit", "quantity", "unit_price", "cost", "currency")
    }
    old |= {"auth_method": "legacy key"}
    _, settings, _ = run_broken(one_row(), tmp_path, served_as(usage_page(old), summary("0.025")))
    assert ask(
        settings,
        "select credential_id, percent_discount, cost_subtotal, cost_discount, cost_total "
        "from marts.fct_usage",
    ) == [("label:legacy key", None, None, None, Decimal("0.025"))]
    assert ask(settings, "select effective_unit_price from reports.rpt_spend_daily") == [(None,)]


def test_rows_outside_the_window_are_dropped_counted_and_warned_about(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = json.loads(usage_page(PLAIN))
    page["time_series"].append({"bucket": "2026-11-23T00:00:00Z", "results": [PLAIN]})
    body = json.dumps(page).encode()
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(body, summary("0.025")))
    assert report.exit_code == 0
    assert "1 rows outside the window" in caplog.text
    assert ask(settings, "select sum(dropped_rows) from ops.loads") == [(1,)]
    assert total(settings) == Decimal("0.025")


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"cost_discount": 0.01}, "cost_subtotal less cost_discount is cost_total"),
        ({"cost": 0.5}, "cost is cost_total"),
        ({"currency": "EUR"}, "currency is USD"),
        ({"currency": None}, "currency is USD"),
    ],
)
def test_odd_rows_are_kept_warned_about_and_counted(
    odd: dict[str, Any], said: str, clock: time_machine.Traveller, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    control = json.loads(summary("0.025").body or b"")
    control["summary"][0] |= {"currency": odd.get("currency", "USD")}
    fault = served_as(usage_page({**PLAIN, **odd}), Fault(body=json.dumps(control).encode()))
    report, settings, _ = run_broken(one_row(), tmp_path, fault, gate=True)
    assert report.exit_code == 0
    assert said in caplog.text
    assert ask(settings, "select sum(doubtful_rows) from ops.loads") == [(1,)]
    spent = ask(settings, "select currency, cost_total from reports.rpt_spend_daily")
    assert spent == [(odd.get("currency", "USD") or "XXX", Decimal("0.025"))]


@pytest.mark.parametrize("wrong", [{"percent_discount": 101}, {"endpoint_id": ""}, {"quantity": -1}])
def test_rows_that_cannot_be_right_refuse_their_window(
    wrong: dict[str, Any], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    fault = served_as(usage_page({**PLAIN, **wrong}), summary("0.025"))
    report, settings, _ = run_broken(one_row(), tmp_path, fault)
    assert report.exit_code == 3
    assert [type(error) for _, error in report.failures] == [DataRefusedError]
    assert "page 1 row 1" in str(report.failures[0][1])
    assert "fal request" in str(report.failures[0][1])
    assert total(settings) == 0


def test_rows_that_a_killed_run_had_landed_are_read_anew_where_fal_has_mended_them(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    broken = served_as(usage_page({**PLAIN, "quantity": -1}), summary("0.025"))
    with Sandbox(one_row(), fault=broken) as server:
        settings, asked = settings_for(server.url, tmp_path), Asked(resources=["usage"])
        assert pipeline.extract(settings, asked).exit_code == 3
        next(Path(settings.landing).rglob("discarded")).unlink()  # killed before it was refused
        server.fault = None
        clock.shift(60)
        assert pipeline.run(settings, asked).exit_code == 0
    assert total(settings) == Decimal("0.025")


def test_a_key_that_comes_twice_refuses_its_window(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    twice = usage_page(PLAIN).replace(b'"cost_total"', b'"cost_total": 9, "cost_total"')
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(twice, summary("0.025")))
    assert report.exit_code == 3
    assert "'cost_total' twice" in str(report.failures[0][1])
    assert total(settings) == 0


def test_a_recorded_charge_and_its_usage_are_loaded_and_match(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantity, nano = "2.6006458333333335", "2600646"
    where = '"endpoint_id": "fal-ai/deepfilternet3", "unit_price": 0.001'
    charge = (
        f'{{{where}, "request_id": "r-1", "timestamp": "2026-11-22T03:44:17.164745999Z", '
        f'"percent_discount": 0, "output_units": {quantity}, "cost_estimate_nano_usd": {nano}}}'
    )
    row = (
        f'{{{where}, "unit": "seconds", "quantity": {quantity}, "percent_discount": null, "cost_total": '
        '0.0026006458333333337, "cost": 0.0026006458333333337, "cost_subtotal": 0.0026006458333333337, '
        '"cost_discount": 0, "currency": "USD"}'
    )

    def fault(request: Request) -> Fault | None:
        if request.path not in ("/models/usage", "/models/billing-events"):
            return None
        is_day = request.query["start"][0].startswith("2026-11-22")
        if request.path == "/models/billing-events":
            body = f'{{"billing_events": [{charge if is_day else ""}]'
        elif is_summary(request):
            body = f'{{"summary": [{row.replace("null", "0") if is_day else ""}]'
        else:
            bucket = f'{{"bucket": "2026-11-22T03:00:00Z", "results": [{row}]}}'
            body = f'{{"time_series": [{bucket if is_day else ""}]'
        return Fault(body=f'{body}, "next_cursor": null, "has_more": false}}'.encode())

    with Sandbox(truth.Account(), fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        report = pipeline.run(settings, Asked(truth.day(22), truth.day(23)))
    assert report.exit_code == 0, report.failures
    exact = Decimal("2.600645833333")
    at = datetime(2026, 11, 22, 3, 44, 17, 164745, tzinfo=UTC)
    assert ask(
        settings, "select timestamp, quantity, cost_total, percent_discount from raw.billing_events"
    ) == [(at, exact, Decimal("0.002600646"), 0)]
    assert ask(settings, "select quantity, cost_total, percent_discount from marts.fct_usage") == [
        (exact, Decimal("0.002600645833"), None)
    ]
    assert ask(settings, "select quantity, percent_discount from marts.fct_billing_event") == [
        (exact, None)
    ]
    rounded = (
        "select resource, rounded_amounts, proof from ops.loads where rows > 0 and resource like '%s%'"
    )
    assert ask(settings, f"{rounded} and window_start = '2026-11-22 00:00:00Z' order by all") == [
        ("billing_events", 1, "summary"), ("usage", 4, "summary"),
    ]  # fmt: skip
    assert ask(settings, "select status, reason from reports.rpt_reconciliation") == [("matched", None)]
    assert "differ" not in caplog.text


@pytest.mark.parametrize(("ours", "fals"), [("null", "0"), ("0", "null"), ("0.0", "0")])
def test_no_discount_and_a_discount_of_zero_are_one(
    ours: str, fals: str, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    noted, total = b'"percent_discount": null', summary("0.025").body
    assert total is not None
    answers = served_as(
        usage_page(PLAIN).replace(noted, f'"percent_discount": {ours}'.encode()),
        Fault(body=total.replace(noted, f'"percent_discount": {fals}'.encode())),
    )
    report, settings, _ = run_broken(one_row(), tmp_path, answers)
    assert report.exit_code == 0, report.failures
    assert ask(
        settings, "select proof, count(*) from ops.loads where resource = 'usage' group by 1"
    ) == [("summary", 3)]
    assert ask(settings, "select percent_discount, cost_total from marts.fct_usage") == [
        (None, Decimal("0.025"))
    ]
    held = ask(settings, "select percent_discount from raw.usage")
    assert held == [(None if ours == "null" else 0,)]  # as fal sent it


def test_rows_of_both_no_discounts_are_one_line_of_the_fact(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    hour = account.lines[0].hour
    account.lines = [line(hour, percent_discount=discount) for discount in (None, "0", "10")]
    assert pipeline.run(settings).exit_code == 0
    assert ask(settings, "select percent_discount, quantity from marts.fct_usage order by all") == [
        (10, 1), (None, 2),
    ]  # fmt: skip
    assert verify(settings).findings == []


def test_float_noise_is_rounded_and_counted(clock: time_machine.Traveller, tmp_path: Path) -> None:
    noisy = {**PLAIN, "cost_total": 0.1 + 0.2, "cost": 0.1 + 0.2, "cost_subtotal": 0.1 + 0.2}
    report, settings, _ = run_broken(one_row(), tmp_path, served_as(usage_page(noisy), summary("0.3")))
    assert report.exit_code == 0, report.failures
    assert total(settings) == Decimal("0.3")
    assert ask(settings, "select sum(rounded_amounts) from ops.loads") == [(3,)]


# --- Files that were damaged ----------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    """Turn 64 bytes of the file over."""
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[offset : offset + 64] = bytes(byte ^ 0xFF for byte in content[offset : offset + 64])
    path.write_bytes(content)


@pytest.mark.duckdb_only("a server has no such file")
def test_a_damaged_warehouse_is_told_at_once_and_left_alone(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    flip(tmp_path / "warehouse.duckdb", 100)
    damaged = (tmp_path / "warehouse.duckdb").read_bytes()
    report = pipeline.run(settings)
    assert report.exit_code == 4
    assert "is damaged" in str(report.failures[0][1])
    assert (tmp_path / "warehouse.duckdb").read_bytes() == damaged


@pytest.mark.duckdb_only("a server has no such file")
def test_a_damaged_published_copy_is_made_anew(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    before = total(settings)
    flip(tmp_path / "spend.duckdb", 100)
    assert pipeline.publish(settings).published == str(tmp_path / "spend.duckdb")
    assert total(settings) == before


@pytest.mark.duckdb_only("a server has no such file")
def test_a_database_of_somebody_else_is_never_published_over(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    with duckdb.connect(str(tmp_path / "spend.duckdb")) as connection:
        connection.execute("create table precious as select 1 as x")
    report = pipeline.run(settings)
    assert report.exit_code == 2
    assert "FALETL_PUBLISH" in str(report.failures[0][1])
    assert ask(settings, "from precious") == [(1,)]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("delete from raw.prices", "loads of raw"),
        ("delete from raw.credits", "loads of raw"),
        ("delete from raw.models where endpoint_id = 'fal-ai/flux/dev'", "loads of raw"),
        ("update raw.usage set cost_total = cost_total + 1", "loads of raw"),
        ("update ops.loads set is_current = false where resource = 'usage'", "loads of raw"),
        (
            "insert into raw.billing_events select * from raw.billing_events limit 1",
            "grain of marts.fct_billing_event",
        ),
    ],
)
def test_a_warehouse_that_was_edited_by_hand_does_not_pass_its_checks(
    damage: str, found: str, clock: time_machine.Traveller, settings: Settings
) -> None:
    def shown() -> list[list[tuple[Any, ...]]]:
        tables = all_tables(settings).items()
        return [rows for name, rows in tables if name.startswith(("marts.", "reports."))]

    pipeline.run(settings)
    before = shown()
    with opened(settings) as connection:
        connection.execute(damage)
    with pytest.raises(CheckFailedError, match=found):
        pipeline.build(settings, full=True)
    assert shown() == before


@pytest.mark.parametrize("label", [None, "acme"])
def test_a_key_that_may_not_read_the_account_skips_the_credits(
    label: str | None, clock: time_machine.Traveller, account: Account, tmp_path: Path
) -> None:
    def refuse(request: Request) -> Fault | None:
        return Fault(status=403) if request.path == "/account/billing" else None

    with Sandbox(account, fault=refuse) as server:
        settings = settings_for(server.url, tmp_path, account=label)
        assert pipeline.run(settings).exit_code == 0
        named = pipeline.run(settings, Asked(resources=["credits"]))
    spent = dict(
        ask(settings, "select account, sum(cost_total) from reports.rpt_spend_daily group by 1")
    )
    assert spent == {label or "default": sum(one.cost_total for one in account.lines)}
    assert named.exit_code == 2


def test_days_that_were_named_first_leave_no_hole_before_them(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    assert pipeline.run(settings, Asked(truth.day(22), truth.day(23))).exit_code == 0
    assert pipeline.run(settings).exit_code == 0
    loaded = ask(
        settings,
        "select distinct resource, cast(window_start as date) from ops.loads "
        "where resource in ('usage', 'billing_events') order by all",
    )
    days = [truth.day(number) for number in (21, 22, 23)]
    assert loaded == [(name, day) for name in ("billing_events", "usage") for day in days]
