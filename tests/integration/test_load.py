"""Loads by themselves: what one read after the other leaves in raw and in the tables of ops."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pytest
import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import LeaseLostError, UnprovenError, UsageError, WarehouseError
from faletl.fal.pages import Page
from faletl.landing import extracts
from faletl.landing.extracts import Call, Receipt
from faletl.line import replace
from faletl.resources import ANALYTICS, CREDITS, MODELS, PRICES, USAGE, Resource
from faletl.selection import Asked
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import (
    KnownIds,
    changed_days,
    current_loads,
    known_ids,
    last_extract_times,
    last_extracts,
    pages_per_window,
    read_ledger,
    rows_of_windows,
)
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.quality import record_failure
from faletl.warehouse.tables import (
    FAILURES,
    HORIZONS,
    LOADS,
    RAW,
    RESTATEMENTS,
    UNKNOWN_ENDPOINTS,
    WAREHOUSE,
)
from faletl.windows import DAY, HOUR, LastExtract, Window
from tests import truth
from tests.conftest import IS_ON_POSTGRES, settings_for
from tests.truth import FLUX, NOW, VIDEO, VOICE

MORNING, NOON = NOW, NOW + timedelta(hours=2)
DAY_21, DAY_22 = Window.of_day(truth.day(21)), Window.of_day(truth.day(22))
DAYS = {truth.day(21), truth.day(22)}
LINE = {"endpoint_id": FLUX, "unit": "images", "quantity": 4, "unit_price": 0.025, "cost_total": 0.1,
        "currency": "USD"}  # fmt: skip


NO_CALLS = b'{"time_series":[],"next_cursor":null,"has_more":false}'


def usage(*lines: dict[str, Any], day: int = 22) -> bytes:
    """A page of usage in the third hour of a day."""
    series = [{"bucket": f"2026-11-{day}T03:00:00Z", "results": [LINE | line for line in lines]}]
    return json.dumps({"time_series": series, "next_cursor": None, "has_more": False}).encode()


def calls(*records: dict[str, Any]) -> bytes:
    """A page of requests in the third hour of the 22nd."""
    counts = {"request_count": 1, "success_count": 1, "user_error_count": 0, "error_count": 0}
    series = [{"bucket": "2026-11-22T03:00:00Z", "results": [counts | one for one in records]}]
    return json.dumps({"time_series": series, "next_cursor": None, "has_more": False}).encode()


def listed(name: str, *records: dict[str, Any]) -> bytes:
    """A page of a resource whose records stand in one list."""
    return json.dumps({name: records, "next_cursor": None, "has_more": False}).encode()


@dataclass
class Desk:
    """A warehouse, and reads that land without anybody being asked."""

    settings: Settings
    folder: Path

    @cached_property
    def warehouse(self) -> Warehouse:
        """Where reads are loaded."""
        return open_warehouse(self.settings)

    @contextmanager
    def lease(self, holder: str = "test") -> Iterator[Lease]:
        """The right to write."""
        with self.warehouse.lease(holder) as lease:
            yield lease

    def read(
        self,
        resource: Resource,
        body: bytes,
        window: Window | None = None,
        *,
        at: datetime = MORNING,
        ids: Sequence[str] = (),
        **more: Any,
    ) -> Staged:
        """Land that page as a whole read of the window, and stage it; `more` goes into the manifest.

        It was planned after all that was loaded, unless `more` says otherwise.
        """
        window = window or DAY_22
        account = more.pop("account", "acme")
        attempt = extracts.begin(self.settings, account, resource.name, window, at)
        query = {name: [v] for name, v in resource.params[0].items() if isinstance(v, str)}
        query |= {"endpoint_id": list(ids)} if ids else {}
        calls = []
        for label in ("rows", "again"):
            pages = [attempt.land(label, {}, Page(1, body, "req-1", body.count(b"endpoint_id"), None))]
            calls.append(Call(label, resource.path, query, pages))
        known = {
            "load_id": attempt.load_id, "run_id": "run-1", "account": account,
            "resource": resource.name, "window_start": window.start, "window_end": window.end,
            "started_at": at, "finished_at": at + timedelta(minutes=1), "planned_from": window.day,
            "fencing_token": 99, "calls": calls,
        }  # fmt: skip
        landed = attempt.seal(extracts.Manifest(**known | more))
        return stage_window(self.settings, landed, self.folder)

    def load(self, lease: Lease, staged: Staged) -> replace.Outcome:
        """Load it."""
        return replace.replace_window(self.settings, self.warehouse, lease, staged).outcome

    def receipt(
        self, lease: Lease, loaded_at: datetime, outcome: Literal["loaded", "unchanged"]
    ) -> Receipt:
        """The receipt for a load under that lease."""
        [row] = self.rows(lease, sa.select(WAREHOUSE.c.warehouse_id))
        return Receipt(lease.token, loaded_at, outcome, row["warehouse_id"])

    def rows(self, lease: Lease, query: Any) -> list[dict[str, Any]]:
        """What the warehouse holds, instants in UTC."""
        with lease.transaction():
            found = lease.connection.execute(query).mappings().all()
        return [
            {name: v.astimezone(UTC) if isinstance(v, datetime) else v for name, v in row.items()}
            for row in found
        ]

    def loads(self, lease: Lease) -> list[dict[str, Any]]:
        """The ledger, oldest first."""
        return self.rows(lease, sa.select(LOADS).order_by(LOADS.c.fencing_token, LOADS.c.read_at))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with an empty warehouse: to make one takes longer than all that is done with it."""
    folder = tmp_path_factory.mktemp("empty")
    with open_warehouse(settings_for("http://127.0.0.1:9", folder)).lease("test"):
        return folder / "warehouse.duckdb"


