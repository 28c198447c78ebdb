"""Loaded windows as Parquet files: they hold raw as it is, and follow it."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import StorageError, UsageError
from faletl.operations.handover import hand_over
from faletl.operations.rename import forget, rename
from faletl.resources import RESOURCES
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse.tables import RAW
from tests import truth
from tests.conftest import ask, settings_for
from tests.forked import Trap, start
from tests.truth import VIDEO, Account, line


def handed(out: Path, resource: str) -> list[tuple[Any, ...]]:
    """All rows of a resource, as an engine that knows only the folder reads them."""
    with duckdb.connect() as engine:
        engine.execute("set TimeZone = 'UTC'")
        rows = engine.execute(
            f"select * exclude (account, day) from read_parquet('{out}/{resource}/*/*/*.parquet')"
        ).fetchall()
    return sorted(tuple(_plain(value) for value in row) for row in rows)


def _plain(value: Any) -> str:
    return repr(value.astimezone(UTC) if isinstance(value, datetime) and value.tzinfo else value)


@pytest.mark.parametrize("kind", ["duckdb", "postgresql"])
def test_the_files_hold_raw_and_follow_it(
    kind: str,
    clock: time_machine.Traveller,
    account: Account,
    sandbox: Sandbox,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    url = f"duckdb:///{tmp_path / 'warehouse.duckdb'}"
    if kind == "postgresql":
        url = request.getfixturevalue("database")
    settings = settings_for(sandbox.url, tmp_path, warehouse=url, account="acme/é =1")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nothing is loaded yet"):
        hand_over(settings, out)

    def check() -> None:
        for name in RESOURCES:
            rows = ask(settings, f"select * from {RAW[name].fullname}")
            assert handed(out, name) == sorted(tuple(map(_plain, row)) for row in rows)

    pipeline.run(settings)
    first = hand_over(settings, out)
    assert len(first.written) == 12
    assert {path.name for path in first.written} == {"rows.parquet"}
    check()
    again = hand_over(settings, out)
    assert (again.written, again.unchanged, again.deleted) == ([], 12, [])

    account.lines.append(line(datetime.fromisoformat("2026-11-22T05:00:00+00:00"), VIDEO, "8"))
    clock.shift(60)
    pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"]))
    later = hand_over(settings, out, Asked(resources=["usage"]))
    assert ([path.parent.name for path in later.written], later.unchanged) == (["day=2026-11-22"], 2)
    assert later.deleted == []  # the new file took its place
    check()

    others = out / "usage" / "account=of another warehouse" / "day=2026-11-22" / "1.parquet"
    others.parent.mkdir(parents=True)
    others.write_bytes(b"theirs")
    rename(settings, "acme/é =1", "acme [1]*?")
    renamed = hand_over(settings, out, Asked(resources=["usage"]))
    assert len(renamed.written) == len(renamed.deleted) == 3
    assert others.read_bytes() == b"theirs"
    shutil.rmtree(others.parents[1])
    assert len(hand_over(settings, out).deleted) == 9
    check()
    rename(settings, "acme [1]*?", "acme/é =1")  # the first label is in use again
    left = next(out.glob("usage/account=acme%20*/day=2026-11-22/*.parquet"))
    stale = out / "usage" / "account=acme%2F%C3%A9%20%3D1" / "day=2026-11-01" / left.name
    stale.parent.mkdir(parents=True)
    shutil.copy(left, stale)  # a day that only an earlier holder of the label had
    hand_over(settings, out)
    check()
    forget(settings, "acme/é =1")
    assert len(hand_over(settings, out).deleted) == 12
    assert list(out.rglob("*.parquet")) == []


def test_a_folder_that_cannot_be_written_is_told(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        hand_over(settings, tmp_path / "out")


def usage_per_day(out: Path) -> dict[str, Decimal]:
    """What somebody finds who adds up all files of usage."""
    return {
        path.parent.name: duckdb.sql(f"select coalesce(sum(cost_total), 0) from '{path}'").fetchall()[0][
            0
        ]
        for path in out.glob("usage/*/*/*.parquet")
    }


def test_the_manifest_lists_what_the_files_hold(
    clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    out = tmp_path / "out"
    hand_over(settings, out)
    listed = json.loads((out / "manifest.json").read_text())["files"]
    assert {one["path"] for one in listed} == {
        path.relative_to(out).as_posix() for path in out.rglob("*.parquet")
    }
    for one in listed:
        rows = duckdb.sql(f"from '{out / one['path']}'")
        assert one["rows"] == len(rows.fetchall())
        has_cost = "cost_total" in rows.columns
        cost = rows.sum("cost_total").fetchall()[0][0] if has_cost and one["rows"] else None
        assert one["cost_total"] == (None if cost is None else str(cost))
    (out / "manifest.json").write_text("{")
    assert len(hand_over(settings, out).written) == len(listed)
    assert json.loads((out / "manifest.json").read_text())["files"] == listed


def test_files_of_an_older_faletl_are_replaced(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings)
    out = tmp_path / "out"
    hand_over(settings, out)
    (out / "manifest.json").unlink()
    for path in list(out.rglob("*.parquet")):
        path.rename(path.with_name("20261127T192708840116Z-25f949-75a5aae5.parquet"))
        path.with_name("part-0001.parquet").write_bytes(b"another program's")
    hand_over(settings, out)
    found = sorted(path.name for path in next(out.glob("usage/*/*")).iterdir())
    assert found == ["part-0001.parquet", "rows.parquet"]
    assert {path.read_bytes() for path in out.rglob("part-*")} == {b"another program's"}


HAND_OVER = "stage --out handed --resource usage"


@pytest.mark.parametrize(
    "trap",
    [
        Trap("faletl.operations.handover.rows_of_windows", "after", 2),
        Trap("faletl.operations.handover._figures", "after", 2),
        Trap("pathlib.Path.replace", "before", 2),
        Trap("pathlib.Path.replace", "after", 2),
        Trap("faletl.operations.handover._write_manifest", "before"),
        Trap("faletl.operations.handover._write_manifest"),
    ],
    ids=lambda trap: f"{trap.when} {trap.function}",
)
@pytest.mark.duckdb_only("where the rows come from is tried above")
def test_a_kill_leaves_each_day_once_and_nothing_behind(
    trap: Trap, clock: time_machine.Traveller, account: Account, settings: Settings, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    pipeline.run(settings)
    out = tmp_path / "handed"
    hand_over(settings, out, Asked(resources=["usage"]))
    before = usage_per_day(out)
    account.lines = [replace(one, cost_total=one.cost_total * 2) for one in account.lines]
    clock.shift(60)
    pipeline.run(settings, Asked(truth.day(21), truth.day(23), ["usage"]))
    code, said = start(settings, trap, command=HAND_OVER).finish()
    assert code == -signal.SIGKILL, said
    left = usage_per_day(out)
    assert left.keys() == before.keys()
    assert all(cost in (before[day], 2 * before[day]) for day, cost in left.items())
    assert len(list(out.glob("usage/*/*/*.parquet"))) == len(before)
    code, said = start(settings, command=HAND_OVER).finish()
    assert code == 0, said
    assert usage_per_day(out) != before
    assert {path.name for path in out.iterdir()} == {"usage", "manifest.json"}
