"""Rename or forget an account in every table of raw and ops, in one transaction.

faletl/line/relabel.py applies the decision to pages that landed before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from faletl import duck
from faletl.config import Settings, is_label
from faletl.duck import quoted
from faletl.errors import UsageError, WarehouseError
from faletl.files import scratch_folder
from faletl.landing import decisions
from faletl.landing.decisions import AccountForgotten, AccountRenamed
from faletl.line import relabel
from faletl.line.accounts import Account, known_accounts
from faletl.line.release import build_and_publish
from faletl.line.report import Report, new_run_id
from faletl.models.build import make_next_build_full
from faletl.resources import RESOURCES, Resource
from faletl.staging.digest import digest_of, digest_sums, hash_expression
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import fence
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.tables import ALERTS, LOADS, METADATA, RAW


def rename(settings: Settings, old: str, new: str) -> Report:
    """Rename an account in every table, then build and publish.

    Fingerprints of charges contain the label, so they are computed again (CHANGELOG, "Data").

    Raises:
        UsageError: there is no such account, or the new label is in use, or this warehouse does not know
            of a decision that another warehouse of the landing folder made. Nothing is changed.
    """
    if not is_label(new):
        raise UsageError(
            f"{new[:80]!a} cannot be a label: it must be printable, with at most 200 characters"
        )
    warehouse = _existing_warehouse(settings)
    with (
        scratch_folder() as scratch,
        warehouse.lease("faletl accounts rename") as lease,
        lease.transaction(),
    ):
        known = known_accounts(lease.connection)
        _require(known, old)
        relabel.require_followed(lease.connection, decisions.recorded(settings))
        if new in known:
            raise UsageError(
                f"there is already an account {new!a}, and two cannot be merged; choose another label"
            )
        version = fence(lease, changes_data=True)
        _rename_rows(settings, warehouse, lease, old, new, scratch)
        lease.connection.execute(
            sa.update(LOADS).where(LOADS.c.account == new).values(data_version=version)
        )
        make_next_build_full(lease.connection)
        _decide(
            settings,
            lease.connection,
            AccountRenamed(
                decided_at=decisions.next_instant(settings),
                decided_by=decisions.user_name(),
                account=old,
                new_account=new,
            ),
        )
    return _full_build(settings)


@dataclass(frozen=True, slots=True)
class Extent:
    """The loaded data of an account: rows in raw, and the UTC days of its windows."""

    rows: int
    days: int
    first_day: date | None
    last_day: date | None


def extent(settings: Settings, label: str) -> Extent:
    """Return what `forget` would delete; raises UsageError if there is no such account."""
    with _existing_warehouse(settings).reading() as connection:
        assert connection is not None  # noqa: S101  # checked in _existing_warehouse
        _require(known_accounts(connection), label)
        rows = sum(
            connection.execute(
                sa.select(sa.func.count()).select_from(table).where(table.c["_account"] == label)
            ).scalar_one()
            for table in RAW.values()
        )
        starts = connection.execute(
            sa.select(LOADS.c.window_start).where(LOADS.c.account == label, LOADS.c.is_current)
        ).scalars()
        days = {start.astimezone(UTC).date() for start in starts}
    return Extent(rows, len(days), min(days, default=None), max(days, default=None))


def forget(settings: Settings, label: str) -> Report:
    """Delete an account's rows from every table, then build and publish.

    Its landed pages stay until they are pruned, and are never loaded again. An account that was
    forgotten by mistake can be extracted again.

    Raises:
        UsageError: there is no such account, or as for `rename`; nothing is changed.
    """
    warehouse = _existing_warehouse(settings)
    with warehouse.lease("faletl accounts forget") as lease, lease.transaction():
        _require(known_accounts(lease.connection), label)
        relabel.require_followed(lease.connection, decisions.recorded(settings))
        fence(lease, changes_data=True)
        for column in _labels():
            lease.connection.execute(sa.delete(column.table).where(column == label))
        make_next_build_full(lease.connection)
        _decide(
            settings,
            lease.connection,
            AccountForgotten(
                decided_at=decisions.next_instant(settings),
                decided_by=decisions.user_name(),
                account=label,
            ),
        )
    return _full_build(settings)


def _decide(
    settings: Settings, connection: sa.Connection, decision: AccountRenamed | AccountForgotten
) -> None:
    relabel.follow(connection, [decision])
    decisions.record(settings, decision)


def _existing_warehouse(settings: Settings) -> Warehouse:
    warehouse = open_warehouse(settings)
    with warehouse.reading() as connection:
        if connection is None:
            raise UsageError("there is no account yet; run faletl run first")
    return warehouse


def _require(known: Mapping[str, Account], label: str) -> None:
    if label not in known:
        labels = ", ".join(map(ascii, sorted(known))) or "none yet"
        raise UsageError(f"there is no account {label!a}; the accounts are: {labels}")


def _full_build(settings: Settings) -> Report:
    report = Report(new_run_id())
    build_and_publish(settings, report, builds="always")
    return report


def _labels() -> Iterable[sa.Column[Any]]:
    """Yield the account column of each table of raw and ops that has one."""
    for table in METADATA.sorted_tables:
        for name in ("_account", "account"):
            if table.schema in ("raw", "ops") and name in table.c:
                yield table.c[name]


def _rename_rows(
    settings: Settings, warehouse: Warehouse, lease: Lease, old: str, new: str, scratch: Path
) -> None:
    for name, resource in RESOURCES.items():
        if resource.identity:
            _rehash(
                settings, warehouse, lease.connection, resource, old, new, scratch / f"{name}.parquet"
            )
    for column in _labels():
        lease.connection.execute(sa.update(column.table).where(column == old).values({column.name: new}))
    names_new = sa.func.replace(
        ALERTS.c.detail, decisions.account_option(old), decisions.account_option(new)
    )
    lease.connection.execute(
        sa.update(ALERTS)
        .where(ALERTS.c.account == new, ALERTS.c.resolved_at.is_(None))
        .values(detail=names_new)
    )


def _rehash(
    settings: Settings,
    warehouse: Warehouse,
    connection: sa.Connection,
    resource: Resource,
    old: str,
    new: str,
    path: Path,
) -> None:
    """Replace the rows of an account with those that staging would make for its new label.

    They go through DuckDB for either database, so that the rule of a hash is in one place. The digest
    of a load is updated too, unless its rows did not match it before.
    """
    table = RAW[resource.name]
    has_old_label = table.c["_account"] == old
    warehouse.export_rows(connection, sa.select(table).where(has_old_label), path)
    renamed = (
        f"(select * replace ({quoted(new)} as _account, {hash_expression(new, resource)} as _hash) "
        f"from {quoted(path)})"
    )
    before, after = (
        _digests(settings, resource, source, path.parent) for source in (quoted(path), renamed)
    )
    deleted = connection.execute(sa.delete(table).where(has_old_label)).rowcount
    warehouse.load_rows(connection, table, renamed, path.parent)
    loaded_rows = connection.execute(
        sa.select(sa.func.count()).select_from(table).where(table.c["_account"] == new)
    ).scalar_one()
    if loaded_rows != deleted:
        raise WarehouseError(
            f"{table.fullname} has {loaded_rows} of {deleted} rows; nothing was renamed"
        )
    for load_id, digest in after.items():
        connection.execute(
            sa.update(LOADS)
            .where(LOADS.c.load_id == load_id, LOADS.c.digest == before[load_id])
            .values(digest=digest)
        )
    path.unlink()


def _digests(settings: Settings, resource: Resource, source: str, scratch: Path) -> dict[str, str]:
    """Return the digest of the rows of each load, computed as in staging."""
    with duck.engine(settings.memory, scratch) as engine:
        sums = digest_sums(resource)
        result = engine.execute(f"select _load_id, {sums} from {source} group by _load_id")
        return {load_id: digest_of(sums) for load_id, *sums in result.fetchall()}
