"""Seeds: tables of units and owners that people write, and thresholds from settings.

Each build writes them to `staging.seed_…`, where models read them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import SettingsError
from faletl.files import sql_folder
from faletl.warehouse.tables import (
    SEED_CREDENTIAL_OWNER,
    SEED_THRESHOLD,
    SEED_UNIT,
    SEEDS,
    UNIT_FAMILIES,
)

LARGEST_FACTOR = 1_000_000
"""The largest number of base units in one unit; more could overflow a quantity."""

MAX_NAMED = 3
"""Lines of a seed that a warning names; further lines are only counted."""

Row: TypeAlias = dict[str, str | None]

_SETTINGS = {
    SEED_UNIT.name: "FALETL_UNITS",
    SEED_CREDENTIAL_OWNER.name: "FALETL_OWNERS",
    SEED_THRESHOLD.name: "FALETL_RUNAWAY_…",
}


def plant(connection: sa.Connection, seeds: Mapping[str, list[Row]]) -> None:
    """Replace the rows of `staging.seed_…`, inside a transaction."""
    for table in SEEDS:
        connection.execute(sa.delete(table))
        if rows := seeds[table.name]:
            connection.execute(sa.insert(table).values(rows))


def changes(connection: sa.Connection, seeds: Mapping[str, list[Row]]) -> list[str]:
    """Return a sentence for each table whose rows differ from those of the last build."""
    sentences = []
    for table in SEEDS:
        planted = [dict(row) for row in connection.execute(sa.select(table)).mappings()]
        before, after = _by_key(table, planted), _by_key(table, seeds[table.name])
        kinds = {
            "new": after.keys() - before.keys(),
            "gone": before.keys() - after.keys(),
            "changed": {key for key in before.keys() & after.keys() if before[key] != after[key]},
        }
        differences = [f"{len(keys):,} {kind} ({named(keys)})" for kind, keys in kinds.items() if keys]
        if differences:
            sentences.append(
                f"{_SETTINGS[table.name]}: lines differ from those of the last build: "
                f"{', '.join(differences)}"
            )
    return sentences


def _by_key(table: sa.Table, rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[object, ...]]:
    return {
        " ".join(str(row[name]) for name in table.info["grain"] if row[name]): tuple(
            _comparable(column, row[column.name]) for column in table.columns
        )
        for row in rows
    }


def _comparable(column: sa.Column[Any], value: object) -> object:
    """Normalise a value, so that database and file compare equal."""
    is_number = isinstance(column.type, sa.Numeric) and value is not None
    return Decimal(str(value)).normalize() if is_number else value


def named(names: Iterable[str]) -> str:
    """Return the first names in order, and the number of further names."""
    shown = sorted(names)
    more = f" and {len(shown) - MAX_NAMED:,} more" if len(shown) > MAX_NAMED else ""
    return ", ".join(ascii(name)[1:-1] for name in shown[:MAX_NAMED]) + more


def unmatched(connection: sa.Connection, settings: Settings) -> list[str]:
    """Return a sentence for each of the user's tables with lines that match nothing built."""
    sentences = []
    for path, table, what, matches in (
        (settings.owners, SEED_CREDENTIAL_OWNER, "credential", _owned(connection)),
        (settings.units, SEED_UNIT, "unit", _billed(connection)),
    ):
        setting = _SETTINGS[table.name]
        lines = list(_lines(path, setting, table)) if path else []
        odd = [f"line {line}, {_name(table, row)}" for line, row in lines if not matches(row)]
        if odd:
            more = f"; and {len(odd) - MAX_NAMED:,} more" if len(odd) > MAX_NAMED else ""
            sentences.append(
                f"{setting}: {len(odd):,} of {len(lines):,} lines match no loaded {what}: "
                f"{'; '.join(odd[:MAX_NAMED])}{more}"
            )
    return sentences


def _name(table: sa.Table, row: Mapping[str, str]) -> str:
    return ascii(" ".join(row[name] for name in table.info["grain"] if row[name]))


def _owned(connection: sa.Connection) -> Callable[[Mapping[str, str]], bool]:
    """Return a test whether a line of the table of owners names a known credential."""
    seen = {
        (account, credential_id)
        for account, credential_id in connection.exec_driver_sql(
            "select account, credential_id from marts.dim_credential"
        )
    }
    seen |= {("", credential_id) for _, credential_id in seen}
    return lambda row: (row["account"], row["credential_id"]) in seen


