"""Load: replace a window of a raw table in one transaction with its row in ops.loads.

There is no append path. A read that found the same rows replaces nothing. A read that was planned
before somebody else loaded the window replaces nothing either: it may be the older one, whatever the
clocks say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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

if TYPE_CHECKING:
    pass

Outcome = Literal["loaded", "unchanged", "superseded", "held"]
"""What became of a window: replaced; found to hold the same rows; left as a later run had it; or left as
it was, because the extract lacks rows that were proven before (faletl/line/holds.py)."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of a window, and what it lost, or would have lost, by the extract."""

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

    An extract that lacks rows which were proven before is held instead, unless an `acceptance`, this one
    or an earlier one, says that they are rightly missing.

    Raises:
        LeaseLostError: a newer run took over; nothing is changed.
        UsageError: what was accepted is out of date; nothing is changed.
        WarehouseError: the database did not keep what it was given; nothing is changed.
    """
    with _written(staged):
        with lease.transaction():
            if acceptance is not None:
                holds.enter(lease.connection, acceptance)
            done = _replace(settings, warehouse, lease, staged)
            if acceptance is not None:
                if done.outcome == "superseded":
                    raise UsageError(
                        "another extract of that day was loaded meanwhile, so nothing is accepted; "
                        "faletl status shows what is held or refused now"
                    )
                decisions.record(settings, acceptance)
        if done.receipt is not None:
            extracts.leave_receipt(staged.landed.folder, done.receipt)
        if done.stood_in_for is not None:
            extracts.take_receipts(done.stood_in_for)
    return Replaced(done.outcome, done.loss)


def confirm_window(
    settings: Settings, lease: Lease, acceptance: WindowAccepted, extracted_at: datetime
) -> None:
    """What is loaded of a held window is right: it is not held any longer; raises LeaseLostError.

    `extracted_at` is when the held extract began.
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
    """Whether the window holds these very rows already, so that loading them would change nothing."""
    current = _current_load(connection, staged)
    return current is not None and _is_same(connection, current, staged)


