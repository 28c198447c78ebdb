"""Cursors that lose or repeat rows, the same ones on every walk: what is asked for in halves then.

An example cursor of fal's is a bare instant. Where rows of that instant do not all fit on a page, the
next page goes on behind all of them. Two equal walks prove nothing about such rows; fal's total does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import msgspec
import pytest
import time_machine
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import DataRefusedError, TamperedError, UnprovenError
from faletl.fal import client as client_module
from faletl.fal.client import FalClient
from faletl.landing import extracts
from faletl.line.extract import fetch_until_proven
from faletl.line.fetch import RunContext
from faletl.line.plan import Task
from faletl.line.release import build_and_publish
from faletl.line.report import Report
from faletl.operations.rebuild import rebuild
from faletl.resources import BILLING_EVENTS
from faletl.sandbox import BillingEvent, Fault, Request, Sandbox, UsageLine
from faletl.sandbox.server import answer, event_row, to_json
from faletl.selection import Asked
from faletl.staging.window import stage_window
from faletl.windows import Window
from tests import truth
from tests.conftest import all_tables, ask, settings_for
from tests.truth import KEY, LOGIN, line

DAY = Window.of_day(truth.day(21))
NAMED = (truth.day(21), truth.day(22))
USAGE = Asked(*NAMED, ["usage"])
CHARGES = Asked(*NAMED, ["billing_events"])
BOTH = Asked(*NAMED, ["usage", "billing_events"])
EVENTS_PATH = "/models/billing-events"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "TRIES", 2)


@dataclass
class Charges(truth.Account):
    """An account with one charge for each line, at the very instant that the line names as its hour.

    So usage of any minute is the sum of the charges in it.
    """

    lines: list[UsageLine] = field(default_factory=list)

    def billing_events(self, start: datetime, end: datetime) -> Iterable[BillingEvent]:
        """The charges of the instants asked for."""
        return [
            BillingEvent(
                timestamp=one.hour,
                request_id=f"request-{number:04d}",
                endpoint_id=one.endpoint_id,
                unit=one.unit,
                quantity=one.quantity,
                unit_price=one.unit_price,
                percent_discount=one.percent_discount,
                cost_subtotal=one.cost_subtotal,
                cost_discount=one.cost_discount,
                cost_total=one.cost_total,
                credential=one.credential,
            )
            for number, one in enumerate(self.lines)
            if start <= one.hour < end
        ]


def at(seconds: float) -> datetime:
    """So many seconds after the day began."""
    return DAY.start + timedelta(seconds=seconds)


def charged(seconds: Iterable[float], **more: Any) -> Charges:
    """A charge at each of these seconds of the day; their amounts differ, so each shows in a sum."""
    return Charges(lines=[line(at(one), quantity=str(n + 1), **more) for n, one in enumerate(seconds)])


TIES = [3600.0 * 2 + 60 * n for n in range(12)] + [3600.0 * 14] * 5 + [3600.0 * 20 + n for n in range(8)]
"""Twenty-five charges, five of them in one second: across the edge of the first page of ten."""


def loaded(settings: Settings) -> Counter[tuple[Any, ...]]:
    """The charges in the warehouse."""
    return Counter(ask(settings, "select request_id, timestamp, cost_total from raw.billing_events"))


def true_charges(account: Charges) -> Counter[tuple[Any, ...]]:
    """The charges that fal holds of the day."""
    events = account.billing_events(DAY.start, DAY.end)
    return Counter((one.request_id, one.timestamp, one.cost_total) for one in events)


def proofs(settings: Settings) -> dict[str, str]:
    """How each resource's day was proven."""
    return dict(ask(settings, "select resource, proof from ops.loads where is_current"))


def rows_asked(requests: Iterable[Request], path: str = EVENTS_PATH) -> list[Request]:
    """The requests for rows of that path."""
    return [one for one in requests if one.path == path and one.query.get("expand") != ["summary"]]


# --- Charges --------------------------------------------------------------------------------------


