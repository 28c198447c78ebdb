"""Load extracts in order, through the gate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import AccountLockedError, DataRefusedError, FaletlError, HeldError
from faletl.fal.bodies import forget_frames
from faletl.files import scratch_folder
from faletl.landing import extracts
from faletl.landing.extracts import SealedExtract
from faletl.line import accounts, holds, relabel
from faletl.line.overlap import SharedChargesError, in_order, refuse_shared
from faletl.line.plan import Task
from faletl.line.replace import (
    is_already_loaded,
    replace_window,
    snapshots_taken_out,
    take_out_the_future,
)
from faletl.line.report import Progress, Report, no_progress, note_outcome
from faletl.resources import RESOURCES, USAGE
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import last_extract_times
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.quality import record_failure
from faletl.warehouse.tables import LOADS
from faletl.windows import CLOCK_TOLERANCE, Window

if TYPE_CHECKING:
    from faletl.gate.gate import Gate

log = logging.getLogger(__name__)


def load_extracts(
    settings: Settings, sealed: Sequence[SealedExtract], report: Report, progress: Progress = no_progress
) -> None:
    """Stage and load sealed extracts, charges first; refused ones go to the report."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        accepted = holds.accepted_rows(connection)
    with (
        scratch_folder() as scratch,
        loader(settings, warehouse, report) as load,
    ):
        for done, landed in enumerate(in_order(sealed)):
            progress("loading", done, len(sealed))
            try:
                staged = stage_window(settings, landed, scratch, accepted)
            except FaletlError as error:
                task = Task(RESOURCES[landed.manifest.resource], landed.manifest.window)
                forget_frames(error)
                report.failures.append((task, error.at(account=landed.manifest.account)))
                continue
            load([staged])
            staged.discard()
        progress("loading", len(sealed), len(sealed))
    record_failures(settings, report)


@contextmanager
def loader(
    settings: Settings, warehouse: Warehouse, report: Report
) -> Iterator[Callable[[list[Staged]], None]]:
    """Yield a function that loads staged windows which pass the gate; refused ones go to the report.

    Creating the gate takes seconds, so it is created only when a window has new rows, and before the
    lease is taken. FALETL_GATE may turn it off.
    """
    created_gate: Gate | None = None
    staged_in: Path | None = None
    has_warned = settings.gate
    with ExitStack() as stack:

        def gate() -> Gate:
            nonlocal created_gate
            if created_gate is None:
                from faletl.gate.gate import Gate

                created_gate = Gate(settings, stack.enter_context(scratch_folder()), staged_in)
            return created_gate

        def load(batch: list[Staged]) -> None:
            nonlocal has_warned, staged_in
            staged_in = next((file.parent for staged in batch for file in staged.files), staged_in)
            if not has_warned:
                has_warned = True
                log.warning("FALETL_GATE is off: windows are loaded without validation by the gate")
            if settings.gate and created_gate is None and _has_news(warehouse, batch):
                gate()
            _load_batch(settings, warehouse, gate, batch, report)

        yield load


def _has_news(warehouse: Warehouse, batch: list[Staged]) -> bool:
    with warehouse.reading() as connection:
        return connection is None or not all(is_already_loaded(connection, staged) for staged in batch)


def _load_batch(
    settings: Settings,
    warehouse: Warehouse,
    gate: Callable[[], Gate],
    batch: list[Staged],
    report: Report,
) -> None:
    with warehouse.lease(f"faletl load, run {report.run_id}") as lease:
        with lease.transaction():
            accounts.require_known(lease.connection, report.account)
            manifests = [staged.landed.manifest for staged in batch]
            ahead = take_out_the_future(settings, lease, manifests, datetime.now(UTC))
        warn_of_the_future("%s loaded by a clock that was ahead: removed from the tables", ahead)
        for staged in batch:
            resource, window = staged.resource, staged.landed.manifest.window
            checked = staged
            try:
                with lease.transaction():
                    if not is_already_loaded(lease.connection, staged):
                        refused = _shared_days(report)
                        refuse_shared(settings, warehouse, lease.connection, staged, refused)
                        checked = (
                            gate().check_staged(lease.connection, staged) if settings.gate else staged
                        )
            except DataRefusedError as error:
                extracts.refuse(staged.landed.folder)
                error.at(account=staged.landed.manifest.account)
                report.failures.append((Task(resource, window), error))
                continue
            replaced = replace_window(settings, warehouse, lease, checked)
            note_outcome(report, staged, replaced)


def _shared_days(report: Report) -> set[tuple[str, date]]:
    """Return the accounts and days refused because their charges are loaded under another label."""
    return {
        (str(error.facts["account"]), task.window.day)
        for task, error in report.failures
        if task and isinstance(error, SharedChargesError)
    }