def _is_same(connection: sa.Connection, current: sa.RowMapping, staged: Staged) -> bool:
    """Whether the extract has the rows of the current load of its window, and no others would go.

    Rows of an endpoint that this extract asked for, and that load did not, are still of an earlier one.
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
    """Inside a transaction: take out of the tables what is of a later instant than `at`.

    It was loaded by a clock that was ahead: snapshots, and days without rows, as they had not begun.
    Their pages stay where they landed. `manifests` are what is loaded at `at`: if our clock is behind
    fal's, snapshots that agreed with fal's clock stay. Returns what was taken out, by name.
    """
    connection, limit = lease.connection, at + CLOCK_TOLERANCE
    later = sa.and_(LOADS.c.is_current, LOADS.c.window_start > limit)
    found = connection.execute(sa.select(LOADS).where(later).order_by(LOADS.c.window_start)).mappings()
    is_behind = any(one.clock_ahead < -CLOCK_TOLERANCE for one in manifests)
    ahead = [one for one in found if _is_of_the_future(settings, one, is_behind=is_behind)]
    _forget_failures_after(connection, limit, at)
    if ahead:
        take_out(lease, ahead, at)
    return [f"{one['resource']} {Window(one['window_start'], one['window_end'])}" for one in ahead]


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
    """Inside a transaction: delete what raw holds of these snapshots and days without rows."""
    connection, data_version = lease.connection, fence(lease, changes_data=True)
    for one in loads:
        table = RAW[one["resource"]]
        if RESOURCES[one["resource"]].window == "snapshot":
            mine = sa.and_(table.c["_account"] == one["account"], table.c["_load_id"] == one["load_id"])
            connection.execute(sa.delete(table).where(mine))
        connection.execute(
            sa.update(LOADS)
            .where(LOADS.c.load_id == one["load_id"])
            .values(is_current=False, data_version=data_version)
        )
        connection.execute(
            sa.update(QUARANTINE)
            .where(QUARANTINE.c.load_id == one["load_id"], QUARANTINE.c.resolved_at.is_(None))
            .values(resolved_at=at, fencing_token=lease.token)
        )


def replay(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    reads: Iterable[tuple[Staged, Receipt]],
    forget: date | None = None,
) -> tuple[list[Outcome], Lease]:
    """Load earlier reads once more, in the order given, as they were loaded then; all or nothing.

    All that is known of the day to `forget` goes first: rows, ledger, restatements. Each read has a
    token of its own, as it had before; returns the lease with the newest.

    Raises: as `replace_window`.
    """
    outcomes = []
    with lease.transaction():
        out = set[str]()
        if forget is not None:
            out = snapshots_taken_out(lease.connection)
            _forget_day(lease, Window.of_day(forget))
        for staged, receipt in reads:
            lease = _next_lease(lease)
            with _written(staged):
                manifest = staged.landed.manifest
                if forget is None:
                    take_out_the_future(settings, lease, [manifest], receipt.loaded_at)
                done = _replace(settings, warehouse, lease, staged, then=receipt, is_all=forget is None)
            outcomes.append(done.outcome)
            if manifest.load_id in out:
                entered = sa.select(LOADS).where(LOADS.c.load_id == manifest.load_id)
                take_out(lease, lease.connection.execute(entered).mappings().all(), receipt.loaded_at)
    return outcomes, lease


def snapshots_taken_out(connection: sa.Connection) -> set[str]:
    """The loads of snapshots that raw does not hold, as they were of the future."""
    names = [name for name, resource in RESOURCES.items() if resource.window == "snapshot"]
    found = sa.select(LOADS.c.load_id).where(LOADS.c.resource.in_(names), LOADS.c.is_current.is_(False))
    return set(connection.execute(found).scalars())


def _next_lease(lease: Lease) -> Lease:
    fence(lease, changes_data=False)
    token = lease.connection.execute(
        sa.update(WAREHOUSE)
        .values(fencing_token=WAREHOUSE.c.fencing_token + 1)
        .returning(WAREHOUSE.c.fencing_token)
    ).scalar_one()
    return replace(lease, token=token)


@contextmanager
def _written(staged: Staged) -> Iterator[None]:
    """Errors while the window is written name it."""
    manifest = staged.landed.manifest
    try:
        yield
    except sa.exc.DBAPIError as error:
        told = f"the warehouse refused the load: {str(error.orig).splitlines()[0]}"
        if error.connection_invalidated:  # before or after it had committed, who knows
            told += "; whether the window is loaded is in the ledger, which the next run reads"
        raise WarehouseError(told, resource=manifest.resource, window=str(manifest.window)) from None
    except FaletlError as error:
        raise error.at(resource=manifest.resource, window=str(manifest.window)) from None


def _forget_day(lease: Lease, day: Window) -> None:
    fence(lease, changes_data=True)
    for name, table in RAW.items():
        time = table.c[RESOURCES[name].time or "_snapshot_at"]
        lease.connection.execute(sa.delete(table).where(time >= day.start, time < day.end))
    for ledger in (LOADS, RESTATEMENTS):
        start = ledger.c.window_start
        lease.connection.execute(sa.delete(ledger).where(start >= day.start, start < day.end))


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of a window, the receipt for its extract, and the damaged one it stands in for."""

    outcome: Outcome
    receipt: Receipt | None = None
    stood_in_for: Path | None = None
    loss: Loss | None = None


def _replace(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    staged: Staged,
    *,
    then: Receipt | None = None,
    is_all: bool = True,
) -> _Done:
    """Replace the window; `then` is the receipt of an extract that is loaded once more.

    Where not all is loaded once more, failures and unknown ids stay as they are known now.
    """
    manifest, connection = staged.landed.manifest, lease.connection
    current = _current_load(connection, staged)
    is_same = current is not None and _is_same(connection, current, staged)
    if current is not None and is_same and current["load_id"] == manifest.load_id:
        receipt = _receipt(connection, current["fencing_token"], current["loaded_at"], "loaded")
        return _Done("unchanged", receipt)
    if current is not None and then is None and _is_newer(connection, current, manifest):
        return _Done("superseded")
    at = then.loaded_at if then else datetime.now(UTC)
    loss, is_kept = None, False
    if current is not None and not is_same and not (then and then.is_taken_on_trust):
        loss, is_kept = _judged_loss(warehouse, connection, staged, current)
        if loss is not None and loss.rows_digest is not None:
            return _hold(settings, lease, staged, loss, at, is_all=is_all)
    lost = None
    if current is not None and is_same and then is None:
        lost = _damaged_pages(settings, current)
        if lost is not None:  # the new pages are what a rebuild can depend on from now on
            connection.execute(sa.delete(LOADS).where(LOADS.c.load_id == current["load_id"]))
            is_same = False
    is_news = current is not None and _is_news(connection, manifest, current)
    data_version = fence(lease, changes_data=is_news or not (is_same or is_kept))
    _close_what_was_open(connection, manifest, at, is_all=is_all)
    outcome: Literal["loaded", "unchanged"] = "unchanged" if is_same or is_kept else "loaded"
    record_findings(lease, staged.findings, outcome, at=at)
    extract = _columns_of_extract(staged, lease.token, current)
    if current is not None and outcome == "unchanged":
        if is_kept:  # the rows are still those of the load, and so are their proof and their pages
            extract = _as_confirmed(manifest.window, manifest.started_at)
        if is_news:
            extract["data_version"] = data_version
        same = LOADS.c.load_id == current["load_id"]
        connection.execute(sa.update(LOADS).where(same).values(extract))
    else:
        extract |= {"loaded_at": at, "data_version": data_version}
        _load_rows(settings, warehouse, lease, staged, current, extract)
    return _Done(outcome, _receipt(connection, lease.token, at, outcome), lost, loss)


