"""Rebuild and prune: the warehouse anew from the landed pages, and which of these that needs.

A load leaves a receipt next to the pages it loaded. The extracts with a receipt, in the order in which
fal gave them, are the history: loading them once more gives the newest figures, their ledger and
restatements, whichever warehouse had loaded them.
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
from faletl.line.report import Progress, Report, new_run_id, outcome_of, silent
from faletl.models.build import build_models
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import Ledger, read_ledger
from faletl.warehouse.protocol import Lease
from faletl.warehouse.tables import WAREHOUSE
from faletl.windows import refuse_odd_day

log = logging.getLogger(__name__)

_NEVER_ENDING = datetime.max.replace(tzinfo=UTC)
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A complete extract that a warehouse took: its rows were loaded, known already, or held.

    `receipts` has one for each warehouse that took it, ours first. `began_at` is when it began, by fal's
    clock where the manifest has it.
    """

    landed: SealedExtract
    receipts: tuple[Receipt, ...]
    began_at: datetime

    @property
    def receipt(self) -> Receipt:
        """The receipt by which it is loaded again."""
        return self.receipts[0]

    @property
    def load_id(self) -> str:
        """The id of the read."""
        return self.landed.manifest.load_id


def rebuild(settings: Settings, day: date | None = None, progress: Progress = silent) -> Report:
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
    _refuse_gaps(settings, ledger, past)
    if not past and not ledger.needed:
        return
    newest = max((max(one.receipt.fencing_token, _planned_under(one)) for one in past), default=0)
    with (
        warehouse.renewed(holder, newest, read_ledger) as (fresh, last),
        scratch_folder() as scratch,
        fresh.lease(holder) as lease,
    ):
        # Now that nobody else can load any more: somebody may have, and died before the receipt.
        ledger = last or ledger
        past = _history(settings, ledger)
        _refuse_gaps(settings, ledger, past)
        needed = _needed(past, ledger)
        with lease.transaction():
            _restore_what_was_decided(settings, lease, ledger)
            accepted = holds.accepted_rows(lease.connection)
        for done, one in enumerate(past):
            progress("loading", done, len(past))
            if staged := _staged_again(settings, one, needed, scratch, accepted, past):
                outcomes, lease = replay(settings, fresh, lease, [(staged, one.receipt)])
                report.outcomes.append(outcome_of(staged, outcomes[0]))
                staged.discard()
        with lease.transaction():
            relabel.restore(
                lease.connection, decisions.recorded(settings), (one.landed.manifest for one in past)
            )
        report.build = build_models(settings, fresh, lease, run_id=report.run_id)
        warn_of_runaways(report.build)
        with lease.transaction():
            ledger = read_ledger(lease.connection)
    _complete_receipts(past)
    _leave_own_receipts(past, ledger)


def _restore_what_was_decided(settings: Settings, lease: Lease, ledger: Ledger) -> None:
    """The warehouse keeps its id, and knows what people accepted, before anything is loaded."""
    if ledger.warehouse_id:
        lease.connection.execute(sa.update(WAREHOUSE).values(warehouse_id=ledger.warehouse_id))
    made = decisions.recorded(settings)
    for decision in made:
        if isinstance(decision, WindowAccepted):
            label = relabel.label_now(made, decision.account, decision.decided_at)
            if label is not None:
                holds.enter(lease.connection, msgspec.structs.replace(decision, account=label))


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
            relabel.require_followed(lease.connection, decisions.recorded(settings))
            ledger = read_ledger(lease.connection, day)
            accepted = holds.accepted_rows(lease.connection)
        past = _history(settings, ledger, day)
        _refuse_gaps(settings, ledger, past)
        if not past:
            return
        needed = _needed(past, ledger)
        again = [
            (staged, one.receipt)
            for one in past
            if (staged := _staged_again(settings, one, needed, scratch, accepted, past, is_strict=True))
        ]
        outcomes, _ = replay(settings, warehouse, lease, again, forget=day)
    for (staged, _), outcome in zip(again, outcomes, strict=True):
        report.outcomes.append(outcome_of(staged, outcome))
    _complete_receipts(past)