@pytest.fixture
def desk(empty: Path, tmp_path: Path) -> Desk:
    if not IS_ON_POSTGRES:
        shutil.copy(empty, tmp_path)
    return Desk(settings_for("http://127.0.0.1:9", tmp_path), tmp_path)


def test_the_ledger_tells_all_of_a_load_and_of_later_reads_that_found_the_same(desk: Desk) -> None:
    body = usage({}, {"endpoint_id": VIDEO, "cost_total": 0.25, "currency": "EUR"})
    first = desk.read(USAGE, body, is_whole_catalogue=True)
    with desk.lease() as lease:
        assert desk.load(lease, first) == "loaded"
        [row] = desk.loads(lease)
        receipt = desk.receipt(lease, row.pop("loaded_at"), "loaded")
        version = row.pop("data_version")
        expected = {
            "load_id": first.landed.manifest.load_id, "run_id": "run-1", "account": "acme",
            "resource": "usage", "window_start": DAY_22.start, "window_end": DAY_22.end,
            "pages": 1, "rows": 2, "cost_total": Decimal("0.35"), "control_total": None,
            "digest": first.digest, "asked_digest": None, "proof": "two walks", "dropped_rows": 0,
            "quarantined_rows": 0, "doubtful_rows": 1, "rounded_amounts": 0,
            "fencing_token": lease.token, "last_fencing_token": lease.token,
            "landing_path": f"acme/usage/2026-11-22/{first.landed.folder.name}",
            "last_load_id": first.landed.manifest.load_id, "read_at": MORNING, "last_read_at": MORNING,
            "whole_catalogue_at": MORNING, "is_current": True, "is_provisional": False,
            "is_settled": False, "changed_at": None,
        }  # fmt: skip
        assert row == expected
        assert extracts.receipt_of(first.landed.folder) == receipt
        extracts.take_receipts(first.landed.folder)  # as if killed before it was left
        assert desk.load(lease, first) == "unchanged"
        assert extracts.receipt_of(first.landed.folder) == receipt
    again = desk.read(USAGE, body, at=NOON, fencing_token=lease.token)
    with desk.lease() as later:
        assert desk.load(later, again) == "unchanged"
        [row] = desk.loads(later)
        confirmed = desk.receipt(later, NOON, "unchanged")
    assert row.pop("loaded_at") == receipt.loaded_at
    assert row.pop("data_version") == version
    assert row == expected | {
        "last_load_id": again.landed.manifest.load_id,
        "last_read_at": NOON,
        "last_fencing_token": later.token,
    }
    told = extracts.receipt_of(again.landed.folder)
    with desk.warehouse.reading() as connection:
        assert connection is not None
        receipts = read_ledger(connection).receipts
    assert receipts[first.landed.manifest.load_id] == receipt
    assert receipts[again.landed.manifest.load_id] == confirmed
    assert told is not None
    assert (told.fencing_token, told.outcome) == (later.token, "unchanged")
    assert receipt.loaded_at < told.loaded_at <= datetime.now(UTC)