def _load_rows(
    settings: Settings,
    warehouse: Warehouse,
    lease: Lease,
    staged: Staged,
    current: sa.RowMapping | None,
    extract: Mapping[str, Any],
) -> None:
    """Put the staged rows in place of those of the `current` load; keep what that changed."""
    manifest, connection = staged.landed.manifest, lease.connection
    # A clock that was ahead may have taken an open day for a closed one: what comes is no restatement.
    is_ahead = current is not None and current["last_read_at"] > manifest.started_at
    is_restating = current is not None and not current["is_provisional"] and not is_ahead
    before = _lines(connection, staged) if is_restating else {}
    _delete_window(connection, staged)
    _insert(warehouse, lease, staged)
    is_changed = current is not None and current["digest"] != staged.digest
    changed_at = current["changed_at"] if current is not None else None
    if is_restating and is_changed:
        changed_at = manifest.started_at
    if changed_at is not None:
        changed_at = min(changed_at, manifest.started_at)
    _enter(settings, lease, staged, {**extract, "changed_at": changed_at})
    if is_restating:
        _restate(connection, manifest, before, _lines(connection, staged))


def _judged_loss(
    warehouse: Warehouse, connection: sa.Connection, staged: Staged, current: sa.RowMapping
) -> tuple[Loss | None, bool]:
    """What the window would lose by the extract, and whether a person said that it keeps its rows.

    A loss that a person accepted is none.
    """
    loss = loss_of(warehouse, connection, staged, current, _replaced_by(staged))
    if loss is None or loss.rows_digest is None:
        return loss, False
    accepted = holds.acceptance_of(connection, staged.landed.manifest, loss.rows_digest)
    return (loss, False) if accepted is None else (None, accepted == "kept")


def _damaged_pages(settings: Settings, current: sa.RowMapping) -> Path | None:
    """The folder of the load's landed pages, if they are not as they were landed."""
    folder = extracts.root(settings) / current["landing_path"]
    return None if extracts.is_intact(folder) else folder


def _is_news(connection: sa.Connection, manifest: Manifest, current: sa.RowMapping) -> bool:
    """Whether reports say something else of the window now, even if it has the same rows.

    That is so when a day has closed or settled, and when it was held or refused until now.
    """
    is_settled = manifest.window.has_settled(manifest.started_at)
    was, now = (
        (current["is_provisional"], current["is_settled"]),
        (manifest.window.is_provisional, is_settled),
    )
    failed = sa.select(sa.func.count()).select_from(FAILURES).where(
        failures_of(manifest), FAILURES.c.exit_code == REFUSED
    )  # fmt: skip
    return (
        was != now or holds.is_held(connection, manifest) or connection.execute(failed).scalar_one() > 0
    )


def _columns_of_extract(staged: Staged, token: int, current: sa.RowMapping | None) -> dict[str, Any]:
    """What ops.loads says of the newest extract that has the rows of a load."""
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
    """What ops.loads says of rows that stay, though a closed window's extract lacks some of them."""
    return {
        "window_end": window.end,
        "last_read_at": extracted_at,
        "is_provisional": False,
        "is_settled": window.has_settled(extracted_at),
    }


