"""The gate between staged and loaded: Great Expectations over the rows of one window, in DuckDB.

Each window is looked at once, with all expectations in as few scans as Great Expectations makes of
them; only those that fail are looked at again, for how many rows and which. No value of a row leaves
the database but the keys of these, and nothing is sent anywhere.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import duckdb
import sqlalchemy as sa

from faletl import duck
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import DataRefusedError, SettingsError
from faletl.findings import Validation
from faletl.models.seeds import known_units
from faletl.money import plain
from faletl.resources import Resource
from faletl.staging.window import Staged
from faletl.warehouse.duckdb import MACROS
from faletl.warehouse.tables import LOADS, RAW
from faletl.windows import DAY, WEEK, Window

if TYPE_CHECKING:
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations.expectation import Expectation

    from faletl.gate.expectations import Facts

log = logging.getLogger(__name__)

_SAMPLE = 3  # rows whose keys are kept


@dataclass(frozen=True, slots=True)
class Subject:
    """A window to be looked at; `source` is the SQL of DuckDB for its rows (see `Staged`)."""

    account: str
    resource: Resource
    window: Window
    source: str
    expected_rows: int
    control_total: Decimal | None
    read_at: datetime

    @classmethod
    def of(cls, staged: Staged) -> Subject:
        """The staged window, before it is loaded."""
        manifest = staged.landed.manifest
        resource = staged.resource
        return cls(
            account=manifest.account,
            resource=resource.with_any_sign if staged.is_accepted else resource,
            window=manifest.window,
            source=staged.source,
            expected_rows=(
                staged.landed_rows
                - staged.findings.breaches
                - staged.dropped_rows
                - staged.repeated_rows
            ),
            control_total=(
                None
                if staged.control_total is None or staged.is_accepted
                else Decimal(staged.control_total)
            ),
            read_at=manifest.started_at,
        )


class Gate:
    """Great Expectations, ready to look at windows; making one takes seconds, so make it once.

    It reads files of `scratch`, where it keeps its own, and of the folder where windows are staged.

    Raises:
        SettingsError: the user's expectations, or table of units, cannot be read.
    """

    def __init__(self, settings: Settings, scratch: Path, staged_in: Path | None = None) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"
        # It tells of itself in hundreds of lines where a scheduler shows them all.
        logging.getLogger("great_expectations").setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of modules that it imports
            import great_expectations as gx
            from great_expectations.data_context.types.base import (
                DataContextConfig,
                InMemoryStoreBackendDefaults,
                ProgressBarsConfig,
            )

        from faletl.gate.expectations import own_expectations

        self._scratch = scratch
        self._own = own_expectations(settings.expectations)
        self._units = scratch / "units.csv"
        _write_csv(self._units, ("unit",), [(unit,) for unit in sorted(known_units(settings))])
        stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)  # else it leaves folders
        context = gx.get_context(
            mode="ephemeral",
            project_config=DataContextConfig(
                store_backend_defaults=stores, progress_bars=ProgressBarsConfig(globally=False)
            ),
        )
        options = duck.config(settings.memory.replace(" ", ""), scratch)
        url = sa.URL.create("duckdb", database=":memory:", query=options)
        source = context.data_sources.add_sql(
            "staged",
            connection_string=url.render_as_string(),
            # With its defaults every metric fails, as DuckDB knows no isolation levels.
            kwargs={  # type: ignore[call-arg]  # it goes to create_engine, though the stub knows it not
                "isolation_level": "AUTOCOMMIT",
                "skip_autocommit_rollback": True,
            },
            create_temp_table=False,
        )
        # One asset for all windows: Great Expectations writes its configuration anew for each.
        asset = source.add_query_asset("window", query="select * from staged_window")
        self._batches = asset.add_batch_definition_whole_table("window")
        self._engine = source.get_execution_engine().engine
        readable = ", ".join(map(quoted, filter(None, (scratch, staged_in))))
        with self._engine.connect() as connection:
            for macro in MACROS:
                connection.exec_driver_sql(macro)
            for setting in (
                "TimeZone = 'UTC'",
                "enable_external_file_cache = false",
                f"allowed_directories = [{readable}]",
                "enable_external_access = false",
                "lock_configuration = true",
            ):
                connection.exec_driver_sql(f"set global {setting}")
        sa.event.listen(self._engine, "before_cursor_execute", _refuse_all_but_a_select)

    def passed(self, connection: sa.Connection, staged: Staged) -> Staged:
        """The staged window with what was found of it; what is not as expected is logged.

        Raises:
            DataRefusedError: a critical expectation failed; the error carries what was found.
        """
        manifest = staged.landed.manifest
        validations = self.judge(connection, Subject.of(staged))
        findings = replace(staged.findings, validations=validations)
        refusing = [one for one in validations if not one.success and one.severity == "critical"]
        tell(manifest.resource, manifest.window, (one for one in validations if one not in refusing))
        if refusing:
            error = DataRefusedError(
                f"the gate refuses the window: {'; '.join(map(sentence, refusing))}; ops.validations "
                "keeps all that was found",
                resource=manifest.resource,
                window=str(manifest.window),
                account=manifest.account,
            )
            error.findings = findings
            raise error
        return replace(staged, findings=findings)

    def judge(self, connection: sa.Connection, subject: Subject) -> tuple[Validation, ...]:
        """What is found of each expectation; `connection` is to the warehouse, for the history."""
        from faletl.gate.expectations import key_columns, suite_of

        facts = self._facts(connection, subject)
        suite = suite_of(facts, self._own.get(subject.resource.name, ()))
        with self._engine.connect().execution_options(**_OURS) as engine:
            engine.exec_driver_sql(
                f"create or replace view staged_window as select * from {subject.source}"  # noqa: S608
            )
        batch, at = self._batches.get_batch(), datetime.now(UTC)
        keys = key_columns(subject.resource)
        return tuple(
            _passed(one, at) if one.success else _failed(batch, one, keys, at)
            for one in batch.validate(suite, result_format="BOOLEAN_ONLY").results
        )

    def _facts(self, connection: sa.Connection, subject: Subject) -> Facts:
        from faletl.gate.expectations import Facts

        prices = None
        if found := _prices_before(connection, subject):
            prices = self._scratch / "prices.csv"
            _write_csv(prices, ("endpoint_id", "unit", "low", "high"), found)
        window = subject.window
        return Facts(
            resource=subject.resource,
            window=window,
            expected_rows=subject.expected_rows,
            control_total=subject.control_total,
            is_settled=window.has_settled(subject.read_at),
            units=self._units,
            prices=prices,
            usual_rows=None if window.is_provisional else _usual_rows(connection, subject),
        )


_OURS = {"is_of_faletl": True}
"""The option of statements that are no part of a suite."""


def _refuse_all_but_a_select(
    connection: sa.Connection, _cursor: object, statement: str, *_: object
) -> None:
    """Suites are data: what the user's SQL makes of itself must not write, nor set anything."""
    if connection.get_execution_options().keys() & _OURS:
        return
    kinds = [one.type for one in duckdb.extract_statements(statement)]
    if kinds != [duckdb.StatementType.SELECT]:
        raise SettingsError("an expectation may only select; its SQL has other statements")


