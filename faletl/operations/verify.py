"""Verify that the warehouse still is what was loaded and built, without calling fal.

Four things are verified: ledger and totals (every check of a build, over all days), digests (raw rows
are those that were loaded), lineage (each raw row names a load and a row of a landed page, and the page
is unchanged), and models (every table equals the result of its SQL).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from faletl import duck
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import DamagedExtractError, FaletlError, StorageError, UsageError
from faletl.files import scratch_folder
from faletl.landing import extracts
from faletl.landing.extracts import SealedExtract
from faletl.line import holds, relabel
from faletl.models import catalogue
from faletl.models.build import CHECKED_SPAN, days_with_rows, has_unbuilt_rows, statements
from faletl.models.days import Span, is_by_day, restricted, sources, spans
from faletl.resources import RESOURCES, Resource
from faletl.staging.digest import DIGEST_FORM, digest_of, digest_sums
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse, schema
from faletl.warehouse.ledger import read_ledger
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.tables import LAYERS, LOADS, RAW
from faletl.windows import Window

_TURN_SECONDS = 1.0
"""After this time, when the current part is done, verify releases the warehouse for other commands."""


@dataclass(slots=True)
class Verification:
    """A sentence for each change that was found, and whether everything was verified.

    Sums and models are not verified while loaded rows are not built yet.
    """

    findings: list[str] = field(default_factory=list)
    is_complete: bool = True


def verify(settings: Settings) -> Verification:
    """Verify everything, for `_TURN_SECONDS` at a time: other commands may write in between.

    Raises:
        UsageError: there is no warehouse yet.
        WarehouseError, TamperedError: the warehouse cannot be read at all.
        SettingsError, StorageError: the landed pages cannot be read at all.
    """
    warehouse, verification = open_warehouse(settings), Verification()
    parts = deque([*_parts_of_raw(settings, warehouse), *_parts_of_models(warehouse)])
    while parts:
        with warehouse.reading() as connection:
            if connection is None:
                raise UsageError("nothing is loaded yet; run faletl run first")
            is_built: bool | None = None  # valid for the snapshot of this connection
            began = time.monotonic()
            while parts and time.monotonic() - began < _TURN_SECONDS:
                part = parts.popleft()
                if part.needs_build and is_built is None:
                    is_built = not has_unbuilt_rows(settings, connection)
                if part.needs_build and not is_built:
                    verification.is_complete = False
                    return verification
                findings = list(part.look(connection))
                verification.findings += findings
                if findings and part.is_shape:
                    return verification
    return verification


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing to verify; whether it needs a build, and whether all later parts depend on it."""

    look: Callable[[sa.Connection], Iterable[str]]
    needs_build: bool = False
    is_shape: bool = False


def _parts_of_raw(settings: Settings, warehouse: Warehouse) -> Iterator[_Part]:
    yield _Part(_altered_tables, is_shape=True)
    lost = list[DamagedExtractError]()
    for name in RESOURCES:
        yield _Part(partial(_changed_rows, settings=settings, warehouse=warehouse, resource=name))
        yield _Part(partial(_missing_pages, settings=settings, resource=name, lost=lost))
        check = next(check for check in catalogue.checks() if check.name == f"loads of raw.{name}")
        yield _Part(partial(_check_violations, dialect=warehouse.dialect, check=check))
    yield _Part(lambda _: [str(DamagedExtractError.of_many(lost[0], len(lost)))] if lost else [])


def _parts_of_models(warehouse: Warehouse) -> Iterator[_Part]:
    dialect = warehouse.dialect
    yield _Part(_altered_models, needs_build=True, is_shape=True)
    yield _Part(partial(_retyped_models, warehouse=warehouse), needs_build=True, is_shape=True)
    for check in catalogue.checks():
        if not check.name.startswith("loads of raw."):
            yield _Part(partial(_check_violations, dialect=dialect, check=check), needs_build=True)
    for model in catalogue.models():
        if not model.is_view:
            yield _Part(partial(_changed_model, dialect=dialect, model=model), needs_build=True)


def _altered_tables(connection: sa.Connection) -> Iterator[str]:
    """Yield differences in the tables of raw and ops: columns, types, keys."""
    for changed in schema.altered(connection):
        yield f"{changed}; run faletl rebuild to restore the tables from the landed pages"


def _altered_models(connection: sa.Connection) -> Iterator[str]:
    """Yield models whose table or view is missing or has other columns."""
    existing = schema.existing_columns(connection, LAYERS)
    for table, columns in catalogue.column_comments().items():
        if table.startswith(LAYERS) and list(columns) != list(existing.get(table, ())):
            yield f"{table} has other columns than its SQL; run faletl build --full"


