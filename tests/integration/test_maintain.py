"""Maintain: a warehouse of years stays small, and says the same as one that was never maintained."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import time_machine
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import UsageError, WarehouseBusyError
from faletl.landing import extracts
from faletl.line import distributed
from faletl.operations.maintain import KEPT, RETENTIONS, Freed, maintain
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.verify import verify
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import LOADS, METADATA, RESTATEMENTS
from tests import truth
from tests.conftest import all_tables, ask, opened, settings_for, warehouse_for
from tests.forked import Trap, start
from tests.integration.test_rebuild import forget
from tests.truth import FLUX, VIDEO, VOICE, Account, line

CREDITS = Asked(resources=["credits"])
SNAPSHOTS = Asked(resources=["models", "prices", "credits"])

OF_READINGS = {"raw.credits", "staging.stg_fal__credits", "marts.fct_credit_balance"}
"""The tables with a row for each reading of the balance: the only ones that maintain may change."""


def read_balance(
    account: Account, settings: Settings, clock: time_machine.Traveller, balances: str
) -> None:
    """A reading of the balance each hour from now on, loaded and built; a digit each."""
    for balance in balances:
        account.balance = Decimal(balance)
        pipeline.extract(settings, CREDITS)
        clock.shift(timedelta(hours=1))
    show(settings)


def show(settings: Settings, *, full: bool = False) -> None:
    """Load what has landed, build and publish."""
    pipeline.load(settings)
    pipeline.build(settings, full=full)
    pipeline.publish(settings)


@pytest.fixture(autouse=True)
def _temporary_folders_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What killed commands of other tests left is not looked at."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def maintained(settings: Settings) -> dict[str, Freed]:
    """What was freed by kind, as the dry run had said it would be."""
    would_be = maintain(settings, is_dry=True)
    done = maintain(settings)
    assert done.freed == would_be.freed
    assert pipeline.build(settings).build is None
    assert pipeline.publish(settings).published is None
    return {one.kind: one for one in done.freed}


def is_nothing(freed: Mapping[str, Freed]) -> bool:
    """Whether nothing was freed of any kind."""
    return not any((one.rows, one.files, one.bytes) != (0, 0, 0) for one in freed.values())


def readings(settings: Settings) -> list[tuple[Any, ...]]:
    """Instant and balance of each reading that is shown."""
    return ask(settings, "select read_at, balance from marts.fct_credit_balance order by all")


def by_the_rule(of: list[tuple[Any, ...]], before: datetime) -> list[tuple[Any, ...]]:
    """The first and the last of each day, those unlike the one before, and all that are young."""
    kept = []
    for _, group in groupby(of, key=lambda one: one[0].date()):
        day = list(group)
        for number, (at, balance) in enumerate(day):
            is_edge = number in (0, len(day) - 1)
            if is_edge or balance != day[number - 1][1] or at >= before.replace(tzinfo=None):
                kept.append((at, balance))
    return kept


def without_readings(settings: Settings) -> dict[str, list[tuple[Any, ...]]]:
    """All that maintain must leave as it is."""
    return {table: rows for table, rows in all_tables(settings).items() if table not in OF_READINGS}


def check_is_stable(settings: Settings) -> None:
    """Made again from raw, and from the landed pages, it is the same; and nothing is left to free."""
    tables, past = all_tables(settings), history(settings)
    show(settings, full=True)
    assert all_tables(settings) == tables
    rebuild(settings)
    assert (all_tables(settings), history(settings)) == (tables, past)
    forget(settings)
    rebuild(settings)
    assert (all_tables(settings), history(settings)) == (tables, past)
    assert verify(settings).findings == []


def history(settings: Settings) -> list[list[tuple[Any, ...]]]:
    """The ledger and the restatements of the warehouse itself, but for tokens, which only grow."""
    return [
        ask(settings, f"select {', '.join(names)} from ops.{table.name} order by all", opened)
        for table, less in (
            (LOADS, ("fencing_token", "last_fencing_token", "data_version")),
            (RESTATEMENTS, ("load_id",)),
        )
        if (names := [column.name for column in table.columns if column.name not in less])
    ]


# --- Snapshots ------------------------------------------------------------------------------------


def test_readings_of_the_balance_thin_out_by_the_rule_and_reports_stay(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    pipeline.run(settings)
    clock.move_to(datetime(2026, 11, 24, 18, tzinfo=UTC))
    read_balance(account, settings, clock, "777766665566661111")
    clock.move_to(datetime(2026, 12, 25, 2, 30, tzinfo=UTC))  # 30 days after 02:30 of the 25th
    shown, before = readings(settings), without_readings(settings)

    freed = maintained(settings)

    kept = [at.strftime("%dT%H") for at, _ in readings(settings)]
    assert kept == [
        "23T10", "24T18", "24T22", "24T23", "25T00", "25T02", "25T03", "25T04", "25T05", "25T06",
        "25T07", "25T08", "25T09", "25T10", "25T11",
    ]  # fmt: skip
    assert readings(settings) == by_the_rule(shown, datetime(2026, 11, 25, 2, 30, tzinfo=UTC))
    assert without_readings(settings) == before
    thinned = freed.pop("snapshots equal to the one before")
    assert (thinned.rows, thinned.files) == (2 * 4, 3 * 4)  # raw and ops.loads; page, manifest, receipt
    assert is_nothing(maintained(settings))
    check_is_stable(settings)


steps = st.tuples(
    st.integers(1, 9),  # hours since the step before
    st.sampled_from(["5", "5", "7"]),  # the balance
    st.sampled_from([0.025, 0.03]),  # a list price
    st.booleans(),  # whether an endpoint is in the catalogue
    st.integers(0, 2),  # how much was used of late
)


@hypothesis_settings(
    max_examples=3,
    phases=(Phase.explicit, Phase.generate),  # each example takes seconds
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(steps, min_size=4, max_size=6), days=st.integers(0, 4))
def test_no_history_says_anything_else_when_it_is_maintained(
    steps: list[tuple[int, str, float, bool, int]], days: int
) -> None:
    account = truth.two_days()
    with (
        tempfile.TemporaryDirectory() as name,
        Sandbox(account, page_size=1000) as sandbox,
        time_machine.travel(truth.NOW, tick=False) as clock,
    ):
        settings = settings_for(sandbox.url, Path(name), keep_days=1)
        pipeline.run(settings)
        for hours, balance, price, is_listed, used in steps:
            clock.shift(timedelta(hours=hours))
            account.balance = Decimal(balance)
            account.listed[FLUX] = {**account.listed[FLUX], "unit_price": price}
            account.catalogue[:] = [{"endpoint_id": one} for one in (VIDEO, VOICE)[: 1 + is_listed]]
            if used:
                account.lines.append(line(truth.NOW.replace(minute=0, hour=5), FLUX, f"{used}"))
                pipeline.extract(settings)
            else:
                pipeline.extract(settings, SNAPSHOTS)
            pipeline.load(settings)
        show(settings)
        clock.shift(timedelta(days=days))
        shown, before = readings(settings), without_readings(settings)
        restated = history(settings)[1]

        maintained(settings)

        assert readings(settings) == by_the_rule(shown, datetime.now(UTC) - timedelta(days=1))
        assert without_readings(settings) == before
        assert history(settings)[1] == restated
        assert is_nothing(maintained(settings))
        check_is_stable(settings)


# --- The ledger and its pages ---------------------------------------------------------------------


def days_of_runs(folder: Path, days: int) -> tuple[Counter[str], int]:
    """Rows by table, and files that landed, of so many days with six runs each, when all are old."""
    account = truth.two_days()
    with (
        Sandbox(account, page_size=1000) as sandbox,
        time_machine.travel(truth.NOW.replace(hour=0), tick=False) as clock,
    ):
        settings = settings_for(sandbox.url, folder, keep_days=1, keep_ops_days=1)
        pipeline.run(settings, Asked(resources=["usage", "billing_events"]))
        for _ in range(days * 6):
            clock.shift(timedelta(hours=4))
            now = datetime.now(UTC)
            account.lines.append(line(now.replace(minute=0) - timedelta(hours=1), FLUX, "2"))
            pipeline.run(settings, Asked(resources=["usage", "billing_events", "credits"]))
        before = without_readings(settings)
        restated = history(settings)[1]
        clock.shift(timedelta(days=3))
        freed = maintained(settings)
        assert freed["superseded extracts"].rows > days * 3
        assert freed["superseded extracts"].files > days * 9
        assert freed["ops.builds"].rows > days * 3
        assert without_readings(settings) == before
        assert is_nothing(maintained(settings))
        rows = Counter(
            {
                table: int(ask(settings, f"select count(*) from {table}", opened)[0][0])
                for table in ("ops.loads", "ops.builds", "ops.validations", "raw.credits")
            }
        )
        landed = sum(len(extracts.sizes(folder)) for folder in extracts.all_reads(settings))
        check_is_stable(settings)
        assert history(settings)[1] == restated
    return rows, landed


def test_what_is_left_does_not_grow_with_the_number_of_runs(tmp_path: Path) -> None:
    (short, few), (long, many) = (days_of_runs(tmp_path / f"{days}", days) for days in (1, 2))
    grown = long - short
    assert grown["ops.loads"] <= 4  # a day more: usage, charges, the balance twice
    assert grown["raw.credits"] <= 2
    assert long["ops.builds"] == short["ops.builds"] <= 2
    assert many - few <= 2 * 3 * 4 + 2 * 3  # of a day three extracts at most, of four files


def test_pages_that_are_young_or_needed_stay_and_prune_takes_the_young_ones(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    usage = Asked(resources=["usage"])
    pipeline.run(settings)
    for quantity in ("2", "3"):
        clock.shift(timedelta(hours=2))
        account.lines.append(line(truth.NOW.replace(minute=0, hour=5), FLUX, quantity))
        pipeline.run(settings, usage)
    clock.shift(timedelta(days=29, hours=20))
    superseded = prune(settings, is_dry=True)[0]
    assert superseded
    assert is_nothing(maintained(settings))
    clock.shift(timedelta(hours=1))  # the first of them is 30 days old now
    freed = maintained(settings)["superseded extracts"]
    assert (freed.rows, freed.files) == (1, 4)  # rows, proof, manifest, receipt
    assert len(prune(settings)[0]) == len(superseded) - 1 > 0


def test_a_day_that_is_held_or_was_restated_keeps_its_pages(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    days = Asked(truth.day(21), truth.day(23), ["usage"])
    pipeline.run(settings)
    served = list(account.lines)
    account.lines[0] = line(served[0].hour, FLUX, "9")
    clock.shift(timedelta(days=1))
    pipeline.run(settings, days)
    account.lines[:] = [one for one in served if one.hour.day != 22]
    clock.shift(timedelta(days=1))
    assert pipeline.run(settings, days).exit_code == 3
    held = ask(settings, "select load_id from ops.holds", opened)
    restated = history(settings)[1]
    assert held
    assert restated
    clock.shift(timedelta(days=60))

    maintained(settings)

    assert {folder.name for folder in extracts.complete_reads(settings)} >= {one for (one,) in held}
    check_is_stable(settings)
    assert history(settings)[1] == restated
    assert ask(settings, "select load_id from ops.holds", opened) == held


# --- Rows about runs that are over ----------------------------------------------------------------

ENTERED: dict[str, tuple[str, str]] = {
    "ops.validations": ("load_id, expectation, validated_at", "'{name}', 'x', {at}"),
    "ops.quarantine": ("load_id, page, row, seen_at, resolved_at", "'{name}', 1, 1, {at}, {at}"),
    "ops.alerts": ("alert_key, kind, subject, resolved_at", "'{name}', 'held', 'x', {at}"),
    "ops.unknown_endpoints": ("endpoint_id, resource, seen_at", "'{name}', 'prices', {at}"),
    "ops.builds": (
        "build_id, data_version, fencing_token, models_digest, finished_at",
        "'{name}', 0, 0, '', {at}",
    ),
}  # fmt: skip
"""Columns and values of a row that is over since an instant."""


@pytest.mark.parametrize("table", ENTERED)
def test_rows_of_ops_go_when_they_are_old_and_over(
    table: str, clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings, CREDITS)
    columns, values = ENTERED[table]
    key = columns.split(", ")[0]
    at = {
        "old": f"timestamptz '{datetime.now(UTC) - timedelta(days=401)}'",
        "young": f"timestamptz '{datetime.now(UTC) - timedelta(days=399)}'",
        "open": "null",
    }
    with opened(settings) as connection:
        for name, instant in at.items():
            connection.execute(
                f"insert into {table} ({columns}) values ({values.format(name=name, at=instant)})"
            )
    freed = maintained(settings)
    assert freed.pop(table) == Freed(table, rows=1)
    assert is_nothing(freed)
    left = {name for (name,) in ask(settings, f"select {key} from {table}", opened)}
    assert left & set(at) == {"young", "open"}


def test_the_newest_build_and_the_one_that_readers_have_stay(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    for published in (True, True, False):
        account.balance += 1
        clock.shift(timedelta(hours=1))
        pipeline.extract(settings, CREDITS)
        pipeline.load(settings)
        pipeline.build(settings)
        if published:
            pipeline.publish(settings)
    clock.shift(timedelta(days=401))
    builds = "select build_id from ops.builds order by fencing_token"
    *_, newest = ask(settings, builds, opened)
    assert maintain(settings, is_dry=True).freed[4] == Freed("ops.builds", rows=1)
    assert maintain(settings).report.published  # then the newest is the one that readers have, too
    assert ask(settings, builds, opened) == [newest]
    assert pipeline.build(settings).build is None  # nothing is news


@pytest.mark.parametrize(
    ("day", "exit_code", "is_over"), [(22, 1, True), (22, 3, False), (12, 1, False), (12, 3, False)]
)
def test_a_failure_is_over_only_where_the_day_is_loaded_and_was_not_refused(
    day: int, exit_code: int, is_over: bool, clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings, Asked(resources=["usage"]))
    failed_at = datetime.now(UTC) - timedelta(days=401)
    with opened(settings) as connection:
        connection.execute(
            "insert into ops.failures (account, resource, window_start, exit_code, failed_at) values "
            f"('acme', 'usage', timestamptz '2026-11-{day} 00:00:00Z', {exit_code}, "
            f"timestamptz '{failed_at}')"
        )
    freed = {one.kind: one.rows for one in maintain(settings).freed}
    assert freed["ops.failures"] == int(is_over)


def test_every_table_of_ops_has_a_rule_or_a_reason_to_stay() -> None:
    ruled = [rule.table for rule in RETENTIONS]
    assert len(ruled) == len(set(ruled))
    tables = {table for table in METADATA.tables.values() if table.schema == "ops"}
    assert {*ruled, *KEPT} == tables
    assert not set(ruled) & set(KEPT)


# --- What killed commands left --------------------------------------------------------------------


def test_plans_and_leftovers_of_killed_commands_go_and_what_is_in_use_stays(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert distributed.write_plan(settings, CREDITS)
    old = sorted((tmp_path / "landing" / ".plans").iterdir())
    pipeline.run(settings)
    clock.shift(timedelta(days=31))
    young = distributed.write_plan(settings, CREDITS)
    with opened(settings):
        pass
    folder = next(extracts.complete_reads(settings))
    (tmp_path / "landing" / ".decisions").mkdir(exist_ok=True)
    left = [folder / ".loaded.json.part", tmp_path / "landing" / ".decisions" / ".x.json.part"]
    for path in left:
        path.write_bytes(b"1234")
        os.utime(path, (0, 0))
    written = folder / ".page.json.zst.part"
    written.write_bytes(b"1234")
    now = datetime.now(UTC).timestamp()
    os.utime(written, (now, now))
    abandoned = scratch / "faletl-abandoned"
    abandoned.mkdir()
    (abandoned / ".held").touch()
    (abandoned / "rows.parquet").write_bytes(b"12345")

    freed = maintained(settings)

    assert not any(path.exists() for path in (*old, *left, abandoned))
    assert written.exists()
    assert young is not None
    assert Path(young).exists()
    assert freed["unfinished files"] == Freed("unfinished files", files=2, bytes=8)
    assert freed["abandoned temporary folders"].bytes == 5


# --- Others at the same time ----------------------------------------------------------------------


def test_two_that_delete_or_a_rebuild_exclude_each_other(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    pipeline.run(settings)
    read_balance(account, settings, clock, "555")
    clock.shift(timedelta(days=40))
    landed = sorted(Path(settings.landing).rglob("*"))
    hasty = settings.model_copy(update={"lock_seconds": 0.1})
    with extracts.deleting(settings):
        for work in (maintain, prune, rebuild):
            with pytest.raises(WarehouseBusyError, match="another faletl maintain, landing prune or"):
                work(hasty)
        assert maintain(hasty, is_dry=True)
    with (
        open_warehouse(settings).lease("a run"),
        pytest.raises(WarehouseBusyError, match="in use by a run"),
    ):
        maintain(hasty)
    assert {*Path(settings.landing).rglob("*")} - {*landed} <= {Path(settings.landing, ".deleting")}
    assert not is_nothing(maintained(settings))


KILLS = [
    Trap("faletl.landing.extracts.leave_receipt", "after", 2),  # some snapshots are marked
    Trap("faletl.operations.maintain.fence", "after", 1),  # nothing is deleted
    Trap("faletl.operations.maintain._delete_loads", "after", 1),  # deleted, not committed
    Trap(
        "faletl.operations.maintain.build_and_publish", "before"
    ),  # snapshots are gone, their pages are not
    Trap("faletl.landing.extracts.drop", "after", 2),  # some pages are gone
]


def test_a_maintenance_that_is_killed_anywhere_is_finished_by_the_next(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    pipeline.run(settings)
    read_balance(account, settings, clock, "55555555")
    account.lines.append(line(truth.NOW.replace(minute=0, hour=5), FLUX, "2"))
    pipeline.run(settings)
    clock.shift(timedelta(days=40))
    before, now = without_readings(settings), datetime.now(UTC).isoformat()
    for kill in KILLS:
        code, said = start(settings, kill, command="maintain", CLOCK=now).finish()
        assert code == -9, said
        assert verify(settings).findings == []
        rebuild(settings)
        assert without_readings(settings) == before
    code, said = start(settings, command="maintain", CLOCK=now).finish()
    assert code == 0, said
    assert is_nothing(maintained(settings))
    assert without_readings(settings) == before
    check_is_stable(settings)


def test_a_page_that_another_warehouse_needs_stays_until_that_one_is_maintained(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    read_balance(account, settings, clock, "55555555")
    account.lines.append(line(truth.NOW.replace(minute=0, hour=5), FLUX, "2"))
    pipeline.run(settings)
    (tmp_path / "other").mkdir()
    other = settings.model_copy(update={"warehouse": warehouse_for(tmp_path / "other")})
    rebuild(other)
    full = all_tables(other)
    clock.shift(timedelta(days=40))

    freed = maintained(settings)

    assert freed["snapshots equal to the one before"].rows > 0
    assert freed["snapshots equal to the one before"].files == 0
    thin = all_tables(settings)
    assert thin != full
    for work in (show, rebuild):
        work(other)
        assert all_tables(other) == full
        work(settings)
        assert all_tables(settings) == thin
    for one in (settings, other):
        assert verify(one).findings == []
    assert maintained(other)["snapshots equal to the one before"].files > 0
    assert all_tables(other) == thin
    for one in (settings, other):
        check_is_stable(one)
        assert all_tables(one) == thin


def test_nothing_is_deleted_where_no_warehouse_tells_what_is_needed(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    assert is_nothing({one.kind: one for one in maintain(settings).freed})
    pipeline.run(settings)
    clock.shift(timedelta(days=40))
    landed = sorted((tmp_path / "landing").glob("*/**/*"))
    elsewhere = settings.model_copy(update={"warehouse": f"duckdb:///{tmp_path / 'typo.duckdb'}"})
    for is_dry in (True, False):
        with pytest.raises(UsageError, match="check FALETL_WAREHOUSE"):
            maintain(elsewhere, is_dry=is_dry)
    assert sorted((tmp_path / "landing").glob("*/**/*")) == landed
    assert not (tmp_path / "typo.duckdb").exists()