def test_what_a_closed_day_was_and_is_now_is_kept_line_by_line(desk: Desk) -> None:
    with desk.lease() as lease:
        desk.load(lease, first := desk.read(USAGE, usage({}, {"endpoint_id": VIDEO}, {"unit": "calls"})))
        [old] = desk.loads(lease)
    body = usage({}, {"endpoint_id": VOICE, "auth_method": "x"}, {"unit": "calls", "quantity": 5})
    with desk.lease() as lease:
        desk.load(lease, second := desk.read(USAGE, body, at=NOON))
        was, now = desk.loads(lease)
        lines = desk.rows(lease, sa.select(RESTATEMENTS).order_by(RESTATEMENTS.c.endpoint_id))
        raw = desk.rows(lease, rows_of_windows(USAGE, "acme", [DAY_22]))
    assert was == old | {"is_current": False}
    assert (now["is_current"], now["whole_catalogue_at"]) == (True, None)
    assert now["data_version"] == old["data_version"] + 1
    assert {row["_load_id"] for row in raw} == {second.landed.manifest.load_id}
    manifest = second.landed.manifest
    of_all = {
        "load_id": manifest.load_id, "account": "acme", "resource": "usage",
        "window_start": DAY_22.start, "currency": "USD", "seen_at": manifest.finished_at,
    }  # fmt: skip
    four, five, cost, none = Decimal(4), Decimal(5), Decimal("0.1"), Decimal(0)
    expected = [
        (FLUX, "calls", "none", four, five, cost, cost),
        (VOICE, "images", "label:x", none, four, none, cost),
        (VIDEO, "images", "none", four, none, cost, none),
    ]
    names = ("endpoint_id", "unit", "credential_id", "quantity_before", "quantity_after",
             "cost_total_before", "cost_total_after")  # fmt: skip
    assert lines == [of_all | dict(zip(names, line, strict=True)) for line in sorted(expected)]
    assert extracts.receipt_of(first.landed.folder) is not None


def test_a_day_may_become_again_what_it_was(desk: Desk) -> None:
    bodies = [usage({"quantity": quantity}) for quantity in (4, 5, 4, 4)]
    with desk.lease() as lease:
        desk.load(lease, desk.read(ANALYTICS, NO_CALLS, ids=[FLUX]))  # another resource's, of the day
        outcomes = [desk.load(lease, desk.read(USAGE, body)) for body in bodies]
        loads = [one for one in desk.loads(lease) if one["resource"] == "usage"]
    assert outcomes == ["loaded", "loaded", "loaded", "unchanged"]
    assert sorted(one["is_current"] for one in loads) == [False, False, True]


def test_a_restatement_counts_although_its_clock_is_a_little_behind(desk: Desk) -> None:
    closed = DAY_22.end + timedelta(hours=30)
    for at, quantity in ((closed, 1), (closed - timedelta(seconds=1), 5)):
        with desk.lease() as lease:
            read = desk.read(USAGE, usage({"quantity": quantity}), at=at, fencing_token=lease.token)
            desk.load(lease, read)
            newest = desk.loads(lease)[-1]
            restated = desk.rows(lease, sa.select(RESTATEMENTS))
    assert newest["changed_at"] == closed - timedelta(seconds=1)
    assert restated


def test_an_open_day_leaves_no_restatements_and_that_it_closed_is_news(desk: Desk) -> None:
    window = DAY_22
    open_day = Window(window.start, window.start + timedelta(hours=10))
    versions = []
    for at, read, lines in (
        (window.start + timedelta(hours=11), open_day, [{}]),
        (window.start + timedelta(hours=12), open_day, [{"quantity": 5}]),  # no restatement
        (window.end + timedelta(hours=1), window, [{"quantity": 5}]),  # closed: news
        (window.end + timedelta(hours=2), window, [{"quantity": 5}]),
        (window.end + timedelta(hours=24), window, [{"quantity": 5}]),  # settled: news
        (window.end + timedelta(hours=25), window, [{"quantity": 5}]),
    ):
        with desk.lease() as lease:
            desk.load(lease, desk.read(USAGE, usage(*lines), read, at=at))
            row = desk.loads(lease)[-1]
            versions.append((row["data_version"], row["is_provisional"], row["is_settled"]))
            assert desk.rows(lease, sa.select(RESTATEMENTS)) == []
    first = versions[0][0]
    assert versions == [
        (first, True, False), (first + 1, True, False), (first + 2, False, False),
        (first + 2, False, False), (first + 3, False, True), (first + 3, False, True),
    ]  # fmt: skip


