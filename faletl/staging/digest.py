"""Digests of rows, and the numbers that distinguish exact twins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from faletl.duck import count, quoted
from faletl.resources import Kind, Resource
from faletl.staging.columns import value

DIGEST_FORM = "-2"
"""The end of a digest, which names its form. Digests of two forms are never equal: a window with an
older form is loaded again when it is next extracted."""


_TEXTS = (Kind.TEXT, Kind.LIST)


def hash_expression(account: str, resource: Resource) -> str:
    """Return DuckDB SQL for the hash that identifies a row without an id; it includes the account."""
    values = [quoted(account), *(value(resource.column(name)) for name in resource.identity)]
    return f"md5(concat({', chr(31), '.join(values)}))"  # concat takes null as an empty text


_OWN = "_is_inside, _breach, _unusable"
"""Columns of a file that the raw table does not have."""


def rows_source(
    connection: duckdb.DuckDBPyConnection, resource: Resource, path: Path
) -> tuple[str, tuple[Path, ...]]:
    """Return DuckDB SQL for the rows of the window (see `Staged`), and the files that it reads.

    Where a key comes twice (because pages shifted), the later row counts.
    """
    twins, files = path.with_suffix(".twins.parquet"), [path]
    columns, rows, latest = f"* exclude ({_OWN})", f"{quoted(path)} as rows", ""
    if resource.identity and number_twins(connection, resource, path, twins):
        columns = f"* exclude ({_OWN}, n) replace (coalesce(n, 1) as _ordinal)"
        rows += f" left join {quoted(twins)} as twins using (_page, _row)"
        files.append(twins)
    elif resource.key and not resource.repeats:
        key = ", ".join(resource.key)
        order = "order by _page desc, _row desc"
        latest = f"qualify row_number() over (partition by {key} {order}) = 1"
    return f"(select {columns} from {rows} where _is_inside and _breach = '' {latest})", tuple(files)


def number_twins(
    connection: duckdb.DuckDBPyConnection, resource: Resource, path: Path, twins: Path
) -> bool:
    """Number the rows with the same `_hash` in a file, in any order of rows; false if there are none.

    Only twins are numbered, because a window function over millions of rows would sort them all.
    """
    rows = f"from {quoted(path)} where _is_inside and _breach = ''"
    connection.execute(
        "create or replace temp table twin_hashes as "
        f"select _hash {rows} group by _hash having count(*) > 1"
    )
    if not count(connection, "select count(*) from twin_hashes"):
        return False
    names = ", ".join(f'"{column.name}"' for column in resource.columns)
    order = f"over (partition by _hash order by {names}, _page, _row)"
    connection.execute(
        f"copy (select _page, _row, cast(row_number() {order} as integer) as n {rows} "
        f"and _hash in (from twin_hashes)) to {quoted(twins)} (format parquet)"
    )
    return True


def rows_digest(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> str:
    """Return a fingerprint of the multiset of rows: the same for any order and any cut into pages."""
    sums = connection.execute(f"select {digest_sums(resource)} from {source}").fetchone()
    return digest_of(sums)


def digest_sums(resource: Resource) -> str:
    """Return DuckDB SQL for the sums over all rows from which `digest_of` makes the digest.

    Each row counts with 64 bits of the MD5 of its values. Their text is different for different rows:
    first the numbers, then the lengths of the texts, then the texts.
    """
    numbers = ["_hash", "_ordinal"] if resource.identity else []
    numbers += [value(column) for column in resource.columns if column.kind not in _TEXTS]
    texts = [f'"{column.name}"' for column in resource.columns if column.kind in _TEXTS]
    numbers += [f"strlen({text})" for text in texts]
    values = ", ',', ".join([*numbers, ", ".join(texts)])
    return f"count(*), sum(cast(md5_number(concat({values})) >> 64 as hugeint))"


def digest_of(sums: Sequence[Any] | None) -> str:
    """Return the digest of the rows with these sums, with its form at the end."""
    return hashlib.sha256(repr(tuple(sums or ())).encode()).hexdigest() + DIGEST_FORM
