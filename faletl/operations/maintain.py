"""Maintain: delete obsolete data, so that a warehouse of years stays small.

Three things grow with the number of runs: superseded extracts, snapshots that equal the one before, and
ops rows about past runs. Everything that `rebuild` needs for the same rows, ledger and restatements
stays (docs/decisions.md, "Retention").

Each kind of row is deleted in one transaction under the lease, before the landed pages that it came
from. A kill at any point leaves a warehouse that can be read, rebuilt and maintained again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from faletl.config import Settings
from faletl.files import abandoned_scratch
from faletl.landing import decisions, extracts
from faletl.landing.extracts import Receipt
from faletl.landing.storage import backend_for
from faletl.line import relabel
from faletl.line.distributed import old_plans
from faletl.line.release import build_and_publish
from faletl.line.report import Report, new_run_id
from faletl.operations.rebuild import unneeded
from faletl.resources import RESOURCES
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import fence, read_ledger
from faletl.warehouse.protocol import Lease
from faletl.warehouse.quality import REFUSED
from faletl.warehouse.tables import (
    ACCEPTANCES,
    ACCOUNTS,
    ALERTS,
    BUILDS,
    CONTRACT_DRIFT,
    FAILURES,
    HOLDS,
    HORIZONS,
    LOADS,
    OBJECTS,
    QUARANTINE,
    RAW,
    RESTATEMENTS,
    UNKNOWN_ENDPOINTS,
    VALIDATIONS,
    WAREHOUSE,
)

MAX_IDS_PER_STATEMENT = 500


@dataclass(frozen=True, slots=True)
class Freed:
    """Rows, files and bytes of one kind that were deleted, or would be."""

    kind: str
    rows: int = 0
    files: int = 0
    bytes: int = 0


_ALWAYS: sa.ColumnElement[bool] = sa.true()


@dataclass(frozen=True, slots=True)
class Retention:
    """Rows to delete FALETL_KEEP_OPS_DAYS after the instant in `since`; if it is null, they stay.

    `only_if` is an additional condition on them.
    """

    since: sa.Column[Any]
    only_if: sa.ColumnElement[bool] = _ALWAYS

    @property
    def table(self) -> sa.Table:
        """The table of the rows."""
        return self.since.table


def _newest_token(only_if: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
    newest = sa.select(sa.func.coalesce(sa.func.max(BUILDS.c.fencing_token), -1))
    return newest.where(only_if).scalar_subquery()


_IS_LOADED = sa.exists().where(
    LOADS.c.account == FAILURES.c.account,
    LOADS.c.resource == FAILURES.c.resource,
    LOADS.c.window_start == FAILURES.c.window_start,
    LOADS.c.is_current,
)

RETENTIONS = (
    Retention(VALIDATIONS.c.validated_at),
    Retention(
        BUILDS.c.finished_at,  # runs and readers need the newest build, and the newest published one
        BUILDS.c.fencing_token.not_in(
            [_newest_token(_ALWAYS), _newest_token(BUILDS.c.published_at.is_not(None))]
        ),
    ),
    # The failure of a window that is not loaded, or was refused, stays: it marks missing data.
    Retention(FAILURES.c.failed_at, sa.and_(FAILURES.c.exit_code != REFUSED, _IS_LOADED)),
    Retention(QUARANTINE.c.resolved_at),
    Retention(ALERTS.c.resolved_at),
    Retention(UNKNOWN_ENDPOINTS.c.seen_at),
)

KEPT: Mapping[sa.Table, str] = {
    WAREHOUSE: "one row",
    OBJECTS: "one row per table or view",
    RESTATEMENTS: "data: what fal changed",
    CONTRACT_DRIFT: "one row per field that changed; without it the change would be reported again",
    HORIZONS: "decided by people",
    ACCOUNTS: "decided by people",
    ACCEPTANCES: "decided by people",
    HOLDS: "open state",
    LOADS: "the ledger; superseded loads are deleted with their landed pages",
}
"""Tables of ops without a `Retention`, and why."""


@dataclass(frozen=True, slots=True)
class Maintained:
    """What was deleted, kind by kind, and the report of the build and publication after it."""

    freed: Sequence[Freed]
    report: Report


def maintain(settings: Settings, *, is_dry: bool = False) -> Maintained:
    """Delete obsolete data that is old enough; build and publish if that changes a table.

    Raises:
        UsageError: there are landed pages but no warehouse that knows which are needed, or the warehouse
            does not know of a rename yet.
        WarehouseBusyError: another command writes, deletes landed pages, or rebuilds from them.
        CheckFailedError: a SQL check found rows; snapshots are deleted, readers keep the last build.
        StorageError, WarehouseError: a disk or the warehouse failed; earlier deletions stay.
    """
    now, report = datetime.now(UTC), Report(new_run_id())
    obsolete = _find_obsolete(settings, now)
    if is_dry:
        return Maintained(_deleted(settings, obsolete, now, is_dry=True), report)
    with extracts.deleting(settings):
        _mark_thinned(settings, obsolete)
        warehouse, thinned_out = open_warehouse(settings), obsolete
        if obsolete.thinnable:
            with warehouse.lease("faletl maintain") as lease:
                thinned_out = _thin_out(lease, obsolete, _Cuts.of(settings, now))
        build_and_publish(settings, report)
        obsolete = replace(_find_obsolete(settings, now), thinnable=thinned_out.thinnable)
        if obsolete.superseded or any(obsolete.ops.values()):
            with warehouse.lease("faletl maintain") as lease:
                _delete_rows(lease, obsolete, _Cuts.of(settings, now))
        return Maintained(_deleted(settings, obsolete, now, is_dry=False), report)


def _deleted(settings: Settings, obsolete: _Obsolete, now: datetime, *, is_dry: bool) -> list[Freed]:
    """Delete obsolete files, unless `is_dry`; return all deleted files and rows, kind by kind."""
    thinned = frozenset(load.load_id for load in obsolete.thinnable)
    before = _Cuts.of(settings, now).pages
    pages = unneeded(settings, before=before, thinned=thinned, is_dry=is_dry)
    of_snapshots = [folder for folder in pages.superseded if folder.name in thinned]
    superseded = [folder for folder in pages.superseded if folder.name not in thinned]
    drop = None if is_dry else extracts.drop
    return [
        _folders("snapshots equal to the one before", of_snapshots, drop, rows=obsolete.thinned_rows),
        _folders("superseded extracts", superseded, drop, rows=len(obsolete.superseded)),
        _folders("interrupted extracts", pages.interrupted, drop),
        *(Freed(rule.table.fullname, rows=obsolete.ops.get(rule.table, 0)) for rule in RETENTIONS),
        _files("plans", old_plans(settings, now), is_dry=is_dry),
        _files("unfinished files", extracts.unfinished_files(settings), is_dry=is_dry),
        _folders(
            "abandoned temporary folders",
            list(abandoned_scratch(Path(tempfile.gettempdir()))),
            None if is_dry else lambda folder: shutil.rmtree(folder, ignore_errors=True),
        ),
    ]


# --- Rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cuts:
    """The instants before which data may be deleted: landed pages with their loads; rows of ops."""

    pages: datetime
    ops: datetime

    @classmethod
    def of(cls, settings: Settings, now: datetime) -> Self:
        return cls(
            now - timedelta(days=settings.keep_days), now - timedelta(days=settings.keep_ops_days)
        )


@dataclass(frozen=True, slots=True)
class _Obsolete:
    """Obsolete rows: loads of snapshots, superseded loads, and the number of ops rows by table."""

    thinnable: Sequence[sa.Row[Any]] = ()
    superseded: Sequence[str] = ()
    ops: Mapping[sa.Table, int] = field(default_factory=dict)
    warehouse_id: str = ""

    @property
    def thinned_rows(self) -> int:
        """The number of raw and ops.loads rows of the obsolete snapshots."""
        return sum(load.rows + 1 for load in self.thinnable)


def _find_obsolete(settings: Settings, now: datetime) -> _Obsolete:
    """Return the rows that are obsolete now; none if there is no warehouse."""
    cuts = _Cuts.of(settings, now)
    with open_warehouse(settings).reading() as connection:
        if connection is None:
            return _Obsolete()
        relabel.require_followed(connection, decisions.recorded(settings))
        thinnable = connection.execute(_thinnable_loads(cuts.pages)).all()
        return _Obsolete(
            thinnable=thinnable,
            superseded=_superseded_loads(connection, cuts.pages),
            ops={
                rule.table: _count_over(connection, rule, cuts.ops, is_built=bool(thinnable))
                for rule in RETENTIONS
            },
            warehouse_id=connection.execute(sa.select(WAREHOUSE.c.warehouse_id)).scalar_one(),
        )


def _count_over(connection: sa.Connection, rule: Retention, before: datetime, *, is_built: bool) -> int:
    """Count the rows that the rule deletes; if a build comes first (`is_built`), also today's newest."""
    is_over = rule.since < before if is_built and rule.table is BUILDS else _is_over(rule, before)
    count = sa.select(sa.func.count()).select_from(rule.table).where(is_over)
    return int(connection.execute(count).scalar_one())


