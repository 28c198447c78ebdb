"""Days that change while their pages are walked: what is taken is what fal held at one moment.

The cursors of the sandbox are positions, so a row that comes or goes on a page that was walked already
moves all rows behind it: one is lost at the page's edge, or comes twice. `FALETL_TEST_WALKS=10000` walks
as many seeded days of each feed, by the very code of a run, over HTTP.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import ContractError, UnprovenError
from faletl.fal import client as client_module
from faletl.fal.client import FalClient
from faletl.landing import extracts
from faletl.line.extract import fetch_until_proven
from faletl.line.fetch import RunContext
from faletl.line.plan import Task
from faletl.resources import BILLING_EVENTS, USAGE, Resource
from faletl.sandbox import Fault, Request, Sandbox, UsageLine
from faletl.sandbox.server import answer, to_json
from faletl.selection import Asked
from faletl.staging.window import Staged, stage_window
from faletl.windows import Window
from tests import truth
from tests.conftest import ask, settings_for, total
from tests.truth import FLUX, KEY, LOGIN, VIDEO, Account, charges, line

WALKS = int(os.environ.get("FALETL_TEST_WALKS", "20"))
DAY = Window.of_day(truth.day(21))

Rows = Counter[tuple[Any, ...]]

both_feeds = pytest.mark.parametrize("resource", [USAGE, BILLING_EVENTS], ids=lambda r: r.name)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, clock: time_machine.Traveller) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "TRIES", 2)


@pytest.fixture(scope="module")
def server() -> Iterator[Sandbox]:
    """One server for all walks; each sets the account, the pages, and what happens meanwhile."""
    with Sandbox(Account()) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def client(server: Sandbox) -> Iterator[FalClient]:
    """To make a client takes longer than to ask it."""
    with FalClient(settings_for(server.url, Path())) as client:
        yield client


def given(server: Sandbox, folder: Path) -> Settings:
    """Settings of a run that lands below the folder."""
    return settings_for(server.url, folder)


def taken(client: FalClient, server: Sandbox, resource: Resource, folder: Path) -> Staged:
    """The day as a run would take it; raises what it would be refused with."""
    origin = RunContext("acme", "run", datetime.now(UTC), 0, planned_from={}, unknown_ids={})
    task = Task(resource, DAY)
    return fetch_until_proven(client, given(server, folder), task, folder, origin)


def held(staged: Staged) -> Rows:
    """What was taken, row by row."""
    columns = {
        "usage": "bucket, endpoint_id, auth_detail, quantity, cost_total",
        "billing_events": "timestamp, endpoint_id, request_id, cost_total",
    }
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        rows = connection.execute(f"select {columns[staged.resource.name]} from {staged.source}")
        return Counter((at.astimezone(UTC), *others) for at, *others in rows.fetchall())


def told(resource: Resource, lines: list[UsageLine]) -> Rows:
    """What fal holds, row by row."""
    if resource is BILLING_EVENTS:
        return Counter(
            (one.timestamp, one.endpoint_id, one.request_id, one.cost_total) for one in charges(lines)
        )
    sums: dict[tuple[Any, ...], list[Decimal]] = {}
    for one in map(truth.as_sent, lines):
        amounts = sums.setdefault((one.hour, one.endpoint_id, one.credential.detail), [Decimal(0)] * 2)
        amounts[0] += one.quantity
        amounts[1] += one.cost_total
    return Counter((*key, *map(as_summed, amounts)) for key, amounts in sums.items())


def as_summed(amount: Decimal) -> Decimal:
    """The sum as fal sends it, as a double, and as it is held: rounded half-even at the 12th decimal."""
    return truth.nearest_double(amount).quantize(Decimal("1e-12"))


def at(hour: int) -> datetime:
    """That hour of the day."""
    return DAY.start + timedelta(hours=hour)


def lines_of(*hours: int) -> list[UsageLine]:
    """A line of one image at each of these hours: they differ in nothing else."""
    return [line(at(hour)) for hour in hours]


def serve(server: Sandbox, account: Account, page_size: int, hook: Callable[[Request], Any]) -> None:
    """Serve the account in such pages; `hook` sees each request before it is answered."""
    server.world, server.page_size = account, page_size
    server.fault = lambda request: hook(request)


def on_page(number: int, change: Callable[[], None], walks: int = 1) -> Callable[[Request], None]:
    """A hook that changes the account before that page of rows is answered, in so many walks."""
    seen: list[int] = []

    def hook(request: Request) -> None:
        if request.query.get("expand") == ["summary"]:
            return
        # A first page that is asked for again, behind the total in front of it, is that of one walk.
        seen.append(1 if "cursor" not in request.query else seen[-1] + 1)
        if seen[-1] == number and seen.count(number) <= walks:
            change()

    return hook


# --- Seeded days ----------------------------------------------------------------------------------


class Moving:
    """A day with some lines, to which up to four things happen while it is walked.

    In every other day all amounts are the same, so that the sum of the rows does not tell which is
    missing. There all that happens is of one kind: a line that goes while another of the very same
    amounts comes is what totals cannot show (docs/fal-api.md, "Control totals").
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # the same day for the same seed
        self._is_equal = seed % 2 == 0
        kinds = ["late", "late", "gone", "restated", "shuffled"]
        self._kinds = [self._random.choice(kinds)] if self._is_equal else kinds
        self.account = Account(lines=[self._line() for _ in range(self._random.randint(4, 14))])
        self.page_size = self._random.randint(1, 5)
        self.moments = [list(self.account.lines)]
        self._left = self._random.randint(0, 4)

    def __call__(self, _: Request) -> None:
        """Let something happen, perhaps."""
        if not self._left or self._random.random() < 0.5:
            return
        self._left -= 1
        lines = self.account.lines
        number = self._random.randrange(len(lines))
        match self._random.choice(self._kinds):
            case "late":
                lines.append(self._line())
            case "gone" if len(lines) > 1:
                del lines[number]
            case "restated":
                old = lines[number]
                more = old.quantity + self._random.randint(1, 9)
                lines[number] = line(old.hour, old.endpoint_id, more, credential=old.credential)
            case "shuffled":
                self._random.shuffle(lines)
        self.moments.append(list(lines))

    def _line(self) -> UsageLine:
        chosen = self._random
        quantity = "1" if self._is_equal else f"{chosen.randint(1, 10**6)}.{chosen.randint(1, 999)}"
        hour, endpoint_id = at(chosen.randrange(24)), chosen.choice([FLUX, VIDEO])
        return line(hour, endpoint_id, quantity, credential=chosen.choice([KEY, LOGIN]))


