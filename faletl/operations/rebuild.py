"""Rebuild the warehouse from landed pages, and prune pages that no rebuild needs.

A load leaves a receipt next to the pages it loaded. The extracts with a receipt, in the order in which
fal sent them, are the history: loading them again gives the newest figures, their ledger and
restatements, no matter which warehouse loaded them.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import sqlalchemy as sa

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import (
    ContractError,
    DamagedExtractError,
    DataRefusedError,
    SettingsError,
    TamperedError,
    UnprovenError,
    UsageError,
    WarehouseBusyError,
    WarehouseError,
)
from faletl.files import scratch_folder
from faletl.landing import decisions, extracts
from faletl.landing.decisions import WindowAccepted
from faletl.landing.extracts import Manifest, Receipt, SealedExtract
from faletl.line import holds, relabel
from faletl.line.fetch import RESUME_WITHIN
from faletl.line.release import build_and_publish, warn_of_runaways
from faletl.line.replace import replay
from faletl.line.report import Progress, Report, new_run_id, no_progress, result_of
from faletl.models.build import build_models
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import Ledger, read_ledger
from faletl.warehouse.protocol import Lease
from faletl.warehouse.tables import WAREHOUSE
from faletl.windows import refuse_odd_day

log = logging.getLogger(__name__)

_FOREVER = datetime.max.replace(tzinfo=UTC)
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class LoadedExtract:
    """A complete extract that a warehouse processed: its rows were loaded, unchanged, or held.

    `receipts` has one for each such warehouse, ours first. `began_at` is when the extract began, by
    fal's clock if the manifest has it.
    """

    landed: SealedExtract
    receipts: tuple[Receipt, ...]
    began_at: datetime

    @property
    def receipt(self) -> Receipt:
        """The receipt that decides how it is loaded again."""
        return self.receipts[0]

    @property
    def load_id(self) -> str:
        """The id of the extract."""
        return self.landed.manifest.load_id


def rebuild(settings: Settings, day: date | None = None, progress: Progress = no_progress) -> Report:
    """Rebuild the warehouse, or one UTC day of it, from landed pages alone; fal is not called.

    Every extract that was loaded is loaded again, in the original order, so that ledger and restatements
    come back too. Readers see the old warehouse until the new one is complete.

    Raises:
        TamperedError: landed pages are gone or were changed; nothing is changed.
        SettingsError, WarehouseError, StorageError: the warehouse cannot be written.
        UsageError: the day is impossible, or there is no warehouse to rebuild one day of.
    """
    if day is not None:
        refuse_odd_day("--window", day)
    report = Report(new_run_id())
    with extracts.deleting(settings):
        if day is None:
            _rebuild_all(settings, report, progress)
        else:
            _rebuild_day(settings, report, day)
    if report.outcomes or report.build:
        _load_what_waits(settings, report, day)
        build_and_publish(settings, report)
    return report


def _rebuild_all(settings: Settings, report: Report, progress: Progress) -> None:
    warehouse, holder = open_warehouse(settings), f"faletl rebuild, run {report.run_id}"
    ledger = _readable_ledger(settings)
    past = _history(settings, ledger)
    _require_pages(settings, ledger, past)
    if not past and not ledger.needed:
        return
    newest = max(
        (max(extract.receipt.fencing_token, _planning_token(extract)) for extract in past), default=0
    )
    with (
        warehouse.rebuilding(holder, newest, read_ledger) as (fresh, last_ledger),
        scratch_folder() as scratch,
        fresh.lease(holder) as lease,
    ):
        # Read the history again under the lease: a run may have loaded, and died before its receipt.
        ledger = last_ledger or ledger
        past = _history(settings, ledger)
        _require_pages(settings, ledger, past)
        needed = _needed(past, ledger)
        with lease.transaction():
            _restore_decisions(settings, lease, ledger)
            accepted = holds.accepted_rows(lease.connection)
        for done, extract in enumerate(past):
            progress("loading", done, len(past))
            if staged := _restage(settings, extract, needed, scratch, accepted, past):
                outcomes, lease = replay(settings, fresh, lease, [(staged, extract.receipt)])
                report.outcomes.append(result_of(staged, outcomes[0]))
                staged.discard()
        with lease.transaction():
            relabel.restore(
                lease.connection,
                decisions.recorded(settings),
                (extract.landed.manifest for extract in past),
            )
        report.build = build_models(settings, fresh, lease, run_id=report.run_id)
        warn_of_runaways(report.build)
        with lease.transaction():
            ledger = read_ledger(lease.connection)
    _write_missing_receipts(past)
    _leave_own_receipts(past, ledger)


def _restore_decisions(settings: Settings, lease: Lease, ledger: Ledger) -> None:
    """Restore the warehouse id and people's acceptances before anything is loaded."""
    if ledger.warehouse_id:
        lease.connection.execute(sa.update(WAREHOUSE).values(warehouse_id=ledger.warehouse_id))
    recorded = decisions.recorded(settings)
    for decision in recorded:
        if isinstance(decision, WindowAccepted):
            label = relabel.label_now(recorded, decision.account, decision.decided_at)
            if label is not None:
                holds.enter(lease.connection, msgspec.structs.replace(decision, account=label))


