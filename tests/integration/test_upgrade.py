"""A warehouse of an older faletl is brought up to date, without losing a row."""

from __future__ import annotations

import shutil
import signal
import tarfile
from pathlib import Path

import duckdb
import pytest
import time_machine

from faletl import pipeline
from faletl.answers import status
from faletl.config import Settings
from faletl.errors import SettingsError, TamperedError, UsageError
from faletl.rebuild import rebuild
from faletl.sandbox import Sandbox
from faletl.verify import verify
from faletl.warehouse.tables import METADATA, SCHEMA_VERSION
from tests.conftest import all_tables, settings_for
from tests.forked import Trap, start

OLDER = Path(__file__).parents[1] / "older"

pytestmark = pytest.mark.duckdb_only("PostgreSQL warehouses are not older than schema 4")


@pytest.fixture(params=sorted(path.name for path in OLDER.iterdir()))
def older(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path) -> Settings:
    """A warehouse as an older faletl left it after a run over the served account, and its pages.

    Made with `export database … (format csv)`; marts and reports are left out, as they are made anew.
    """
    settings = settings_for(sandbox.url, tmp_path)
    kept = OLDER / request.param
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///")) as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.execute((kept / "schema.sql").read_text("utf-8"))
        for path in sorted(kept.glob("*.csv")):
            table = path.stem.replace("_", ".", 1)
            connection.execute(f"copy {table} from '{path}' (format csv, header true)")
    with tarfile.open(kept / "landing.tar.gz") as landing:
        landing.extractall(tmp_path, filter="data")
    return settings


def raw_rows(settings: Settings, columns: dict[str, str] | None = None) -> dict[str, list[object]]:
    """All of raw and the ledger, or those columns of each table."""
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///"), read_only=True) as connection:
        return {
            name: sorted(connection.execute(f"select {names} from {name}").fetchall(), key=repr)
            for name, names in (columns or columns_of(settings)).items()
        }


def columns_of(settings: Settings) -> dict[str, str]:
    """The columns that raw and the ledger have now."""
    tables = [t.fullname for t in METADATA.tables.values() if t.schema == "raw"]
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///"), read_only=True) as connection:
        return {
            name: ", ".join(f'"{row[0]}"' for row in connection.execute(f"describe {name}").fetchall())
            for name in (*tables, "ops.loads", "ops.horizons")
        }


def test_an_older_warehouse_is_upgraded_and_goes_on(
    older: Settings, sandbox: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    columns = columns_of(older)
    before = raw_rows(older)
    assert pipeline.build(older).build is not None
    assert raw_rows(older, columns) == before
    assert pipeline.publish(older).published
    assert verify(older).findings == []
    (tmp_path / "fresh").mkdir()
    fresh = settings_for(sandbox.url, tmp_path / "fresh")
    for settings in (older, fresh):
        assert pipeline.run(settings).exit_code == 0
    assert all_tables(older) == all_tables(fresh)
    with duckdb.connect(older.warehouse.removeprefix("duckdb:///"), read_only=True) as connection:
        version = connection.execute("select schema_version from ops.warehouse").fetchone()
        bare = connection.execute(
            "select table_name, column_name from duckdb_columns() where comment is null "
            "and schema_name in ('raw', 'staging', 'marts', 'reports', 'ops')"
        )
        assert bare.fetchall() == []
    assert version == (SCHEMA_VERSION,)
    held = all_tables(older)
    rebuild(older)
    assert all_tables(older) == held


def test_an_older_warehouse_can_be_looked_at_first(
    older: Settings, clock: time_machine.Traveller
) -> None:
    windows = {line["resource"]: line["windows"] for line in status(older)["resources"]}
    assert windows["usage"] == 3
    assert verify(older).findings == []


def test_rows_of_an_older_digest_whose_pages_are_gone_are_not_called_changed(
    older: Settings, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    shutil.rmtree(next((tmp_path / "landing").glob("*/usage/2026-11-22")))
    findings = verify(older).findings
    assert any("2026-11-22" in f and "cannot be compared" in f for f in findings)
    assert not [finding for finding in findings if "its rows are not those of" in finding]


def test_a_killed_upgrade_leaves_the_older_warehouse(older: Settings) -> None:
    path = Path(older.warehouse.removeprefix("duckdb:///"))
    before = path.read_bytes()
    for kill in (
        Trap("faletl.warehouse.duckdb.copy_file"),  # a copy is there
        Trap("faletl.warehouse.schema.upgrade"),  # altered, not committed
        Trap("pathlib.Path.replace", "before"),  # committed, not in its place
    ):
        assert start(older, kill, command="build").finish()[0] == -signal.SIGKILL
        assert path.read_bytes() == before
    assert start(older, Trap("pathlib.Path.replace"), command="build").finish()[0] == -signal.SIGKILL
    with duckdb.connect(str(path), read_only=True) as connection:
        version = connection.execute("select schema_version from ops.warehouse").fetchone()
    assert version == (SCHEMA_VERSION,)
    assert start(older, command="build").finish()[0] == 0
    assert verify(older).findings == []
    assert not list(path.parent.glob(".*upgrade*"))


def test_one_that_is_too_old_has_to_be_rebuilt(older: Settings, clock: time_machine.Traveller) -> None:
    with duckdb.connect(older.warehouse.removeprefix("duckdb:///")) as connection:
        connection.execute("update ops.warehouse set schema_version = 2")
    with pytest.raises(SettingsError, match="can upgrade from 3"):
        pipeline.build(older)
    shutil.rmtree(older.landing)  # as if this were another landing folder
    with pytest.raises(TamperedError, match="landed pages"):
        rebuild(older)


def test_what_a_newer_faletl_left_is_refused_and_stays_as_it_is(
    older: Settings, clock: time_machine.Traveller
) -> None:
    path = Path(older.warehouse.removeprefix("duckdb:///"))
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"update ops.warehouse set schema_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    for step in (pipeline.build, pipeline.publish, rebuild, verify, status):
        with pytest.raises(SettingsError, match=r"was written by a newer faletl .*; upgrade faletl"):
            step(older)
    assert path.read_bytes() == before
    assert not path.with_name("spend.duckdb").exists()

    for manifest in Path(older.landing).rglob("manifest.json"):
        manifest.write_bytes(manifest.read_bytes().replace(b'"format": 1', b'"format": 2'))
    path.unlink()
    with pytest.raises(UsageError, match=r"was landed by faletl .*; upgrade faletl"):
        rebuild(older)
    assert not path.exists()