_LEVELS = {"critical": logging.ERROR, "warning": logging.WARNING, "info": logging.DEBUG}


def tell(resource: str, window: Window, validations: Iterable[Validation]) -> None:
    """Log what is not as expected."""
    for one in validations:
        if not one.success:
            log.log(_LEVELS[one.severity], "%s, window %s: %s", resource, window, sentence(one))


def sentence(validation: Validation) -> str:
    """An expectation that failed, in words: what was expected, what was found, where to look."""
    keys = f", such as {validation.sample_keys}" if validation.sample_keys != "[]" else ""
    return f"expected that {ascii(validation.expectation)[1:-1]}, but {validation.observed}{keys}"


# --- What Great Expectations found ----------------------------------------------------------------


def _passed(result: ExpectationValidationResult, at: datetime) -> Validation:
    return _validation(result, at, "all as expected", 0, [])


def _failed(
    batch: Any, result: ExpectationValidationResult, keys: list[str], at: datetime
) -> Validation:
    """Look again at what failed, for how many rows and which."""
    if broken := _exception(result):
        return _validation(result, at, f"it cannot be told: {broken}", 0, [])
    from faletl.gate.expectations import with_rows

    expectation = with_rows(_expectation(result))
    is_query = expectation.expectation_type == "unexpected_rows_expectation"
    again = batch.validate(
        expectation,
        result_format={
            "result_format": "COMPLETE" if is_query else "SUMMARY",
            "unexpected_index_column_names": keys,
            "partial_unexpected_count": _SAMPLE,
            "return_unexpected_index_query": False,
        },
    )
    found = again.result
    if is_query:
        rows = found["details"]["unexpected_rows"]
        shown = [{k: v for k, v in row.items() if len(row) < len(keys) or k in keys} for row in rows]
        count = int(found["observed_value"])
        return _validation(result, at, _rows_not_so(count), count, shown)
    if "unexpected_count" in found:
        count = int(found["unexpected_count"])
        rows = found.get("partial_unexpected_index_list") or found.get("partial_unexpected_list") or []
        shown = [{k: v for k, v in row.items() if k in keys} for row in rows if isinstance(row, dict)]
        return _validation(result, at, _rows_not_so(count), count, shown)
    return _validation(result, at, f"it is {_shown(found.get('observed_value'))}", 0, [])