@pytest.mark.parametrize("own", [0, 1])
def test_a_read_that_was_planned_before_another_was_loaded_replaces_nothing(
    own: int, desk: Desk
) -> None:
    early = desk.read(USAGE, usage({}, {"endpoint_id": VIDEO}), fencing_token=0)
    with desk.lease() as lease:
        desk.load(lease, late := desk.read(USAGE, usage({}), at=NOON, fencing_token=0))
        held = desk.loads(lease)
        assert desk.load(lease, early) == "superseded"
        assert desk.loads(lease) == held
        assert extracts.receipt_of(early.landed.folder) is None
    same = desk.read(USAGE, usage({}), at=NOON, fencing_token=lease.token)
    with desk.lease() as later:
        assert desk.load(later, same) == "unchanged"
        # Reads that the window stands on may be loaded anew: rows of theirs may have been set aside.
        assert desk.load(later, dataclasses.replace((late, same)[own], digest="other")) == "loaded"


def test_the_same_rows_stand_in_for_pages_that_are_damaged(desk: Desk) -> None:
    with desk.lease() as lease:
        desk.load(lease, first := desk.read(USAGE, usage({})))
        (first.landed.folder / first.landed.manifest.pages("rows")[0].file).unlink()
        desk.load(lease, second := desk.read(USAGE, usage({}), at=NOON, fencing_token=lease.token))
        [row] = desk.loads(lease)
        raw = desk.rows(lease, sa.select(RAW["usage"]))
    assert row["load_id"] == second.landed.manifest.load_id
    assert [one["_load_id"] for one in raw] == [row["load_id"]]
    assert extracts.receipt_of(first.landed.folder) is None
    assert extracts.receipt_of(second.landed.folder) is not None


def test_who_lost_the_lease_writes_nothing_and_is_told_who_has_it(desk: Desk) -> None:
    staged = desk.read(USAGE, usage({}))
    with desk.lease("the winner") as lease:
        lost = dataclasses.replace(lease, token=lease.token - 1)
        with pytest.raises(LeaseLostError, match="the winner") as caught:
            desk.load(lost, staged)
        assert caught.value.facts == {"resource": "usage", "window": "2026-11-22"}
        with pytest.raises(LeaseLostError):
            record_failure(lost, UnprovenError("x"),
                account="acme", resource="usage", window=DAY_22, run_id="r",
            )  # fmt: skip
        assert desk.loads(lease) == []
        assert desk.rows(lease, sa.select(FAILURES)) == []
        assert desk.rows(lease, sa.select(RAW["usage"])) == []
    assert extracts.receipt_of(staged.landed.folder) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"rows": 2}, "has 1 rows with a sum of 0.1.* after loading 2 rows"),
        ({"cost_total": "0.100000000001"}, "of 0.100000000001; the load was undone"),
        ({"source": "'gone.parquet'"}, "the warehouse refused the load: .*gone.parquet"),
    ],
)
def test_a_load_that_is_not_what_was_staged_is_undone(
    said: dict[str, Any], told: str, desk: Desk
) -> None:
    with desk.lease() as lease:
        desk.load(lease, desk.read(USAGE, usage({"quantity": 7})))
        before = desk.loads(lease), desk.rows(lease, sa.select(RAW["usage"]))
        staged = dataclasses.replace(desk.read(USAGE, usage({}), at=NOON), **said)
        with pytest.raises(WarehouseError, match=told) as caught:
            desk.load(lease, staged)
        assert (desk.loads(lease), desk.rows(lease, sa.select(RAW["usage"]))) == before
    assert caught.value.facts == {"resource": "usage", "window": "2026-11-22"}


