"""Files that have other names, and where DuckDB puts what it spills."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pytest
import time_machine

from faletl import duck, pipeline
from faletl.config import Settings
from faletl.errors import SettingsError, WarehouseBusyError
from faletl.operations.handover import hand_over
from faletl.operations.maintain import maintain
from faletl.operations.rebuild import prune, rebuild
from faletl.operations.validate import validate
from faletl.operations.verify import verify
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import SCHEMA_VERSION
from tests import truth
from tests.conftest import opened, settings_for, total
from tests.truth import Account

pytestmark = pytest.mark.duckdb_only("a server has no files of ours")

USAGE = Asked(truth.day(21), truth.day(23), ["usage"])


@pytest.fixture
def tmpdir_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, with nothing in it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- Landing folder: what is no extract -----------------------------------------------------------


def test_what_others_put_into_the_landing_folder_is_left_alone(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    pipeline.run(settings)
    day = next((tmp_path / "landing").glob("*/usage/2026-11-22"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text("theirs")
    (day / "20261122T103000000000Z-a1b2c3").write_text("a file")
    (day / "20261122T103000000000Z-a1b2c4").symlink_to(elsewhere)
    (day / "20261399T103000000000Z-a1b2c5").mkdir()
    (day / "20261122T103000000000Z-a1b2c6" / "manifest.json").mkdir(parents=True)
    (day / "20261122T103000000000Z-a1b2c7").mkdir()
    os.mkfifo(day / "20261122T103000000000Z-a1b2c7" / "manifest.json")
    (day / "notes").mkdir()
    (day / "notes" / "manifest.json").write_text("theirs")
    before = total(settings)
    clock.shift(timedelta(days=40))
    maintain(settings)
    rebuild(settings)
    assert total(settings) == before
    assert (elsewhere / "manifest.json").read_text() == "theirs"
    assert not list(elsewhere.glob(".*"))
    assert (day / "20261122T103000000000Z-a1b2c3").read_text() == "a file"
    assert (day / "notes" / "manifest.json").read_text() == "theirs"


def test_an_extract_behind_a_link_is_used_and_only_the_link_is_deleted(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    for _ in range(2):
        pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"]))
        clock.shift(timedelta(hours=1))
    folder = sorted((tmp_path / "landing").glob("*/usage/2026-11-22/2026*"))[0]
    archive = tmp_path / "archive"
    folder.rename(archive)
    folder.symlink_to(archive)
    rebuild(settings)
    assert total(settings) > 0
    for _ in range(2):  # superseded, and then not needed any more
        pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"]))
        clock.shift(timedelta(days=40))
    maintain(settings)
    prune(settings)
    assert (archive / "manifest.json").exists()


# --- Links ----------------------------------------------------------------------------------------


def linked(sandbox: Sandbox, folder: Path) -> Settings:
    """Warehouse, published copy and landing folder are links in `names` to `real`, not yet there."""
    names, real = folder / "names", folder / "real"
    names.mkdir()
    real.mkdir()
    (real / "landing").mkdir()
    for name in ("w.duckdb", "s.duckdb", "landing"):
        (names / name).symlink_to(real / name)
    return settings_for(
        sandbox.url,
        folder,
        warehouse=f"duckdb:///{names / 'w.duckdb'}",
        publish=str(names / "s.duckdb"),
        landing=str(names / "landing"),
    )


def test_links_stay_links_and_what_they_name_is_replaced(
    clock: time_machine.Traveller, account: Account, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = linked(sandbox, tmp_path)
    names, real = tmp_path / "names", tmp_path / "real"
    assert pipeline.run(settings, USAGE).exit_code == 0
    with opened(settings) as connection:
        connection.execute(f"update ops.warehouse set schema_version = {SCHEMA_VERSION - 1}")
    account.lines.append(truth.line(account.lines[-1].hour, "x/late", "3"))
    for step in (partial(pipeline.run, settings, USAGE), partial(rebuild, settings)):
        before = (real / "w.duckdb").stat().st_ino
        assert step().exit_code == 0
        assert (real / "w.duckdb").stat().st_ino != before  # another file
        assert {path.name for path in names.iterdir()} == {"w.duckdb", "s.duckdb", "landing"}
        assert all(path.is_symlink() for path in names.iterdir())
    with duckdb.connect(str(names / "s.duckdb"), read_only=True) as shown:
        [(spent,)] = shown.execute("select sum(cost_total) from reports.rpt_spend_daily").fetchall()
    assert spent == sum(one.cost_total for one in account.lines)
    assert {path.name for path in real.iterdir()} == {
        "w.duckdb", "w.duckdb.lock", "s.duckdb", "landing",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["relative", "dots", "link", "linked folder"])
def test_all_names_of_a_warehouse_have_one_lock(
    name: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline.run(settings, USAGE).exit_code == 0
    (tmp_path / "link.duckdb").symlink_to("warehouse.duckdb")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    path = {
        "relative": "warehouse.duckdb",
        "dots": f"{tmp_path}/below/../warehouse.duckdb",
        "link": f"{tmp_path}/link.duckdb",
        "linked folder": f"{tmp_path}/folder/warehouse.duckdb",
    }[name]
    other = settings.model_copy(update={"warehouse": f"duckdb:///{path}", "lock_seconds": 0})
    with open_warehouse(settings).lease("a writer"):
        with pytest.raises(WarehouseBusyError, match="is in use by a writer"):
            open_warehouse(other).reading(wait=False).__enter__()
        with pytest.raises(WarehouseBusyError, match="is in use by a writer"):
            open_warehouse(other).lease("another").__enter__()
    assert total(settings) > 0


def test_a_warehouse_with_a_hard_link_is_not_written_to(settings: Settings, tmp_path: Path) -> None:
    assert pipeline.run(settings, USAGE).exit_code == 0
    other = tmp_path / "other.duckdb"
    other.hardlink_to(tmp_path / "warehouse.duckdb")
    before = other.read_bytes()
    with pytest.raises(SettingsError, match="has a second name"):
        open_warehouse(settings).lease("a writer").__enter__()
    assert other.read_bytes() == before
    with open_warehouse(settings).reading() as connection:
        assert connection is not None


def test_a_published_copy_cannot_be_a_link_to_the_warehouse(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "shown.duckdb").symlink_to(tmp_path / "warehouse.duckdb")
    shown = settings.model_copy(update={"publish": str(tmp_path / "shown.duckdb")})
    with pytest.raises(SettingsError, match="cannot be the warehouse itself"):
        open_warehouse(shown)


# --- Engines --------------------------------------------------------------------------------------


def test_every_engine_keeps_to_the_memory_and_spills_below_tmpdir(
    settings: Settings, tmpdir_of_its_own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    connect = duckdb.connect

    def noted(*arguments: Any, **given: Any) -> duckdb.DuckDBPyConnection:
        made = connect(*arguments, **given)
        if sys._getframe(1).f_code.co_filename.endswith("duckdb_sqlalchemy/config.py"):
            return made  # the dialect asks empty engines which settings there are, once a process
        names = ("memory_limit", "temp_directory", "autoinstall_known_extensions")
        selected = ", ".join(f"current_setting('{name}')" for name in names)
        [values] = made.execute(f"select {selected}").fetchall()
        seen.append(dict(zip(names, values, strict=True)))
        return made

    monkeypatch.setattr(duckdb, "connect", noted)
    small = settings.model_copy(update={"memory": "200MB", "gate": True})
    assert pipeline.run(small).exit_code == 0
    assert verify(small).findings == []
    hand_over(small, tmp_path / "out")
    validate(small)
    assert rebuild(small).exit_code == 0
    with open_warehouse(small).published() as connection:
        assert connection is not None
    assert len(seen) > 20
    assert {one["memory_limit"] for one in seen} == {"190.7 MiB"}
    spills = [Path(one["temp_directory"]) for one in seen]
    assert [path for path in spills if not path.is_relative_to(tmpdir_of_its_own)] == []
    mine = (duck.config("1GB", tmp_path)["temp_directory"] for _ in range(9))
    assert len(set(mine)) == 9  # no two engines overwrite each other's files
    assert not any(one["autoinstall_known_extensions"] for one in seen)
    assert list(tmpdir_of_its_own.iterdir()) == []


def test_a_query_that_spills_leaves_nothing_and_is_for_its_user_alone(
    settings: Settings, tmpdir_of_its_own: Path, tmp_path: Path
) -> None:
    assert pipeline.run(settings, USAGE).exit_code == 0
    before = set(tmp_path.iterdir())
    small = settings.model_copy(update={"memory": "64MB"})
    with open_warehouse(small).published() as connection:
        assert connection is not None
        large = "select md5(range::varchar) as text, range from range(2000000) order by text"
        found = connection.exec_driver_sql(f"select * from ({large}) offset 10")
        assert found.fetchone() is not None
        [scratch] = tmpdir_of_its_own.iterdir()
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        assert [path for path in scratch.rglob("*") if path.suffix == ".tmp"]
        assert set(tmp_path.iterdir()) == before
    assert list(tmpdir_of_its_own.iterdir()) == []


def test_a_tmpdir_that_takes_nothing_does_not_hinder_who_reads(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline.run(settings, USAGE).exit_code == 0
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with open_warehouse(settings).published() as connection:
        assert connection is not None
        found = connection.exec_driver_sql("select count(*) from marts.fct_usage").scalar_one()
    assert found > 0
    assert not os.path.exists(tmp_path / "none")  # noqa: PTH110