def test_charges_of_one_second_at_a_pages_edge_are_all_loaded(tmp_path: Path) -> None:
    account = charged(TIES)
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        report = pipeline.run(mine, BOTH)
        assert (report.exit_code, report.failures) == (0, [])
        assert loaded(mine) == true_charges(account)
        assert proofs(mine) == {"usage": "summary", "billing_events": "summary"}
        assert len(rows_asked(sandbox.requests)) < 40
        days = [one for one in sandbox.requests if one.query.get("timeframe") == ["minute"]]
        assert days
        assert all(one.query["expand"] == ["summary"] for one in days)
    assert ask(mine, "select status from reports.rpt_reconciliation") == [("matched",)]
    # Neither what was given up nor a copy of it is left: one extract, of parts that tile the day.
    (folder,) = (tmp_path / "landing/acme/billing_events/2026-11-21").iterdir()
    parts = [part.window for part in extracts.open_read(folder).manifest.parts]
    assert len(parts) > 2
    assert [one.end for one in parts[:-1]] == [one.start for one in parts[1:]]


@pytest.fixture(scope="module")
def server() -> Iterator[Sandbox]:
    """One server for all examples of a property; each sets the account and the pages."""
    with Sandbox(Charges(), has_time_cursors=True) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def client(server: Sandbox) -> Iterator[FalClient]:
    """To make a client takes longer than to ask it."""
    with FalClient(settings_for(server.url, Path())) as client:
        yield client


@profile(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seconds=st.lists(st.integers(0, 86_399).map(float), max_size=30)
    | st.lists(st.integers(50_000, 50_300).map(float), max_size=40),
    page_size=st.integers(8, 20),
)
def test_charges_at_any_instants_are_all_taken_where_a_minute_fits_on_a_page(
    server: Sandbox, client: FalClient, seconds: list[float], page_size: int
) -> None:
    busiest = max(Counter(one // 60 for one in seconds).values(), default=0)
    server.world = account = charged(seconds)
    server.page_size = max(page_size, busiest)
    origin = RunContext("acme", "run", datetime.now(UTC), 0, planned_from={}, unknown_ids={})
    with TemporaryDirectory() as folder:
        mine, task = settings_for(server.url, Path(folder)), Task(BILLING_EVENTS, DAY)
        staged = fetch_until_proven(client, mine, task, Path(folder), origin)
        with duckdb.connect() as connection:
            held = connection.execute(f"select request_id, cost_total from {staged.source}").fetchall()
    assert staged.proof == "summary"
    assert Counter(held) == Counter(
        (one.request_id, one.cost_total) for one in account.billing_events(DAY.start, DAY.end)
    )


def test_more_charges_in_a_second_than_a_page_holds_are_taken_after_two_walks_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = charged([100.0, 200.0, *[50_000.0] * 15, 60_000.0])
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, BOTH).exit_code == 0
    assert loaded(mine).total() == 3 + 10  # the first page of that minute is all that fal shows
    assert proofs(mine)["billing_events"] == "two walks"
    assert "but not with fal's usage" in caplog.text
    assert ask(mine, "select status from reports.rpt_reconciliation") == [("differs",)]


def test_what_was_asked_in_halves_proves_itself_again_in_load_and_rebuild(tmp_path: Path) -> None:
    account = charged(TIES)
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.extract(mine, BOTH).exit_code == 0
    assert pipeline.load(mine).exit_code == 0
    build_and_publish(mine, Report("run"))
    before = all_tables(mine)
    assert loaded(mine) == true_charges(account)
    assert rebuild(mine).exit_code == 0
    assert all_tables(mine) == before


def test_an_extract_in_halves_that_lacks_one_is_not_taken_for_whole(tmp_path: Path) -> None:
    account = charged(TIES)
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        pipeline.extract(mine, CHARGES)
    (folder,) = extracts.complete_reads(mine)
    landed = extracts.open_read(folder)
    assert stage_window(mine, landed, tmp_path).proof == "summary"
    parts = landed.manifest.parts
    calls = [call for call in landed.manifest.calls if call not in parts[1].calls]
    content = msgspec.json.encode(msgspec.structs.replace(landed.manifest, calls=calls))
    (folder / extracts.MANIFEST).write_bytes(content)
    with pytest.raises(TamperedError, match="does not cover its window"):
        stage_window(mine, extracts.open_read(folder), tmp_path)


def test_a_run_that_is_cut_off_among_the_halves_is_made_good_by_the_next(tmp_path: Path) -> None:
    account = charged(TIES)
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        mine = settings_for(sandbox.url, tmp_path, account="acme")
        for last in (12, 16, 22):
            sandbox.requests.clear()
            sandbox.fault = lambda _, last=last: (
                Fault(status=500) if len(sandbox.requests) > last else None
            )
            assert pipeline.run(mine, CHARGES).exit_code == 1
        sandbox.fault = None
        assert pipeline.run(mine, CHARGES).exit_code == 0
    assert loaded(mine) == true_charges(account)


def test_a_charge_that_moves_from_one_half_to_one_that_was_fetched_is_not_lost(tmp_path: Path) -> None:
    """Each half adds up at its own moment; only the total of the whole day shows it."""
    account = charged(TIES)

    def move(request: Request) -> None:
        is_second_half = request.query.get("start") == ["2026-11-21T12:00:00Z"]
        if request.path == EVENTS_PATH and is_second_half and account.lines[-1].hour > at(43_200):
            account.lines[-1] = replace(account.lines[-1], hour=at(1800))

    with Sandbox(account, page_size=10, has_time_cursors=True, fault=move) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, CHARGES).exit_code == 0
    assert account.lines[-1].hour == at(1800)
    assert loaded(mine) == true_charges(account)