def _retyped_models(connection: sa.Connection, warehouse: Warehouse) -> Iterator[str]:
    """Yield the first table with other column types: amounts may be rounded there, and compare equal."""
    for model in catalogue.models():
        select = f"select * from (\n{catalogue.translate(model.sql, warehouse.dialect)}\n) as model"
        expected = warehouse.column_types(connection, select)
        existing = warehouse.column_types(connection, f"select * from {model.table}")
        for (name, kind), (_, actual_type) in zip(expected, existing, strict=True):
            if kind != actual_type:
                yield (
                    f"{model.table}: the column {name} is of type {actual_type.lower()}, "
                    f"not {kind.lower()}; run faletl build --full"
                )
        if expected != existing:
            return  # tables that read it have other types, too


def _repair(day: date) -> str:
    return f"run faletl rebuild --window {day} to restore it from the landed pages"


def _changed_rows(
    connection: sa.Connection, settings: Settings, warehouse: Warehouse, resource: str
) -> Iterator[str]:
    """Yield loads whose rows in raw are not those that were loaded."""
    table = RAW[resource].fullname
    digests = _digests_in_raw(settings, warehouse, connection, resource)
    loads = {
        load.load_id: load
        for load in connection.execute(sa.select(LOADS).where(LOADS.c.resource == resource))
    }
    for load_id in sorted(digests.keys() - loads.keys()):
        yield f"{table}: rows of load {load_id!a}, which is not in ops.loads; run faletl rebuild"
    for load_id, load in sorted(loads.items()):
        day = load.window_start.astimezone(UTC).date()
        if not load.is_current and load_id not in digests:
            continue
        digest = _expected_digest(settings, connection, load)
        if digest is None:
            yield (
                f"{table}, window {day}: the rows of load {load_id} cannot be compared, because an "
                "older faletl made its digest and its landed pages cannot be read"
            )
            continue
        is_same = digests.get(load_id, digest_of((0, None))) == digest
        if not is_same and not load.is_current:  # an earlier load: raw has only a part of its rows
            is_same = _are_landed(settings, connection, RESOURCES[resource], load.landing_path)
        if not is_same:
            yield (
                f"{table}, window {day}: its rows are not those of load {load_id}, in number or "
                f"content; {_repair(day)}"
            )


def _digests_in_raw(
    settings: Settings, warehouse: Warehouse, connection: sa.Connection, resource: str
) -> Mapping[str, str]:
    """Return the digest of the rows of each load in raw, computed in DuckDB as in staging."""
    with scratch_folder() as scratch:
        path = scratch / "rows.parquet"
        warehouse.export_rows(connection, sa.select(RAW[resource]), path)
        with duck.engine(settings.memory, scratch) as engine:
            sums = digest_sums(RESOURCES[resource])
            result = engine.execute(f"select _load_id, {sums} from {quoted(path)} group by _load_id")
            return {load_id: digest_of(sums) for load_id, *sums in result.fetchall()}


def _expected_digest(settings: Settings, connection: sa.Connection, load: sa.Row[Any]) -> str | None:
    """Return the digest of the loaded rows; from landed pages if the ledger has one of an older form.

    None if these pages cannot be staged any more.
    """
    if load.digest.endswith(DIGEST_FORM):
        return str(load.digest)
    with scratch_folder() as scratch:
        staged = _staged(settings, connection, load.landing_path, scratch)
        return None if staged is None else staged.digest


def _staged(
    settings: Settings, connection: sa.Connection, landing_path: str, scratch: Path
) -> Staged | None:
    """Stage an extract from its landed pages; None if they were changed."""
    try:
        landed = relabel.opener(settings)(extracts.root(settings) / landing_path)
        if landed is None:
            return None
        return stage_window(settings, landed, scratch, holds.accepted_rows(connection))
    except StorageError:
        raise  # the storage failed, which says nothing about the pages
    except FaletlError:
        return None


def _are_landed(
    settings: Settings, connection: sa.Connection, resource: Resource, landing_path: str
) -> bool:
    """Whether all rows of the load in raw are among its landed rows."""
    names = [column.name for column in resource.columns]
    table = RAW[resource.name]
    with scratch_folder() as scratch:
        staged = _staged(settings, connection, landing_path, scratch)
        if staged is None:
            return False
        with duck.engine(settings.memory, scratch) as engine:
            columns = ", ".join(f'"{name}"' for name in ("_page", "_row", *names))
            rows = set(engine.execute(f"select {columns} from {staged.source}").fetchall())
    loaded = sa.select(table.c["_page"], table.c["_row"], *(table.c[name] for name in names)).where(
        table.c["_load_id"] == staged.landed.manifest.load_id
    )
    return all(tuple(row) in rows for row in connection.execute(loaded))


