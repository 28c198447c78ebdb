"""SIGKILL at every step boundary, at system calls and at random moments; signals; two runs at once.

A kill is followed by the next run, which gets as far as its own: what one leaves behind the next one has
to take. The last one is left alone, and has to end in the tables of the served account.
"""

from __future__ import annotations

import random
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it has no types
import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import LeaseLostError, WarehouseBusyError
from faletl.landing import extracts
from faletl.operations.rebuild import prune
from faletl.operations.verify import verify
from faletl.sandbox import Fault, Sandbox
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import fence
from faletl.warehouse.tables import WAREHOUSE
from tests import truth
from tests.conftest import (
    IS_ON_POSTGRES,
    all_tables,
    ask,
    published_path,
    settings_for,
    total,
)
from tests.forked import Child, Trap, be_traced, fork, needs_strace, start, suffer, traced
from tests.servers import wait_for
from tests.truth import Account, line

FILE_ONLY = pytest.mark.duckdb_only("a step that only DuckDB's file has")

DAY = Asked(truth.day(21), truth.day(22), ["usage"])
SPEND = Asked(resources=["usage", "prices"])
"""All that rpt_spend_daily is made of."""
EXTRACT = "extract --resource usage --start 2026-11-21 --end 2026-11-22"


@pytest.fixture
def one_by_one(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings of runs that do one thing after the other, so that moments can be counted."""
    return settings_for(sandbox.url, tmp_path, parallel=1)


def check_a_clean_run_mends_all(
    settings: Settings, served: Account | None = None, asked: Asked = SPEND
) -> None:
    """One clean run later the warehouse is that of the served account."""
    with time_machine.travel(truth.NOW, tick=True):
        report = pipeline.run(settings, asked)
    assert report.exit_code == 0, report.failures
    daily = ask(
        settings,
        "select account, usage_date, endpoint_id, unit, currency, quantity, cost_subtotal, "
        "cost_discount, cost_total, effective_unit_price from reports.rpt_spend_daily",
    )
    assert {row[:5]: row[5:] for row in daily} == truth.spend_daily(served or truth.two_days())
    assert ask(settings, "select count(*), count(distinct endpoint_id) from raw.prices") == [(2, 2)]
    current = "select count(*), count(distinct window_start) from ops.loads "
    current += "where is_current and resource = 'usage'"
    assert ask(settings, current) == [(3, 3)]


def is_killed(child: Child) -> bool:
    """Whether it was, and did not end by itself: then what it said is told."""
    code, said = child.finish()
    assert code == -signal.SIGKILL, f"ended with {code}: {said}"
    return True


# --- Kills ----------------------------------------------------------------------------------------


def test_a_read_that_is_killed_at_any_step_loses_at_most_the_page_in_flight(
    sandbox: Sandbox, one_by_one: Settings
) -> None:
    kills = [
        Trap("faletl.line.extract.plan"),
        Trap("faletl.landing.extracts.write_durably", "before"),  # a page received, not landed
        Trap("os.fsync", "before", 5),  # written under a temporary name; four folders were made
        Trap("pathlib.Path.rename", "before"),  # and flushed
        Trap("pathlib.Path.rename"),  # it has its name, which is not flushed
        Trap("faletl.landing.extracts.write_durably", "after", 2),  # landed, not sealed
        Trap("faletl.landing.extracts.OpenExtract.seal", "before"),
    ]
    now = truth.NOW  # what landed before the account was bound is not gone on with, so time passes
    for kill in kills:
        child = start(one_by_one, kill, command=EXTRACT, FALETL_PARALLEL="1", CLOCK=now.isoformat())
        assert is_killed(child)
        assert not list(extracts.complete_reads(one_by_one))
        now += timedelta(minutes=1)
    with time_machine.travel(now, tick=True):
        assert pipeline.extract(one_by_one, DAY).exit_code == 0
    (read,) = map(extracts.open_read, extracts.complete_reads(one_by_one))
    assert extracts.is_intact(read.folder)
    pages = [request for request in sandbox.requests if request.path == "/models/usage"]
    asked = [
        request for request in pages if request.query.get("limit") != ["1"]
    ]  # the key was tried first
    rows = [request for request in asked if request.query["expand"] != ["summary"]]
    assert len(read.manifest.pages("rows")) == 4
    assert len(rows) <= 4 + len(kills)
    assert not list(read.folder.glob(".*"))


LOADING = [
    Trap("faletl.staging.window.prove", "before"),  # half staged
    Trap("faletl.line.load.stage_window"),  # staged, not validated
    Trap("faletl.line.load._load_batch", "before"),  # not begun to be loaded
    Trap("faletl.line.replace.fence"),  # inside the window's transaction
    Trap("faletl.line.replace._delete_window"),
    Trap("faletl.line.replace._insert"),
    Trap("faletl.line.replace._enter"),  # all written, not committed
]


def test_a_load_that_is_killed_at_any_step_is_done_or_not_and_never_twice(
    sandbox: Sandbox, one_by_one: Settings
) -> None:
    assert is_killed(
        start(one_by_one, Trap("faletl.landing.extracts.OpenExtract.seal"), command=EXTRACT)
    )
    asked = len(sandbox.requests)
    for kill in LOADING:
        assert is_killed(start(one_by_one, kill, command="load"))
        assert loaded(one_by_one) == (0, 0)
    committed = Trap("faletl.line.replace.extracts.leave_receipt", "before")
    assert is_killed(start(one_by_one, committed, command="load"))
    assert loaded(one_by_one) == (15, 1)
    code, said = start(one_by_one, command="load").finish()
    assert code == 0
    assert "nothing to load" in said
    assert loaded(one_by_one) == (15, 1)
    assert len(sandbox.requests) == asked
    check_a_clean_run_mends_all(one_by_one)


def loaded(settings: Settings) -> tuple[int, int]:
    """How many rows of usage are loaded, and how many loads brought them."""
    with open_warehouse(settings).reading() as connection:
        if connection is None:
            return 0, 0
        rows, loads = (
            int(connection.exec_driver_sql(f"select count(*) from {table}").scalar_one())
            for table in ("raw.usage", "ops.loads")
        )
        return rows, loads


def test_a_load_that_is_killed_when_the_gate_has_passed_it_is_not_begun(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    gated = settings_for(sandbox.url, tmp_path, gate=True)
    with time_machine.travel(truth.NOW, tick=True):
        assert pipeline.extract(gated, DAY).exit_code == 0
    assert is_killed(start(gated, Trap("faletl.gate.gate.Gate.judge"), command="load"))
    assert loaded(gated) == (0, 0)
    with time_machine.travel(truth.NOW, tick=True):
        assert pipeline.load(gated.model_copy(update={"gate": False})).exit_code == 0
    assert loaded(gated) == (15, 1)


BUILDING = [
    Trap("faletl.models.build._fill", "after", 9),  # half built
    Trap("faletl.models.build._check", "after", 9),  # checked, not committed
    Trap("faletl.line.release.build_models"),  # built, not published
]


def half_copied(settings: Settings) -> None:
    """What a copy of the file is in the middle of being made."""
    path = Path(settings.warehouse.removeprefix("duckdb:///"))
    shown = published_path(settings)
    half = path.read_bytes()[: path.stat().st_size // 2]
    shown.with_name(f".{shown.name}.part").write_bytes(half)
    suffer(signal.SIGKILL)


def test_readers_have_the_old_tables_or_the_new_whenever_a_build_or_publication_is_killed(
    account: Account, one_by_one: Settings
) -> None:
    def load_days(asked: Asked = DAY, later: timedelta = timedelta(0)) -> None:
        with time_machine.travel(truth.NOW + later, tick=True):
            assert pipeline.extract(one_by_one, asked).exit_code == 0
            assert pipeline.load(one_by_one).exit_code == 0

    load_days()
    pipeline.build(one_by_one)
    pipeline.publish(one_by_one)
    report = "from reports.rpt_spend_daily order by all"
    before = ask(one_by_one, report)
    account.lines[0] = line(account.lines[0].hour, quantity="9")
    load_days(later=timedelta(minutes=1))
    publishing = [] if IS_ON_POSTGRES else [
        Trap("faletl.warehouse.duckdb.copy_file", "before", springs=partial(half_copied, one_by_one)),
        Trap("pathlib.Path.replace", "before"),
    ]  # fmt: skip
    for kill in BUILDING:
        assert is_killed(start(one_by_one, kill, command="build"))
        if not IS_ON_POSTGRES or kill is not BUILDING[-1]:  # readers of a server see what is committed
            assert ask(one_by_one, report) == before
    for kill in publishing:
        assert is_killed(start(one_by_one, kill, command="publish"))
        assert ask(one_by_one, report) == before
    if not IS_ON_POSTGRES:
        assert is_killed(start(one_by_one, Trap("pathlib.Path.replace"), command="publish"))
    assert ask(one_by_one, report) != before
    check_a_clean_run_mends_all(one_by_one, account)
    assert not list(published_path(one_by_one).parent.glob(".spend*"))


def test_a_rebuild_that_is_killed_leaves_the_old_warehouse_or_the_new(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    with time_machine.travel(truth.NOW, tick=True):
        assert pipeline.run(settings, Asked(truth.day(21), truth.day(23), ["usage"])).exit_code == 0
    before = all_tables(settings)
    half = Trap("faletl.operations.rebuild.replay")  # of the reads loaded
    whole = Trap("faletl.operations.rebuild.build_models")  # not committed on a server
    if not IS_ON_POSTGRES:  # not in its place; before that the new file had got its name
        whole = Trap("pathlib.Path.replace", "before", 2)
    done = [] if IS_ON_POSTGRES else [Trap("pathlib.Path.replace", "after", 2)]  # not published
    for kill in (half, whole, *done):
        assert is_killed(start(settings, kill, command="rebuild"))
        assert loaded(settings) == (30, 2)
        with open_warehouse(settings).lease("a test"):
            pass  # it can be written
        assert not list(tmp_path.glob(".*rebuild*"))
    code, said = start(settings, command="rebuild").finish()
    assert code == 0, said
    assert all_tables(settings) == before


def test_pages_that_are_needed_outlive_a_pruning_that_is_killed(
    account: Account, one_by_one: Settings
) -> None:
    with time_machine.travel(truth.NOW, tick=True) as clock:
        pipeline.run(one_by_one, DAY)
        for quantity in ("7", "8"):
            account.lines[0] = line(account.lines[0].hour, quantity=quantity)
            clock.shift(timedelta(hours=2))  # too late to take the read before over
            pipeline.extract(one_by_one, DAY)
        pipeline.load(one_by_one)
        dropped, _ = prune(one_by_one, is_dry=True)
        assert len(dropped) == 1
        # The manifest is gone, the pages are not.
        kill = Trap("faletl.landing.storage.Disk.drop", "before")
        assert is_killed(start(one_by_one, kill, command="landing prune"))
        assert [extracts.is_complete(folder) for folder in dropped] == [False]
        clock.shift(timedelta(hours=2))  # an interrupted read could have been taken up until then
        assert prune(one_by_one)[0] == dropped
        assert verify(one_by_one).findings == []


def hold_the_lease(settings: Settings) -> None:
    """Make the warehouse, if need be, and take its lease."""
    be_traced()
    with open_warehouse(settings).lease("a test"):
        pass


def is_killed_at(child: Child, call: str, nth: int) -> bool:
    """Whether it was when a thread of it made that system call for that time."""
    with traced(child, f"trace={call}", f"inject={call}:signal=SIGKILL:when={nth}"):
        return is_killed(child)


@needs_strace
@FILE_ONLY
def test_a_first_run_that_is_killed_while_the_file_is_made_leaves_nothing_in_the_way(
    tmp_path: Path,
) -> None:
    settings = settings_for("http://127.0.0.1:9", tmp_path)
    for call, nth in (("pwrite64", 1), ("pwrite64", 2), ("pwrite64", 3), ("pwrite64", 7),
                      ("fsync", 1), ("fsync", 2), ("rename", 1)):  # fmt: skip
        assert is_killed_at(fork(hold_the_lease, settings), call, nth)
        assert not (tmp_path / "warehouse.duckdb").exists()
    with open_warehouse(settings).lease("a test") as lease:
        assert lease.token == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "warehouse.duckdb", "warehouse.duckdb.lock",
    ]  # fmt: skip


@needs_strace
@FILE_ONLY
def test_commands_that_are_killed_at_system_calls_are_mended_by_the_next(one_by_one: Settings) -> None:
    calls = {
        EXTRACT: [("write", 2), ("fsync", 3), ("rename", 2), ("unlink", 1)],
        "load": [("fsync", 1), ("write", 1), ("write", 2), ("unlink", 1), ("pwrite64", 1)],
        "build": [("write", 1), ("write", 3), ("fsync", 1)],
        "publish": [
            ("pwrite64", 1), ("pwrite64", 3), ("fsync", 2), ("copy_file_range", 1), ("rename", 1),
        ],
    }  # fmt: skip
    for command, kills in calls.items():
        for call, nth in kills:
            child = start(one_by_one, be_traced, command=command)
            assert is_killed_at(child, call, nth), (command, call, nth)
        code, said = start(one_by_one, command=command).finish()
        assert code == 0, said
    check_a_clean_run_mends_all(one_by_one)


def test_runs_that_are_killed_at_random_moments_are_mended_by_the_next(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    chance = random.Random(5)  # noqa: S311  # a repeatable test, not secrecy
    for _ in range(6):
        child = start(settings)
        time.sleep(chance.uniform(0.1, 2.5))
        child.process.kill()
        child.finish()
    check_a_clean_run_mends_all(settings, asked=EVERYTHING_DUE)


# --- Signals --------------------------------------------------------------------------------------


def test_a_signal_stops_any_step_in_good_order_and_a_second_one_at_once(
    sandbox: Sandbox, one_by_one: Settings
) -> None:
    steps = [
        (EXTRACT, "faletl.line.extract.wait"),
        ("load", "faletl.line.replace._insert"),
        ("build", "faletl.models.build._fill"),
        (
            "publish",
            "faletl.warehouse.duckdb.copy_file"
            if not IS_ON_POSTGRES
            else "faletl.warehouse.schema.build_to_publish",
        ),
    ]
    for command, function in steps:
        for signals, code in (([signal.SIGINT], 130), ([signal.SIGTERM] * 2, 143)):
            trap = Trap(function, springs=partial(suffer, *signals))
            ended, said = start(one_by_one, trap, command=command).finish()
            assert ended == code, said
            assert said.count("faletl: interrupted") == (len(signals) == 1), said
            assert "Traceback" not in said
        ended, said = start(one_by_one, command=command).finish()
        assert ended == 0, said
    check_a_clean_run_mends_all(one_by_one)


@pytest.mark.parametrize(
    "slow", [Fault(status=503, headers={"retry-after": "100"}), Fault(delay_seconds=100)]
)
def test_a_signal_ends_a_wait_for_fal(slow: Fault, sandbox: Sandbox, tmp_path: Path) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    sandbox.fault = lambda _: slow
    for number, account, code in ((signal.SIGTERM, "acme", 143), (signal.SIGINT, "", 130)):
        sandbox.requests.clear()
        child = start(settings, command="extract", FALETL_ACCOUNT=account)  # without, one thread asks
        wait_for("fal is asked", lambda: sandbox.requests, seconds=60, every=0.05)
        child.send(number)
        ended, said = child.finish(30)
        assert (ended, said.splitlines()[-1][:19]) == (code, "faletl: interrupted")


def test_a_signal_ends_a_wait_for_the_lock(one_by_one: Settings) -> None:
    with open_warehouse(one_by_one).lease("a test"):
        waiting = start(one_by_one, Trap("time.sleep", "before", springs=be_awaited), command="build")
        wait_for("it waits", lambda: waiting.said.read_text("utf-8"), seconds=60, every=0.05)
        waiting.send(signal.SIGTERM)
        assert waiting.finish(30)[0] == 143


def be_awaited() -> None:
    """Tell that the moment has come."""
    print("here", flush=True)


# --- Several at once ------------------------------------------------------------------------------


def test_runs_at_once_neither_double_nor_spoil(sandbox: Sandbox, tmp_path: Path) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    runs = [start(settings, command="run --resource usage") for _ in range(3)]
    codes = {run.finish() for run in runs}
    assert {code for code, _ in codes} == {0}, codes
    check_a_clean_run_mends_all(settings)


def test_a_paused_holder_spoils_nothing_when_it_goes_on(
    account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    for hour, function in enumerate(("faletl.line.replace._insert", "faletl.models.build._fill")):
        account.lines.append(line(truth.NOW.replace(hour=hour, minute=0)))
        pause = Trap(function, springs=partial(suffer, signal.SIGSTOP))
        paused = start(settings, pause, command="run --resource usage")
        wait_for("it pauses", partial(is_stopped, paused.pid), seconds=60, every=0.05)
        other = start(settings, command="run --resource usage", FALETL_LOCK_SECONDS="0.5")
        code, said = other.finish()
        assert code == 1
        assert f"process {paused.pid}" in said  # it says who holds the warehouse
        assert "since" in said
        paused.send(signal.SIGCONT)
        code, said = paused.finish()
        assert code == 0, said
    check_a_clean_run_mends_all(settings, account)


def is_stopped(pid: int) -> bool:
    """Whether the process is paused."""
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def test_a_run_that_lost_its_lease_writes_nothing(
    clock: time_machine.Traveller, settings: Settings, account: Account
) -> None:
    warehouse = open_warehouse(settings)
    with warehouse.lease("the old one") as lease:
        with lease.connection.begin():  # what a newer holder does when it takes over
            lease.connection.execute(
                sa.update(WAREHOUSE).values(
                    fencing_token=WAREHOUSE.c.fencing_token + 1, holder="the new one"
                )
            )
        with pytest.raises(LeaseLostError, match="the new one"), lease.connection.begin():
            fence(lease, changes_data=True)


def test_a_read_planned_before_a_newer_load_replaces_nothing(
    clock: time_machine.Traveller, settings: Settings, account: Account
) -> None:
    pipeline.extract(settings, SPEND)  # lands; then somebody else reads and loads what came since
    account.lines.append(line(account.lines[-1].hour, quantity="7"))
    pipeline.run(settings, SPEND)
    after = total(settings)
    clock.shift(-60)  # whatever the clocks say
    report = pipeline.load(settings)
    assert {outcome.outcome for outcome in report.outcomes} <= {"superseded"}
    pipeline.build(settings, full=True)
    pipeline.publish(settings)
    assert total(settings) == after == sum(one.cost_total for one in account.lines)


def test_a_writer_waits_and_then_says_who_holds_the_warehouse(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings, DAY)
    impatient = settings.model_copy(update={"lock_seconds": 0.3})
    with open_warehouse(settings).lease("a long load"):
        with pytest.raises(WarehouseBusyError, match=r"a long load .process .* since 2026-11-23"):
            open_warehouse(impatient).lease("me").__enter__()
        assert ask(settings, "select count(*) > 0 from reports.rpt_spend_daily") == [(True,)]
