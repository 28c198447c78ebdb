"""Rebuild and prune: the warehouse anew from the landed pages, and which of these that needs.

A load leaves a receipt beside the pages it loaded. The receipts, in their order, are the history of
the warehouse: loading these reads once more gives the same rows, ledger and restatements.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from faletl import decisions, landing, models, pipeline, relabel
from faletl.config import Settings
from faletl.errors import (
    ContractError,
    DataRefusedError,
    SettingsError,
    TamperedError,
    UnprovenError,
    UsageError,
    WarehouseBusyError,
    WarehouseError,
)
from faletl.extract import RESUME_WITHIN
from faletl.landing import Landed, Manifest, Receipt
from faletl.load import Ledger, read_ledger, replay
from faletl.pipeline import Progress, Report
from faletl.places import scratch_folder
from faletl.staging import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.windows import refuse_odd_day

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A complete read that was loaded, or that found the rows which were loaded before it."""

    landed: Landed
    receipt: Receipt

    @property
    def load_id(self) -> str:
        """The id of the read."""
        return self.landed.manifest.load_id


def rebuild(settings: Settings, day: date | None = None, progress: Progress = pipeline.silent) -> Report:
    """The warehouse, or one UTC day of it, anew from the landed pages alone; asks fal nothing.

    Every read that was loaded is loaded again, in the order of that time, so that the ledger and the
    restatements come back, too. The old warehouse serves until the new one is whole.

    Raises:
        TamperedError: landed pages are gone or are not those that were landed; nothing is changed.
        SettingsError, WarehouseError, StorageError: the warehouse cannot be written.
        UsageError: one day of a warehouse that is not there, or a day that cannot be.
    """
    if day is not None:
        refuse_odd_day("--window", day)
    report = Report(pipeline.new_run_id())
    if day is None:
        _rebuild_all(settings, report, progress)
    else:
        _rebuild_day(settings, report, day)
    if report.outcomes:
        pipeline.build_and_publish(settings, report)
    return report


def _rebuild_all(settings: Settings, report: Report, progress: Progress) -> None:
    warehouse, holder = open_warehouse(settings), f"faletl rebuild, run {report.run_id}"
    ledger = _readable_ledger(settings)
    past = _history(settings, ledger)
    _refuse_gaps(ledger, past)
    if not past:
        return
    newest = max(max(one.receipt.fencing_token, _planned_under(one)) for one in past)
    with (
        warehouse.renewed(holder, newest, read_ledger) as (fresh, last),
        scratch_folder() as scratch,
        fresh.lease(holder) as lease,
    ):
        # Now that nobody else can load any more: somebody may have, and died before the receipt.
        ledger = last or ledger
        past = _history(settings, ledger)
        _refuse_gaps(ledger, past)
        needed = _needed(past, ledger)
        for done, one in enumerate(past):
            progress("loading", done, len(past))
            if staged := _staged_again(settings, one, needed, scratch):
                outcomes, lease = replay(settings, fresh, lease, [(staged, one.receipt)])
                report.outcomes.append(pipeline.outcome_of(staged, outcomes[0]))
                staged.discard()
        with lease.transaction():
            relabel.restore(
                lease.connection, decisions.recorded(settings), (one.landed.manifest for one in past)
            )
        report.build = models.build(settings, fresh, lease, run_id=report.run_id)
        pipeline.warn_of_runaways(report.build)
    _complete_receipts(past)


def _rebuild_day(settings: Settings, report: Report, day: date) -> None:
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None:
            raise UsageError("there is no warehouse yet; faletl rebuild makes all of it")
    with (
        scratch_folder() as scratch,
        warehouse.lease(f"faletl rebuild, run {report.run_id}") as lease,
    ):
        with lease.transaction():
            ledger = read_ledger(lease.connection, day)
        past = _history(settings, ledger, day)
        _refuse_gaps(ledger, past)
        if not past:
            return
        needed = _needed(past, ledger)
        again = [
            (staged, one.receipt)
            for one in past
            if (staged := _staged_again(settings, one, needed, scratch, is_strict=True))
        ]
        outcomes, _ = replay(settings, warehouse, lease, again, forget=day)
    for (staged, _), outcome in zip(again, outcomes, strict=True):
        report.outcomes.append(pipeline.outcome_of(staged, outcome))
    _complete_receipts(past)


def prune(settings: Settings, *, is_dry: bool = False) -> tuple[list[Path], int]:
    """Delete landed reads that nothing stands on any more; return their folders and bytes.

    Kept is what `rebuild` needs for the same rows and restatements, what can still be loaded, and
    interrupted reads that can still be taken up.

    Raises:
        UsageError: there is no warehouse to tell what is needed.
        StorageError: a folder cannot be deleted.
    """
    dropped = list(landing.interrupted_reads(settings, datetime.now(UTC) - RESUME_WITHIN))
    with open_warehouse(settings).reading() as connection:  # nobody loads meanwhile
        complete = list(landing.complete_reads(settings))
        if connection is None:
            if complete:
                raise UsageError(
                    "there is no warehouse to tell which landed pages are needed, so none is dropped; "
                    "is FALETL_WAREHOUSE right? faletl rebuild makes it anew"
                )
            return [], 0
        ledger = read_ledger(connection)
        past = _history(settings, ledger)
    kept = _needed(past, ledger) | _loadable(settings, complete, past)
    dropped += [folder for folder in complete if folder.name not in kept]
    size = sum(landing.size(folder) for folder in dropped)
    if not is_dry:
        _complete_receipts(past)
        for folder in dropped:
            landing.drop(folder)
    return dropped, size


