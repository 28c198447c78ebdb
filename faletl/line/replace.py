"""Load: replace a window of a raw table in one transaction with its row in ops.loads.

Nothing is ever appended. An extract with the same rows replaces nothing. Neither does an extract planned
before another run loaded the window: it may be the older one, whatever the clocks say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import AccountLockedError, FaletlError, UsageError, WarehouseError
from faletl.landing import decisions, extracts
from faletl.landing.decisions import WindowAccepted
from faletl.landing.extracts import Manifest, Receipt
from faletl.line import holds
from faletl.line.holds import Loss, loss_of
from faletl.resources import RESOURCES
from faletl.staging.window import Staged
from faletl.warehouse import alerts
from faletl.warehouse.ledger import fence, is_of, of_window
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.quality import LOCKED, REFUSED, failures_of, record_findings
from faletl.warehouse.tables import (
    FAILURES,
    LOADS,
    QUARANTINE,
    RAW,
    RESTATEMENTS,
    UNKNOWN_ENDPOINTS,
    WAREHOUSE,
)
from faletl.windows import CLOCK_TOLERANCE, DAY, Window

Outcome = Literal["loaded", "unchanged", "superseded", "held"]
"""The outcome for a window: loaded; unchanged (the extract has the same rows); superseded (a later run
loaded it); or held, because the extract lacks rows that were proven before (faletl/line/holds.py)."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """The outcome for a window, and the rows it lost, or would have lost, by the extract."""

    outcome: Outcome
    loss: Loss | None = None


def replace_window(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    staged: Staged,
    acceptance: WindowAccepted | None = None,
) -> Replaced:
    """Make the raw table hold exactly the staged rows for their window; all or nothing.

    An extract that lacks rows which were proven before is held instead, unless an `acceptance` (this one
    or an earlier one) confirms that they are gone.

    Raises:
        LeaseLostError: a newer run took over; nothing is changed.
        UsageError: the acceptance is out of date; nothing is changed.
        WarehouseError: the database did not store the rows it was given; nothing is changed.
    """
    with _naming_window(staged):
        with lease.transaction():
            if acceptance is not None:
                holds.enter(lease.connection, acceptance)
            result = _replace(settings, warehouse, lease, staged)
            if acceptance is not None:
                if result.outcome == "superseded":
                    raise UsageError(
                        "another extract of that day was loaded meanwhile, so nothing was accepted; "
                        "faletl status lists the windows that are held or refused now"
                    )
                decisions.record(settings, acceptance)
        if result.receipt is not None:
            extracts.leave_receipt(staged.landed.folder, result.receipt)
        if result.replaced_folder is not None:
            extracts.take_receipts(result.replaced_folder)
    return Replaced(result.outcome, result.loss)


def confirm_window(
    settings: Settings, lease: Lease, acceptance: WindowAccepted, extracted_at: datetime
) -> None:
    """Keep the loaded rows of a held window and release the hold; raise LeaseLostError if superseded.

    `extracted_at` is the start of the held extract.
    """
    account, resource = acceptance.account, acceptance.resource
    day = acceptance.window_start.date()
    with lease.transaction():
        connection, data_version = lease.connection, fence(lease, changes_data=True)
        holds.enter(connection, acceptance)
        holds.release(connection, account, resource, day, acceptance.decided_at)
        loaded = sa.and_(of_window(LOADS, account, resource, day), LOADS.c.is_current)
        confirmed = {**_as_confirmed(Window.of_day(day), extracted_at), "data_version": data_version}
        connection.execute(sa.update(LOADS).where(loaded).values(confirmed))
        decisions.record(settings, acceptance)


def is_already_loaded(connection: sa.Connection, staged: Staged) -> bool:
    """Return whether exactly these rows are loaded already, so that loading would change nothing."""
    current = _current_load(connection, staged)
    return current is not None and _is_same(connection, current, staged)


def _is_same(connection: sa.Connection, current: sa.RowMapping, staged: Staged) -> bool:
    """Return whether the extract has the rows of the current load, and would delete no others.

    If this extract asked for an endpoint that the current load did not, raw may have rows of that
    endpoint from an earlier load.
    """
    if current["digest"] != staged.digest:
        return False
    if current["asked_digest"] == _digest_of_ids(staged):
        return True
    table = RAW[staged.resource.name]
    others = sa.exists().where(_replaced_by(staged), table.c["_load_id"] != current["load_id"])
    return not connection.execute(sa.select(others)).scalar_one()


def take_out_the_future(
    settings: Settings, lease: Lease, manifests: Iterable[Manifest], at: datetime
) -> list[str]:
    """Remove windows that are later than `at` from the tables, inside a transaction.

    A clock that was ahead loaded them: snapshots, and days without rows because they had not begun.
    Their landed pages stay. `manifests` are of the extracts loaded at `at`: if they show that our clock
    is behind fal's, snapshots that agree with fal's clock stay. Returns the names of removed windows.
    """
    connection, limit = lease.connection, at + CLOCK_TOLERANCE
    later = sa.and_(LOADS.c.is_current, LOADS.c.window_start > limit)
    loads = connection.execute(sa.select(LOADS).where(later).order_by(LOADS.c.window_start)).mappings()
    is_behind = any(manifest.clock_ahead < -CLOCK_TOLERANCE for manifest in manifests)
    ahead = [load for load in loads if _is_of_the_future(settings, load, is_behind=is_behind)]
    _forget_failures_after(connection, limit, at)
    if ahead:
        take_out(lease, ahead, at)
    return [f"{load['resource']} {Window(load['window_start'], load['window_end'])}" for load in ahead]


def _is_of_the_future(settings: Settings, load: sa.RowMapping, *, is_behind: bool) -> bool:
    if RESOURCES[load["resource"]].window == "day":
        return not load["rows"]
    if is_behind:
        with suppress(FaletlError):
            manifest = extracts.open_read(extracts.root(settings) / load["landing_path"]).manifest
            is_vouched_for = manifest.fal_started_at and abs(manifest.clock_ahead) <= CLOCK_TOLERANCE
            return not is_vouched_for
    return True


def take_out(lease: Lease, loads: Iterable[sa.RowMapping], at: datetime) -> None:
    """Delete the raw rows of these loads (snapshots and days without rows), inside a transaction."""
    connection, data_version = lease.connection, fence(lease, changes_data=True)
    for load in loads:
        table = RAW[load["resource"]]
        if RESOURCES[load["resource"]].window == "snapshot":
            is_own = sa.and_(
                table.c["_account"] == load["account"], table.c["_load_id"] == load["load_id"]
            )
            connection.execute(sa.delete(table).where(is_own))
        connection.execute(
            sa.update(LOADS)
            .where(LOADS.c.load_id == load["load_id"])
            .values(is_current=False, data_version=data_version)
        )
        connection.execute(
            sa.update(QUARANTINE)
            .where(QUARANTINE.c.load_id == load["load_id"], QUARANTINE.c.resolved_at.is_(None))
            .values(resolved_at=at, fencing_token=lease.token)
        )


def replay(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    extracted: Iterable[tuple[Staged, Receipt]],
    forget: date | None = None,
) -> tuple[list[Outcome], Lease]:
    """Load earlier extracts again in the given order, with their earlier outcomes; all or nothing.

    Rows, ledger and restatements of the day to `forget` are deleted first. Each extract gets a token of
    its own, as before. Returns the outcomes and the lease with the newest token.

    Raises: as `replace_window`.
    """
    outcomes = []
    with lease.transaction():
        taken_out = set[str]()
        if forget is not None:
            taken_out = snapshots_taken_out(lease.connection)
            _forget_day(lease, Window.of_day(forget))
        for staged, receipt in extracted:
            lease = _next_lease(lease)
            with _naming_window(staged):
                manifest = staged.landed.manifest
                if forget is None:
                    take_out_the_future(settings, lease, [manifest], receipt.loaded_at)
                result = _replace(
                    settings, warehouse, lease, staged, then=receipt, is_all=forget is None
                )
            outcomes.append(result.outcome)
            if manifest.load_id in taken_out:
                recorded = sa.select(LOADS).where(LOADS.c.load_id == manifest.load_id)
                take_out(lease, lease.connection.execute(recorded).mappings().all(), receipt.loaded_at)
    return outcomes, lease


def snapshots_taken_out(connection: sa.Connection) -> set[str]:
    """Return the loads of snapshots that were removed from raw because they were later than now."""
    names = [name for name, resource in RESOURCES.items() if resource.window == "snapshot"]
    query = sa.select(LOADS.c.load_id).where(LOADS.c.resource.in_(names), LOADS.c.is_current.is_(False))
    return set(connection.execute(query).scalars())


def _next_lease(lease: Lease) -> Lease:
    fence(lease, changes_data=False)
    token = lease.connection.execute(
        sa.update(WAREHOUSE)
        .values(fencing_token=WAREHOUSE.c.fencing_token + 1)
        .returning(WAREHOUSE.c.fencing_token)
    ).scalar_one()
    return replace(lease, token=token)


@contextmanager
def _naming_window(staged: Staged) -> Iterator[None]:
    """Add resource and window to errors raised while the window is written."""
    manifest = staged.landed.manifest
    try:
        yield
    except sa.exc.DBAPIError as error:
        message = f"the warehouse refused the load: {str(error.orig).splitlines()[0]}"
        if error.connection_invalidated:  # it is unknown whether the commit happened
            message += "; the ledger shows whether the window is loaded, and the next run reads that"
        raise WarehouseError(message, resource=manifest.resource, window=str(manifest.window)) from None
    except FaletlError as error:
        raise error.at(resource=manifest.resource, window=str(manifest.window)) from None


def _forget_day(lease: Lease, day: Window) -> None:
    fence(lease, changes_data=True)
    for name, table in RAW.items():
        time = table.c[RESOURCES[name].time or "_snapshot_at"]
        lease.connection.execute(sa.delete(table).where(time >= day.start, time < day.end))
    for table_by_window in (LOADS, RESTATEMENTS):
        start = table_by_window.c.window_start
        lease.connection.execute(sa.delete(table_by_window).where(start >= day.start, start < day.end))


@dataclass(frozen=True, slots=True)
class _Result:
    """The outcome for a window, the receipt for its extract, and the damaged folder it replaces."""

    outcome: Outcome
    receipt: Receipt | None = None
    replaced_folder: Path | None = None
    loss: Loss | None = None


def _replace(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    staged: Staged,
    *,
    then: Receipt | None = None,
    is_all: bool = True,
) -> _Result:
    """Replace the window; `then` is the receipt of an extract that is loaded again.

    Unless `is_all` extracts are loaded again, failures and unknown ids stay unchanged.
    """
    manifest, connection = staged.landed.manifest, lease.connection
    current = _current_load(connection, staged)
    is_same = current is not None and _is_same(connection, current, staged)
    if current is not None and is_same and current["load_id"] == manifest.load_id:
        receipt = _receipt(connection, current["fencing_token"], current["loaded_at"], "loaded")
        return _Result("unchanged", receipt)
    if current is not None and then is None and _is_newer(connection, current, manifest):
        return _Result("superseded")
    at = then.loaded_at if then else datetime.now(UTC)
    loss, is_kept = None, False
    if current is not None and not is_same and not (then and then.is_taken_on_trust):
        loss, is_kept = _judged_loss(warehouse, connection, staged, current)
        if loss is not None and loss.rows_digest is not None:
            return _hold(settings, lease, staged, loss, at, is_all=is_all)
    damaged_folder = None
    if current is not None and is_same and then is None:
        damaged_folder = _damaged_pages(settings, current)
        if damaged_folder is not None:  # from now on, a rebuild depends on the new pages
            connection.execute(sa.delete(LOADS).where(LOADS.c.load_id == current["load_id"]))
            is_same = False
    is_visible_change = current is not None and _is_news(connection, manifest, current)
    data_version = fence(lease, changes_data=is_visible_change or not (is_same or is_kept))
    _clear_holds_and_failures(connection, manifest, at, is_all=is_all)
    outcome: Literal["loaded", "unchanged"] = "unchanged" if is_same or is_kept else "loaded"
    record_findings(lease, staged.findings, outcome, at=at)
    extract = _columns_of_extract(staged, lease.token, current)
    if current is not None and outcome == "unchanged":
        if is_kept:  # rows, proof and pages are still those of the current load
            extract = _as_confirmed(manifest.window, manifest.started_at)
        if is_visible_change:
            extract["data_version"] = data_version
        is_current_load = LOADS.c.load_id == current["load_id"]
        connection.execute(sa.update(LOADS).where(is_current_load).values(extract))
    else:
        extract |= {"loaded_at": at, "data_version": data_version}
        _load_rows(settings, warehouse, lease, staged, current, extract)
    return _Result(outcome, _receipt(connection, lease.token, at, outcome), damaged_folder, loss)


def _load_rows(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    staged: Staged,
    current: sa.RowMapping | None,
    extract: Mapping[str, Any],
) -> None:
    """Replace the rows of the `current` load by the staged rows; record restatements."""
    manifest, connection = staged.landed.manifest, lease.connection
    # A clock that was ahead may have taken an open day for a closed one: then it is not a restatement.
    ahead = current["last_read_at"] - manifest.started_at if current is not None else timedelta(0)
    is_ahead = ahead > CLOCK_TOLERANCE
    is_restating = current is not None and not current["is_provisional"] and not is_ahead
    before = _line_totals(connection, staged) if is_restating else {}
    _delete_window(connection, staged)
    _insert(warehouse, lease, staged)
    is_changed = current is not None and current["digest"] != staged.digest
    changed_at = current["changed_at"] if current is not None else None
    if is_restating and is_changed:
        changed_at = manifest.started_at
    if changed_at is not None:
        changed_at = min(changed_at, manifest.started_at)
    _record_load(settings, lease, staged, {**extract, "changed_at": changed_at})
    if is_restating:
        _record_restatements(connection, manifest, before, _line_totals(connection, staged))


def _judged_loss(
    warehouse: Warehouse, connection: sa.Connection, staged: Staged, current: sa.RowMapping
) -> tuple[Loss | None, bool]:
    """Return the loss that the extract would cause, and whether a person chose to keep the loaded rows.

    An accepted loss is returned as None.
    """
    loss = loss_of(warehouse, connection, staged, current, _replaced_by(staged))
    if loss is None or loss.rows_digest is None:
        return loss, False
    accepted = holds.acceptance_of(connection, staged.landed.manifest, loss.rows_digest)
    return (loss, False) if accepted is None else (None, accepted == "kept")


def _damaged_pages(settings: Settings, current: sa.RowMapping) -> Path | None:
    """Return the folder of the load's landed pages if these are damaged or gone, else None."""
    folder = extracts.root(settings) / current["landing_path"]
    return None if extracts.is_intact(folder) else folder


