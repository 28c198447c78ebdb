"""Validate: the gate once more, over windows that are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import DataRefusedError
from faletl.files import scratch_folder
from faletl.findings import Validation
from faletl.gate.gate import Gate, Subject, tell
from faletl.line import holds
from faletl.line.report import Progress, new_run_id, silent
from faletl.resources import RESOURCES
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import current_loads, fence, rows_of_windows
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.quality import keep_validations
from faletl.warehouse.tables import LOADS
from faletl.windows import Window, WindowKey


@dataclass(frozen=True, slots=True)
class Judged:
    """A loaded window and what the gate found of it."""

    account: str
    resource: str
    window: Window
    load_id: str
    rows: int
    validations: tuple[Validation, ...]

    def failures(self, severity: str) -> int:
        """How many expectations of that severity failed."""
        return sum(not one.success and one.severity == severity for one in self.validations)


@dataclass(slots=True)
class Verdict:
    """What the gate found of all windows that were asked for."""

    run_id: str
    judged: list[Judged] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """That of a refused window if one would be refused, else 0."""
        critical = (v for one in self.judged for v in one.validations if v.severity == "critical")
        return 0 if all(v.success for v in critical) else DataRefusedError.exit_code


def validate(settings: Settings, asked: Asked = EVERYTHING_DUE, progress: Progress = silent) -> Verdict:
    """Look at what is loaded of the days and resources asked for (default: all), window by window.

    Runs get their turn in between. What is found takes the place of what was found of these loads.

    Raises:
        UsageError: there is no warehouse yet.
        SettingsError: the user's expectations, or table of units, cannot be read.
    """
    warehouse, verdict = open_warehouse(settings), Verdict(new_run_id())
    loads = current_loads(warehouse, asked)
    with scratch_folder() as scratch:
        gate = Gate(settings, scratch)
        for done, load in enumerate(loads):
            progress("validating", done, len(loads))
            if judged := _judged(warehouse, gate, load, scratch):
                tell(judged.resource, judged.window, judged.validations)
                verdict.judged.append(judged)
        progress("validating", len(loads), len(loads))
    if verdict.judged:
        _keep(warehouse, verdict)
    return verdict


def _judged(warehouse: Warehouse, gate: Gate, load: sa.RowMapping, scratch: Path) -> Judged | None:
    """What the gate finds of the window; None if another load holds it by now."""
    resource = RESOURCES[load["resource"]]
    window = Window(load["window_start"], load["window_end"])
    path = scratch / f"{load['load_id']}.parquet"
    with warehouse.reading() as connection:
        held = sa.select(LOADS.c.is_current).where(LOADS.c.load_id == load["load_id"])
        if connection is None or not connection.execute(held).scalar():
            return None
        warehouse.hand_out(connection, rows_of_windows(resource, load["account"], [window]), path)
        is_accepted = holds.is_refused_window_accepted(connection, load)
        subject = Subject(
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
    return Judged(load["account"], resource.name, window, load["load_id"], load["rows"], validations)


def _keep(warehouse: Warehouse, verdict: Verdict) -> None:
    with warehouse.lease(f"faletl validate, run {verdict.run_id}") as lease, lease.transaction():
        fence(lease, changes_data=False)
        for one in verdict.judged:
            key = WindowKey(one.account, one.resource, one.window)
            keep_validations(lease.connection, key, one.load_id, verdict.run_id, one.validations)