def _hold(
    settings: Settings, lease: Lease, staged: Staged, loss: Loss, at: datetime, *, is_all: bool
) -> _Done:
    """Leave the window as it is, and say so in ops.holds; the extract stays where it landed."""
    manifest, connection = staged.landed.manifest, lease.connection
    data_version = fence(lease, changes_data=not holds.is_held(connection, manifest))
    if is_all:
        _forget_failures(connection, manifest, at)
    record_findings(lease, staged.findings, "refused", at=at)
    holds.hold(settings, lease, staged, loss, data_version)
    if loss.is_final:  # nobody looks at the window again
        loaded = sa.and_(
            of_window(LOADS, manifest.account, manifest.resource, manifest.window.day),
            LOADS.c.is_current,
        )
        settled = _as_confirmed(manifest.window, manifest.started_at)
        connection.execute(sa.update(LOADS).where(loaded).values(settled))
    return _Done("held", _receipt(connection, lease.token, at, "held"), loss=loss)


def _receipt(
    connection: sa.Connection,
    token: int,
    at: datetime,
    outcome: Literal["loaded", "unchanged", "held"],
) -> Receipt:
    warehouse_id = connection.execute(sa.select(WAREHOUSE.c.warehouse_id)).scalar_one()
    return Receipt(token, at, outcome, warehouse_id)


def _close_what_was_open(
    connection: sa.Connection, manifest: Manifest, at: datetime, *, is_all: bool
) -> None:
    """The window is loaded: neither held nor refused any longer."""
    holds.release(connection, manifest.account, manifest.resource, manifest.window.day, at)
    if is_all:
        _forget_failures(connection, manifest, at)
        _remember_unknown(connection, manifest)


def _is_newer(connection: sa.Connection, current: sa.RowMapping, manifest: Manifest) -> bool:
    """Whether the window was loaded under a lease that this extract did not know when it was planned.

    An extract that is held, or of which rows are quarantined still, is the newest one: any that was
    loaded later would have ended that. Its token says less, as those of a rebuild are newer than all.
    """
    if current["last_fencing_token"] <= manifest.fencing_token:
        return False
    is_own = manifest.load_id in (current["load_id"], current["last_load_id"])
    return not (is_own or holds.is_open(connection, manifest.load_id))


def _digest_of_ids(staged: Staged) -> str | None:
    """A fingerprint of the endpoint ids that the rows speak for; None where they speak for all."""
    if staged.asked_ids is None:
        return None
    return hashlib.sha256(repr(sorted(staged.asked_ids)).encode()).hexdigest()


def _current_load(connection: sa.Connection, staged: Staged) -> sa.RowMapping | None:
    """The load whose rows the window has now; for a snapshot, the newest one of the same UTC day."""
    resource, manifest = staged.resource, staged.landed.manifest
    start = manifest.window_start.replace(hour=0, minute=0, second=0, microsecond=0)
    is_same_window = sa.and_(
        LOADS.c.account == manifest.account,
        LOADS.c.resource == manifest.resource,
        LOADS.c.window_start >= start,
        LOADS.c.window_start < start + DAY,
        LOADS.c.is_current,
    )
    if resource.every_run:  # a level: each instant of it stands for itself
        is_same_window = sa.and_(is_same_window, LOADS.c.window_start == manifest.window_start)
    newest = sa.select(LOADS).where(is_same_window).limit(1)
    newest = newest.order_by(LOADS.c.last_fencing_token.desc(), LOADS.c.window_start.desc())
    return connection.execute(newest).mappings().first()


def _rows_of(staged: Staged) -> sa.ColumnElement[bool]:
    """Where the rows of the window stand in its raw table, also those that the read did not ask for."""
    manifest = staged.landed.manifest
    return is_of(staged.resource, manifest.account, manifest.window)


def _replaced_by(staged: Staged) -> sa.ColumnElement[bool]:
    """The rows of the window whose place the staged ones take: those of the endpoints asked for."""
    if staged.asked_ids is None:
        return _rows_of(staged)
    asked = RAW[staged.resource.name].c.endpoint_id.in_(sorted(staged.asked_ids))
    return sa.and_(_rows_of(staged), asked)