def test_what_was_not_asked_for_stays(desk: Desk) -> None:
    def asked(ids: Sequence[str], *records: dict[str, Any], at: datetime) -> Staged:
        return desk.read(ANALYTICS, calls(*records), at=at, ids=ids)

    with desk.lease() as lease:
        first = asked([FLUX, VIDEO], {"endpoint_id": FLUX}, {"endpoint_id": VIDEO}, at=MORNING)
        assert desk.load(lease, first) == "loaded"
        again = asked([VIDEO, FLUX], {"endpoint_id": VIDEO}, {"endpoint_id": FLUX}, at=MORNING)
        assert desk.load(lease, again) == "unchanged"
        more = asked([FLUX, VIDEO, VOICE], {"endpoint_id": FLUX}, {"endpoint_id": VIDEO}, at=MORNING)
        assert desk.load(lease, more) == "unchanged"  # there was nothing of it, and there is nothing
        second = asked([FLUX], {"endpoint_id": FLUX, "request_count": 9}, at=NOON)
        assert desk.load(lease, second) == "loaded"
        raw = desk.rows(lease, rows_of_windows(ANALYTICS, "acme", [DAY_22]))
        assert [one["rows"] for one in desk.loads(lease) if one["is_current"]] == [2]
        standing = read_ledger(lease.connection).needed
        lease.connection.rollback()
        gone = asked([FLUX, VIDEO], {"endpoint_id": FLUX, "request_count": 9}, at=NOON)
        assert desk.load(lease, gone) == "loaded"  # the same row, but now it speaks of the other, too
        left = desk.rows(lease, rows_of_windows(ANALYTICS, "acme", [DAY_22]))
    found = {row["endpoint_id"]: (row["request_count"], row["_load_id"]) for row in raw}
    ids = [one.landed.manifest.load_id for one in (first, second)]
    assert found == {FLUX: (9, ids[1]), VIDEO: (1, ids[0])}
    assert standing >= set(ids)
    assert [row["endpoint_id"] for row in left] == [FLUX]


def test_snapshots_of_a_day_follow_one_another_and_levels_stand_for_themselves(desk: Desk) -> None:
    def priced(at: datetime, price: float) -> Staged:
        body = listed("prices", {"endpoint_id": FLUX, "unit": "images", "unit_price": price})
        return desk.read(PRICES, body, Window.snapshot(at), at=at, ids=[FLUX])

    def balance(at: datetime) -> Staged:
        body = b'{"username":"acme","credits":{"current_balance":24.5,"currency":"USD"}}'
        return desk.read(CREDITS, body, Window.snapshot(at), at=at)

    outcomes = []
    with desk.lease() as lease:
        for at, price in ((MORNING, 1), (NOON, 1), (NOON + HOUR, 2), (NOON + DAY, 2)):
            outcomes.append((desk.load(lease, priced(at, price)), desk.load(lease, balance(at))))
        raw = desk.rows(lease, sa.select(RAW["prices"]).order_by(RAW["prices"].c["_snapshot_at"]))
        current = desk.rows(lease, sa.select(LOADS).where(LOADS.c.is_current))
        reads = last_extracts(lease.connection, "acme", "prices")
        lease.connection.rollback()
    assert [price for price, _ in outcomes] == ["loaded", "unchanged", "loaded", "loaded"]
    assert {credit for _, credit in outcomes} == {"loaded"}
    assert [row["_snapshot_at"] for row in raw] == [MORNING, NOON + HOUR, NOON + DAY]
    assert len(current) == 3 + 4  # each of them is held
    assert {day: read.read_at for day, read in reads.items()} == {
        date(2026, 11, 23): NOON + HOUR,
        date(2026, 11, 24): NOON + DAY,
    }


def test_a_load_moves_no_horizon_and_ends_the_failure_of_its_window(desk: Desk) -> None:
    window = Window.of_day(truth.day(22))
    with desk.lease() as lease:
        desk.load(lease, desk.read(USAGE, usage({}), planned_from=truth.day(20)))
        assert desk.rows(lease, sa.select(HORIZONS)) == []
        version = desk.rows(lease, sa.select(WAREHOUSE.c.data_version))
        for resource, failed, number in (
            ("usage", window, 1), ("usage", window, 2), ("usage", DAY_21, 3),
            ("models", window, 4), ("usage", Window.of_day(truth.day(23)), 5),
        ):  # fmt: skip
            error = UnprovenError(f"number {number}").at(resource=resource, window=str(failed))
            record_failure(lease, error,
                account="acme", resource=resource, window=failed, run_id="run-2",
            )  # fmt: skip
        found = desk.rows(lease, sa.select(FAILURES).order_by(FAILURES.c.message))
        assert datetime.now(UTC) - found[0].pop("failed_at") < HOUR
        assert found[0] == {
            "run_id": "run-2", "account": "acme", "resource": "models",
            "window_start": window.start, "error": "UnprovenError",
            "message": "models, window 2026-11-22: number 4", "exit_code": 3,
            "data_version": version[0]["data_version"] + 3,
        }  # fmt: skip
        assert [one["message"][-1] for one in found] == ["4", "3", "2", "5"]
        assert [one["data_version"] - version[0]["data_version"] for one in found] == [3, 2, 1, 4]
        desk.load(lease, desk.read(USAGE, usage({})))
        found = desk.rows(lease, sa.select(FAILURES))
        assert {(one["resource"], one["window_start"].day) for one in found} == {
            ("models", 22), ("usage", 21), ("usage", 23),
        }  # fmt: skip