def _is_news(connection: sa.Connection, manifest: Manifest, current: sa.RowMapping) -> bool:
    """Return whether reports change for the window even if its rows are the same.

    They do when a day has closed or settled, and when it was held or refused until now.
    """
    is_settled = manifest.window.has_settled(manifest.started_at)
    before, after = (
        (current["is_provisional"], current["is_settled"]),
        (manifest.window.is_provisional, is_settled),
    )
    refusals = sa.select(sa.func.count()).select_from(FAILURES).where(
        failures_of(manifest), FAILURES.c.exit_code == REFUSED
    )  # fmt: skip
    return (
        before != after
        or holds.is_held(connection, manifest)
        or connection.execute(refusals).scalar_one() > 0
    )


def _columns_of_extract(staged: Staged, token: int, current: sa.RowMapping | None) -> dict[str, Any]:
    """Return the columns of ops.loads about the newest extract with the rows of a load."""
    manifest = staged.landed.manifest
    whole_catalogue_at = current["whole_catalogue_at"] if current is not None else None
    return {
        "last_load_id": manifest.load_id,
        "last_read_at": manifest.started_at,
        "last_fencing_token": token,
        "window_end": manifest.window_end,
        "proof": staged.proof,
        "control_total": None if staged.control_total is None else Decimal(staged.control_total),
        "quarantined_rows": staged.findings.breaches,
        "is_provisional": manifest.window.is_provisional,
        "is_settled": manifest.window.has_settled(manifest.started_at),
        "whole_catalogue_at": (
            manifest.started_at if manifest.is_whole_catalogue else whole_catalogue_at
        ),
    }


