"""Loaded windows as Parquet files: they hold raw as it is, and follow it."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import StorageError, UsageError
from faletl.handover import hand_over
from faletl.plan import Asked
from faletl.rename import forget, rename
from faletl.resources import RESOURCES
from faletl.sandbox import Sandbox
from faletl.warehouse.tables import RAW
from tests import truth
from tests.conftest import ask, settings_for
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
    check()
    again = hand_over(settings, out)
    assert (again.written, again.unchanged, again.deleted) == ([], 12, [])

    account.lines.append(line(datetime.fromisoformat("2026-11-22T05:00:00+00:00"), VIDEO, "8"))
    clock.shift(60)
    pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"]))
    later = hand_over(settings, out, Asked(resources=["usage"]))
    assert ([path.parent.name for path in later.written], later.unchanged) == (["day=2026-11-22"], 2)
    assert len(later.deleted) == 1
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