def breaking(sandbox: Sandbox, request_id: str, **changed: Any) -> Callable[[Request], Fault | None]:
    """A hook that changes the fields of one charge, on whatever page it comes."""

    def hook(request: Request) -> Fault | None:
        if request.path != EVENTS_PATH:
            return None
        page = json.loads(answer(sandbox, request), parse_float=Decimal)
        for row in page["billing_events"]:
            if row["request_id"] == request_id:
                row.update(changed)
        return Fault(body=to_json(page).encode())

    return hook


def test_a_broken_row_of_no_value_does_not_keep_a_day_from_being_asked_in_halves(tmp_path: Path) -> None:
    account = charged(TIES)
    account.lines.append(line(at(40_000), quantity="0"))
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        sandbox.fault = breaking(sandbox, "request-0025", percent_discount=101)
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, CHARGES).exit_code == 0
    assert loaded(mine) == true_charges(charged(TIES))
    assert ask(mine, "select count(*) from ops.quarantine") == [(1,)]


def test_a_broken_row_of_value_refuses_the_day_once_the_halves_show_that_no_other_is_missing(
    tmp_path: Path,
) -> None:
    with Sandbox(charged(TIES), page_size=10, has_time_cursors=True) as sandbox:
        sandbox.fault = breaking(sandbox, "request-0013", cost_total=Decimal(-1))
        mine = settings_for(sandbox.url, tmp_path)
        report = pipeline.run(mine, CHARGES)
        assert report.exit_code == 3
    [(_, error)] = report.failures
    assert isinstance(error, DataRefusedError)
    assert "1 row violates fal's contract" in str(error)
    (folder,) = (tmp_path / "landing/acme/billing_events/2026-11-21").iterdir()
    assert len(extracts.open_read(folder).manifest.parts) > 2
    assert sum(page.rows for page in extracts.open_read(folder).manifest.pages("rows")) == len(TIES)