@both_feeds
def test_no_seeded_walk_takes_rows_that_fal_never_held_together(
    resource: Resource, server: Sandbox, client: FalClient
) -> None:
    wrong, outcomes = [], Counter[str]()
    for seed in range(WALKS):
        day = Moving(seed)
        serve(server, day.account, day.page_size, day)
        with TemporaryDirectory() as folder:
            try:
                rows = held(taken(client, server, resource, Path(folder)))
            except (UnprovenError, ContractError):  # a cursor that came twice, say
                outcomes["refused"] += 1
                continue
        moments = [told(resource, lines) for lines in day.moments]
        outcomes["disturbed" if len(moments) > 1 else "undisturbed"] += 1
        if rows not in moments:
            wrong.append(seed)
    assert wrong == []
    assert outcomes["disturbed"] > outcomes["refused"]


# --- One thing at a time --------------------------------------------------------------------------


@both_feeds
@pytest.mark.parametrize("is_late", [True, False])
def test_a_row_that_comes_or_goes_between_two_pages_is_seen_though_no_sum_tells(
    is_late: bool, resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    account = Account(lines=lines_of(*range(4, 12)))

    def happen() -> None:  # usage comes oldest first, charges newest first
        if is_late:
            account.lines += lines_of(1 if resource is USAGE else 20)
        else:
            del account.lines[0 if resource is USAGE else 7]

    serve(server, account, 3, on_page(2, happen))
    assert held(taken(client, server, resource, tmp_path)) == told(resource, account.lines)


@both_feeds
def test_a_day_that_never_holds_still_is_refused_and_says_so(
    resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    account = Account(lines=lines_of(*range(4, 12)))

    def grow(request: Request) -> None:  # between the rows and each of their totals
        if request.query.get("expand") == ["summary"]:
            account.lines += lines_of(4)

    serve(server, account, 3, grow)
    with pytest.raises(UnprovenError) as caught:
        taken(client, server, resource, tmp_path)
    assert str(caught.value).startswith(f"{resource.name}, window 2026-11-21: the rows ")
    assert "the next run fetches the window again (fal request " in str(caught.value)
    assert caught.value.exit_code == 3
    sealed = map(extracts.open_read, extracts.complete_reads(given(server, tmp_path)))
    folder = tmp_path / "landing/acme" / resource.name / "2026-11-21"
    assert [one.folder for one in sealed] == list(folder.iterdir())


def edit(
    server: Sandbox, account: Account, number: int, change: Callable[[Any], None], walks: int = 1
) -> None:
    """Serve pages of four, that one with its records edited in so many walks."""
    is_it = [False]

    def on_it() -> None:
        is_it[0] = True

    watch = on_page(number, on_it, walks)

    def hook(request: Request) -> Fault | None:
        is_it[0] = False
        watch(request)
        if not is_it[0]:
            return None
        page = json.loads(answer(server, request), parse_float=Decimal)
        change(next(iter(page.values())))
        return Fault(body=to_json(page).encode())

    server.world, server.page_size, server.fault = account, 4, hook


@both_feeds
def test_a_row_that_comes_twice_in_place_of_another_is_seen_though_no_total_tells(
    resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    """As where rows have no order of their own, so that each page is cut from another one."""
    account = Account(lines=lines_of(*range(4, 12)))
    pages: list[list[Any]] = []

    def repeat(records: list[Any]) -> None:
        twice = pages[0][0]
        lost = next(
            n for n, one in enumerate(records) if one.get("cost_total") == twice.get("cost_total")
        )
        records[lost] = twice

    edit(server, account, 1, pages.append, walks=9)
    held(taken(client, server, resource, tmp_path / "before"))
    edit(server, account, 2, repeat)
    assert held(taken(client, server, resource, tmp_path)) == told(resource, account.lines)


@both_feeds
def test_a_page_out_of_a_stale_cache_is_seen(
    resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    account = Account(lines=lines_of(*range(4, 12)))
    stale: list[list[Any]] = []
    edit(server, account, 2, stale.append, walks=9)
    taken(client, server, resource, tmp_path / "before")
    account.lines[1:7] = [line(one.hour, quantity="2") for one in account.lines[1:7]]  # restated

    def serve_stale(records: list[Any]) -> None:
        records[:] = stale[0]

    edit(server, account, 2, serve_stale)
    assert held(taken(client, server, resource, tmp_path)) == told(resource, account.lines)


@both_feeds
def test_the_first_page_served_once_more_ends_the_walk(
    resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    server.world, server.page_size = Account(lines=lines_of(*range(4, 12))), 4
    bodies: dict[str, bytes] = {}

    def cached(request: Request) -> Fault | None:
        """A cache that does not look at the cursor."""
        question = str(request.query["expand"])
        bodies.setdefault(question, answer(server, request))
        return Fault(body=bodies[question])

    server.fault = cached
    with pytest.raises(ContractError, match="same cursor twice"):
        taken(client, server, resource, tmp_path)


@both_feeds
@pytest.mark.parametrize("walks", [1, 9])
def test_rows_cut_off_the_last_of_several_pages_are_fetched_however_often_they_are_cut_off(
    walks: int, resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    account = Account(lines=lines_of(*range(4, 12)))
    edit(server, account, 2 if resource is USAGE else 4, lambda records: records.pop(), walks)
    staged = taken(client, server, resource, tmp_path)
    assert held(staged) == told(resource, account.lines)
    assert staged.proof == "summary"


@both_feeds
def test_rows_cut_off_the_only_page_are_missed(
    resource: Resource, server: Sandbox, client: FalClient, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    account = Account(lines=lines_of(*range(4, 12)))
    edit(server, account, 1, lambda records: records.pop(), walks=9)
    server.page_size = 100
    if resource is USAGE:
        with pytest.raises(UnprovenError, match=r"quantity 7 fetched, 8 by fal"):
            taken(client, server, resource, tmp_path)
        return
    staged = taken(client, server, resource, tmp_path)
    assert (told(resource, account.lines) - held(staged)).total() == 1
    # Usage is another ledger: charges that are the same twice are taken, and the difference is told.
    assert staged.proof == "two walks"
    assert "but not with fal's usage" in caplog.text


@pytest.mark.parametrize("page_size", [1, 3, 100])
def test_charges_that_are_exact_twins_are_kept_on_whatever_pages_they_come(
    page_size: int, server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    account = Account(lines=lines_of(5, 5, 5, 6))
    serve(server, account, page_size, lambda _: None)
    staged = taken(client, server, BILLING_EVENTS, tmp_path)
    assert held(staged) == told(BILLING_EVENTS, account.lines)
    assert staged.proof == ("summary" if page_size == 100 else "two walks")
    with duckdb.connect() as connection:
        rows = connection.execute(f"select count(distinct (_hash, _ordinal)) from {staged.source}")
        assert rows.fetchone() == (8,)
    # What was taken proves itself again from its landed pages.
    again = stage_window(settings_for(server.url, tmp_path), staged.landed, tmp_path)
    assert (again.digest, again.proof) == (staged.digest, staged.proof)


def test_a_broken_row_of_no_value_beside_twins_on_two_pages_is_set_aside_as_ever(
    server: Sandbox, client: FalClient, tmp_path: Path
) -> None:
    account = Account(lines=lines_of(5, 5, 5, 6))
    costs = ("cost_subtotal", "cost_discount", "cost_total", "cost_estimate_nano_usd")
    broken = {"percent_discount": 101, **dict.fromkeys(costs, 0)}
    edit(server, account, 2, lambda records: records.append({**records[0], **broken}), walks=9)
    staged = taken(client, server, BILLING_EVENTS, tmp_path)
    assert held(staged) == told(BILLING_EVENTS, account.lines)
    assert (staged.proof, staged.findings.breaches) == ("two walks", 1)


def test_an_open_day_that_grows_while_it_is_walked_is_taken_as_it_is_and_closed_later(
    clock: time_machine.Traveller, server: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    today = truth.NOW.replace(hour=0, minute=0)
    account = Account(lines=[line(today + timedelta(hours=hour)) for hour in range(2, 10)])
    mine = settings_for(server.url, tmp_path, account="acme")
    usage = Asked(truth.day(23), resources=["usage"])
    serve(server, account, 3, on_page(2, lambda: account.lines.append(line(today, quantity="5"))))
    assert pipeline.run(mine, usage).exit_code == 0
    assert "the day is still open, and its rows do not yet add up" in caplog.text
    loads = "select proof, is_provisional from ops.loads where is_current"
    assert ask(mine, loads) == [("differs", True)]

    clock.shift(timedelta(days=1))
    assert pipeline.run(mine, Asked(truth.day(23), truth.day(24), ["usage"])).exit_code == 0
    assert ask(mine, loads) == [("summary", False)]
    assert total(mine) == sum(one.cost_total for one in account.lines)
    assert ask(mine, "select count(*) from raw.usage") == [(9,)]