def _missing_pages(
    connection: sa.Connection, settings: Settings, resource: str, lost: list[DamagedExtractError]
) -> Iterator[str]:
    """Yield loads with rows in raw that no landed page has; append damaged extracts to `lost`."""
    table = RAW[resource]
    load_id_and_page, row = (table.c["_load_id"], table.c["_page"]), table.c["_row"]
    twins = sa.func.count() - sa.func.count(sa.distinct(row))
    last_rows: dict[str, dict[int, tuple[int, int]]] = {}
    for load_id, page, *figures in connection.execute(
        sa.select(*load_id_and_page, sa.func.max(row), twins).group_by(*load_id_and_page)
    ):
        last_rows.setdefault(load_id, {})[page] = tuple(figures)
    needed = read_ledger(connection).needed
    loads = sa.select(LOADS.c.load_id, LOADS.c.landing_path)
    for load in connection.execute(loads.where(LOADS.c.resource == resource)).all():
        if load.load_id not in needed:
            continue
        folder = extracts.root(settings) / load.landing_path
        try:
            landed = extracts.open_read(folder)
            pages = _checked_pages(landed)
        except StorageError:
            raise  # the storage failed, which says nothing about the pages
        except DamagedExtractError as error:
            lost.append(error)
            continue
        except FaletlError as error:
            yield f"{table.fullname}, load {load.load_id}: {error}"
            continue
        for page, (last, twice) in last_rows.get(load.load_id, {}).items():
            place = f"{table.fullname}, load {load.load_id}: page {page}"
            if not (1 <= page <= len(pages) and 1 <= last <= pages[page - 1]):
                yield f"{place} row {last} was never landed; {_repair(landed.manifest.window.day)}"
            if twice:
                yield f"{place} gave {twice} rows twice; {_repair(landed.manifest.window.day)}"


def _checked_pages(landed: SealedExtract) -> list[int]:
    """Return the row count of each landed page; raises TamperedError if a page was changed."""
    for call in landed.manifest.calls:
        for page in call.pages:
            landed.body(page)
    return [page.rows for page in landed.manifest.pages("rows")]


def _check_violations(connection: sa.Connection, dialect: str, check: catalogue.Check) -> Iterator[str]:
    for sql in statements(connection, check, dialect):
        rows = connection.exec_driver_sql(sql).mappings().fetchmany(3)
        for row in rows:
            values = ", ".join(f"{key} {_printable(value)}" for key, value in row.items())
            remedy = check.cure or "run faletl rebuild"
            yield f"the check '{check.name}' finds {values}; {remedy}"
        if rows:
            return


def _changed_model(connection: sa.Connection, dialect: str, model: catalogue.Model) -> Iterator[str]:
    """Yield spans of days where the table differs from the result of its SQL."""
    if is_by_day(model):
        without = f"select count(*) from {model.table} where {model.day} is null"
        if count := connection.exec_driver_sql(without).scalar_one():
            yield f"{model.table}: {count} rows have no day; run faletl build --full"
    columns = ", ".join(f'"{name}"' for name in catalogue.column_comments()[model.table])
    for span in _spans(connection, model) if is_by_day(model) else [None]:
        expected, existing = (
            restricted(sql, span, dialect) if span else catalogue.translate(sql, dialect)
            for sql in (model.sql, f"select * from {model.table}")
        )  # fmt: skip
        # EXCEPT ALL in both directions would compute each side twice.
        differing = f"""
            select coalesce(sum(abs(surplus)), 0) from (
                select sum(side) as surplus from (
                    select *, 1 as side from ({expected}) as expected
                    union all
                    select *, -1 as side from ({existing}) as existing
                ) as both_sides
                group by {columns}
                having sum(side) <> 0
            ) as differing
        """
        count = connection.exec_driver_sql(differing).scalar_one()
        if count:
            when = f", {span.first} to before {span.end}" if span else ""
            yield (
                f"{model.table}{when}: {count} rows differ from the result of {model.name}.sql; "
                "run faletl build --full"
            )


def _spans(connection: sa.Connection, model: catalogue.Model) -> Iterator[Span]:
    """Yield the days of the model's table and of its source windows, a few at a time."""
    days = {
        start.astimezone(UTC).date()
        for (start,) in connection.execute(
            sa.select(LOADS.c.window_start).where(
                LOADS.c.is_current, LOADS.c.resource.in_(sorted(sources(model.sql)))
            )
        )
    }
    built_days = days_with_rows(connection, model)
    yield from spans(days | built_days, min(model.longest_span, CHECKED_SPAN))


def _printable(value: object) -> str:
    if isinstance(value, datetime):
        return str(Window.snapshot(value.astimezone(UTC)))
    return ascii(value) if isinstance(value, str) else str(value)
