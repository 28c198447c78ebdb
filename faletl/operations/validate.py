"""Validate: run the gate again over loaded windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import DataRefusedError
from faletl.files import scratch_folder
from faletl.findings import Validation
from faletl.gate.gate import Gate, GateInput, log_findings
from faletl.line import holds
from faletl.line.report import Progress, new_run_id, no_progress
from faletl.resources import RESOURCES
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import current_loads, fence, rows_of_windows
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.quality import record_validations
from faletl.warehouse.tables import LOADS
from faletl.windows import Window, WindowKey


@dataclass(frozen=True, slots=True)
class JudgedWindow:
    """A loaded window and the results of its expectations."""

    account: str
    resource: str
    window: Window
    load_id: str
    rows: int
    validations: tuple[Validation, ...]

    def failures(self, severity: str) -> int:
        """Count the failed expectations of that severity."""
        return sum(
            not validation.success and validation.severity == severity for validation in self.validations
        )


@dataclass(slots=True)
class GateReport:
    """The results of the gate for all selected windows."""

    run_id: str
    judged: list[JudgedWindow] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """The code of a refused window if the gate would refuse one, else 0."""
        critical = (v for window in self.judged for v in window.validations if v.severity == "critical")
        return 0 if all(v.success for v in critical) else DataRefusedError.exit_code


def validate(
    settings: Settings, selection: Asked = EVERYTHING_DUE, progress: Progress = no_progress
) -> GateReport:
    """Run the gate over the selected loaded windows (default: all), one by one.

    Runs may write in between. The results replace earlier results of the same loads.

    Raises:
        UsageError: there is no warehouse yet.
        SettingsError: the user's expectations, or table of units, cannot be read.
    """
    warehouse, report = open_warehouse(settings), GateReport(new_run_id())
    loads = current_loads(warehouse, selection)
    with scratch_folder() as scratch:
        gate = Gate(settings, scratch)
        for done, load in enumerate(loads):
            progress("validating", done, len(loads))
            if judged := _judge_window(warehouse, gate, load, scratch):
                log_findings(judged.resource, judged.window, judged.validations)
                report.judged.append(judged)
        progress("validating", len(loads), len(loads))
    if report.judged:
        _record(warehouse, report)
    return report


def _judge_window(
    warehouse: Warehouse, gate: Gate, load: sa.RowMapping, scratch: Path
) -> JudgedWindow | None:
    """Run the gate over one window; None if another load has replaced it since."""
    resource = RESOURCES[load["resource"]]
    window = Window(load["window_start"], load["window_end"])
    path = scratch / f"{load['load_id']}.parquet"
    with warehouse.reading() as connection:
        is_current = sa.select(LOADS.c.is_current).where(LOADS.c.load_id == load["load_id"])
        if connection is None or not connection.execute(is_current).scalar():
            return None
        warehouse.export_rows(connection, rows_of_windows(resource, load["account"], [window]), path)
        is_accepted = holds.is_refused_window_accepted(connection, load)
        subject = GateInput(
            account=load["account"],
            resource=resource.with_any_sign if is_accepted else resource,
            window=window,
            source=quoted(path),
            expected_rows=load["rows"],
            control_total=None if is_accepted else load["control_total"],
            read_at=load["last_read_at"],
        )
        validations = gate.judge(connection, subject)
    path.unlink()
    return JudgedWindow(
        load["account"], resource.name, window, load["load_id"], load["rows"], validations
    )


def _record(warehouse: Warehouse, report: GateReport) -> None:
    with warehouse.lease(f"faletl validate, run {report.run_id}") as lease, lease.transaction():
        fence(lease, changes_data=False)
        for judged in report.judged:
            key = WindowKey(judged.account, judged.resource, judged.window)
            record_validations(lease.connection, key, judged.load_id, report.run_id, judged.validations)
