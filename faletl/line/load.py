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
from faletl.resources import RESOURCES, USAGE
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import loaded_reads
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.quality import record_failure
from faletl.warehouse.tables import LOADS
from faletl.windows import CLOCK_TOLERANCE, Window

if TYPE_CHECKING:
    from faletl.gate.gate import Gate
from faletl.line.report import Progress, Report, note_outcome, silent

log = logging.getLogger(__name__)


def load_reads(
    settings: Settings, reads: Sequence[SealedExtract], report: Report, progress: Progress = silent
) -> None:
    """Stage and load complete reads, charges first; those that are refused go to the report."""
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        accepted = holds.accepted_rows(connection)
    with (
        scratch_folder() as scratch,
        loader(settings, warehouse, report) as load,
    ):
        for done, landed in enumerate(in_order(reads)):
            progress("loading", done, len(reads))
            try:
                staged = stage_window(settings, landed, scratch, accepted)
            except FaletlError as error:
                task = Task(RESOURCES[landed.manifest.resource], landed.manifest.window)
                forget_frames(error)
                report.failures.append((task, error.at(account=landed.manifest.account)))
                continue
            load([staged])
            staged.discard()
        progress("loading", len(reads), len(reads))
    record_failures(settings, report)


@contextmanager
def loader(
    settings: Settings, warehouse: Warehouse, report: Report
) -> Iterator[Callable[[list[Staged]], None]]:
    """What loads staged windows that pass the gate; those that do not go to the report.

    The gate takes seconds to make, so it is made when there is news to look at, and without the lease;
    FALETL_GATE may say that there is none.
    """
    made: Gate | None = None
    staged_in: Path | None = None
    is_told = settings.gate
    with ExitStack() as stack:

        def gate() -> Gate:
            nonlocal made
            if made is None:
                from faletl.gate.gate import Gate

                made = Gate(settings, stack.enter_context(scratch_folder()), staged_in)
            return made

        def load(batch: list[Staged]) -> None:
            nonlocal is_told, staged_in
            staged_in = next((file.parent for staged in batch for file in staged.files), staged_in)
            if not is_told:
                is_told = True
                log.warning("FALETL_GATE is off: windows are loaded without what the gate would find")
            if settings.gate and made is None and _has_news(warehouse, batch):
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
        warn_of_the_future("%s loaded by a clock that was ahead: taken out of the tables", ahead)
        for staged in batch:
            resource, window = staged.resource, staged.landed.manifest.window
            judged = staged
            try:
                with lease.transaction():
                    if not is_already_loaded(lease.connection, staged):
                        refused = _shared_days(report)
                        refuse_shared(settings, warehouse, lease.connection, staged, refused)
                        judged = gate().passed(lease.connection, staged) if settings.gate else staged
            except DataRefusedError as error:
                extracts.refuse(staged.landed.folder)
                error.at(account=staged.landed.manifest.account)
                report.failures.append((Task(resource, window), error))
                continue
            replaced = replace_window(settings, warehouse, lease, judged)
            note_outcome(report, staged, replaced)


def _shared_days(report: Report) -> set[tuple[str, date]]:
    """The accounts and days refused because their charges are loaded under another label."""
    return {
        (str(error.facts["account"]), task.window.day)
        for task, error in report.failures
        if task and isinstance(error, SharedChargesError)
    }


def record_failures(settings: Settings, report: Report) -> None:
    """Keep what failed for `faletl status`; that it failed is in the report in any case."""
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
    """What failed of a window, with its account. A locked account is recorded as usage of today.

    A held window is in ops.holds.
    """
    for task, error in report.failures:
        account = error.facts.get("account") or report.account
        if task is None and isinstance(error, AccountLockedError):
            task = Task(USAGE, Window.of_day(datetime.now(UTC).date()))
            account = account or accounts.label_of_key(warehouse, settings)
        if task is not None and account and not isinstance(error, HeldError):
            yield task, error, str(account)


def warn_of_other_landing(settings: Settings, connection: sa.Connection | None) -> None:
    """Warn where the landing folder lacks what was loaded last: it may be another, or not mounted."""
    newest = sa.select(LOADS.c.landing_path).where(LOADS.c.is_current)
    newest = newest.order_by(LOADS.c.fencing_token.desc(), LOADS.c.load_id.desc()).limit(1)
    path = connection.execute(newest).scalar() if connection is not None else None
    folder = extracts.root(settings)
    if path is not None and not extracts.is_complete(folder / path):
        log.warning(
            "the landing folder %s lacks the pages of what was loaded last (%s): is FALETL_LANDING "
            "right, and its disk mounted? faletl verify counts what is gone; faletl rebuild needs it",
            folder,
            path,
        )


def not_loaded(settings: Settings, warehouse: Warehouse, report: Report) -> list[SealedExtract]:
    """Complete reads that are newer than what is loaded; of a day only its newest.

    Those that cannot be opened go to the report. What a clock that was ahead landed of windows that have
    not ended is left until they have.
    """
    now = datetime.now(UTC)
    with warehouse.reading() as connection:
        warn_of_other_landing(settings, connection)
        loaded = loaded_reads(connection) if connection is not None else {}
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
        read_at = loaded.get((manifest.account, manifest.resource, manifest.window.day))
        if not _is_after(manifest.started_at, read_at, now):
            continue
        if manifest.window.end > now + CLOCK_TOLERANCE:
            ahead.append(f"{manifest.resource} {manifest.window}")
            continue
        if manifest.window.is_snapshot:
            key = (*key, manifest.load_id)
        newest[key] = max(newest.get(key, landed), landed, key=lambda one: _newness(one, now))
    warn_of_the_future("%s landed by a clock that was ahead: not loaded before that instant", ahead)
    order = list(RESOURCES)
    return sorted(
        newest.values(),
        key=lambda landed: (order.index(landed.manifest.resource), landed.manifest.began_at),
    )


def _is_after(started_at: datetime, read_at: datetime | None, now: datetime) -> bool:
    """Whether an extract is newer than the loaded one, or may be, as a clock was ahead for that one."""
    return read_at is None or started_at > read_at or (started_at != read_at and read_at > now)


def _newness(landed: SealedExtract, now: datetime) -> tuple[bool, datetime, datetime]:
    """Of two attempts at the same read, the one that ended later took over the pages of the other.

    An extract that seems to be of the future may be of any age, unless fal's clock vouches for it.
    """
    manifest = landed.manifest
    return manifest.began_at <= now, manifest.began_at, manifest.finished_at


def warn_of_the_future(sentence: str, windows: Sequence[str]) -> None:
    """One warning for all that a clock that was ahead left; without any, nothing."""
    if windows:
        more = f" and {len(windows) - 1:,} more windows were" if len(windows) > 1 else " was"
        log.warning(sentence, f"{windows[-1]}{more}")