def _as_confirmed(window: Window, extracted_at: datetime) -> dict[str, Any]:
    """Return the columns of ops.loads for rows that stay although a newer extract lacks some."""
    return {
        "window_end": window.end,
        "last_read_at": extracted_at,
        "is_provisional": False,
        "is_settled": window.has_settled(extracted_at),
    }


def _hold(
    settings: Settings, lease: Lease, staged: Staged, loss: Loss, at: datetime, *, is_all: bool
) -> _Result:
    """Keep the loaded rows of the window, and record the hold in ops.holds."""
    manifest, connection = staged.landed.manifest, lease.connection
    data_version = fence(lease, changes_data=not holds.is_held(connection, manifest))
    if is_all:
        _forget_failures(connection, manifest, at)
    record_findings(lease, staged.findings, "refused", at=at)
    holds.hold(settings, lease, staged, loss, data_version)
    if loss.is_final:  # the window is not extracted again
        loaded = sa.and_(
            of_window(LOADS, manifest.account, manifest.resource, manifest.window.day),
            LOADS.c.is_current,
        )
        settled = _as_confirmed(manifest.window, manifest.started_at)
        connection.execute(sa.update(LOADS).where(loaded).values(settled))
    return _Result("held", _receipt(connection, lease.token, at, "held"), loss=loss)