def test_ids_that_are_worth_asking_for_are_those_used_or_held_and_those_unknown_rest(desk: Desk) -> None:
    def known(lease: Lease, resource: Resource, window: Window, now: datetime) -> KnownIds:
        with lease.transaction():
            return known_ids(lease.connection, "acme", resource, window, now)

    def listing(*ids: str, at: datetime) -> Staged:
        body = listed("models", *({"endpoint_id": one} for one in ids))
        return desk.read(MODELS, body, Window.snapshot(at), at=at)

    def priced(*ids: str, asked: Sequence[str], unknown: Sequence[str] = (), at: datetime) -> Staged:
        body = listed("prices", *({"endpoint_id": i, "unit": "u", "unit_price": 1} for i in ids))
        return desk.read(
            PRICES,
            body,
            Window.snapshot(at),
            at=at,
            ids=asked,
            unknown_ids=list(unknown),
            fencing_token=99,
        )

    snapshot = Window.snapshot(NOON)
    with desk.lease() as lease:
        desk.load(lease, desk.read(USAGE, usage({})))
        desk.load(lease, desk.read(USAGE, usage({"endpoint_id": "other"}), account="other"))
        desk.load(lease, listing("old", at=MORNING - DAY))
        desk.load(lease, listing(FLUX, VOICE, at=MORNING))
        desk.load(lease, priced("was", asked=["was"], at=MORNING - DAY))
        desk.load(
            lease, priced(VIDEO, asked=[VIDEO, "gone", "lost"], unknown=["gone", "lost"], at=MORNING)
        )
        assert known(lease, PRICES, snapshot, NOON) == KnownIds(
            frozenset({FLUX, VIDEO}), frozenset({FLUX, VOICE}), frozenset({"gone", "lost"})
        )
        week = MORNING + timedelta(days=7)
        assert known(lease, PRICES, snapshot, week - timedelta(seconds=1)).unknown == {"gone", "lost"}
        assert known(lease, PRICES, snapshot, week).unknown == frozenset()
        assert known(lease, ANALYTICS, DAY_22, NOON).unknown == frozenset()
        desk.load(lease, priced(VIDEO, "gone", asked=[VIDEO, "gone"], at=NOON))
        assert known(lease, PRICES, snapshot, NOON).unknown == {"lost"}
        assert len(desk.rows(lease, sa.select(UNKNOWN_ENDPOINTS))) == 1
        desk.load(lease, desk.read(ANALYTICS, NO_CALLS, ids=["lost"]))  # known to another resource
        assert known(lease, PRICES, snapshot, NOON).unknown == {"lost"}
        # What is held of the day, of this account.
        for account, one in (("acme", VOICE), ("other", VIDEO)):
            desk.load(
                lease, desk.read(ANALYTICS, calls({"endpoint_id": one}), ids=[one], account=account)
            )
        assert known(lease, ANALYTICS, DAY_22, NOON).used_or_loaded == {FLUX, VOICE}
        # Usage of the window or of the 90 days before, and nothing later.
        for days, is_used in ((0, True), (90, True), (91, False), (-1, False)):
            window = Window.of_day(truth.day(22) + timedelta(days=days))
            assert (FLUX in known(lease, ANALYTICS, window, NOON).used_or_loaded) == is_used, days