def _rows_not_so(count: int) -> str:
    return f"{count:,} rows are not so" if count != 1 else "1 row is not so"


def _expectation(result: ExpectationValidationResult) -> Expectation:
    configuration = result.expectation_config
    assert configuration is not None  # noqa: S101  # it is of an expectation
    return configuration.to_domain_obj()


def _exception(result: ExpectationValidationResult) -> str | None:
    """What kept the expectation from being evaluated, in a line."""
    told = result.exception_info or {}
    for one in (told, *(each for each in told.values() if isinstance(each, dict))):
        if message := one.get("exception_message"):
            return str(message).strip().splitlines()[0][:200]
    return None


def _validation(
    result: ExpectationValidationResult,
    at: datetime,
    observed: str,
    count: int,
    rows: Sequence[dict[str, Any]],
) -> Validation:
    expectation = _expectation(result)
    return Validation(
        expectation=str(expectation.description),
        severity=expectation.severity.value,
        success=bool(result.success),
        observed=observed,
        unexpected_count=count,
        sample_keys=json.dumps([{k: _shown(v) for k, v in row.items()} for row in rows[:_SAMPLE]]),
        validated_at=at,
    )


def _shown(value: object) -> str | int | None:
    """A value as it may be shown: short, and whatever fal sent as plain printable characters."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Decimal):
        return plain(value)
    text = value.astimezone(UTC).isoformat() if isinstance(value, datetime) else str(value)
    return ascii(text)[1:-1][:80]


# --- A window's own history -----------------------------------------------------------------------


def _prices_before(connection: sa.Connection, subject: Subject) -> list[tuple[str, str, str, str]]:
    """The lowest and highest price of each endpoint and unit in the time before the window."""
    from faletl.gate.expectations import PRICE_HISTORY_DAYS, PRICED

    resource, rows = subject.resource, RAW[subject.resource.name].c
    if resource.name not in PRICED:
        return []
    time = rows[resource.time or "_snapshot_at"]
    start = subject.window.start
    found = connection.execute(
        sa.select(
            rows.endpoint_id, rows.unit, sa.func.min(rows.unit_price), sa.func.max(rows.unit_price)
        )
        .where(
            rows["_account"] == subject.account,
            time >= start - PRICE_HISTORY_DAYS * DAY,
            time < start,
        )
        .group_by(rows.endpoint_id, rows.unit)
    )
    return [(endpoint, unit, plain(low), plain(high)) for endpoint, unit, low, high in found]


def _usual_rows(connection: sa.Connection, subject: Subject) -> int | None:
    """The median of comparable windows before: the same weekday's, or the last snapshots'."""
    from faletl.gate.expectations import LEAST_USUAL, VOLUME_HISTORY

    loads, start = LOADS.c, subject.window.start
    same = sa.and_(
        loads.account == subject.account,
        loads.resource == subject.resource.name,
        loads.is_current,
        loads.is_provisional.is_(False),
        loads.window_start < start,
    )
    if not subject.window.is_snapshot:
        weeks = [start - number * WEEK for number in range(1, VOLUME_HISTORY + 1)]
        same = sa.and_(same, loads.window_start.in_(weeks))
    newest = sa.select(loads.rows).where(same).order_by(loads.window_start.desc()).limit(VOLUME_HISTORY)
    rows = connection.execute(newest).scalars().all()
    if len(rows) < 3 or (usual := median_low(rows)) < LEAST_USUAL:
        return None
    return int(usual)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