def _receipt(
    connection: sa.Connection,
    token: int,
    at: datetime,
    outcome: Literal["loaded", "unchanged", "held"],
) -> Receipt:
    warehouse_id = connection.execute(sa.select(WAREHOUSE.c.warehouse_id)).scalar_one()
    return Receipt(token, at, outcome, warehouse_id)


def _clear_holds_and_failures(
    connection: sa.Connection, manifest: Manifest, at: datetime, *, is_all: bool
) -> None:
    """Clear holds and failures of a window that is loaded now."""
    holds.release(connection, manifest.account, manifest.resource, manifest.window.day, at)
    if is_all:
        _forget_failures(connection, manifest, at)
        _remember_unknown(connection, manifest)


def _is_newer(connection: sa.Connection, current: sa.RowMapping, manifest: Manifest) -> bool:
    """Return whether the window was loaded under a newer lease than was known when it was planned.

    A held extract, or one with rows still in quarantine, counts as the newest: loading a later one would
    have ended that. Its token does not show it, because tokens of a rebuild are greater than all others.
    """
    if current["last_fencing_token"] <= manifest.fencing_token:
        return False
    is_own = manifest.load_id in (current["load_id"], current["last_load_id"])
    return not (is_own or holds.is_open(connection, manifest.load_id))


