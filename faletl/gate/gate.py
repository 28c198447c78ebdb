"""The gate between staging and load: Great Expectations over the rows of one window, in DuckDB.

The gate evaluates all expectations on a window once, in as few scans as Great Expectations needs. Only
failed expectations are evaluated again, to count and identify their rows. No value of a row leaves the
database except the keys of these rows, and nothing is sent over the network.
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

_MAX_SAMPLES = 3  # rows whose keys are kept


@dataclass(frozen=True, slots=True)
class GateInput:
    """A window to validate; `source` is DuckDB SQL for its rows (see `Staged`)."""

    account: str
    resource: Resource
    window: Window
    source: str
    expected_rows: int
    control_total: Decimal | None
    read_at: datetime

    @classmethod
    def of(cls, staged: Staged) -> GateInput:
        """Return the input for a staged window, before it is loaded."""
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
    """Great Expectations, ready to validate windows. Create one and reuse it: that takes seconds.

    It reads and writes files in `scratch`, and reads the folder where windows are staged.

    Raises:
        SettingsError: the user's expectations, or table of units, cannot be read.
    """

    def __init__(self, settings: Settings, scratch: Path, staged_in: Path | None = None) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"
        # It logs hundreds of lines about itself, which a scheduler would show.
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
        stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)  # otherwise it leaves folders
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
            kwargs={  # type: ignore[call-arg]  # passed to create_engine, though the stub does not declare it
                "isolation_level": "AUTOCOMMIT",
                "skip_autocommit_rollback": True,
            },
            create_temp_table=False,
        )
        # One asset for all windows: Great Expectations rewrites its configuration for each asset.
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

    def check_staged(self, connection: sa.Connection, staged: Staged) -> Staged:
        """Validate a staged window and return it with the results; log failed expectations.

        Raises:
            DataRefusedError: a critical expectation failed; the error carries the results.
        """
        manifest = staged.landed.manifest
        validations = self.judge(connection, GateInput.of(staged))
        findings = replace(staged.findings, validations=validations)
        critical = [
            validation
            for validation in validations
            if not validation.success and validation.severity == "critical"
        ]
        log_findings(
            manifest.resource,
            manifest.window,
            (validation for validation in validations if validation not in critical),
        )
        if critical:
            error = DataRefusedError(
                f"the gate refuses the window: {'; '.join(map(describe, critical))}; see "
                "ops.validations for all results",
                resource=manifest.resource,
                window=str(manifest.window),
                account=manifest.account,
            )
            error.findings = findings
            raise error
        return replace(staged, findings=findings)

    def judge(self, connection: sa.Connection, subject: GateInput) -> tuple[Validation, ...]:
        """Evaluate each expectation; `connection` is to the warehouse, for the history."""
        from faletl.gate.expectations import key_columns, suite_of

        facts = self._facts(connection, subject)
        suite = suite_of(facts, self._own.get(subject.resource.name, ()))
        with self._engine.connect().execution_options(**_OWN_STATEMENT) as engine:
            engine.exec_driver_sql(
                f"create or replace view staged_window as select * from {subject.source}"  # noqa: S608
            )
        batch, at = self._batches.get_batch(), datetime.now(UTC)
        keys = key_columns(subject.resource)
        return tuple(
            _succeeded(result, at) if result.success else _failed(batch, result, keys, at)
            for result in batch.validate(suite, result_format="BOOLEAN_ONLY").results
        )

    def _facts(self, connection: sa.Connection, subject: GateInput) -> Facts:
        from faletl.gate.expectations import Facts

        prices = None
        if price_bands := _prices_before(connection, subject):
            prices = self._scratch / "prices.csv"
            _write_csv(prices, ("endpoint_id", "unit", "low", "high"), price_bands)
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


_OWN_STATEMENT = {"is_of_faletl": True}
"""Execution option of our own statements, which are not part of a suite."""


def _refuse_all_but_a_select(
    connection: sa.Connection, _cursor: object, statement: str, *_: object
) -> None:
    """Raise SettingsError unless a user's SQL only selects: it must not write or set anything."""
    if connection.get_execution_options().keys() & _OWN_STATEMENT:
        return
    kinds = [parsed.type for parsed in duckdb.extract_statements(statement)]
    if kinds != [duckdb.StatementType.SELECT]:
        raise SettingsError(
            "an expectation may only select; the SQL of one in FALETL_EXPECTATIONS has other statements"
        )


_LEVELS = {"critical": logging.ERROR, "warning": logging.WARNING, "info": logging.DEBUG}


def log_findings(resource: str, window: Window, validations: Iterable[Validation]) -> None:
    """Log each failed expectation, at the level of its severity."""
    for validation in validations:
        if not validation.success:
            log.log(
                _LEVELS[validation.severity], "%s, window %s: %s", resource, window, describe(validation)
            )