def _rebuild_day(settings: Settings, report: Report, day: date) -> None:
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None:
            raise UsageError("there is no warehouse yet; run faletl rebuild without --window")
    with (
        scratch_folder() as scratch,
        warehouse.lease(f"faletl rebuild, run {report.run_id}") as lease,
    ):
        with lease.transaction():
            relabel.require_followed(lease.connection, decisions.recorded(settings))
            ledger = read_ledger(lease.connection, day)
            accepted = holds.accepted_rows(lease.connection)
        past = _history(settings, ledger, day)
        _require_pages(settings, ledger, past)
        if not past:
            return
        needed = _needed(past, ledger)
        restaged = [
            (staged, extract.receipt)
            for extract in past
            if (staged := _restage(settings, extract, needed, scratch, accepted, past, is_strict=True))
        ]
        outcomes, _ = replay(settings, warehouse, lease, restaged, forget=day)
    for (staged, _), outcome in zip(restaged, outcomes, strict=True):
        report.outcomes.append(result_of(staged, outcome))
    _write_missing_receipts(past)


def _load_what_waits(settings: Settings, report: Report, day: date | None) -> None:
    """Load extracts (of one UTC day) that landed after the loaded ones; log those that are refused.

    A refused window does not fail the rebuild: it was refused before.
    """
    waiting = Report(report.run_id)
    selection = EVERYTHING_DUE if day is None else Asked(day, day + timedelta(days=1))
    pipeline.load_waiting(settings, selection, waiting)
    report.outcomes += waiting.outcomes
    damaged = [error for _, error in waiting.failures if isinstance(error, DamagedExtractError)]
    if damaged:
        log.warning("%s", DamagedExtractError.of_many(damaged[0], len(damaged)))
    for _, error in waiting.failures:
        if not isinstance(error, DamagedExtractError):
            log.warning("%s", error)


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Folders of landed extracts that nothing depends on: interrupted and complete ones."""

    interrupted: Sequence[Path] = ()
    superseded: Sequence[Path] = ()


def prune(settings: Settings, *, is_dry: bool = False) -> tuple[list[Path], int]:
    """Delete landed extracts that nothing depends on, of any age; return their folders and bytes.

    Raises:
        UsageError: there is no warehouse to show what is needed, or it does not know of a rename yet.
        WarehouseBusyError: another command deletes landed pages, or rebuilds from them.
        StorageError: a folder cannot be deleted.
    """
    with nullcontext() if is_dry else extracts.deleting(settings):
        obsolete = unneeded(settings, is_dry=is_dry)
        dropped = [*obsolete.interrupted, *obsolete.superseded]
        size = sum(extracts.size(folder) for folder in dropped)
        for folder in () if is_dry else dropped:
            extracts.drop(folder)
    return dropped, size


def unneeded(
    settings: Settings,
    *,
    before: datetime = _FOREVER,
    thinned: frozenset[str] = frozenset(),
    is_dry: bool = False,
) -> Unneeded:
    """Return landed extracts that nothing depends on; of complete ones only those from before `before`.

    Needed are extracts that `rebuild` makes the same rows and restatements from, that can still be
    loaded, or that another warehouse of the landing folder has loaded; also interrupted extracts that
    can still be resumed. `thinned` are loads that are about to be deleted from the ledger. Unless
    `is_dry`, write the ledger's receipts first, so that deleting is safe.

    Raises: as `prune`.
    """
    interrupted = list(extracts.interrupted_reads(settings, datetime.now(UTC) - RESUME_WITHIN))
    with open_warehouse(settings).reading() as connection:  # no load can run meanwhile
        complete = list(extracts.complete_reads(settings))
        if connection is None:
            if complete:
                raise UsageError(
                    "there is no warehouse to show which landed pages are needed, so none is deleted; "
                    "check FALETL_WAREHOUSE, or run faletl rebuild"
                )
            return Unneeded()
        relabel.require_followed(connection, decisions.recorded(settings))
        ledger = read_ledger(connection)
        ledger = replace(ledger, needed=ledger.needed - thinned, thinned=thinned)
        past = _history(settings, ledger)
    kept = _needed(past, ledger) | _loadable(settings, complete, past)
    kept |= _loaded_elsewhere(complete, past, ledger)
    if not is_dry:
        _write_missing_receipts(past)
    superseded = [
        folder for folder in complete if folder.name not in kept and extracts.started_at(folder) < before
    ]
    return Unneeded(interrupted, superseded)


# --- History --------------------------------------------------------------------------------------


def _history(settings: Settings, ledger: Ledger, day: date | None = None) -> list[LoadedExtract]:
    """Return the extracts (of one UTC day) that a warehouse processed, in the order fal sent them.

    If a run was killed between a load and its receipt, the ledger has the receipt. A receipt without a
    warehouse id counts as ours: an older faletl wrote it.
    """
    past = []
    for landed in _complete(settings, ledger, day):
        receipts = extracts.receipts(landed.folder)
        if _is_thinned(landed.folder.name, receipts, ledger):
            continue
        receipts = [receipt for receipt in receipts if receipt.outcome != "pruned"]
        if landed.folder.name in ledger.receipts:
            receipts.append(ledger.receipts[landed.folder.name])
        if receipts:
            receipts.sort(key=lambda receipt: receipt.warehouse_id not in ("", ledger.warehouse_id))
            past.append(LoadedExtract(landed, tuple(receipts), landed.manifest.began_at))
    return sorted(
        _in_order_of_tokens(past),
        key=lambda extract: (extract.began_at, extract.receipt.fencing_token, extract.load_id),
    )


def _is_thinned(load_id: str, receipts: Sequence[Receipt], ledger: Ledger) -> bool:
    """Whether our warehouse loaded the extract and has deleted its rows since, or is about to.

    The receipt of that is written first, so it counts only after the ledger has deleted the load.
    """
    if load_id in ledger.receipts:
        return load_id in ledger.thinned
    return any(
        receipt.outcome == "pruned" and receipt.warehouse_id == ledger.warehouse_id
        for receipt in receipts
    )


def _complete(settings: Settings, ledger: Ledger, day: date | None) -> Iterator[SealedExtract]:
    """Yield the extracts (of one UTC day) that can be opened.

    Raises:
        DamagedExtractError: others cannot be opened, and rows depend on them.
    """
    open_extract = relabel.opener(settings)
    damaged: dict[bool, list[DamagedExtractError]] = {True: [], False: []}
    for folder in extracts.complete_reads(settings, day):
        try:
            landed = open_extract(folder)
        except DamagedExtractError as error:
            damaged[folder.name in ledger.needed].append(error)
            continue
        if landed is not None:
            yield landed
    _warn_of_damage(damaged[False])
    if damaged[True]:
        raise DamagedExtractError.of_many(damaged[True][0], len(damaged[True]))


def _warn_of_damage(damaged: Sequence[DamagedExtractError]) -> None:
    """Log one warning for all damaged extracts that are not needed."""
    if damaged:
        log.warning(
            "%s; no row depends on %s",
            DamagedExtractError.of_many(damaged[0], len(damaged)),
            "it" if len(damaged) == 1 else "them",
        )


def _in_order_of_tokens(past: Sequence[LoadedExtract]) -> Iterator[LoadedExtract]:
    """Yield the extracts, with start times that agree with the order in which they were loaded.

    Fal's clock has whole seconds, so two extracts of a window may be closer than it can show. An extract
    without fal's clock has a time of our own clock, which may be wrong. The order of tokens is reliable,
    because tokens only grow, unless an older state of the warehouse was restored: then use the clocks.
    """
    groups: dict[tuple[str, ...], list[LoadedExtract]] = {}
    for extract in past:
        manifest = extract.landed.manifest
        key = _window_of(manifest) if manifest.fal_started_at else ()
        groups.setdefault((extract.receipt.warehouse_id, *key), []).append(extract)
    for (_, *window), loads in groups.items():
        in_time = sorted(
            loads, key=lambda extract: (extract.receipt.loaded_at, extract.receipt.fencing_token)
        )
        tokens = [extract.receipt.fencing_token for extract in in_time]
        if tokens != sorted(tokens):
            yield from loads
            continue
        resolution = _SECOND if window else timedelta.max  # without fal's clock
        latest = _FOREVER
        for extract in reversed(in_time):
            is_odd = timedelta(0) < extract.began_at - latest < resolution
            latest = latest if is_odd else extract.began_at
            yield replace(extract, began_at=latest)


def _needed(past: Sequence[LoadedExtract], ledger: Ledger) -> set[str]:
    """Return the extracts without which a rebuild would give other rows, restatements or times.

    For a day these are: each extract that changed the rows after the day had closed, the current one,
    the first extract after the close, the last extract, and those held now. For snapshots: all that
    changed something. Every warehouse that shares the landing folder has its own history.
    """
    needed = set(ledger.needed | ledger.held)
    by_window: dict[tuple[str, ...], list[LoadedExtract]] = {}
    for extract in past:
        for receipt in extract.receipts:
            key = (receipt.warehouse_id, *_window_of(extract.landed.manifest))
            by_window.setdefault(key, []).append(replace(extract, receipts=(receipt,)))
    for history in by_window.values():
        not_held = [extract for extract in history if extract.receipt.outcome != "held"]
        changes = [extract for extract in not_held if extract.receipt.outcome == "loaded"]
        closed = [extract for extract in not_held if not extract.landed.manifest.window.is_provisional]
        held = history[history.index(not_held[-1]) + 1 :] if not_held else history
        last_or_first = [*changes[-1:], *closed[:1], *not_held[-1:], *held[:1], *held[-1:]]
        needed |= {extract.load_id for extract in last_or_first}
        needed |= {extract.load_id for extract in changes if extract in closed}
    return needed


def _loadable(settings: Settings, complete: Iterable[Path], past: Sequence[LoadedExtract]) -> set[str]:
    """Return the extracts that can still be loaded: no later extract of their window was processed."""
    newest: dict[tuple[str, ...], tuple[int, datetime]] = {}
    for extract in past:
        window = _window_of(extract.landed.manifest)
        token, began_at = newest.get(window, (0, extract.began_at))
        newest[window] = max(token, extract.receipt.fencing_token), max(began_at, extract.began_at)
    loaded = {extract.load_id for extract in past}
    loadable = set()
    for manifest in _manifests(settings, (folder for folder in complete if folder.name not in loaded)):
        began_at = manifest.began_at
        token, last = newest.get(_window_of(manifest), (0, began_at))
        if token <= manifest.fencing_token or last < began_at:
            loadable.add(manifest.load_id)
    return loadable


def _loaded_elsewhere(
    complete: Iterable[Path], past: Sequence[LoadedExtract], ledger: Ledger
) -> set[str]:
    """Return extracts that were deleted from this warehouse but may be loaded in another one."""
    loaded = {extract.load_id for extract in past}
    return {
        folder.name
        for folder in complete
        if folder.name not in loaded
        and any(
            receipt.outcome != "pruned" and receipt.warehouse_id not in ("", ledger.warehouse_id)
            for receipt in extracts.receipts(folder)
        )
    }


def _manifests(settings: Settings, folders: Iterable[Path]) -> Iterator[Manifest]:
    """Yield the readable manifests; an extract without one cannot be loaded."""
    open_extract, damaged = relabel.opener(settings), list[DamagedExtractError]()
    for folder in folders:
        try:
            landed = open_extract(folder)
        except DamagedExtractError as error:
            damaged.append(error)
            continue
        if landed is not None:
            yield landed.manifest
    _warn_of_damage(damaged)


def _window_of(manifest: Manifest) -> tuple[str, ...]:
    return manifest.account, manifest.resource, manifest.window.day.isoformat()


def _planning_token(extract: LoadedExtract) -> int:
    return extract.landed.manifest.fencing_token


def _readable_ledger(settings: Settings) -> Ledger:
    """Return the ledger, empty if the warehouse cannot be read: that may be why it is rebuilt."""
    try:
        with open_warehouse(settings).reading(is_older_fine=True) as connection:
            return read_ledger(connection) if connection is not None else Ledger()
    except WarehouseBusyError:
        raise
    except (SettingsError, TamperedError, WarehouseError) as error:
        log.warning("%s; the rebuild uses the landed pages alone", error)
        return Ledger()


def _require_pages(settings: Settings, ledger: Ledger, past: Sequence[LoadedExtract]) -> None:
    """Raise TamperedError if landed pages of loaded rows are gone: a rebuild would lose the rows.

    Loads of an account that was forgotten in another warehouse do not count: they are to be deleted.
    """
    gone = ledger.needed - {extract.load_id for extract in past}
    if gone:
        open_extract = relabel.opener(settings)
        complete = (folder for folder in extracts.complete_reads(settings) if folder.name in gone)
        gone -= {folder.name for folder in complete if open_extract(folder) is None}
    if gone:
        raise TamperedError(
            f"the landed pages of {len(gone)} loads are gone (the first is {min(gone)}), and a rebuild "
            "would lose their rows; check FALETL_LANDING, restore the pages, fetch the days again with "
            "faletl run --start … --end …, or move the warehouse away to rebuild without them"
        )


def _restage(
    settings: Settings,
    extract: LoadedExtract,
    needed: set[str],
    scratch: Path,
    accepted: Container[str],
    past: Sequence[LoadedExtract],
    *,
    is_strict: bool = False,
) -> Staged | None:
    """Stage an earlier extract again; None if it is refused now, or damaged and not needed.

    With `is_strict`, the refusal of a needed extract is raised. If a needed extract is damaged, the
    error counts all damaged ones in `past`.
    """
    try:
        return stage_window(settings, extract.landed, scratch, accepted)
    except DamagedExtractError as error:
        if extract.load_id in needed:
            lost = sum(
                other.load_id in needed and not extracts.is_intact(other.landed.folder) for other in past
            )
            raise DamagedExtractError.of_many(error, lost) from None
        log.warning("%s; skipped, because no row depends on it", error)
    except TamperedError as error:
        if extract.load_id in needed:
            raise
        log.warning("%s; skipped, because no row depends on it", error)
    except (ContractError, DataRefusedError, UnprovenError) as error:
        if is_strict and extract.load_id in needed:
            raise
        log.warning("%s; it was loaded before, but is not loaded again", error)
    return None


def _write_missing_receipts(past: Iterable[LoadedExtract]) -> None:
    """Write the receipts that only the ledger had."""
    for extract in past:
        extracts.leave_receipt(extract.landed.folder, extract.receipt)


def _leave_own_receipts(past: Iterable[LoadedExtract], ledger: Ledger) -> None:
    """Write receipts of this warehouse, so that others of the landing folder keep its extracts."""
    for extract in past:
        is_known = any(receipt.warehouse_id in ("", ledger.warehouse_id) for receipt in extract.receipts)
        if extract.load_id in ledger.receipts and not is_known:
            extracts.leave_receipt(extract.landed.folder, ledger.receipts[extract.load_id])