def _digest_of_ids(staged: Staged) -> str | None:
    """Return a fingerprint of the endpoint ids that the rows cover; None where they cover all."""
    if staged.asked_ids is None:
        return None
    return hashlib.sha256(repr(sorted(staged.asked_ids)).encode()).hexdigest()


def _current_load(connection: sa.Connection, staged: Staged) -> sa.RowMapping | None:
    """Return the load whose rows are in the window now; for a snapshot, the newest of its UTC day."""
    resource, manifest = staged.resource, staged.landed.manifest
    start = manifest.window_start.replace(hour=0, minute=0, second=0, microsecond=0)
    is_same_window = sa.and_(
        LOADS.c.account == manifest.account,
        LOADS.c.resource == manifest.resource,
        LOADS.c.window_start >= start,
        LOADS.c.window_start < start + DAY,
        LOADS.c.is_current,
    )
    if resource.every_run:  # a level: each instant is separate
        is_same_window = sa.and_(is_same_window, LOADS.c.window_start == manifest.window_start)
    newest = sa.select(LOADS).where(is_same_window).limit(1)
    newest = newest.order_by(LOADS.c.last_fencing_token.desc(), LOADS.c.window_start.desc())
    return connection.execute(newest).mappings().first()


def _rows_of(staged: Staged) -> sa.ColumnElement[bool]:
    """Return the condition for all raw rows of the window, including those not asked for."""
    manifest = staged.landed.manifest
    return is_of(staged.resource, manifest.account, manifest.window)