# --- History --------------------------------------------------------------------------------------


def _history(settings: Settings, ledger: Ledger, day: date | None = None) -> list[Loaded]:
    """What was loaded (of one UTC day), in the order of that time.

    Where a run was killed between a load and its receipt, the ledger knows.
    """
    past = []
    open_read = relabel.opener(settings)
    for folder in landing.complete_reads(settings, day):
        try:
            landed = open_read(folder)
        except TamperedError as error:
            if folder.name in ledger.needed:
                raise
            log.warning("%s; nothing stands on it", error)
            continue
        if landed is None:
            continue
        if receipt := landing.receipt_of(folder) or ledger.receipts.get(folder.name):
            past.append(Loaded(landed, receipt))
    return sorted(past, key=lambda one: (one.receipt, one.landed.manifest.started_at))


def _needed(past: Sequence[Loaded], ledger: Ledger) -> set[str]:
    """The reads without which a rebuild would give other rows, restatements or times of reading.

    Of a day these are each that replaced what was known of it after it had closed, what it stands on
    now, the first read that found it closed, and the last one. Of snapshots, all that were news.
    """
    needed = set(ledger.needed)
    by_window: dict[tuple[str, ...], list[Loaded]] = {}
    for one in past:
        by_window.setdefault(_window_of(one.landed.manifest), []).append(one)
    for reads in by_window.values():
        news = [one for one in reads if one.receipt.outcome == "loaded"]
        closed = [one for one in reads if not one.landed.manifest.window.is_provisional]
        needed |= {one.load_id for one in [*news[-1:], *closed[:1], *reads[-1:]]}
        needed |= {one.load_id for one in news if one in closed}
    return needed


def _loadable(settings: Settings, complete: Iterable[Path], past: Sequence[Loaded]) -> set[str]:
    """The reads that were not loaded and could be: no later run has loaded their window since."""
    newest: dict[tuple[str, ...], int] = {}
    for one in past:
        window = _window_of(one.landed.manifest)
        newest[window] = max(newest.get(window, 0), one.receipt.fencing_token)
    loaded = {one.load_id for one in past}
    return {
        manifest.load_id
        for manifest in _manifests(settings, (one for one in complete if one.name not in loaded))
        if newest.get(_window_of(manifest), 0) <= manifest.fencing_token
    }


def _manifests(settings: Settings, folders: Iterable[Path]) -> Iterator[Manifest]:
    """The manifests that can be read; a read without one can be neither loaded nor rebuilt from."""
    open_read = relabel.opener(settings)
    for folder in folders:
        try:
            landed = open_read(folder)
        except TamperedError as error:
            log.warning("%s; nothing stands on it", error)
            continue
        if landed is not None:
            yield landed.manifest


def _window_of(manifest: Manifest) -> tuple[str, ...]:
    return manifest.account, manifest.resource, manifest.window.day.isoformat()


def _planned_under(one: Loaded) -> int:
    return one.landed.manifest.fencing_token


def _readable_ledger(settings: Settings) -> Ledger:
    """The ledger, as far as the warehouse can be read: that it cannot is a reason to rebuild it."""
    try:
        with open_warehouse(settings).reading(is_older_fine=True) as connection:
            return read_ledger(connection) if connection is not None else Ledger()
    except WarehouseBusyError:
        raise
    except (SettingsError, TamperedError, WarehouseError) as error:
        log.warning("%s; going by the landed pages alone", error)
        return Ledger()


def _refuse_gaps(ledger: Ledger, past: Sequence[Loaded]) -> None:
    """Raises TamperedError when something is loaded whose landed pages are gone: it would be lost."""
    if gone := sorted(ledger.needed - {one.load_id for one in past}):
        raise TamperedError(
            f"the landed pages of {len(gone)} loads are gone (the first is {gone[0]}), and a rebuild "
            "would lose their rows: is FALETL_LANDING right? Restore them, read these days again with "
            "faletl run --start … --end …, or move the warehouse away to rebuild without them"
        )


def _staged_again(
    settings: Settings, one: Loaded, needed: set[str], scratch: Path, *, is_strict: bool = False
) -> Staged | None:
    """The rows of an earlier read; None for one that is refused now, or damaged and not needed.

    One that is needed and refused is an error where it `is_strict`.
    """
    try:
        return stage_window(settings, one.landed, scratch)
    except TamperedError as error:
        if one.load_id in needed:
            raise
        log.warning("%s; nothing stands on it", error)
    except (ContractError, DataRefusedError, UnprovenError) as error:
        if is_strict and one.load_id in needed:
            raise
        log.warning("%s; it was loaded once, and is not now", error)
    return None


def _complete_receipts(past: Iterable[Loaded]) -> None:
    """Write down what only the ledger knew."""
    for one in past:
        if landing.receipt_of(one.landed.folder) is None:
            landing.leave_receipt(one.landed.folder, one.receipt)
