"""Shared fixtures: a served account, settings that point at it, a clock that tests move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
import time_machine

from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox
from tests import truth

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in Settings.model_fields:
        monkeypatch.delenv(str(Settings.model_fields[name].validation_alias), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    """The clock stands still at `truth.NOW` until a test moves it."""
    with time_machine.travel(truth.NOW, tick=False) as traveller:
        yield traveller


@pytest.fixture
def account() -> truth.Account:
    """A small account with two days of usage."""
    return truth.two_days()


@pytest.fixture
def sandbox(account: truth.Account) -> Iterator[Sandbox]:
    """The account, served over HTTP in small pages."""
    with Sandbox(account, page_size=4) as server:
        yield server


@pytest.fixture
def settings(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings of a run against the served account."""
    return settings_for(sandbox.url, tmp_path)


@pytest.fixture
def query(settings: Settings) -> Query:
    """Ask the published copy, as a reader would."""
    return lambda sql: ask(settings, sql)


def settings_for(url: str, folder: Path, **given: object) -> Settings:
    """Settings for a warehouse of its own below `folder`; without the gate, unless `given` says so.

    The gate is looked at by its own tests, and by those of the command line and the documents.
    """
    return Settings.isolated(
        **{
            "key": FULL_KEY,
            "api_url": url,
            "warehouse": f"duckdb:///{folder / 'warehouse.duckdb'}",
            "landing": str(folder / "landing"),
            "first_days": 2,
            "rate": 0,
            "gate": False,
            **given,
        }
    )


def published_path(settings: Settings) -> Path:
    """The file that readers open."""
    return Path(settings.warehouse.removeprefix("duckdb:///")).with_name("spend.duckdb")


@contextmanager
def published(settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """A reader of the published copy."""
    with duckdb.connect(str(published_path(settings)), read_only=True) as connection:
        connection.execute("set TimeZone = 'UTC'")
        yield connection


def ask(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the published copy."""
    with published(settings) as connection:
        return connection.execute(sql).fetchall()


def all_tables(settings: Settings) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of all layers that two warehouses of the same data must share.

    Where a row was landed differs with the cut into pages and with each load; so do the ledgers.
    """
    with published(settings) as connection:
        columns: dict[str, list[str]] = {}
        for table, column in connection.execute(
            "select table_schema || '.' || table_name, column_name from information_schema.columns "
            "where table_schema in ('raw', 'staging', 'marts', 'reports') order by all"
        ).fetchall():
            if column not in ("_load_id", "_page", "_row", "load_id"):
                columns.setdefault(table, []).append(f'"{column}"')
        return {
            table: sorted(
                connection.execute(f"select {', '.join(names)} from {table}").fetchall(), key=repr
            )
            for table, names in columns.items()
        }


def total(settings: Settings) -> Decimal:
    """All that is published as spent."""
    return Decimal(
        ask(settings, "select coalesce(sum(cost_total), 0) from reports.rpt_spend_daily")[0][0]
    )