def inclusive(sandbox: Sandbox) -> Callable[[Request], Fault | None]:
    """Pages of charges whose cursor is the second of their last row, and begins with all of it again."""

    def hook(request: Request) -> Fault | None:
        if request.path != EVENTS_PATH:
            return None
        start, end = (datetime.fromisoformat(request.query[name][0]) for name in ("start", "end"))
        before = request.query.get("cursor", [end.isoformat()])[0]
        events = sorted(
            (one for one in sandbox.world.billing_events(start, end)
             if one.timestamp <= datetime.fromisoformat(before)),
            key=lambda one: (one.timestamp, one.request_id), reverse=True,
        )  # fmt: skip
        page, rest = events[:10], events[10:]
        cursor = page[-1].timestamp.isoformat() if rest else None
        rows = [event_row(one, ["auth_method", "auth_method_structured"]) for one in page]
        body = {"billing_events": rows, "next_cursor": cursor, "has_more": cursor is not None}
        return Fault(body=to_json(body).encode())

    return hook


def test_charges_that_a_cursor_repeats_are_not_doubled(tmp_path: Path) -> None:
    account = charged(TIES)
    with Sandbox(account) as sandbox:
        sandbox.fault = inclusive(sandbox)
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, BOTH).exit_code == 0
    assert loaded(mine) == true_charges(account)
    assert ask(mine, "select status from reports.rpt_reconciliation") == [("matched",)]


def test_rows_beyond_the_bounds_of_a_half_are_dropped_and_not_counted_twice(tmp_path: Path) -> None:
    account = charged(TIES)

    def widen(request: Request) -> None:
        """Answer for three hours more on either side of a half."""
        if request.path == EVENTS_PATH:
            start, end = (datetime.fromisoformat(request.query[name][0]) for name in ("start", "end"))
            if Window(start, end) != DAY:
                request.query["start"] = [(start - timedelta(hours=3)).isoformat()]
                request.query["end"] = [(end + timedelta(hours=3)).isoformat()]

    with Sandbox(account, page_size=10, has_time_cursors=True, fault=widen) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, CHARGES).exit_code == 0
    assert loaded(mine) == true_charges(account)
    dropped = ask(mine, "select dropped_rows from ops.loads where resource = 'billing_events'")
    assert dropped[0][0] > 0


def test_a_walk_of_several_pages_that_holds_more_than_usage_is_not_halved(tmp_path: Path) -> None:
    """Usage is another ledger and may be behind: no row is lost then."""
    account = charged(range(0, 40_000, 1000))

    class Behind(Charges):
        def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
            return list(super().usage(start, end))[1:]

    late = Behind(lines=account.lines)
    with Sandbox(late, page_size=10) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, CHARGES).exit_code == 0
        assert len(rows_asked(sandbox.requests)) == 2 * 5  # two walks of four pages, the first twice
    assert loaded(mine) == true_charges(late)
    assert proofs(mine) == {"billing_events": "two walks"}


def test_charges_are_asked_in_halves_and_twice_where_fal_refuses_the_total(tmp_path: Path) -> None:
    account = charged(TIES)
    with Sandbox(account, page_size=10, has_time_cursors=True) as sandbox:
        sandbox.fault = lambda request: (
            Fault(status=401) if request.query.get("expand") == ["summary"] else None
        )
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, CHARGES).exit_code == 0
    assert loaded(mine) == true_charges(account)
    assert proofs(mine) == {"billing_events": "two walks"}


# --- Usage and analytics --------------------------------------------------------------------------


def test_usage_that_a_cursor_cuts_within_an_hour_is_all_loaded_or_refused(tmp_path: Path) -> None:
    who = [KEY, LOGIN]
    lines = [
        line(at(3600 * hour), f"acme/model-{n}", str(hour + n + 1), credential=who[n % 2])
        for hour in (3, 4, 9)
        for n in range(5)
    ]
    account = truth.Account(lines=lines)
    for page_size, code in ((7, 0), (5, 0), (3, 3)):
        with Sandbox(account, page_size=page_size, has_time_cursors=True) as sandbox:
            # The total has no hours, so it is not cut: it is what fal says of all.
            sandbox.fault = whole_totals(sandbox)
            mine = settings_for(sandbox.url, tmp_path / str(page_size))
            report = pipeline.run(mine, USAGE)
        assert report.exit_code == code
        if code:
            assert isinstance(report.failures[0][1], UnprovenError)
            continue
        held = ask(mine, "select bucket, endpoint_id, cost_total from raw.usage order by all")
        assert held == sorted((one.hour, one.endpoint_id, one.cost_total) for one in lines)