def _delete_window(connection: sa.Connection, staged: Staged) -> None:
    """Make room for the staged rows. What was not asked for stays, under the load that brought it."""
    table, manifest = RAW[staged.resource.name], staged.landed.manifest
    connection.execute(sa.delete(table).where(_replaced_by(staged)))
    connection.execute(sa.delete(LOADS).where(LOADS.c.load_id == manifest.load_id))  # it is read anew
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
    """Insert in bulk, then read back what the database now holds: a count and a sum."""
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
            f"the warehouse holds {rows} rows and {total} after loading {staged.rows} rows and "
            f"{staged.cost_total}; the load was undone"
        )


def _enter(settings: Settings, lease: Lease, staged: Staged, read: Mapping[str, Any]) -> None:
    manifest, table = staged.landed.manifest, RAW[staged.resource.name]
    held = sa.select(sa.func.count()).select_from(table).where(_rows_of(staged))
    lease.connection.execute(
        sa.insert(LOADS).values(
            load_id=manifest.load_id,
            run_id=manifest.run_id,
            account=manifest.account,
            resource=manifest.resource,
            window_start=manifest.window_start,
            pages=len(manifest.pages("rows")),
            rows=held.scalar_subquery(),
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
            **read,
        )
    )


# --- What a read changed --------------------------------------------------------------------------

_Lines: TypeAlias = Mapping[tuple[str | None, ...], tuple[Decimal, Decimal]]
"""Quantity and cost by endpoint, unit, currency and credential."""


def _lines(connection: sa.Connection, staged: Staged) -> _Lines:
    """The lines of the window as raw holds them now; none where the rows are no charges."""
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
    found = connection.execute(sa.select(*key, *amounts).where(_rows_of(staged)).group_by(*key))
    return {tuple(line[: len(key)]): (Decimal(line[-2]), Decimal(line[-1])) for line in found.fetchall()}


def _restate(connection: sa.Connection, manifest: Manifest, before: _Lines, after: _Lines) -> None:
    """Keep each line that is another one now (docs/restatements.md)."""
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
            "quantity_before": was[0],
            "quantity_after": now[0],
            "cost_total_before": was[1],
            "cost_total_after": now[1],
            "seen_at": manifest.finished_at,
        }
        for line in sorted(before.keys() | after.keys(), key=repr)
        for endpoint_id, unit, currency, credential_id in [line]
        if (was := before.get(line, nothing)) != (now := after.get(line, nothing))
    ]
    if changed:
        connection.execute(sa.insert(RESTATEMENTS).values(changed))


# --- What else a load leaves ----------------------------------------------------------------------


def _forget_failures(connection: sa.Connection, manifest: Manifest, at: datetime) -> None:
    """What failed of the window is over, and so is that the account was locked: fal answered."""
    is_lock = FAILURES.c.error == AccountLockedError.__name__
    was_locked = sa.and_(FAILURES.c.account == manifest.account, is_lock)
    _delete_failures(connection, sa.or_(failures_of(manifest), was_locked), at)


def _forget_failures_after(connection: sa.Connection, limit: datetime, at: datetime) -> None:
    """What failed of windows that begin after `limit` failed by a clock that was ahead."""
    _delete_failures(connection, FAILURES.c.window_start > limit, at)


def _delete_failures(connection: sa.Connection, which: sa.ColumnElement[bool], at: datetime) -> None:
    gone = sa.delete(FAILURES).where(which)
    found = connection.execute(
        gone.returning(
            FAILURES.c.account, FAILURES.c.error, FAILURES.c.resource, FAILURES.c.window_start
        )
    ).all()
    for account, error, resource, start in found:
        subject = f"{resource} {start.astimezone(UTC).date()}"
        alerts.resolve(connection, "refused", account, subject, at)
        if error == AccountLockedError.__name__:
            alerts.resolve(connection, "locked", account, LOCKED, at)


def _remember_unknown(connection: sa.Connection, manifest: Manifest) -> None:
    table = UNKNOWN_ENDPOINTS
    asked = {
        endpoint for call in manifest.calls for endpoint in call.query.get("endpoint_id", [])
    } | set(manifest.unknown_ids)
    if not asked:
        return
    same = sa.and_(table.c.account == manifest.account, table.c.resource == manifest.resource)
    connection.execute(sa.delete(table).where(same, table.c.endpoint_id.in_(sorted(asked))))
    for endpoint in manifest.unknown_ids:
        connection.execute(
            sa.insert(table).values(
                account=manifest.account,
                resource=manifest.resource,
                endpoint_id=endpoint,
                seen_at=manifest.started_at,
            )
        )
