"""Rebuild, prune and verify: the landed pages are enough, whatever became of the warehouse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import SettingsError, TamperedError, UsageError
from faletl.landing import extracts
from faletl.line.report import Report
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.verify import verify
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from faletl.warehouse.tables import LOADS, RESTATEMENTS
from tests import truth
from tests.conftest import IS_ON_POSTGRES, all_tables, ask, opened, settings_for, total
from tests.truth import FLUX, VIDEO, VOICE, Account, line

DAYS = Asked(start=truth.day(21), end=truth.day(23), resources=["usage", "billing_events"])


def at(text: str) -> datetime:
    """An instant of November 2026: `22T05`."""
    return datetime.fromisoformat(f"2026-11-{text}:00:00+00:00")


def history(settings: Settings) -> list[list[tuple[Any, ...]]]:
    """What a rebuild must bring back beside the tables: the ledger and the restatements."""
    return [
        ask(settings, f"select {', '.join(names)} from ops.{table.name} order by all")
        for table, less in (
            (LOADS, ("fencing_token", "last_fencing_token", "data_version")),
            (RESTATEMENTS, ("load_id",)),
        )
        if (names := [column.name for column in table.columns if column.name not in less])
    ]


def check_rebuilds_alike(settings: Settings, *days: int) -> None:
    """From the pages alone, and then day by day: the same."""
    before, past = all_tables(settings), history(settings)
    forget(settings)
    rebuild(settings)
    assert (all_tables(settings), history(settings)) == (before, past)
    for day in days:
        rebuild(settings, truth.day(day))
    if days:
        assert (all_tables(settings), history(settings)) == (before, past)
    assert verify(settings).findings == []


def forget(settings: Settings) -> None:
    """There is no warehouse any more."""
    if settings.warehouse.startswith("duckdb:"):
        Path(settings.warehouse.removeprefix("duckdb:///")).unlink()
    else:
        with psycopg.connect(settings.warehouse, autocommit=True) as owner:
            owner.execute("drop schema raw, staging, marts, reports, ops cascade")


def within_a_run(
    settings: Settings, sandbox: Sandbox, happens: Callable[[], None], asked: Asked = DAYS
) -> Report:
    """A run during whose first request for usage something else happens, from start to end."""
    is_over = False

    def meanwhile(request: Request) -> Fault | None:
        nonlocal is_over
        if request.path == "/models/usage" and not is_over:
            is_over = True
            happens()
        return None

    sandbox.fault = meanwhile
    report = pipeline.run(settings.model_copy(update={"parallel": 1}), asked)
    sandbox.fault = None
    return report


def test_of_two_runs_that_overlap_a_rebuild_loads_the_one_that_was_loaded(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    pipeline.run(settings)
    account.lines.append(line(at("22T05"), VIDEO, "2"))
    clock.shift(60)

    def another() -> None:
        assert {o.outcome for o in pipeline.run(settings, DAYS).outcomes} >= {"loaded"}
        account.lines.append(line(at("21T05"), VOICE, "9"))  # seen by the slower run alone
        clock.shift(60)

    slow = within_a_run(settings, sandbox, another)
    assert {outcome.outcome for outcome in slow.outcomes} == {"superseded"}
    assert verify(settings).findings == []
    check_rebuilds_alike(settings, 21, 22, 23)
    clock.shift(timedelta(days=1))
    pipeline.run(settings, DAYS)
    assert total(settings) == sum(one.cost_total for one in account.lines)
    prune(settings)
    before = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == before


def test_two_extracts_within_a_second_keep_the_order_in_which_they_were_loaded(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    """Fal's clock tells whole seconds: it lets the later one begin before the earlier one."""
    second, breaks = 2, False

    def tells(request: Request) -> Fault:
        is_broken = breaks and "cursor" in request.query
        stated = format_datetime(truth.NOW + timedelta(seconds=second), usegmt=True)
        return Fault(status=500 if is_broken else None, headers={"date": stated})

    sandbox.fault = tells
    clock.shift(timedelta(seconds=2.4))
    assert {outcome.outcome for outcome in pipeline.run(settings, DAYS).outcomes} == {"loaded"}
    clock.shift(timedelta(seconds=0.05))
    account.lines.append(line(at("22T05"), VIDEO, "2"))
    breaks = True
    assert pipeline.extract(settings, DAYS).failures
    clock.shift(timedelta(seconds=2.5))
    second, breaks = 4, False
    assert pipeline.run(settings, DAYS).failures == []
    assert total(settings) == sum(one.cost_total for one in account.lines)
    check_rebuilds_alike(settings, 21, 22)


