"""Seeds: tables that people write, of units and of owners, and thresholds; all from settings.

Each build plants them in `staging.seed_…`, where models read them.
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
"""Base units in one unit; more could overflow a quantity counted in them."""

MAX_NAMED = 3
"""Lines of a seed that a warning names; of more, their number."""

Row: TypeAlias = dict[str, str | None]

_SETTINGS = {
    SEED_UNIT.name: "FALETL_UNITS",
    SEED_CREDENTIAL_OWNER.name: "FALETL_OWNERS",
    SEED_THRESHOLD.name: "FALETL_RUNAWAY_…",
}


def plant(connection: sa.Connection, seeds: Mapping[str, list[Row]]) -> None:
    """Inside a transaction: make these the rows of `staging.seed_…`."""
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
        found = [f"{len(keys):,} {kind} ({named(keys)})" for kind, keys in kinds.items() if keys]
        if found:
            sentences.append(
                f"{_SETTINGS[table.name]}: lines differ from those of the last build: {', '.join(found)}"
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
    """The value as the database and the file have it alike."""
    is_number = isinstance(column.type, sa.Numeric) and value is not None
    return Decimal(str(value)).normalize() if is_number else value


def named(names: Iterable[str]) -> str:
    """Return the first names in order, and how many more there are."""
    shown = sorted(names)
    more = f" and {len(shown) - MAX_NAMED:,} more" if len(shown) > MAX_NAMED else ""
    return ", ".join(ascii(name)[1:-1] for name in shown[:MAX_NAMED]) + more


def unmatched(connection: sa.Connection, settings: Settings) -> list[str]:
    """Return a sentence for each of the user's tables that has lines which match nothing built."""
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
                f"{setting}: {len(odd):,} of {len(lines):,} lines match no {what} that is loaded: "
                f"{'; '.join(odd[:MAX_NAMED])}{more}"
            )
    return sentences


def _name(table: sa.Table, row: Mapping[str, str]) -> str:
    return ascii(" ".join(row[name] for name in table.info["grain"] if row[name]))


def _owned(connection: sa.Connection) -> Callable[[Mapping[str, str]], bool]:
    """Whether a line of the table of owners is of a credential that was ever seen."""
    seen = {
        (account, credential_id)
        for account, credential_id in connection.exec_driver_sql(
            "select account, credential_id from marts.dim_credential"
        )
    }
    seen |= {("", credential_id) for _, credential_id in seen}
    return lambda row: (row["account"], row["credential_id"]) in seen


def _billed(connection: sa.Connection) -> Callable[[Mapping[str, str]], bool]:
    """Whether a line of the table of units is of a unit that is billed or has a list price."""
    known = {
        name
        for names in connection.exec_driver_sql(
            "select lower(trim(unit)), unit_name(unit) from marts.dim_unit"
        )
        for name in names
    }
    return lambda row: row["unit"].strip().lower() in known


def read(settings: Settings) -> dict[str, list[Row]]:
    """The rows of each seed table; of units and owners the user's rows replace ours, or join them."""
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
        given = {name: value or "UNMAPPED" for name, value in row.items()}
        owners[row["account"], row["credential_id"]] = {**given, "account": row["account"]}
    return {
        SEED_UNIT.name: list(units.values()),
        SEED_CREDENTIAL_OWNER.name: list(owners.values()),
        SEED_THRESHOLD.name: [
            {"name": name, "value": f"{value:f}"} for name, value in settings.thresholds.items()
        ],
    }


def known_units(settings: Settings) -> frozenset[str]:
    """Units of the table of units, trimmed and in lower case; raises SettingsError, as `build`."""
    return frozenset(str(row["unit"]) for row in read(settings)[SEED_UNIT.name])


def _check_unit(row: Mapping[str, str]) -> None:
    """Raises SettingsError for a line of the table of units that cannot mean anything."""
    line = f"FALETL_UNITS: the unit {row['unit']!a}"
    if not row["canonical_unit"].strip():
        raise SettingsError(f"{line} has no canonical_unit")
    if row["family"] not in UNIT_FAMILIES:
        known = ", ".join(UNIT_FAMILIES)
        raise SettingsError(f"{line} has the family {row['family']!a}, none of {known}")
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
    """The lines of our table, then those of the user's, with their numbers."""
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
            f"{setting}: {path}, line {line}, is no line of a CSV table with the columns "
            f"{', '.join(names)} ({error})"
        ) from None


def _fields_of(row: Mapping[str | None, Any], names: list[str]) -> dict[str, str]:
    """The fields of a line; raises csv.Error where an unquoted comma has made more of them."""
    if any(row.get(None, ())):
        raise csv.Error("it has more fields than the first line; quote those that have a comma in them")
    return {name: row[name] or "" for name in names}


def _seed_text(path: Path, setting: str) -> str:
    """The text of a seed; raises SettingsError where it is none that a database could hold."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError(
            f"{setting}: {path}, line {line}, is no text in UTF-8; save it as such"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SettingsError(f"{setting}: {path}, line {line}, has a NUL character; delete it")
    return text