def _billed(connection: sa.Connection) -> Callable[[Mapping[str, str]], bool]:
    """Return a test whether a line of the table of units names a unit that is billed or has a price."""
    known = {
        name
        for names in connection.exec_driver_sql(
            "select lower(trim(unit)), unit_name(unit) from marts.dim_unit"
        )
        for name in names
    }
    return lambda row: row["unit"].strip().lower() in known


def read(settings: Settings) -> dict[str, list[Row]]:
    """Read the rows of each seed table; the user's units and owners replace ours or are added."""
    units: dict[str, Row] = {}
    for _, row in _seed_rows("unit.csv", settings.units, "FALETL_UNITS", SEED_UNIT):
        unit = str(row["unit"]).strip().lower()
        _check_unit(row)
        units[unit] = {
            **row,
            "unit": unit,
            "base_unit": row["base_unit"] or None,
            "factor": row["factor"] or None,
        }
    owners: dict[tuple[str, str], Row] = {}
    for _, row in _seed_rows(
        "credential_owner.csv", settings.owners, "FALETL_OWNERS", SEED_CREDENTIAL_OWNER
    ):
        filled = {name: value or "UNMAPPED" for name, value in row.items()}
        owners[row["account"], row["credential_id"]] = {**filled, "account": row["account"]}
    return {
        SEED_UNIT.name: list(units.values()),
        SEED_CREDENTIAL_OWNER.name: list(owners.values()),
        SEED_THRESHOLD.name: [
            {"name": name, "value": f"{value:f}"} for name, value in settings.thresholds.items()
        ],
    }


def known_units(settings: Settings) -> frozenset[str]:
    """Return the units of the table of units, trimmed and in lower case; may raise SettingsError."""
    return frozenset(str(row["unit"]) for row in read(settings)[SEED_UNIT.name])


def _check_unit(row: Mapping[str, str]) -> None:
    """Raise SettingsError for an invalid line of the table of units."""
    line = f"FALETL_UNITS: the unit {row['unit']!a}"
    if not row["canonical_unit"].strip():
        raise SettingsError(f"{line} has no canonical_unit")
    if row["family"] not in UNIT_FAMILIES:
        known = ", ".join(UNIT_FAMILIES)
        raise SettingsError(f"{line} has the family {row['family']!a}; it must be one of {known}")
    if bool(row["base_unit"]) != bool(row["factor"]):
        raise SettingsError(f"{line} has only one of base_unit and factor")
    factor = row["factor"]
    if factor and not (re.fullmatch("[0-9]{1,7}", factor) and 1 <= int(factor) <= LARGEST_FACTOR):
        raise SettingsError(
            f"{line} has the factor {factor!a}; it must be 1 to {LARGEST_FACTOR:,}, whole"
        )


def _seed_rows(
    ours: str, theirs: Path | None, setting: str, table: sa.Table
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the lines of our table, then those of the user's, with their line numbers."""
    for path in filter(None, (sql_folder() / "seeds" / ours, theirs)):
        yield from _lines(path, setting, table)


def _lines(path: Path, setting: str, table: sa.Table) -> Iterator[tuple[int, dict[str, str]]]:
    names = [column.name for column in table.columns]
    lines = csv.DictReader(io.StringIO(_seed_text(path, setting), newline=""))
    line = 2
    try:
        for row in lines:
            yield line, _fields_of(row, names)
            line = lines.line_num + 1
    except (KeyError, csv.Error) as error:
        raise SettingsError(
            f"{setting}: {path}, line {line}, is not a line of a CSV table with the columns "
            f"{', '.join(names)} ({error})"
        ) from None


def _fields_of(row: Mapping[str | None, Any], names: list[str]) -> dict[str, str]:
    """Return the fields of a line; raise csv.Error if an unquoted comma adds a field."""
    if any(row.get(None, ())):
        raise csv.Error("it has more fields than the first line; quote those that have a comma in them")
    return {name: row[name] or "" for name in names}


def _seed_text(path: Path, setting: str) -> str:
    """Read the text of a seed; raise SettingsError if a database could not store it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError(
            f"{setting}: {path}, line {line}, is not UTF-8 text; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SettingsError(f"{setting}: {path}, line {line}, has a NUL character; delete it")
    return text
