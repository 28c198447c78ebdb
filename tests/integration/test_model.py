"""The whole model: charges, requests, months, owners, accounts, restatements, builds of a few days."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import SettingsError, TamperedError, UnprovenError
from faletl.models import catalogue
from faletl.models.days import Span, is_by_day, lookups, restricted
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.verify import verify
from faletl.resources import BILLING_EVENTS, RESOURCES, Kind, Resource
from faletl.sandbox import BILLING_KEY, READONLY_KEY, Calls, Fault, Request, Sandbox
from faletl.selection import Asked
from faletl.staging.digest import digest_sums
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import RAW
from tests import truth
from tests.conftest import Query, all_tables, ask, opened, settings_for, total
from tests.integration.test_rebuild import forget, history
from tests.truth import FLUX, LOGIN, NOW, VIDEO, VOICE, Account, charges, credential_id, line

DOCS = Path(__file__).parents[2] / "docs"


def at(text: str) -> datetime:
    """An instant of November 2026: `22T05`."""
    return datetime.fromisoformat(f"2026-11-{text}:00:00+00:00")


# --- Charges --------------------------------------------------------------------------------------


def charge_rows(account: Account) -> Counter[tuple[Any, ...]]:
    """What fct_billing_event must hold of the served charges, but for the unit."""
    rows: Counter[tuple[Any, ...]] = Counter()
    for one in account.billing_events(datetime.min.replace(tzinfo=UTC), NOW):
        rows[
            account.account, one.timestamp.replace(tzinfo=None), one.request_id, one.endpoint_id,
            one.quantity, one.unit_price, one.percent_discount or None, credential_id(one.credential),
            one.cost_total, int((one.cost_total * 10**9).to_integral_value()),
        ] += 1  # fmt: skip
    return rows


HELD_CHARGES = (
    "select account, requested_at, request_id, endpoint_id, quantity, unit_price, percent_discount, "
    "credential_id, cost_total, cost_estimate_nano_usd from marts.fct_billing_event"
)


def test_every_charge_is_held_once_with_every_figure(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    twin = line(at("22T05"), FLUX, "1", "0.025")
    account.lines += [twin, twin, replace(twin, credential=LOGIN)]  # exact twins, and nearly so
    assert pipeline.run(settings).exit_code == 0
    assert Counter(query(HELD_CHARGES)) == charge_rows(account)
    assert query(
        "select count(*) from (select distinct account, event_hash, event_ordinal "
        "from marts.fct_billing_event) as charges"
    ) == query("select count(*) from raw.billing_events")
    spent = sum(one.cost_total for one in account.lines)
    assert query("select sum(cost_total), min(currency) from marts.fct_billing_event") == [
        (spent, "USD")
    ]


def test_a_missing_unit_is_that_of_the_only_usage_at_its_price_else_unknown(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.lines.append(line(at("22T05"), VOICE, "2", "0.02", unit="minutes"))  # a second one
    free = replace(charges(account.lines[:1])[0], unit_price=None, request_id="no price")
    account.events = [*charges(account.lines), free]
    assert pipeline.run(settings).exit_code == 0
    units = set(
        query(
            "select usage_date, endpoint_id, unit_price, unit from marts.fct_billing_event "
            "where is_unit_inferred"
        )
    )
    assert (truth.day(22), VIDEO, Decimal("0.4"), "second") in units
    assert (truth.day(22), FLUX, Decimal("0.03"), "megapixels") in units
    assert {unit for day, endpoint, _, unit in units if (day, endpoint) == (truth.day(22), VOICE)} == {
        "unknown"
    }
    assert (truth.day(21), VOICE, Decimal("0.02"), "1000 characters ") in units
    assert {unit for *_, price, unit in units if price is None} == {"unknown"}
    assert query("select family from marts.dim_unit where unit = 'unknown'") == [("other",)]


def test_usage_that_comes_later_names_the_unit_of_a_charge(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    late = line(at("22T09"), "x/late", "1", "0.5", unit="trainings")
    account.events = charges([*account.lines, late])
    pipeline.run(settings)
    units = "select distinct unit from marts.fct_billing_event where endpoint_id = 'x/late' order by 1"
    assert query(units) == [("trainings",), ("unknown",)]
    account.lines.append(late)
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    assert query(units) == [("trainings",)]


def is_events(request: Request) -> bool:
    """Whether charges of the 22nd are asked for."""
    return request.path == "/models/billing-events" and request.query["start"] == [
        "2026-11-22T00:00:00Z"
    ]


def proofs(settings: Settings) -> list[tuple[Any, ...]]:
    """How the charges of the 22nd were proven."""
    return ask(
        settings,
        "select proof from ops.loads where resource = 'billing_events' and is_current "
        "and window_start = '2026-11-22 00:00:00+00'",
    )


def test_charges_that_differ_from_usage_are_loaded_after_two_equal_walks(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    account.events = charges(account.lines)[2:]
    clock.shift(timedelta(days=2))
    assert pipeline.run(settings, Asked(start=truth.day(21), end=truth.day(23))).exit_code == 0
    assert Counter(ask(settings, HELD_CHARGES)) == charge_rows(account)
    assert proofs(settings) == [("summary",)]  # of the 22nd; the missing ones are of the 21st
    assert "two walks agree with each other, but not with fal's usage" in caplog.text
    walks = [r for r in sandbox.requests if r.path == "/models/billing-events"]
    days = Counter(r.query["start"][0][:10] for r in walks if "cursor" not in r.query)
    # The first of several pages comes twice. A day that lacks a charge is asked for in halves.
    assert days["2026-11-22"] == 2
    assert 2 * 2 < days["2026-11-21"] < 60


def test_charges_that_change_from_walk_to_walk_are_refused(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    less = iter(Decimal(n).scaleb(-9) for n in range(1, 1000))

    def shift(request: Request) -> Fault | None:
        if is_events(request) and "cursor" not in request.query:
            nano = next(less)
            account.events = [
                replace(one, cost_total=one.cost_total - nano) for one in charges(account.lines)
            ]
        return None

    sandbox.fault = shift
    report = pipeline.run(settings)
    assert report.exit_code == 3
    assert [type(error) for _, error in report.failures] == [UnprovenError] * 2
    told = sorted(str(error)[: len("billing_events, window 2026-11-2x")] for _, error in report.failures)
    assert told == [f"billing_events, window 2026-11-{day}" for day in (21, 22)]
    assert proofs(settings) == []
    assert total(settings) == sum(one.cost_total for one in account.lines)  # usage is not held back


def test_charges_are_proven_by_two_walks_where_the_summary_is_refused(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    sandbox.fault = lambda request: (
        Fault(status=401) if request.query.get("expand") == ["summary"] else None
    )
    assert pipeline.run(settings).exit_code == 0
    assert proofs(settings) == [("two walks",)]
    assert Counter(ask(settings, HELD_CHARGES)) == charge_rows(account)


def test_charges_are_proven_by_usage_in_dollars_alone(
    clock: time_machine.Traveller, account: Account, settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    dollars = line(at("22T05"), FLUX, "4")
    account.lines = [dollars, replace(dollars, currency="EUR")]
    pipeline.run(settings)
    assert proofs(settings) == [("summary",)]
    account.events = charges([dollars, dollars])  # as much as dollars and euros together
    clock.shift(timedelta(days=3))
    pipeline.run(settings)
    assert proofs(settings) == [("two walks",)]
    assert "two walks agree with each other, but not with fal's usage" in caplog.text


def test_one_tiny_charge_among_many_is_missed(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    many = [line(at("22T05"), FLUX, "1", "0.000000002")] * 40
    account.lines = [replace(many[0], quantity=Decimal(40), cost_total=Decimal("0.00000008"))]
    account.events = [one for one in charges(many) if one.cost_total][:-1]
    pipeline.run(settings)
    assert proofs(settings) == [("two walks",)]


# --- Requests -------------------------------------------------------------------------------------

BROKEN = "acme/always-fails"


def failures(hour: datetime, count: int = 3) -> Calls:
    """Requests that only fail: no usage, no charge."""
    return Calls(hour, BROKEN, user_error_count=1, timeout_error_count=count - 1, cold_boot_count=1)


def asked_ids(sandbox: Sandbox, since: int = 0) -> dict[str, set[str]]:
    """The endpoint ids that analytics were asked for, by day."""
    asked: dict[str, set[str]] = {}
    for request in sandbox.requests[since:]:
        if request.path == "/models/analytics":
            asked.setdefault(request.query["start"][0][:10], set()).update(request.query["endpoint_id"])
    return asked


def test_requests_are_counted_by_hour_and_their_durations_told_by_day(
    clock: time_machine.Traveller, account: Account, settings: Settings, query: Query
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [failures(at("22T03")), failures(at("22T04"), 5)]
    assert pipeline.run(settings).exit_code == 0
    served = {
        (account.account, one.hour.replace(tzinfo=None), one.endpoint_id): (
            one.request_count, one.success_count, one.user_error_count, one.error_count,
            one.timeout_error_count, one.cold_boot_count,
        )
        for one in account.calls(at("21T00"), at("23T10"))
    }  # fmt: skip
    held = query(
        "select account, used_at, endpoint_id, request_count, success_count, user_error_count, "
        "error_count, timeout_error_count, cold_boot_count from marts.fct_requests"
    )
    assert {row[:3]: row[3:] for row in held} == served
    # Three hours with one, two or three requests of 1, 2, 3 seconds each.
    assert query(
        "select usage_date, p50_duration, p90_duration from marts.fct_latency "
        f"where endpoint_id = '{FLUX}' order by 1"
    ) == [(truth.day(21), Decimal(2), Decimal(3)), (truth.day(22), Decimal(2), Decimal(3))]


def test_endpoints_that_only_fail_are_found_by_asking_for_the_catalogue_now_and_then(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.catalogue += [{"endpoint_id": f"acme/unused-{number:03d}"} for number in range(120)]
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [failures(at("22T03"))]
    pipeline.run(settings)
    asked = asked_ids(sandbox)
    assert BROKEN in asked["2026-11-22"]  # a closed day: all of the catalogue
    assert len(asked["2026-11-23"]) == 3  # the open day: what was used
    batches = [r.query["endpoint_id"] for r in sandbox.requests if r.path == "/models/analytics"]
    assert max(map(len, batches)) <= 50

    account.failing.append(failures(at("22T04")))
    since = len(sandbox.requests)
    clock.shift(timedelta(days=3))
    pipeline.run(settings)
    asked = asked_ids(sandbox, since)
    assert BROKEN in asked["2026-11-22"]  # held: asked again
    assert len(asked["2026-11-22"]) == 4  # and no more than that within a week
    assert len(asked["2026-11-24"]) > 100
    assert ask(settings, f"select count(*) from marts.fct_requests where endpoint_id = '{BROKEN}'") == [
        (2,)
    ]
    since = len(sandbox.requests)
    clock.shift(timedelta(days=9))
    pipeline.run(settings)
    assert len(asked_ids(sandbox, since)["2026-11-22"]) > 100


def test_what_an_id_was_not_asked_for_stays(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [failures(at("22T03"))]
    pipeline.run(settings)
    account.catalogue.pop()
    account.failing.clear()  # fal forgets the endpoint: 404
    account.lines.append(line(at("22T05"), FLUX))
    clock.shift(timedelta(days=1))
    assert pipeline.run(settings).exit_code == 0
    held = f"select request_count from marts.fct_requests where endpoint_id = '{BROKEN}'"
    assert ask(settings, held) == [(3,)]
    assert verify(settings).findings == []
    before = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == before
    prune(settings)
    rebuild(settings)
    assert all_tables(settings) == before


def test_a_key_without_analytics_leaves_them_out_unless_they_are_asked_for(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = settings_for(sandbox.url, tmp_path, key=BILLING_KEY)
    assert pipeline.run(settings).exit_code == 0
    assert "analytics is left out" in caplog.text
    assert "models:metrics:read" in caplog.text
    assert total(settings) == sum(one.cost_total for one in account.lines)
    assert pipeline.run(settings, Asked(resources=["analytics"])).exit_code == 2

    both = settings_for(sandbox.url, tmp_path, key=BILLING_KEY, metrics_key=READONLY_KEY)
    assert pipeline.run(both).exit_code == 0
    assert ask(both, "select count(*) > 0 from marts.fct_requests") == [(True,)]


def test_requests_that_fal_takes_back_are_gone_though_their_endpoint_was_unknown_meanwhile(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [failures(at("22T03"))]
    pipeline.run(settings)
    day = Asked(start=truth.day(22), end=truth.day(23), resources=["analytics"])
    held = f"select request_count from marts.fct_requests where endpoint_id = '{BROKEN}'"
    account.catalogue.pop()
    account.failing.clear()  # unknown to fal: what is held stays
    clock.shift(60)
    assert pipeline.run(settings, day).exit_code == 0
    assert ask(settings, held) == [(3,)]
    account.catalogue.append({"endpoint_id": BROKEN})  # known again, without a request
    clock.shift(timedelta(days=8))
    assert pipeline.run(settings, day).exit_code == 0
    assert ask(settings, held) == []
    assert verify(settings).findings == []


def test_edits_of_requests_that_stayed_from_an_earlier_read_are_found(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [failures(at("22T03"))]
    pipeline.run(settings)
    account.catalogue.pop()
    account.failing.clear()
    account.lines.append(line(at("22T05"), FLUX))
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    assert verify(settings).findings == []
    before = all_tables(settings)
    with opened(settings) as connection:
        connection.execute(f"update raw.analytics set request_count = 9 where endpoint_id = '{BROKEN}'")
    pipeline.build(settings, full=True)
    assert [
        finding for finding in verify(settings).findings if "raw.analytics, window 2026-11-22" in finding
    ]
    rebuild(settings, truth.day(22))
    pipeline.publish(settings)
    assert all_tables(settings) == before


@pytest.mark.parametrize(("count", "is_first_listed_unpriced"), [(60, False), (130, False), (60, True)])
def test_many_unknown_endpoints_are_isolated_and_remembered(
    count: int, is_first_listed_unpriced: bool,
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings,
) -> None:  # fmt: skip
    if is_first_listed_unpriced:
        account.catalogue.insert(0, {"endpoint_id": "aa/000"})
        sandbox.fault = lambda request: (
            Fault(status=404)
            if request.path == "/models/pricing" and "aa/000" in request.query["endpoint_id"]
            else None
        )
    account.lines += [line(at("22T05"), f"aa/{number:03d}") for number in range(count)]
    assert pipeline.run(settings).exit_code == 0
    unknown = "select count(*) from ops.unknown_endpoints where resource = 'prices'"
    assert ask(settings, unknown) == [(count + 1,)]  # and VIDEO
    assert ask(settings, "select count(*) from raw.prices") == [(2,)]
    asked = len(sandbox.requests)
    clock.shift(timedelta(days=1))
    assert pipeline.run(settings).exit_code == 0
    assert sum(r.path == "/models/pricing" for r in sandbox.requests[asked:]) == 1


def test_a_path_that_is_gone_is_not_taken_for_unknown_endpoints(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.lines += [line(at("22T05"), f"aa/{number:03d}") for number in range(60)]
    sandbox.fault = lambda request: Fault(status=404) if request.path == "/models/pricing" else None
    report = pipeline.run(settings)
    assert report.exit_code == 3
    assert ["/models/pricing seems to be gone" in str(error) for _, error in report.failures] == [True]
    assert sum(request.path == "/models/pricing" for request in sandbox.requests) < 150
    assert ask(settings, "select count(*) from ops.unknown_endpoints where resource = 'prices'") == [
        (0,)
    ]


def test_the_whole_catalogue_counts_as_asked_for_only_if_it_was(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.catalogue.append({"endpoint_id": BROKEN})
    account.failing = [failures(at("22T03"))]
    sandbox.fault = lambda request: Fault(status=400) if request.path == "/models" else None
    assert pipeline.run(settings).exit_code == 3
    sandbox.fault = None
    clock.shift(timedelta(days=2))
    assert pipeline.run(settings).exit_code == 0
    assert ask(settings, f"select count(*) from marts.fct_requests where endpoint_id = '{BROKEN}'") == [
        (1,)
    ]


def test_values_reach_a_written_query_of_the_warehouse(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings)
    with open_warehouse(settings).reading() as connection:
        assert connection is not None
        found = connection.execute(sa.text("select :x + 1, :y"), {"x": 4, "y": "it's"}).all()
    assert found == [(5, "it's")]


# --- Months and owners ----------------------------------------------------------------------------


def test_the_change_of_a_month_is_split_into_price_volume_and_new_or_gone(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    september, october = (datetime(2026, month, 15, 7, tzinfo=UTC) for month in (9, 10))
    account.lines = [
        line(september, FLUX, "3", "0.025"), line(october, FLUX, "7", "0.031"),
        line(september, VOICE, "7", "0.3", unit="s"), line(october, VOICE, "1", "0.3", unit="s"),
        line(september, VIDEO, "2", "0.4"),  # gone
        line(october, "x/new", "0.1", "0.7"),
        line(september, "x/free", "0", "0"), line(october, "x/free", "5", "0.1"),
    ]  # fmt: skip
    settings = settings_for(sandbox.url, tmp_path)
    pipeline.run(settings, Asked(start=date(2026, 9, 15), end=date(2026, 9, 16)))
    pipeline.run(settings, Asked(start=date(2026, 10, 15), end=date(2026, 10, 16)))
    november = pipeline.run(settings, Asked(resources=["usage"]))  # everything is gone
    assert november.exit_code == 0
    rows = ask(
        settings,
        "select usage_month, endpoint_id, cost_total, previous_cost_total, cost_change, "
        "change_from_price, change_from_volume, change_from_new_or_gone, quantity "
        "from reports.rpt_spend_monthly where usage_month >= '2026-10-01'",
    )
    months = {row[:2]: row[2:] for row in rows}
    first, second = date(2026, 10, 1), date(2026, 11, 1)
    with localcontext(prec=60):
        for endpoint, q0, c0, q1, c1 in (
            (FLUX, "3", "0.075", "7", "0.217"),
            (VOICE, "7", "2.1", "1", "0.3"),
        ):
            exact = (Fraction(q1) - Fraction(q0)) * Fraction(c0) / Fraction(q0)
            volume = truth.quotient(Decimal(exact.numerator), Decimal(exact.denominator))
            change = Decimal(c1) - Decimal(c0)
            assert volume is not None
            assert months[first, endpoint][2:6] == (change, change - volume, volume, 0)
    zero = Decimal(0)
    assert months[first, VIDEO][:6] == (
        zero,
        Decimal("0.8"),
        Decimal("-0.8"),
        zero,
        zero,
        Decimal("-0.8"),
    )
    assert months[first, "x/new"][2:6] == (Decimal("0.07"), zero, zero, Decimal("0.07"))
    assert months[first, "x/free"][2:6] == (Decimal("0.5"), zero, zero, Decimal("0.5"))
    assert (second, VIDEO) not in months  # gone once, not every month since
    assert months[second, FLUX][:6] == (
        zero, Decimal("0.217"), Decimal("-0.217"), zero, zero, Decimal("-0.217")
    )  # fmt: skip


def test_a_line_is_gone_only_in_a_month_that_was_read(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    september, november = datetime(2026, 9, 15, 7, tzinfo=UTC), at("15T07")
    account.lines = [line(september, FLUX, "3"), line(november, FLUX, "4")]
    settings = settings_for(sandbox.url, tmp_path)
    for day in (september.date(), november.date()):
        asked = Asked(start=day, end=day + timedelta(days=1), resources=["usage"])
        assert pipeline.run(settings, asked).exit_code == 0
    months = "select usage_month, cost_total, change_from_new_or_gone from reports.rpt_spend_monthly"
    assert ask(settings, f"{months} order by 1") == [
        (date(2026, 9, 1), Decimal("0.075"), Decimal("0.075")),
        (date(2026, 11, 1), Decimal("0.1"), Decimal("0.1")),
    ]


def test_spend_by_credential_names_owners_and_shows_who_has_none(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    owners = tmp_path / "owners.csv"
    owners.write_text(
        "account,credential_id,owner,team,cost_centre\n"
        ",key:key-1,backend,platform,CC-1\n"
        "acme,key:key-1,Ann,platform,CC-2\n"
        "other,user:alice,nobody,,\n"
    )
    settings = settings_for(sandbox.url, tmp_path, owners=owners)
    pipeline.run(settings)
    spent: dict[str, Decimal] = {}
    for one in account.lines:
        who = credential_id(one.credential)
        spent[who] = spent.get(who, Decimal(0)) + one.cost_total
    assert ask(
        settings,
        "select credential_id, credential_label, owner, team, cost_centre, sum(cost_total) "
        "from reports.rpt_spend_by_credential group by 1, 2, 3, 4, 5 order by all",
    ) == [
        ("key:key-1", "backend", "Ann", "platform", "CC-2", spent["key:key-1"]),
        ("none", "None", "UNMAPPED", "UNMAPPED", "UNMAPPED", spent["none"]),
        ("user:alice", "User token", "UNMAPPED", "UNMAPPED", "UNMAPPED", spent["user:alice"]),
    ]
    owners.write_text("account,credential_id,owner,team,cost_centre\n,none,web,,\n")
    pipeline.build(settings)
    pipeline.publish(settings)
    owned = "select owner, team from marts.dim_credential where credential_id = 'none'"
    assert ask(settings, owned) == [("web", "UNMAPPED")]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b",key:key-1,a\0b,,\n", "line 3, has a NUL character; delete it"),
        (b",key:key-1,Zo\xeb,,\n", "line 3, is not UTF-8 text; save the file as UTF-8"),
        (b",key:key-1,Acme, Inc.,team,CC-1\n", "line 3, .*quote those that have a comma in them"),
        (b",key:key-1," + b"x" * 200_000 + b",,\n", "line 3, .*field limit"),
    ],
)  # fmt: skip
def test_a_line_of_a_seed_that_cannot_be_meant_is_refused_by_its_number(
    content: bytes, why: str, clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    before = all_tables(settings)
    owners = tmp_path / "owners.csv"
    owners.write_bytes(b"account,credential_id,owner,team,cost_centre\n,none,web,,\n" + content)
    with pytest.raises(SettingsError, match=f"^FALETL_OWNERS: {owners}, {why}"):
        pipeline.build(settings.model_copy(update={"owners": owners}))
    assert all_tables(settings) == before


def test_two_accounts_with_the_same_endpoints_and_labels_never_mix(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    other = truth.two_days()
    other.account, other.requests = "other", "other's "
    other.lines = [replace(one, quantity=one.quantity + 1) for one in other.lines[:7]]
    pipeline.run(settings)
    key = "another-key:of-another-account"
    with Sandbox(other, keys={key: "FULL"}) as server:
        pipeline.run(settings_for(server.url, tmp_path, key=key))
    for one in (account, other):
        mine = f"where account = '{one.account}'"
        assert Counter(ask(settings, f"{HELD_CHARGES} {mine}")) == charge_rows(one)
        for table in ("marts.fct_usage", "reports.rpt_spend_monthly", "reports.rpt_spend_by_credential"):
            assert ask(settings, f"select sum(cost_total), sum(quantity) from {table} {mine}") == [
                (sum(x.cost_total for x in one.lines), sum(x.quantity for x in one.lines))
            ]
    assert ask(settings, "select count(*), count(distinct label) from marts.dim_credential") == [(6, 3)]


# --- Late and restated data -----------------------------------------------------------------------

CHANGES = (
    "select window_start::date, endpoint_id, unit, credential_id, quantity_before, quantity_after, "
    "cost_total_before, cost_total_after from ops.restatements where resource = 'usage' order by all"
)


def test_what_a_read_changed_is_kept_line_by_line(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    account.lines = [line(at("22T05"), FLUX, "3"), line(at("22T06"), VOICE), line(at("23T05"), FLUX)]
    pipeline.run(settings)
    account.lines[0] = line(at("22T05"), FLUX, "5")  # restated
    account.lines[1] = line(at("22T07"), VIDEO, "2", credential=LOGIN)  # one gone, one late
    account.lines[2] = line(at("23T05"), FLUX, "9")  # of a day that was open: no restatement
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    zero, one = Decimal(0), Decimal(1)
    assert ask(settings, CHANGES) == [
        (truth.day(22), FLUX, "images", "key:key-1", Decimal(3), Decimal(5), Decimal("0.075"),
         Decimal("0.125")),
        (truth.day(22), VOICE, "images", "key:key-1", one, zero, Decimal("0.025"), zero),
        (truth.day(22), VIDEO, "images", "user:alice", zero, Decimal(2), zero, Decimal("0.05")),
    ]  # fmt: skip
    assert (
        ask(
            settings,
            "select sum(cost_total_after - cost_total_before) from ops.restatements group by resource",
        )
        == [(Decimal("0.075"),)] * 2
    )  # of usage and of the charges


def documented(name: str, number: int) -> str:
    """The SQL of that block of a page of the docs."""
    blocks = re.findall(r"```sql\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)
    return str(blocks[number])


def as_of(sql: str, then: datetime) -> str:
    """A documented query, asked of November 2026 as it was at that instant."""
    sql = sql.replace("2026-03-01", "2026-11-01").replace("2026-04-01", "2026-12-01")
    return sql.replace("2026-04-02 09:00:00", f"{then:%Y-%m-%d %H:%M:%S}")


def test_the_documented_query_tells_what_a_month_looked_like_at_an_instant(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    seen: list[tuple[datetime, dict[tuple[str, str], Decimal]]] = []
    account.lines = [line(at(f"{day}T05"), FLUX, "3") for day in (21, 22)]
    for number in range(5):
        pipeline.run(settings, Asked(start=truth.day(21), end=truth.day(23)))
        spent: dict[tuple[str, str], Decimal] = {}
        for one in account.lines:
            key = (one.endpoint_id, one.unit)
            spent[key] = spent.get(key, Decimal(0)) + one.cost_total
        clock.shift(60)
        seen.append((datetime.now(UTC), dict(spent)))
        account.lines.append(line(at(f"21T{number + 6:02d}"), VIDEO, str(number + 1)))
        account.lines[number % 2] = line(at(f"{21 + number % 2}T05"), FLUX, str(10 * number))
        clock.shift(timedelta(hours=5))
    query = documented("restatements.md", 1)
    for is_rebuilt in (False, True):
        if is_rebuilt:
            rebuild(settings)
        for then, spent in seen:
            rows = ask(settings, as_of(query, then))
            assert {(row[1], row[2]): row[5] for row in rows} == {k: v for k, v in spent.items() if v}


FEEDS = Asked(resources=["usage", "billing_events"])


def test_plain_runs_end_at_the_truth_however_late_it_came(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    for passed in (1, 1, 2, 5, 13, 34, 40):  # days from one run to the next
        pipeline.run(settings, FEEDS)
        now = datetime.now(UTC)
        if passed < 20:
            start = now.replace(hour=0, minute=0) - timedelta(days=2)
            account.lines += [line(start + timedelta(hours=hour), VIDEO, "2") for hour in (1, 30, 50)]
            account.lines[len(account.lines) // 2] = line(start, VOICE, str(passed))
        clock.shift(timedelta(days=passed))
    pipeline.run(settings, FEEDS)
    now = datetime.now(UTC)
    held = ask(
        settings, "select used_at, endpoint_id, sum(cost_total) from marts.fct_usage group by 1, 2"
    )
    served: dict[tuple[datetime, str], Decimal] = {}
    for one in account.lines:
        key = (one.hour.replace(tzinfo=None), one.endpoint_id)
        served[key] = served.get(key, Decimal(0)) + one.cost_total
    assert {row[:2]: row[2] for row in held} == served
    assert ask(settings, "select sum(cost_total) from marts.fct_billing_event") == [
        (sum(served.values()),)
    ]
    reads = Counter(
        r.query["start"][0] for r in sandbox.requests
        if r.path == "/models/billing-events" and "cursor" not in r.query
    )  # fmt: skip
    assert max(reads.values()) <= 18  # of a day watched for 90; after a change the hours double again


# --- Builds of a few days -------------------------------------------------------------------------


def last_build(settings: Settings) -> tuple[Any, ...]:
    """Days of the newest build, and whether it made everything anew."""
    return ask(settings, "select days, is_full from ops.builds order by fencing_token desc limit 1")[0]


def test_a_build_touches_only_the_days_that_changed(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    assert last_build(settings) == (3, True)
    account.lines.append(line(at("21T05"), VIDEO, "4"))
    clock.shift(60)
    report = pipeline.run(settings, Asked(start=truth.day(21), resources=["usage"]))
    assert report.build is not None
    assert last_build(settings) == (1, False)
    with opened(settings) as connection:  # a day is left as it was
        connection.execute("update marts.fct_usage set quantity = 77 where usage_date = '2026-11-22'")
    account.lines.append(line(at("21T06"), VIDEO, "4"))
    clock.shift(60)
    pipeline.run(settings, Asked(start=truth.day(21), resources=["usage"]))
    assert ask(
        settings, "select distinct quantity from marts.fct_usage where usage_date = '2026-11-22'"
    ) == [(Decimal(77),)]
    assert [finding for finding in verify(settings).findings if "marts.fct_usage, 2026-11" in finding]
    pipeline.build(settings, full=True)
    assert verify(settings).findings == []


def test_reports_stay_as_they_are_on_other_days_until_what_they_look_up_changes(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    reports = ("rpt_spend_daily", "rpt_spend_by_credential")
    other_days = "from reports.{} where usage_date = '2026-11-22' and quantity <> 77"

    def run(hour: int) -> list[int]:
        """A late line of the 21st; how many rows of the 22nd were made anew, after they were edited."""
        for report in reports:
            with opened(settings) as connection:
                connection.execute(f"update reports.{report} set quantity = 77")
        account.lines.append(line(at(f"21T{hour:02d}"), VIDEO, "4"))
        clock.shift(60)
        asked = Asked(start=truth.day(21), resources=["usage", "models", "prices"])
        assert pipeline.run(settings, asked).exit_code == 0
        return [ask(settings, "select count(*) " + other_days.format(one))[0][0] for one in reports]

    pipeline.run(settings)
    assert run(5) == [0, 0]
    account.catalogue[0]["metadata"]["display_name"] = "FLUX, renamed"
    clock.shift(timedelta(days=1))  # the catalogue is read once a day
    assert min(run(6)) > 0
    assert run(7) == [0, 0]
    account.list_price(FLUX, "0.5")
    clock.shift(timedelta(days=1))
    daily, by_credential = run(8)
    assert daily > 0 == by_credential
    pipeline.build(settings, full=True)
    assert verify(settings).findings == []


def test_days_of_a_select_are_its_select_of_those_days(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    account.lines += [line(at("22T05"), VOICE, unit="minutes"), line(at("23T05"), VIDEO, "4000")]
    pipeline.run(settings)
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        assert connection is not None
        for model in catalogue.models():
            if not (is_by_day(model) or lookups(model)):
                continue
            all_days = catalogue.translate(model.sql, warehouse.dialect)
            spans = [Span(truth.day(day), truth.day(day + 1)) for day in (21, 22, 23)]
            cut = [restricted(model.sql, span, warehouse.dialect) for span in spans]
            whole, *parts = (connection.exec_driver_sql(sql).fetchall() for sql in (all_days, *cut))
            assert Counter(chain(*parts)) == Counter(whole) != Counter()


def test_full_builds_and_rebuilds_give_the_tables_that_a_story_of_runs_gave(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings, tmp_path: Path
) -> None:
    for day in range(4):
        now = datetime.now(UTC)
        account.lines.append(line(now.replace(hour=3, minute=0), VIDEO, str(day + 1)))
        account.lines[day] = line(account.lines[day].hour, FLUX, str(day + 2), "0.03")
        account.list_price(FLUX, f"0.0{day + 1}")
        assert pipeline.run(settings).exit_code == 0
        clock.shift(timedelta(hours=17))
    before, (loads, restatements) = all_tables(settings), history(settings)
    assert restatements

    pipeline.build(settings, full=True)
    pipeline.publish(settings)
    assert all_tables(settings) == before
    sandbox.fault = lambda _: Fault(drop=True)  # the network is not needed
    rebuild(settings)
    assert all_tables(settings) == before
    assert history(settings) == [loads, restatements]
    kept = list((tmp_path / "landing").rglob("manifest.json"))
    dropped, size = prune(settings, is_dry=True)
    assert list((tmp_path / "landing").rglob("manifest.json")) == kept
    assert prune(settings) == (dropped, size)
    assert dropped
    assert size
    forget(settings)
    rebuild(settings)
    assert all_tables(settings) == before
    assert history(settings)[1] == restatements
    assert verify(settings).findings == []


def test_raw_rows_that_were_edited_are_found_and_a_day_is_made_anew(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings)
    before = all_tables(settings)
    for damage, told in (
        ("update raw.usage set cost_total = cost_total + 1 where {}", "usage, window 2026-11-22"),
        (
            "delete from raw.billing_events where _row = 2 and {}",
            "raw.billing_events, window 2026-11-22",
        ),
        ("update raw.analytics set success_count = 9 where {}", "analytics, window 2026-11-22"),
        ("update raw.usage set _row = 999 where {}", "row 999 was never landed"),
        ("delete from ops.loads where resource = 'usage' and {}", "which is not in ops.loads"),
    ):
        table = damage.split()[1 if damage.startswith("update") else 2]
        time = {"raw.billing_events": "timestamp", "ops.loads": "window_start"}.get(table, "bucket")
        first, end = (f"timestamptz '2026-11-{day} 00:00:00Z'" for day in (22, 23))
        of_one_day = f'"{time}" >= {first} and "{time}" < {end}'
        with opened(settings) as connection:
            connection.execute(damage.format(of_one_day))
        assert any(told in finding for finding in verify(settings).findings), damage
        rebuild(settings, truth.day(22))
        assert verify(settings).findings == []
        assert all_tables(settings) == before


@pytest.mark.duckdb_only("the digest is DuckDB's in both warehouses")
@pytest.mark.parametrize("resource", RESOURCES.values(), ids=RESOURCES)
def test_the_digest_is_of_every_column(
    clock: time_machine.Traveller, settings: Settings, resource: Resource
) -> None:
    pipeline.run(settings)
    digests = f"select {digest_sums(resource)} from {resource.table}"
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///")) as connection:
        connection.execute("set TimeZone = 'UTC'")
        before = connection.execute(digests).fetchone()
        for column in RAW[resource.name].columns:
            if column.name in ("_account", "_load_id", "_page", "_row", "_snapshot_at"):
                continue  # which say where a row comes from
            for other in (f'case when "{column.name}" is null then {{}} end', "{}"):
                value = {
                    sa.DateTime: "timestamptz '1999-01-01 00:00:00Z'", sa.Text: "'other'",
                }.get(type(column.type), "7")  # fmt: skip
                connection.execute("begin")
                change = f'update {resource.table} set "{column.name}" = {other.format(value)}'
                connection.execute(change)
                assert connection.execute(digests).fetchone() != before, change
                connection.execute("rollback")


def test_texts_that_run_into_each_other_have_digests_of_their_own() -> None:
    first, second, *others = (c.name for c in BILLING_EVENTS.columns if c.kind is Kind.TEXT)
    given = (("a\x1fb", "c"), ("a", "b\x1fc"), ("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""))
    found = set()
    with duckdb.connect() as connection:
        connection.execute(
            "create table charges (_hash text, _ordinal int, "
            + ", ".join(f'"{name}" text' for name in (first, second, *others))
            + ", "
            + ", ".join(
                f'"{c.name}" {"timestamptz" if c.kind is Kind.INSTANT else "decimal(38, 12)"}'
                for c in BILLING_EVENTS.columns
                if c.kind is not Kind.TEXT
            )
            + ")"
        )
        for texts in given:
            connection.execute("delete from charges")
            connection.execute(f"insert into charges ({first}, {second}) values (?, ?)", texts)
            sums = connection.execute(f"select {digest_sums(BILLING_EVENTS)} from charges").fetchone()
            found.add(sums)
    assert len(found) == len(given)


def test_landed_pages_that_are_gone_are_found_and_refuse_a_rebuild(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    before = all_tables(settings)
    page = next((tmp_path / "landing/acme/usage/2026-11-22").rglob("rows-*"))
    page.write_bytes(page.read_bytes()[:-1] + b"x")
    assert any(page.name in finding for finding in verify(settings).findings)
    for day in (None, truth.day(22)):
        with pytest.raises(TamperedError, match=re.escape(page.name)):
            rebuild(settings, day)
    shutil.rmtree(page.parent)
    for day in (None, truth.day(22)):
        with pytest.raises(TamperedError, match="are gone"):
            rebuild(settings, day)
    assert all_tables(settings) == before
    assert len(verify(settings).findings) == 1


# --- What a run would do, and a server of last year -----------------------------------------------


def test_a_dry_run_tells_what_a_run_then_does(
    clock: time_machine.Traveller, sandbox: Sandbox, settings: Settings, tmp_path: Path
) -> None:
    told = {one.resource: one for one in pipeline.dry_run(settings)}
    assert [request.path for request in sandbox.requests] == ["/account/billing"]
    assert not (tmp_path / "warehouse.duckdb").exists()
    assert not (tmp_path / "landing").exists()
    report = pipeline.run(settings)
    done = Counter(outcome.resource for outcome in report.outcomes)
    assert {name: len(one.windows) for name, one in told.items()} == done
    assert {name for name, one in told.items() if one.is_guess} == {"analytics", "prices"}
    assert told["prices"].calls == 28  # of 1,400 endpoints
    clock.shift(60)
    asked = len(sandbox.requests)
    again = {one.resource: one for one in pipeline.dry_run(settings)}
    assert set(again) == {"usage", "billing_events", "credits", "analytics"}
    assert len(sandbox.requests) == asked + 1
    pipeline.run(settings)
    calls = Counter(request.path for request in sandbox.requests[asked + 1 :])
    assert calls["/models/analytics"] == again["analytics"].calls
    assert not any(one.is_guess for one in again.values())


@pytest.mark.parametrize(("page_size", "within"), [(100, 0), (4, 0.25)])
def test_a_dry_run_counts_the_second_walk_where_fal_refuses_the_control_total(
    page_size: int, within: float, clock: time_machine.Traveller, sandbox: Sandbox, settings: Settings
) -> None:
    """Of days of several pages, which are asked for in parts, about."""
    sandbox.page_size = page_size
    sandbox.fault = lambda request: (
        Fault(status=401) if request.query.get("expand") == ["summary"] else None
    )
    days = Asked(start=truth.day(21), end=truth.day(23), resources=["usage", "billing_events"])
    pipeline.run(settings, days)
    told = sum(one.calls for one in pipeline.dry_run(settings, days))
    asked = len(sandbox.requests)
    clock.shift(60)
    pipeline.run(settings, days)
    assert len(sandbox.requests) - asked - 1 == pytest.approx(told, rel=within)  # and the account's name


@pytest.mark.parametrize(
    "as_of", [date(2026, 4, 1), date(2026, 6, 20), date(2026, 7, 25), date(2026, 8, 10)]
)
def test_the_api_of_earlier_months_loads_too(
    as_of: date, clock: time_machine.Traveller, account: Account, tmp_path: Path
) -> None:
    with Sandbox(account, as_of=as_of) as server:
        settings = settings_for(server.url, tmp_path)
        report = pipeline.run(settings)
    assert report.exit_code == 0, report.failures
    spent = sum(one.cost_total for one in account.lines)
    assert total(settings) == spent
    # Charges were told in whole nano-dollars then.
    events = ask(
        settings, "select sum(cost_total), bool_and(cost_subtotal is null) from marts.fct_billing_event"
    )
    rounded = sum(
        ((one.cost_total * 10**9).to_integral_value() / 10**9 for one in charges(account.lines)),
        Decimal(0),
    )
    assert events == [(rounded, True) if as_of < date(2026, 7, 30) else (spent, False)]
    if as_of < date(2026, 7, 21):
        assert ask(settings, "select bool_and(cost_subtotal is null) from marts.fct_usage") == [(True,)]
    assert ask(settings, "select count(*) > 0 from marts.fct_latency where p50_duration > 0") == [
        (True,)
    ]