def test_the_ledger_is_read_by_day_by_change_and_by_account(desk: Desk) -> None:
    with desk.lease() as lease:
        with pytest.raises(UsageError, match="nothing is loaded yet"):
            current_loads(open_warehouse(replaced(desk.settings)), Asked())
        desk.load(lease, first := desk.read(USAGE, usage({})))
        desk.load(lease, desk.read(USAGE, usage({}, day=21), DAY_21, account="other"))
        version = desk.loads(lease)[-1]["data_version"]
        desk.load(
            lease,
            second := desk.read(USAGE, usage({"quantity": 5}), at=NOON, is_whole_catalogue=True),
        )
        desk.load(
            lease,
            models := desk.read(
                MODELS, listed("models", {"endpoint_id": FLUX}), Window.snapshot(MORNING)
            ),
        )
        connection = lease.connection
        read = LastExtract(NOON, False, NOON, changed_at=NOON)
        assert last_extracts(connection, "acme", "usage") == {truth.day(22): read}
        assert changed_days(connection, version, lease.token) == {
            "usage": {truth.day(22)}, "models": {truth.day(23)},
        }  # fmt: skip
        assert set(changed_days(connection, version - 2, lease.token)["usage"]) == {
            truth.day(21),
            truth.day(22),
        }
        assert last_extract_times(connection) == {
            ("acme", "usage", truth.day(22)): NOON,
            ("other", "usage", truth.day(21)): MORNING,
            ("acme", "models", truth.day(23)): MORNING,
        }
        assert pages_per_window(connection, "acme") == {"usage": 2.0, "models": 1.0}
        ledger = read_ledger(connection)
        ids = [one.landed.manifest.load_id for one in (first, second, models)]
        assert set(ids) <= ledger.needed  # a closed day's earlier load, too
        assert set(ledger.receipts) >= set(ids)
        assert ledger.receipts[ids[1]].outcome == "loaded"
        of_day = read_ledger(connection, truth.day(21))
        connection.rollback()
        assert len(of_day.receipts) == 1
        assert not set(ids) & of_day.needed
    found = current_loads(desk.warehouse, Asked())
    assert [(one["resource"], one["account"]) for one in found] == [
        ("usage", "other"), ("usage", "acme"), ("models", "acme"),
    ]  # fmt: skip
    found = current_loads(desk.warehouse, Asked(resources=["usage"], start=truth.day(22)))
    assert [(one["resource"], one["account"]) for one in found] == [("usage", "acme")]


def replaced(settings: Settings) -> Settings:
    """The same with a warehouse that is not there."""
    return settings.model_copy(update={"warehouse": f"{settings.warehouse}.none"})


def test_reads_are_loaded_once_more_as_they_were(desk: Desk) -> None:
    with desk.lease() as lease:
        desk.load(lease, first := desk.read(USAGE, usage({}, {"unit": "calls"})))
        second = desk.read(
            USAGE, usage({"quantity": 9}), at=NOON, fencing_token=lease.token, unknown_ids=["x"]
        )
    with desk.lease() as lease:
        desk.load(lease, second)
        desk.load(lease, desk.read(USAGE, usage({}, day=21), DAY_21))
        record_failure(lease, UnprovenError("x"),
            account="acme", resource="usage", window=DAY_22, run_id="r",
        )  # fmt: skip
        before = desk.loads(lease)
        restated = desk.rows(lease, sa.select(RESTATEMENTS).order_by(RESTATEMENTS.c.unit))
        again = [
            (one, receipt)
            for one in (first, second)
            if (receipt := extracts.receipt_of(one.landed.folder))
        ]
        outcomes, newest = replace.replay(
            desk.settings, desk.warehouse, lease, again, forget=truth.day(22)
        )
        after = desk.loads(newest)
        assert outcomes == ["loaded", "loaded"]
        assert newest.token == lease.token + 2
        assert desk.rows(newest, sa.select(RESTATEMENTS).order_by(RESTATEMENTS.c.unit)) == restated
        assert len(desk.rows(newest, sa.select(FAILURES))) == 1
        assert len(desk.rows(newest, sa.select(RAW["usage"]))) == 2
        with pytest.raises(LeaseLostError):
            replace.replay(desk.settings, desk.warehouse, lease, again)
        undone = desk.loads(newest)
    assert undone == after
    was, now = (
        [one for one in loads if one["window_start"] == DAY_22.start] for loads in (before, after)
    )
    changed = {"fencing_token": 0, "last_fencing_token": 0, "data_version": 0}
    assert [one | changed for one in now] == [one | changed for one in was]