def record_failures(settings: Settings, report: Report) -> None:
    """Record failures for `faletl status`, if the warehouse can be written."""
    warehouse = open_warehouse(settings)
    failed = list(_recordable(settings, warehouse, report))
    if not failed:
        return
    with suppress(FaletlError), warehouse.lease(f"faletl, run {report.run_id}") as lease:
        with lease.transaction():
            accounts.require_known(lease.connection, report.account)
        for task, error, account in failed:
            record_failure(lease, error, account=account, resource=task.resource.name,
                window=task.window, run_id=report.run_id,
            )  # fmt: skip


def _recordable(
    settings: Settings, warehouse: Warehouse, report: Report
) -> Iterator[tuple[Task, FaletlError, str]]:
    """Yield the failures of windows, with their accounts.

    A locked account is recorded as usage of today. Held windows are left out: they are in ops.holds.
    """
    for task, error in report.failures:
        account = error.facts.get("account") or report.account
        if task is None and isinstance(error, AccountLockedError):
            task = Task(USAGE, Window.of_day(datetime.now(UTC).date()))
            account = account or accounts.label_of_key(warehouse, settings)
        if task is not None and account and not isinstance(error, HeldError):
            yield task, error, str(account)


def warn_of_other_landing(settings: Settings, connection: sa.Connection | None) -> None:
    """Warn if the landing folder lacks the newest loaded extract: it may be another, or not mounted."""
    newest = sa.select(LOADS.c.landing_path).where(LOADS.c.is_current)
    newest = newest.order_by(LOADS.c.fencing_token.desc(), LOADS.c.load_id.desc()).limit(1)
    path = connection.execute(newest).scalar() if connection is not None else None
    folder = extracts.root(settings)
    if path is not None and not extracts.is_complete(folder / path):
        log.warning(
            "the landing folder %s lacks the pages of the newest load (%s): check that FALETL_LANDING "
            "is right and its disk is mounted. faletl verify counts missing pages; faletl rebuild needs "
            "them",
            folder,
            path,
        )


def not_loaded(settings: Settings, warehouse: Warehouse, report: Report) -> list[SealedExtract]:
    """Return sealed extracts that are newer than the loaded ones; of each day only the newest.

    Extracts that cannot be opened go to the report. Extracts of windows in the future, landed by a clock
    that was ahead, are left out until the windows have ended.
    """
    now = datetime.now(UTC)
    with warehouse.reading() as connection:
        warn_of_other_landing(settings, connection)
        loaded_at = last_extract_times(connection) if connection is not None else {}
        taken_out = snapshots_taken_out(connection) if connection is not None else set[str]()
        open_read = relabel.opener(settings, connection)
    newest: dict[tuple[str, ...], SealedExtract] = {}
    ahead = list[str]()
    for folder in extracts.complete_reads(settings):
        try:
            landed = open_read(folder)
        except FaletlError as error:
            report.failures.append((None, error))
            continue
        if landed is None or landed.folder.name in taken_out:
            continue
        manifest = landed.manifest
        key: tuple[str, ...] = (manifest.account, manifest.resource, manifest.window.day.isoformat())
        last_extracted_at = loaded_at.get((manifest.account, manifest.resource, manifest.window.day))
        if not _is_after(manifest.started_at, last_extracted_at, now):
            continue
        if manifest.window.end > now + CLOCK_TOLERANCE:
            ahead.append(f"{manifest.resource} {manifest.window}")
            continue
        if manifest.window.is_snapshot:
            key = (*key, manifest.load_id)
        newest[key] = max(newest.get(key, landed), landed, key=lambda extract: _age_key(extract, now))
    warn_of_the_future("%s landed by a clock that was ahead: not loaded until that time", ahead)
    order = list(RESOURCES)
    return sorted(
        newest.values(),
        key=lambda landed: (order.index(landed.manifest.resource), landed.manifest.began_at),
    )


def _is_after(started_at: datetime, read_at: datetime | None, now: datetime) -> bool:
    """Return whether an extract is newer than the loaded one, or may be if that is from the future."""
    return read_at is None or started_at > read_at or (started_at != read_at and read_at > now)


def _age_key(landed: SealedExtract, now: datetime) -> tuple[bool, datetime, datetime]:
    """Return a sort key by age: of two attempts at one extract, the later took over the other's pages.

    An extract from the future may be of any age, unless fal's clock confirms its time.
    """
    manifest = landed.manifest
    return manifest.began_at <= now, manifest.began_at, manifest.finished_at


def warn_of_the_future(sentence: str, windows: Sequence[str]) -> None:
    """Log one warning for all windows from the future, if there are any."""
    if windows:
        rest = f" and {len(windows) - 1:,} more windows were" if len(windows) > 1 else " was"
        log.warning(sentence, f"{windows[-1]}{rest}")