def test_what_waits_to_be_loaded_is_not_pruned(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    pipeline.run(settings)
    clock.shift(60)
    for quantity in ("2", "3"):
        account.lines.append(line(at("22T05"), VIDEO, quantity))
        pipeline.extract(settings, DAYS)
        clock.shift(timedelta(hours=2))  # too late for the next to take it over
        assert prune(settings)[0] == []
    pipeline.load(settings)
    pipeline.build(settings)
    pipeline.publish(settings)
    assert total(settings) == sum(one.cost_total for one in account.lines)
    dropped, _ = prune(settings)  # the older reads can never be loaded any more
    assert len({folder.parent for folder in dropped}) == len(dropped) > 0
    check_rebuilds_alike(settings)


def test_prune_keeps_the_read_that_found_a_day_closed_and_not_one_that_was_refused(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, settings: Settings
) -> None:
    account.lines.append(line(at("23T05"), VIDEO, "2"))
    pipeline.run(settings)
    clock.shift(timedelta(days=1))
    sandbox.fault = lambda request: (
        Fault(body=b'{"summary":[],"next_cursor":null,"has_more":false}')
        if request.query.get("expand") == ["summary"]
        else None
    )
    assert pipeline.run(settings).exit_code == 3  # refused
    sandbox.fault = None
    clock.shift(60)
    pipeline.run(settings)  # unchanged
    account.lines[-1] = line(at("23T05"), VIDEO, "3")
    clock.shift(timedelta(days=3))
    pipeline.run(settings)  # restated
    before, restated = all_tables(settings), history(settings)[1]
    assert restated
    read = "select resource, window_start, last_read_at from ops.loads where is_current order by all"
    reads = ask(settings, read)
    dropped, size = prune(settings, is_dry=True)
    assert dropped
    assert prune(settings) == (dropped, size)
    assert prune(settings) == ([], 0)
    forget(settings)
    rebuild(settings)
    assert (all_tables(settings), history(settings)[1]) == (before, restated)
    assert ask(settings, read) == reads


def test_nothing_is_pruned_where_no_warehouse_tells_what_is_needed(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    landed = sorted((tmp_path / "landing").glob("*/**/*"))
    elsewhere = settings.model_copy(update={"warehouse": f"duckdb:///{tmp_path / 'typo.duckdb'}"})
    with pytest.raises(UsageError, match="check FALETL_WAREHOUSE"):
        prune(elsewhere)
    assert sorted((tmp_path / "landing").glob("*/**/*")) == landed


@pytest.mark.parametrize("damage", ["drop table ops.loads cascade", "drop table raw.usage cascade"])
def test_a_warehouse_without_its_ledger_is_made_anew(
    damage: str, clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    account.lines[0] = line(account.lines[0].hour, FLUX, "9")
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    before, past = all_tables(settings), history(settings)
    with opened(settings) as connection:
        connection.execute(damage)
    rebuild(settings)
    assert (all_tables(settings), history(settings)) == (before, past)


def test_a_kill_between_a_load_and_its_receipt_loses_nothing(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    account.lines[0] = line(account.lines[0].hour, FLUX, "9")
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    before, past = all_tables(settings), history(settings)
    for receipt in (tmp_path / "landing").rglob(extracts.RECEIPT):
        receipt.unlink()
    rebuild(settings)
    assert (all_tables(settings), history(settings)) == (before, past)
    check_rebuilds_alike(settings)  # the receipts are there again


# --- Pages that are gone or damaged ---------------------------------------------------------------


def damaged(folder: Path) -> None:
    """One byte of the first page is another one."""
    page = next(folder.glob("rows-*"))
    page.write_bytes(page.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [shutil.rmtree, damaged])
def test_reading_a_day_again_stands_in_for_its_damaged_pages(
    damage: Callable[[Path], None],
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path,
) -> None:  # fmt: skip
    pipeline.run(settings)
    before = all_tables(settings)
    for folder in (tmp_path / "landing/acme/usage/2026-11-22").iterdir():
        damage(folder)
    assert verify(settings).findings
    with pytest.raises(TamperedError):
        rebuild(settings)
    clock.shift(60)
    report = pipeline.run(settings, Asked(truth.day(21), truth.day(23), ["usage"]))
    assert sorted(outcome.outcome for outcome in report.outcomes) == ["loaded", "unchanged"]
    assert all_tables(settings) == before
    assert verify(settings).findings == []
    assert history(settings)[1] == []
    check_rebuilds_alike(settings)


def test_damage_to_pages_that_nothing_stands_on_is_no_hindrance(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)  # the 23rd is open
    account.lines.append(line(at("23T05"), VIDEO, "2"))
    (open_read,) = (tmp_path / "landing/acme/usage/2026-11-23").iterdir()
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    before = all_tables(settings)
    damaged(open_read)
    assert verify(settings).findings == []
    rebuild(settings)
    assert all_tables(settings) == before
    (open_read / extracts.MANIFEST).write_bytes(b"{")
    rebuild(settings)
    assert all_tables(settings) == before


def test_a_damaged_extract_that_was_refused_is_no_hindrance(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    account.lines.append(line(at("22T05"), VIDEO, "-2"))
    clock.shift(timedelta(hours=1))
    assert pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"])).exit_code == 3
    before = all_tables(settings)
    damaged(max((tmp_path / "landing/acme/usage/2026-11-22").iterdir()))
    for day in (None, truth.day(22)):
        rebuild(settings, day)
        after = all_tables(settings)
        assert after["reports.rpt_spend_daily"] == before["reports.rpt_spend_daily"]


def test_pages_that_only_restatements_stand_on_are_missed_too(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    (first,) = (tmp_path / "landing/acme/usage/2026-11-22").iterdir()
    account.lines.append(line(at("22T05"), VIDEO, "2"))
    clock.shift(timedelta(days=1))
    pipeline.run(settings)
    assert history(settings)[1]
    shutil.rmtree(first)
    assert [first.name in finding for finding in verify(settings).findings] == [True]
    for day in (None, truth.day(22)):
        with pytest.raises(TamperedError, match=f"1 loads are gone .*{first.name}"):
            rebuild(settings, day)


def test_another_landing_folder_is_not_taken_for_an_empty_history(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    elsewhere = settings.model_copy(update={"landing": str(tmp_path / "typo")})
    with pytest.raises(TamperedError, match="check FALETL_LANDING"):
        rebuild(elsewhere)


# --- One day --------------------------------------------------------------------------------------


def test_a_day_made_anew_leaves_what_is_known_of_fal_as_it_is(
    clock: time_machine.Traveller, sandbox: Sandbox, settings: Settings
) -> None:
    pipeline.run(settings)
    clock.shift(timedelta(days=1))
    sandbox.fault = lambda request: (
        Fault(status=400)
        if request.path == "/models/usage" and request.query["start"] == ["2026-11-22T00:00:00Z"]
        else None
    )
    assert pipeline.run(settings, DAYS).exit_code == 3
    sandbox.fault = None

    def known() -> list[list[tuple[Any, ...]]]:
        with opened(settings) as connection:
            return [
                sorted(connection.execute(f"select * from ops.{table}").fetchall())
                for table in ("failures", "unknown_endpoints")
            ]

    before = known()
    assert all(before)
    rebuild(settings, truth.day(22))
    assert known() == before
    count, distinct = ask(
        settings,
        "select count(*), count(distinct fencing_token) from ops.loads "
        "where window_start::date = '2026-11-22'",
    )[0]
    assert count == distinct  # the ledger tells which of two loads was the later one


# --- Verify ---------------------------------------------------------------------------------------


def test_verify_says_what_it_could_not_look_at(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    assert verify(settings).is_complete
    owners = tmp_path / "owners.csv"
    owners.write_text("account,credential_id,owner,team,cost_centre\n,none,web,,\n")
    verdict = verify(settings.model_copy(update={"owners": owners}))
    assert (verdict.findings, verdict.is_complete) == ([], False)
    account.lines.append(line(at("22T05"), VIDEO, "2"))
    clock.shift(60)
    pipeline.extract(settings, DAYS)
    pipeline.load(settings)
    with opened(settings) as connection:
        connection.execute("delete from reports.rpt_spend_daily")
        connection.execute("delete from raw.billing_events where _row = 2")
    verdict = verify(settings)
    assert not verdict.is_complete
    assert verdict.findings  # raw is looked at in any case
    assert all("billing_events" in finding for finding in verdict.findings)


def test_a_build_counts_the_checks_that_it_made(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    first = pipeline.run(settings).build
    clock.shift(60)
    second = pipeline.run(settings).build  # the balance alone is new
    assert first is not None
    assert second is not None
    assert 0 < second.checks < first.checks
    assert datetime.now(UTC) > truth.NOW


def test_the_day_of_another_landing_is_no_day_of_this_one(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    settings = settings_for("http://127.0.0.1:9", tmp_path)
    with pytest.raises(UsageError, match="there is no warehouse yet"):
        rebuild(settings, truth.day(22))
    assert rebuild(settings).outcomes == []


@pytest.mark.skipif(IS_ON_POSTGRES, reason="a server's tables are emptied, and nothing else")
def test_a_rebuild_loses_nothing_that_others_keep_in_the_file(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    assert pipeline.run(settings, Asked(resources=["credits"])).exit_code == 0
    file = str(sa.make_url(settings.warehouse).database)
    with duckdb.connect(file) as theirs:
        theirs.execute("create schema notes; create table notes.mine as select 42 as answer")
        theirs.execute("create view marts.mine as select 1 as one")
        theirs.execute("create schema drafts; create macro net(amount) as amount * 0.8")
        theirs.execute("create sequence notes.ids; create type notes.mood as enum ('good')")
        theirs.execute("create index by_name on raw.credits (username)")
    named = "drafts, main.net, marts.mine, notes.ids, notes.mine, notes.mood, raw.by_name"
    with pytest.raises(SettingsError, match=f"would delete: {named};"):
        rebuild(settings)
    assert pipeline.run(settings, Asked(resources=["credits"])).exit_code == 0  # a build keeps them, too
    with duckdb.connect(file) as theirs:
        assert theirs.execute("select answer from notes.mine").fetchall() == [(42,)]
        assert theirs.execute("select net(10)").fetchall() == [(Decimal(8),)]
        theirs.execute("drop schema notes cascade; drop schema drafts; drop view marts.mine")
        theirs.execute("drop macro net; drop index raw.by_name")
    rebuild(settings)
