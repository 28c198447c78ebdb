"""SIGKILL at every step boundary and at random moments, two runs at once, a paused and a late one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import LeaseLostError, WarehouseBusyError
from faletl.load import fence
from faletl.sandbox import FULL_KEY, Sandbox
from faletl.verify import verify
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import WAREHOUSE
from tests import truth
from tests.conftest import all_tables, ask, published_path, settings_for, total
from tests.truth import Account, line

FILE_ONLY = pytest.mark.duckdb_only("a step that only DuckDB's file has")

STEPS = [
    ("faletl.landing.write_durably", "before", 1),  # a page received, not landed
    ("faletl.places.sync", "before", 3),  # renamed, the folder not flushed
    ("faletl.landing.write_durably", "after", 4),  # landed, not sealed
    ("faletl.landing.Attempt.seal", "before", 2),
    ("faletl.landing.Attempt.seal", "after", 2),  # sealed, not staged
    ("faletl.staging._prove", "before", 1),  # half staged
    ("faletl.pipeline.stage_window", "after", 2),  # staged, not validated
    ("faletl.gate.Gate.judge", "after", 2),  # validated, not begun to be loaded
    ("faletl.findings.keep_validations", "after", 2),  # what was found is written, not committed
    ("faletl.warehouse.schema.create", "after", 1),  # a new file half made
    pytest.param("faletl.warehouse.duckdb.sync", "after", 1, marks=FILE_ONLY),  # made, not renamed
    ("faletl.load.fence", "after", 2),  # inside a window's transaction
    ("faletl.load._delete_window", "after", 1),
    ("faletl.load._insert", "after", 2),
    ("faletl.load._enter", "after", 3),  # all written, not committed
    ("faletl.pipeline.replace_window", "after", 2),  # committed, not told
    ("faletl.models._fill", "after", 9),  # half built
    ("faletl.models._check", "after", 9),  # checked, not committed
    ("faletl.models.build", "after", 1),  # built, not published
    pytest.param("shutil.copyfile", "after", 1, marks=FILE_ONLY),  # copied, not renamed
    pytest.param("faletl.warehouse.duckdb.sync", "after", 3, marks=FILE_ONLY),
]


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The settings as a child process gets them."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FAL_KEY": FULL_KEY,
        "FALETL_API_URL": settings.api_url,
        "FALETL_WAREHOUSE": settings.warehouse,
        "FALETL_LANDING": settings.landing,
        "FALETL_FIRST_DAYS": "2",
        "FALETL_RATE": "0",
        "FALETL_GATE": str(int(settings.gate)),
        **more,
    }


def start(settings: Settings, *trap: str, command: str = "run", **more: str) -> subprocess.Popen[str]:
    """A command in a process of its own, with the clock of the tests."""
    trap = trap or ("faletl.pipeline.plan", "never", "0")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.killed_run", *trap, command],
        env=environment(settings, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture(scope="module")
def served() -> Iterator[Sandbox]:
    """One server for all kills: nobody changes its account."""
    with Sandbox(truth.two_days(), page_size=4) as server:
        yield server


def check_a_clean_run_mends_all(settings: Settings) -> None:
    """One clean run later the warehouse is that of the served account."""
    with time_machine.travel(truth.NOW, tick=True):
        report = pipeline.run(settings)
    assert report.exit_code == 0, report.failures
    served = truth.two_days()
    daily = ask(
        settings,
        "select account, usage_date, endpoint_id, unit, currency, quantity, cost_subtotal, "
        "cost_discount, cost_total, effective_unit_price from reports.rpt_spend_daily",
    )
    assert {row[:5]: row[5:] for row in daily} == truth.spend_daily(served)
    assert ask(settings, "select count(*), count(distinct endpoint_id) from raw.prices") == [(2, 2)]
    current = "select count(*), count(distinct window_start) from ops.loads "
    current += "where is_current and resource = 'usage'"
    assert ask(settings, current) == [(3, 3)]


@pytest.mark.parametrize(("function", "when", "nth"), STEPS)
def test_a_run_killed_between_two_steps_is_mended_by_the_next(
    function: str, when: str, nth: int, served: Sandbox, tmp_path: Path
) -> None:
    is_gated = function.startswith(("faletl.gate.", "faletl.findings.keep_validations"))
    settings = settings_for(served.url, tmp_path, gate=is_gated)
    code, said = finish(start(settings, function, when, str(nth)))
    assert code == -signal.SIGKILL, f"the trap did not spring: {said}"
    if published_path(settings).exists():
        assert total(settings) == sum(one.cost_total for one in truth.two_days().lines)
    check_a_clean_run_mends_all(settings)


@FILE_ONLY
def test_readers_keep_the_old_copy_when_a_later_run_is_killed(
    served: Sandbox, tmp_path: Path, account: Account
) -> None:
    settings = settings_for(served.url, tmp_path)
    check_a_clean_run_mends_all(settings)
    before = ask(settings, "from reports.rpt_spend_daily order by all")
    for trap in (("faletl.models._fill", "after", "2"), ("shutil.copyfile", "after", "1")):
        assert finish(start(settings, *trap))[0] == -signal.SIGKILL
        assert ask(settings, "from reports.rpt_spend_daily order by all") == before
    check_a_clean_run_mends_all(settings)


@pytest.mark.parametrize(
    "trap",
    [
        ("faletl.rebuild.replay", "after", "4"),  # half of the reads loaded
        ("faletl.models.build", "after", "1"),  # the new warehouse whole, not in its place
        pytest.param(
            ("faletl.warehouse.duckdb.sync", "before", "3"), marks=FILE_ONLY
        ),  # in its place, not published
    ],
)
def test_a_killed_rebuild_leaves_the_old_warehouse_or_the_new(
    trap: tuple[str, str, str], served: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(served.url, tmp_path)
    check_a_clean_run_mends_all(settings)
    before = all_tables(settings)
    assert finish(start(settings, *trap, command="rebuild"))[0] == -signal.SIGKILL
    assert all_tables(settings) == before
    assert verify(settings).findings == []
    assert finish(start(settings, command="rebuild"))[0] == 0
    assert all_tables(settings) == before
    assert not list(tmp_path.glob(".*rebuild*"))
    check_a_clean_run_mends_all(settings)


@pytest.mark.parametrize("seed", range(3))
def test_runs_killed_at_random_moments_are_mended_by_the_next(
    seed: int, served: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(served.url, tmp_path)
    chance = random.Random(seed)  # noqa: S311  # a repeatable test, not secrecy
    for _ in range(3):
        process = start(settings)
        time.sleep(chance.uniform(0.5, 3))
        process.kill()
        finish(process)
    check_a_clean_run_mends_all(settings)


def test_runs_at_once_neither_double_nor_spoil(served: Sandbox, tmp_path: Path) -> None:
    settings = settings_for(served.url, tmp_path)
    codes = {finish(process) for process in [start(settings) for _ in range(3)]}
    assert {code for code, _ in codes} == {0}, codes
    check_a_clean_run_mends_all(settings)


def test_a_paused_holder_spoils_nothing_when_it_goes_on(served: Sandbox, tmp_path: Path) -> None:
    settings = settings_for(served.url, tmp_path)
    for pause_after in (0.8, 1.6):
        paused = start(settings)
        time.sleep(pause_after)
        paused.send_signal(signal.SIGSTOP)
        code, said = finish(start(settings, FALETL_LOCK_SECONDS="1"))
        paused.send_signal(signal.SIGCONT)
        assert code in (0, 1), said
        if code == 1:
            assert f"process {paused.pid}" in said  # it says who holds the warehouse
            assert "since" in said
        assert finish(paused)[0] in (0, 1)
    check_a_clean_run_mends_all(settings)


def test_a_run_that_lost_its_lease_writes_nothing(
    clock: time_machine.Traveller, settings: Settings, account: Account
) -> None:
    pipeline.run(settings)
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
    pipeline.extract(settings)  # lands; then somebody else reads and loads what came since
    account.lines.append(line(account.lines[-1].hour, quantity="7"))
    pipeline.run(settings)
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
    pipeline.run(settings)
    impatient = settings.model_copy(update={"lock_seconds": 0.3})
    with open_warehouse(settings).lease("a long load"):
        with pytest.raises(WarehouseBusyError, match=r"a long load .process .* since 2026-11-23"):
            open_warehouse(impatient).lease("me").__enter__()
        assert ask(settings, "select count(*) > 0 from reports.rpt_spend_daily") == [(True,)]