def _replaced_by(staged: Staged) -> sa.ColumnElement[bool]:
    """Return the condition for rows that the staged ones replace: those of the endpoints asked for."""
    if staged.asked_ids is None:
        return _rows_of(staged)
    is_requested = RAW[staged.resource.name].c.endpoint_id.in_(sorted(staged.asked_ids))
    return sa.and_(_rows_of(staged), is_requested)


def _delete_window(connection: sa.Connection, staged: Staged) -> None:
    """Delete the rows that the staged ones replace; rows that were not asked for stay in their load."""
    table, manifest = RAW[staged.resource.name], staged.landed.manifest
    connection.execute(sa.delete(table).where(_replaced_by(staged)))
    connection.execute(sa.delete(LOADS).where(LOADS.c.load_id == manifest.load_id))  # it is loaded again
    connection.execute(
        sa.update(LOADS)
        .where(
            LOADS.c.account == manifest.account,
            LOADS.c.resource == manifest.resource,
            LOADS.c.window_start == manifest.window_start,
            LOADS.c.is_current,
        )
        .values(is_current=False)
    )


def _insert(warehouse: Warehouse, lease: Lease, staged: Staged) -> None:
    """Insert in bulk, then compare count and sum of the stored rows with those of the staged rows."""
    table = RAW[staged.resource.name]
    warehouse.load_rows(lease.connection, table, staged.source, staged.files[0].parent)
    cost = sa.func.sum(table.c.cost_total) if "cost_total" in table.c else sa.literal(0)
    rows, total = lease.connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(cost, 0)).where(
            _rows_of(staged), table.c["_load_id"] == staged.landed.manifest.load_id
        )
    ).one()
    if rows != staged.rows or Decimal(total) != Decimal(staged.cost_total):
        raise WarehouseError(
            f"the warehouse has {rows} rows with a sum of {total} after loading {staged.rows} rows with "
            f"a sum of {staged.cost_total}; the load was undone"
        )


def _record_load(settings: Settings, lease: Lease, staged: Staged, extract: Mapping[str, Any]) -> None:
    """Insert the row of ops.loads; `extract` are its columns about the newest extract."""
    manifest, table = staged.landed.manifest, RAW[staged.resource.name]
    rows_in_raw = sa.select(sa.func.count()).select_from(table).where(_rows_of(staged))
    lease.connection.execute(
        sa.insert(LOADS).values(
            load_id=manifest.load_id,
            run_id=manifest.run_id,
            account=manifest.account,
            resource=manifest.resource,
            window_start=manifest.window_start,
            pages=len(manifest.pages("rows")),
            rows=rows_in_raw.scalar_subquery(),
            cost_total=Decimal(staged.cost_total),
            digest=staged.digest,
            asked_digest=_digest_of_ids(staged),
            dropped_rows=staged.dropped_rows,
            doubtful_rows=staged.doubtful_rows,
            rounded_amounts=staged.rounded_amounts,
            fencing_token=lease.token,
            landing_path=staged.landed.path,
            read_at=manifest.started_at,
            is_current=True,
            **extract,
        )
    )


# --- Restatements ---------------------------------------------------------------------------------

_Lines: TypeAlias = Mapping[tuple[str | None, ...], tuple[Decimal, Decimal]]
"""Quantity and cost, by endpoint, unit, currency and credential."""