def _load_what_waits(settings: Settings, report: Report, day: date | None) -> None:
    """Load extracts (of one UTC day) that landed after those that were loaded; show which are refused.

    A refused window is no failure of the rebuild: it was refused before.
    """
    waiting = Report(report.run_id)
    asked = EVERYTHING_DUE if day is None else Asked(day, day + timedelta(days=1))
    pipeline.load_waiting(settings, asked, waiting)
    report.outcomes += waiting.outcomes
    damaged = [error for _, error in waiting.failures if isinstance(error, DamagedExtractError)]
    if damaged:
        log.warning("%s", DamagedExtractError.of_many(damaged[0], len(damaged)))
    for _, error in waiting.failures:
        if not isinstance(error, DamagedExtractError):
            log.warning("%s", error)


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Folders of landed extracts that nothing depends on: interrupted ones, and complete ones."""

    interrupted: Sequence[Path] = ()
    superseded: Sequence[Path] = ()


def prune(settings: Settings, *, is_dry: bool = False) -> tuple[list[Path], int]:
    """Delete landed extracts that nothing depends on, however young; return their folders and bytes.

    Raises:
        UsageError: there is no warehouse to tell what is needed, or it does not follow a rename yet.
        WarehouseBusyError: somebody else deletes landed pages, or rebuilds from them.
        StorageError: a folder cannot be deleted.
    """
    with nullcontext() if is_dry else extracts.deleting(settings):
        found = unneeded(settings, is_dry=is_dry)
        dropped = [*found.interrupted, *found.superseded]
        size = sum(extracts.size(folder) for folder in dropped)
        for folder in () if is_dry else dropped:
            extracts.drop(folder)
    return dropped, size


def unneeded(
    settings: Settings,
    *,
    before: datetime = _NEVER_ENDING,
    thinned: frozenset[str] = frozenset(),
    is_dry: bool = False,
) -> Unneeded:
    """The landed extracts that nothing depends on; of complete ones those that began before then.

    Needed is what `rebuild` loads the same rows and restatements from, what can still be loaded, and
    what another warehouse of the landing folder has loaded. Interrupted extracts that can still be taken
    up are, too. `thinned` are loads that the ledger is about to forget. Unless it `is_dry`, the ledger's
    receipts are written down, so that deleting may begin.

    Raises: as `prune`.
    """
    interrupted = list(extracts.interrupted_reads(settings, datetime.now(UTC) - RESUME_WITHIN))
    with open_warehouse(settings).reading() as connection:  # nobody loads meanwhile
        complete = list(extracts.complete_reads(settings))
        if connection is None:
            if complete:
                raise UsageError(
                    "there is no warehouse to tell which landed pages are needed, so none is dropped; "
                    "is FALETL_WAREHOUSE right? faletl rebuild makes it anew"
                )
            return Unneeded()
        relabel.require_followed(connection, decisions.recorded(settings))
        ledger = read_ledger(connection)
        ledger = replace(ledger, needed=ledger.needed - thinned, thinned=thinned)
        past = _history(settings, ledger)
    kept = _needed(past, ledger) | _loadable(settings, complete, past)
    kept |= _loaded_elsewhere(complete, past, ledger)
    if not is_dry:
        _complete_receipts(past)
    superseded = [f for f in complete if f.name not in kept and extracts.started_at(f) < before]
    return Unneeded(interrupted, superseded)


# --- History --------------------------------------------------------------------------------------


def _history(settings: Settings, ledger: Ledger, day: date | None = None) -> list[Loaded]:
    """What a warehouse took (of one UTC day), in the order in which fal gave it.

    Where a run was killed between a load and its receipt, the ledger knows. A receipt without the id of
    a warehouse counts as ours: an older faletl wrote it.
    """
    past = []
    for landed in _complete(settings, ledger, day):
        found = extracts.receipts(landed.folder)
        if _is_thinned(landed.folder.name, found, ledger):
            continue
        found = [one for one in found if one.outcome != "pruned"]
        if landed.folder.name in ledger.receipts:
            found.append(ledger.receipts[landed.folder.name])
        if found:
            found.sort(key=lambda one: one.warehouse_id not in ("", ledger.warehouse_id))
            past.append(Loaded(landed, tuple(found), landed.manifest.began_at))
    return sorted(
        _in_order_of_tokens(past), key=lambda one: (one.began_at, one.receipt.fencing_token, one.load_id)
    )


def _is_thinned(load_id: str, receipts: Sequence[Receipt], ledger: Ledger) -> bool:
    """Whether our warehouse loaded the extract and has deleted its rows since, or is about to.

    The receipt that says so is written first, so it counts only when the ledger has forgotten the load.
    """
    if load_id in ledger.receipts:
        return load_id in ledger.thinned
    return any(one.outcome == "pruned" and one.warehouse_id == ledger.warehouse_id for one in receipts)


def _complete(settings: Settings, ledger: Ledger, day: date | None) -> Iterator[SealedExtract]:
    """The extracts (of one UTC day) that can be opened.

    Raises:
        DamagedExtractError: others cannot, and rows depend on them.
    """
    open_read = relabel.opener(settings)
    damaged: dict[bool, list[DamagedExtractError]] = {True: [], False: []}
    for folder in extracts.complete_reads(settings, day):
        try:
            landed = open_read(folder)
        except DamagedExtractError as error:
            damaged[folder.name in ledger.needed].append(error)
            continue
        if landed is not None:
            yield landed
    _warn_of_damage(damaged[False])
    if damaged[True]:
        raise DamagedExtractError.of_many(damaged[True][0], len(damaged[True]))


def _warn_of_damage(damaged: Sequence[DamagedExtractError]) -> None:
    """One warning for all extracts that are damaged and not needed."""
    if damaged:
        log.warning(
            "%s; no row depends on %s",
            DamagedExtractError.of_many(damaged[0], len(damaged)),
            "it" if len(damaged) == 1 else "them",
        )


def _in_order_of_tokens(past: Sequence[Loaded]) -> Iterator[Loaded]:
    """The same extracts; those that fal's clock cannot order began no later than what was loaded after.

    It tells whole seconds, so two extracts of a window may be nearer to each other than it can show. To
    one without fal's clock our own gives an instant, which may be any. But tokens only grow, unless an
    older state of the warehouse was restored: then these clocks are all there is.
    """
    groups: dict[tuple[str, ...], list[Loaded]] = {}
    for one in past:
        manifest = one.landed.manifest
        window = _window_of(manifest) if manifest.fal_started_at else ()
        groups.setdefault((one.receipt.warehouse_id, *window), []).append(one)
    for (_, *has_clock), loads in groups.items():
        in_time = sorted(loads, key=lambda one: (one.receipt.loaded_at, one.receipt.fencing_token))
        tokens = [one.receipt.fencing_token for one in in_time]
        if tokens != sorted(tokens):
            yield from loads
            continue
        vagueness = _SECOND if has_clock else timedelta.max
        latest = _NEVER_ENDING
        for one in reversed(in_time):
            is_odd = timedelta(0) < one.began_at - latest < vagueness
            latest = latest if is_odd else one.began_at
            yield replace(one, began_at=latest)


def _needed(past: Sequence[Loaded], ledger: Ledger) -> set[str]:
    """The extracts without which a rebuild would give other rows, restatements or times of extracts.

    Of a day these are each that replaced what was known of it after it had closed, what is loaded now,
    the first extract that found it closed, the last one, and those that are held now. Of snapshots, all
    that were news. Every warehouse that shares the landing folder has a history of its own.
    """
    needed = set(ledger.needed | ledger.held)
    by_window: dict[tuple[str, ...], list[Loaded]] = {}
    for one in past:
        for receipt in one.receipts:
            key = (receipt.warehouse_id, *_window_of(one.landed.manifest))
            by_window.setdefault(key, []).append(replace(one, receipts=(receipt,)))
    for history in by_window.values():
        taken = [one for one in history if one.receipt.outcome != "held"]
        news = [one for one in taken if one.receipt.outcome == "loaded"]
        closed = [one for one in taken if not one.landed.manifest.window.is_provisional]
        held = history[history.index(taken[-1]) + 1 :] if taken else history
        needed |= {one.load_id for one in [*news[-1:], *closed[:1], *taken[-1:], *held[:1], *held[-1:]]}
        needed |= {one.load_id for one in news if one in closed}
    return needed


def _loadable(settings: Settings, complete: Iterable[Path], past: Sequence[Loaded]) -> set[str]:
    """The extracts that were not loaded and could be: none of their window was taken later."""
    newest: dict[tuple[str, ...], tuple[int, datetime]] = {}
    for one in past:
        window = _window_of(one.landed.manifest)
        token, began_at = newest.get(window, (0, one.began_at))
        newest[window] = max(token, one.receipt.fencing_token), max(began_at, one.began_at)
    loaded = {one.load_id for one in past}
    found = set()
    for manifest in _manifests(settings, (one for one in complete if one.name not in loaded)):
        began_at = manifest.began_at
        token, last = newest.get(_window_of(manifest), (0, began_at))
        if token <= manifest.fencing_token or last < began_at:
            found.add(manifest.load_id)
    return found


def _loaded_elsewhere(complete: Iterable[Path], past: Sequence[Loaded], ledger: Ledger) -> set[str]:
    """The extracts that are forgotten or thinned out here, and that another warehouse may still hold."""
    loaded = {one.load_id for one in past}
    return {
        folder.name
        for folder in complete
        if folder.name not in loaded
        and any(
            one.outcome != "pruned" and one.warehouse_id not in ("", ledger.warehouse_id)
            for one in extracts.receipts(folder)
        )
    }


def _manifests(settings: Settings, folders: Iterable[Path]) -> Iterator[Manifest]:
    """The manifests that can be read; a read without one can be neither loaded nor rebuilt from."""
    open_read, damaged = relabel.opener(settings), list[DamagedExtractError]()
    for folder in folders:
        try:
            landed = open_read(folder)
        except DamagedExtractError as error:
            damaged.append(error)
            continue
        if landed is not None:
            yield landed.manifest
    _warn_of_damage(damaged)


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


def _refuse_gaps(settings: Settings, ledger: Ledger, past: Sequence[Loaded]) -> None:
    """Raises TamperedError when something is loaded whose landed pages are gone: it would be lost.

    Those of an account that was forgotten in another warehouse are left out, as they are meant to be.
    """
    gone = ledger.needed - {one.load_id for one in past}
    if gone:
        open_read = relabel.opener(settings)
        complete = (one for one in extracts.complete_reads(settings) if one.name in gone)
        gone -= {folder.name for folder in complete if open_read(folder) is None}
    if gone:
        raise TamperedError(
            f"the landed pages of {len(gone)} loads are gone (the first is {min(gone)}), and a rebuild "
            "would lose their rows: is FALETL_LANDING right? Restore them, read these days again with "
            "faletl run --start … --end …, or move the warehouse away to rebuild without them"
        )


def _staged_again(
    settings: Settings,
    one: Loaded,
    needed: set[str],
    scratch: Path,
    accepted: Container[str],
    past: Sequence[Loaded],
    *,
    is_strict: bool = False,
) -> Staged | None:
    """The rows of an earlier read; None for one that is refused now, or damaged and not needed.

    One that is needed and refused is an error where it `is_strict`. Where one that is needed is damaged,
    the error counts all of `past` that are.
    """
    try:
        return stage_window(settings, one.landed, scratch, accepted)
    except DamagedExtractError as error:
        if one.load_id in needed:
            lost = sum(x.load_id in needed and not extracts.is_intact(x.landed.folder) for x in past)
            raise DamagedExtractError.of_many(error, lost) from None
        log.warning("%s; no row depends on it", error)
    except TamperedError as error:
        if one.load_id in needed:
            raise
        log.warning("%s; no row depends on it", error)
    except (ContractError, DataRefusedError, UnprovenError) as error:
        if is_strict and one.load_id in needed:
            raise
        log.warning("%s; it was loaded once, and is not now", error)
    return None


def _complete_receipts(past: Iterable[Loaded]) -> None:
    """Write down what only the ledger knew."""
    for one in past:
        extracts.leave_receipt(one.landed.folder, one.receipt)


def _leave_own_receipts(past: Iterable[Loaded], ledger: Ledger) -> None:
    """Write down what this warehouse holds, so that others that share the landing folder keep it."""
    for one in past:
        is_known = any(receipt.warehouse_id in ("", ledger.warehouse_id) for receipt in one.receipts)
        if one.load_id in ledger.receipts and not is_known:
            extracts.leave_receipt(one.landed.folder, ledger.receipts[one.load_id])