def whole_totals(sandbox: Sandbox) -> Callable[[Request], Fault | None]:
    """Answer every control total on one page."""

    def hook(request: Request) -> Fault | None:
        if request.query.get("expand") != ["summary"]:
            return None
        size, sandbox.page_size = sandbox.page_size, None
        try:
            return Fault(body=answer(sandbox, request))
        finally:
            sandbox.page_size = size

    return hook


@pytest.mark.parametrize("page_size", [2, 5, 7, 40])
def test_analytics_are_asked_so_that_no_answer_takes_several_pages(
    page_size: int, tmp_path: Path
) -> None:
    """No total of fal's would show what is lost between two of them."""
    lines = [
        line(at(3600 * hour), f"acme/model-{n}") for hour in (3, 4, 9) for n in range(6) if hour + n != 5
    ]
    account = truth.Account(lines=lines)
    with Sandbox(account, page_size=page_size, has_time_cursors=True) as sandbox:
        sandbox.fault = whole_totals(sandbox)
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, Asked(*NAMED, ["billing_events", "models"])).exit_code == 0
        sandbox.page_size = None
        assert pipeline.run(mine, USAGE).exit_code == 0
        sandbox.page_size = page_size
        assert pipeline.run(mine, Asked(*NAMED, ["analytics"])).exit_code == 0
        followed = [r for r in sandbox.requests if "analytics" in r.path and "cursor" in r.query]
    assert followed == []
    counts = "select bucket, endpoint_id, request_count from raw.analytics where timeframe = 'hour'"
    assert Counter(ask(mine, counts)) == Counter((one.hour, one.endpoint_id, 1) for one in lines)
    days = "select endpoint_id, p50_duration from raw.analytics where timeframe = 'day'"
    assert Counter(ask(mine, days)) == Counter((f"acme/model-{n}", Decimal(1)) for n in range(6))


# --- What totals cannot show ----------------------------------------------------------------------


def test_rows_of_equal_amounts_that_change_places_are_put_right_by_the_next_extract(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    """While pages are walked, a charge goes from one that was read, and one like it comes on a later."""
    lines = [line(at(3600 * hour), credential=LOGIN if hour == 7 else KEY) for hour in range(4, 12)]
    account = truth.Account(lines=lines)

    def change_places(request: Request) -> None:
        if "cursor" in request.query and account.lines[0].hour == at(3600 * 4):
            del account.lines[0]
            account.lines.append(line(at(3600 * 20), credential=LOGIN))

    with Sandbox(account, page_size=3, fault=change_places) as sandbox:
        mine = settings_for(sandbox.url, tmp_path, account="acme")
        assert pipeline.run(mine, USAGE).exit_code == 0
        hours = "select bucket from raw.usage order by bucket"
        total = sum(one.cost_total for one in account.lines)
        assert ask(mine, "select sum(cost_total) from raw.usage") == [(total,)]
        true_hours = [(one.hour,) for one in account.lines]
        assert ask(mine, hours) != true_hours  # and no sum tells

        clock.shift(timedelta(days=3))
        assert pipeline.run(mine, Asked(resources=["usage"])).exit_code == 0
    assert ask(mine, hours) == true_hours
    price = account.lines[0].cost_total
    amounts = "credential_id, cost_total_before, cost_total_after"
    assert ask(mine, f"select {amounts} from ops.restatements order by credential_id") == [
        ("key:key-1", 7 * price, 6 * price),
        ("user:alice", price, 2 * price),
    ]