def _is_over(rule: Retention, before: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(rule.since < before, rule.only_if)


def _thinnable_loads(before: datetime) -> sa.Select[Any]:
    """Select loads of snapshots that are neither first nor last of their UTC day, and changed nothing.

    A snapshot changed something if it differs from the one before. Where snapshots list endpoints, the
    last one before a change stays as well: it shows until when a removed endpoint was listed.
    """
    loads = LOADS.c
    snapshots = {name for name, resource in RESOURCES.items() if resource.window == "snapshot"}
    lists = {name for name in snapshots if "endpoint_id" in RAW[name].c}
    day = (loads.account, loads.resource, _utc_day(LOADS))

    def in_order(digest: sa.Function[Any]) -> sa.Over[Any]:
        return digest.over(partition_by=day, order_by=loads.window_start)

    neighbours = (
        sa.select(
            loads.load_id, loads.resource, loads.window_start, loads.landing_path, loads.rows,
            loads.fencing_token, loads.loaded_at, loads.digest,
            in_order(sa.func.lag(loads.digest)).label("digest_before"),
            in_order(sa.func.lead(loads.digest)).label("digest_after"),
        )
        .where(loads.resource.in_(sorted(snapshots)), loads.is_current)
        .subquery()
    )  # fmt: skip
    neighbour = neighbours.c
    return sa.select(neighbours).where(
        neighbour.window_start < before,
        neighbour.digest == neighbour.digest_before,
        neighbour.digest_after.is_not(None),
        sa.or_(neighbour.resource.not_in(sorted(lists)), neighbour.digest == neighbour.digest_after),
    )


def _superseded_loads(connection: sa.Connection, before: datetime) -> Sequence[str]:
    """Return loads that a rebuild does not need: of days that were open, and were loaded again since.

    A snapshot that is not current was removed because it was of the future; `load` must remember that.
    """
    old = sa.select(LOADS.c.load_id).where(
        LOADS.c.read_at < before,
        LOADS.c.is_current.is_(False),
        LOADS.c.window_start != LOADS.c.window_end,
    )
    return sorted(set(connection.execute(old).scalars()) - read_ledger(connection).needed)


def _mark_thinned(settings: Settings, obsolete: _Obsolete) -> None:
    """Mark the landed pages of obsolete snapshots, so that a rebuild does not load them again.

    The mark comes first and counts only after the ledger has deleted the load, so a kill in between
    changes nothing. It needs no lease, as an object store may take minutes for it.
    """
    for load in obsolete.thinnable:
        folder = extracts.root(settings) / load.landing_path
        receipt = Receipt(load.fencing_token, load.loaded_at, "pruned", obsolete.warehouse_id)
        if extracts.is_complete(folder):
            extracts.leave_receipt(folder, receipt)


def _thin_out(lease: Lease, marked: _Obsolete, cuts: _Cuts) -> _Obsolete:
    """Delete the marked snapshots in one transaction; the next build builds their days again.

    Return the deleted ones: a load in between may have made others needed again.
    """
    connection, gone = lease.connection, LOADS.alias("gone")
    may_go = {load.load_id for load in marked.thinnable}
    with lease.transaction():
        thinnable = connection.execute(_thinnable_loads(cuts.pages)).all()
        loads = [load for load in thinnable if load.load_id in may_go]
        version = fence(lease, changes_data=bool(loads))
        for load_ids in _chunks([load.load_id for load in loads]):
            is_same_day = sa.exists().where(
                gone.c.load_id.in_(load_ids),
                gone.c.account == LOADS.c.account,
                gone.c.resource == LOADS.c.resource,
                _utc_day(gone) == _utc_day(LOADS),
            )
            connection.execute(sa.update(LOADS).where(is_same_day).values(data_version=version))
        for name in sorted({load.resource for load in loads}):
            table = RAW[name]
            for load_ids in _chunks([load.load_id for load in loads if load.resource == name]):
                is_gone = sa.exists().where(
                    gone.c.load_id.in_(load_ids),
                    gone.c.account == table.c["_account"],
                    gone.c.window_start == table.c["_snapshot_at"],
                )
                connection.execute(sa.delete(table).where(is_gone))
        _delete_loads(connection, [load.load_id for load in loads])
    return replace(marked, thinnable=loads)


def _delete_rows(lease: Lease, obsolete: _Obsolete, cuts: _Cuts) -> None:
    """Delete superseded loads, then obsolete rows of each table of ops, each in a transaction."""
    with lease.transaction():
        fence(lease, changes_data=False)
        _delete_loads(lease.connection, obsolete.superseded)
    for rule in RETENTIONS:
        with lease.transaction():
            fence(lease, changes_data=False)
            lease.connection.execute(sa.delete(rule.table).where(_is_over(rule, cuts.ops)))


def _delete_loads(connection: sa.Connection, load_ids: Sequence[str]) -> None:
    for chunk in _chunks(load_ids):
        connection.execute(sa.delete(LOADS).where(LOADS.c.load_id.in_(chunk)))


def _chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (
        values[first : first + MAX_IDS_PER_STATEMENT]
        for first in range(0, len(values), MAX_IDS_PER_STATEMENT)
    )


def _utc_day(loads: sa.FromClause) -> sa.ColumnElement[date]:
    return sa.cast(sa.func.utc(loads.c.window_start), sa.Date)


# --- Files ----------------------------------------------------------------------------------------


def _folders(
    kind: str, folders: Collection[Path], drop: Callable[[Path], object] | None, rows: int = 0
) -> Freed:
    """Delete the folders with `drop`, unless it is None; return their files and bytes, and the rows."""
    files = size = 0
    for folder in folders:
        sizes = backend_for(folder).sizes(folder)
        files, size = files + len(sizes), size + sum(sizes)
        if drop is not None:
            drop(folder)
    return Freed(kind, rows, files, size)


def _files(kind: str, paths: Iterable[Path], *, is_dry: bool) -> Freed:
    files = size = 0
    for path in paths:
        files, size = files + 1, size + backend_for(path).size(path)
        if not is_dry:
            backend_for(path).delete(path)
    return Freed(kind, files=files, bytes=size)