def _line_totals(connection: sa.Connection, staged: Staged) -> _Lines:
    """Sum the raw rows of the window by line; empty where the rows have no cost."""
    rows = RAW[staged.resource.name].c
    if "quantity" not in rows or "cost_total" not in rows:
        return {}
    label = sa.func.coalesce(rows.auth_detail, rows.auth_method)
    key = (
        rows.endpoint_id,
        rows.unit,
        sa.func.currency_code(rows.currency) if "currency" in rows else sa.literal("USD"),
        sa.func.credential_id(rows.api_key_id, rows.login_username, label),
    )
    amounts = (sa.func.coalesce(sa.func.sum(rows.quantity), 0), sa.func.sum(rows.cost_total))
    lines = connection.execute(sa.select(*key, *amounts).where(_rows_of(staged)).group_by(*key))
    return {tuple(line[: len(key)]): (Decimal(line[-2]), Decimal(line[-1])) for line in lines.fetchall()}


def _record_restatements(
    connection: sa.Connection, manifest: Manifest, before: _Lines, after: _Lines
) -> None:
    """Record each changed line in ops.restatements (docs/restatements.md)."""
    nothing = (Decimal(0), Decimal(0))
    changed = [
        {
            "load_id": manifest.load_id,
            "account": manifest.account,
            "resource": manifest.resource,
            "window_start": manifest.window_start,
            "endpoint_id": endpoint_id,
            "unit": unit,
            "currency": currency,
            "credential_id": credential_id,
            "quantity_before": old[0],
            "quantity_after": new[0],
            "cost_total_before": old[1],
            "cost_total_after": new[1],
            "seen_at": manifest.finished_at,
        }
        for line in sorted(before.keys() | after.keys(), key=repr)
        for endpoint_id, unit, currency, credential_id in [line]
        if (old := before.get(line, nothing)) != (new := after.get(line, nothing))
    ]
    if changed:
        connection.execute(sa.insert(RESTATEMENTS).values(changed))


# --- Failures and unknown ids ---------------------------------------------------------------------


def _forget_failures(connection: sa.Connection, manifest: Manifest, at: datetime) -> None:
    """Delete failures of the window, and a lock of the account, because fal has answered since."""
    is_lock = FAILURES.c.error == AccountLockedError.__name__
    was_locked = sa.and_(FAILURES.c.account == manifest.account, is_lock)
    _delete_failures(connection, sa.or_(failures_of(manifest), was_locked), at)


def _forget_failures_after(connection: sa.Connection, limit: datetime, at: datetime) -> None:
    """Delete failures of windows after `limit`, which a clock that was ahead has caused."""
    _delete_failures(connection, FAILURES.c.window_start > limit, at)


def _delete_failures(connection: sa.Connection, condition: sa.ColumnElement[bool], at: datetime) -> None:
    query = sa.delete(FAILURES).where(condition)
    deleted = connection.execute(
        query.returning(
            FAILURES.c.account, FAILURES.c.error, FAILURES.c.resource, FAILURES.c.window_start
        )
    ).all()
    for account, error, resource, start in deleted:
        subject = f"{resource} {start.astimezone(UTC).date()}"
        alerts.resolve(connection, "refused", account, subject, at)
        if error == AccountLockedError.__name__:
            alerts.resolve(connection, "locked", account, LOCKED, at)


def _remember_unknown(connection: sa.Connection, manifest: Manifest) -> None:
    """Update ops.unknown_endpoints with the ids that the extract requested."""
    table = UNKNOWN_ENDPOINTS
    requested = {
        endpoint for call in manifest.calls for endpoint in call.query.get("endpoint_id", [])
    } | set(manifest.unknown_ids)
    if not requested:
        return
    is_same_resource = sa.and_(
        table.c.account == manifest.account, table.c.resource == manifest.resource
    )
    connection.execute(
        sa.delete(table).where(is_same_resource, table.c.endpoint_id.in_(sorted(requested)))
    )
    for endpoint in manifest.unknown_ids:
        connection.execute(
            sa.insert(table).values(
                account=manifest.account,
                resource=manifest.resource,
                endpoint_id=endpoint,
                seen_at=manifest.started_at,
            )
        )