def describe(validation: Validation) -> str:
    """Describe a failed expectation: what was expected, what was observed, and keys of rows."""
    keys = f", such as {validation.sample_keys}" if validation.sample_keys != "[]" else ""
    return f"expected that {ascii(validation.expectation)[1:-1]}, but {validation.observed}{keys}"


# --- Results of Great Expectations ----------------------------------------------------------------


def _succeeded(result: ExpectationValidationResult, at: datetime) -> Validation:
    return _validation(result, at, "all as expected", 0, [])


def _failed(
    batch: Any, result: ExpectationValidationResult, keys: list[str], at: datetime
) -> Validation:
    """Evaluate a failed expectation again, to count and identify its rows."""
    if broken := _exception(result):
        return _validation(result, at, f"it cannot be evaluated: {broken}", 0, [])
    from faletl.gate.expectations import with_rows

    expectation = with_rows(_expectation(result))
    is_query = expectation.expectation_type == "unexpected_rows_expectation"
    second_result = batch.validate(
        expectation,
        result_format={
            "result_format": "COMPLETE" if is_query else "SUMMARY",
            "unexpected_index_column_names": keys,
            "partial_unexpected_count": _MAX_SAMPLES,
            "return_unexpected_index_query": False,
        },
    )
    outcome = second_result.result
    if is_query:
        rows = outcome["details"]["unexpected_rows"]
        shown = [{k: v for k, v in row.items() if len(row) < len(keys) or k in keys} for row in rows]
        count = int(outcome["observed_value"])
        return _validation(result, at, _rows_failing(count), count, shown)
    if "unexpected_count" in outcome:
        count = int(outcome["unexpected_count"])
        rows = (
            outcome.get("partial_unexpected_index_list") or outcome.get("partial_unexpected_list") or []
        )
        shown = [{k: v for k, v in row.items() if k in keys} for row in rows if isinstance(row, dict)]
        return _validation(result, at, _rows_failing(count), count, shown)
    return _validation(result, at, f"it is {_shown(outcome.get('observed_value'))}", 0, [])


def _rows_failing(count: int) -> str:
    return f"{count:,} rows do not meet this" if count != 1 else "1 row does not meet this"


def _expectation(result: ExpectationValidationResult) -> Expectation:
    configuration = result.expectation_config
    assert configuration is not None  # noqa: S101  # every result has an expectation
    return configuration.to_domain_obj()


def _exception(result: ExpectationValidationResult) -> str | None:
    """Return, in one line, the error that prevented the evaluation; None without one."""
    info = result.exception_info or {}
    for entry in (info, *(nested for nested in info.values() if isinstance(nested, dict))):
        if message := entry.get("exception_message"):
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
        sample_keys=json.dumps([{k: _shown(v) for k, v in row.items()} for row in rows[:_MAX_SAMPLES]]),
        validated_at=at,
    )


def _shown(value: object) -> str | int | None:
    """Format a value for display: short, and in printable ASCII characters only."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Decimal):
        return plain(value)
    text = value.astimezone(UTC).isoformat() if isinstance(value, datetime) else str(value)
    return ascii(text)[1:-1][:80]


# --- The history of a window ----------------------------------------------------------------------


def _prices_before(connection: sa.Connection, subject: GateInput) -> list[tuple[str, str, str, str]]:
    """Return the lowest and highest price of each endpoint and unit before the window."""
    from faletl.gate.expectations import PRICE_HISTORY_DAYS, PRICED

    resource, rows = subject.resource, RAW[subject.resource.name].c
    if resource.name not in PRICED:
        return []
    time = rows[resource.time or "_snapshot_at"]
    start = subject.window.start
    prices = connection.execute(
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
    return [(endpoint, unit, plain(low), plain(high)) for endpoint, unit, low, high in prices]


def _usual_rows(connection: sa.Connection, subject: GateInput) -> int | None:
    """Return the median row count of comparable earlier windows: same weekdays, or last snapshots."""
    from faletl.gate.expectations import MIN_USUAL_ROWS, VOLUME_HISTORY

    loads, start = LOADS.c, subject.window.start
    is_comparable = sa.and_(
        loads.account == subject.account,
        loads.resource == subject.resource.name,
        loads.is_current,
        loads.is_provisional.is_(False),
        loads.window_start < start,
    )
    if not subject.window.is_snapshot:
        weeks = [start - number * WEEK for number in range(1, VOLUME_HISTORY + 1)]
        is_comparable = sa.and_(is_comparable, loads.window_start.in_(weeks))
    newest = (
        sa.select(loads.rows)
        .where(is_comparable)
        .order_by(loads.window_start.desc())
        .limit(VOLUME_HISTORY)
    )
    rows = connection.execute(newest).scalars().all()
    if len(rows) < 3 or (usual := median_low(rows)) < MIN_USUAL_ROWS:
        return None
    return int(usual)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
