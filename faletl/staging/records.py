"""Typed records: landed pages become one Parquet file."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import duckdb
import msgspec

from faletl.duck import count, quoted
from faletl.errors import ContractError, FaletlError
from faletl.fal.bodies import one_body
from faletl.findings import QuarantinedRow
from faletl.landing.extracts import Manifest, SealedExtract
from faletl.money import with_exact_numbers
from faletl.resources import Column, Kind, Resource
from faletl.staging.columns import (
    TOTALS,
    breach_expression,
    contradictions,
    original_text,
    read_type,
    typed_expression,
    unusable_expression,
)
from faletl.staging.contract import (
    LARGEST_RECORD,
    Contract,
    records_of,
    require_small,
    require_small_around,
    tree_of,
)
from faletl.staging.digest import hash_expression
from faletl.windows import instant
from faletl.wire import LIST, OBJECT, as_json

log = logging.getLogger(__name__)

_ROW_GROUP = 20_480
"""Rows of a group in a file; each thread has one group in memory. An insert takes twice as long from
groups that are larger than DuckDB's own of 122,880 rows."""


_MAX_QUARANTINED_ROWS = 1000  # of one extract in ops.quarantine; the landed pages have all


_MAX_QUARANTINED_CHARACTERS = 2**21  # of the texts of these rows


_CHUNK_BYTES = 2**20  # of records whose numbers are converted together


_PROBE_BYTES = 200  # of a list, to find its place in its object


Level: TypeAlias = tuple[Mapping[str, msgspec.Raw], list[msgspec.Raw]]
"""An object of a page that contains records, and these records, as bytes."""


MAX_NAMED_ROWS = 3
"""The number of rows with the same flaw that a sentence names."""


@dataclass(slots=True)
class Typed:
    """The result of typing the records of one walk; those that violate the contract are quarantined.

    `breaches` counts these, `quarantined` has the first of them. `unusable` counts the rows with a value
    that stays empty, `unusable_values` describes the first of them.
    """

    contract: Contract
    rounded: int = 0
    breaches: int = 0
    quarantined: tuple[QuarantinedRow, ...] = ()
    unusable: int = 0
    unusable_values: tuple[str, ...] = ()


def typed_records(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    label: str,
    path: Path,
) -> Typed:
    """Write the records of the `label` calls as the columns of their raw table.

    The file also has `_is_inside` (whether the row is in the window), `_breach` (why the record violates
    the contract, else empty) and `_unusable` (values that stay empty). Every `_ordinal` is still 1.
    Records without the right JSON types are left out.
    """
    lines = path.with_suffix(".ndjson")
    odd = f"select count(*) from {quoted(path)} where _breach <> '' or _unusable <> ''"
    try:
        typed = _write_lines(landed, resource, label, lines, is_each=False)
        _write_typed(connection, landed, resource, label, lines, path)
        is_odd = count(connection, odd) > 0
    except duckdb.InvalidInputException:
        is_odd = True
    if is_odd:
        log.debug("%s: the records are typed number by number", resource.name)
        typed = _write_lines(landed, resource, label, lines, is_each=True)
        _write_typed(connection, landed, resource, label, lines, path)
        _quarantine_breaches(connection, landed, resource, label, path, typed)
        _describe_unusable(connection, resource, path, typed)
    lines.unlink()
    return typed


def _describe_unusable(
    connection: duckdb.DuckDBPyConnection, resource: Resource, path: Path, typed: Typed
) -> None:
    """Describe the rows with a value that stays empty."""
    unusable = f"from {quoted(path)} where _unusable <> '' and _breach = ''"
    typed.unusable = count(connection, f"select count(*) {unusable}")
    if not typed.unusable:
        return
    endpoint_id = "endpoint_id" if resource.has_endpoints else "null"
    rows = connection.execute(
        f"select _page, _row, {endpoint_id}, _unusable {unusable} "
        f"order by _page, _row limit {MAX_NAMED_ROWS}"
    ).fetchall()
    typed.unusable_values = tuple(
        f"page {page} row {row}{of_endpoint(endpoint)}: {ascii(values)[1:-1]}"
        for page, row, endpoint, values in rows
    )


def _quarantine_breaches(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    label: str,
    path: Path,
    typed: Typed,
) -> None:
    """Quarantine the rows whose values violate the contract; their text is in the landed page."""
    breached = f"from {quoted(path)} where _breach <> ''"
    typed.breaches += count(connection, f"select count(*) {breached}")
    breaches = connection.execute(
        f"select _page, _row, _breach {breached} order by _page, _row limit {_MAX_QUARANTINED_ROWS}"
    ).fetchall()
    rows_path, pages = _rows_path(resource, label), landed.manifest.pages(label)
    for page, rows in groupby(breaches, key=lambda breach: int(breach[0])):
        with one_body():
            records = records_of(as_json(landed.body(pages[page - 1])), rows_path)
            typed.quarantined += tuple(
                QuarantinedRow.of(page, row, why, bytes(records[row - 1])) for _, row, why in rows
            )
            del records
    typed.quarantined = _first(sorted(typed.quarantined, key=lambda row: (row.page, row.row)))


def _first(rows: Sequence[QuarantinedRow]) -> tuple[QuarantinedRow, ...]:
    """Return the first of these rows, as many as the quarantine takes."""
    sizes = accumulate(len(row.raw_json) for row in rows[:_MAX_QUARANTINED_ROWS])
    return tuple(
        row for row, size in zip(rows, sizes, strict=False) if size <= _MAX_QUARANTINED_CHARACTERS
    )


def _rows_path(resource: Resource, label: str) -> tuple[str, ...]:
    return resource.proof.rows_path if label in TOTALS and resource.proof else resource.rows_path


def _write_lines(
    landed: SealedExtract, resource: Resource, label: str, lines: Path, *, is_each: bool
) -> Typed:
    """Write each record on a line, after its page, its row and the fields around it.

    With `is_each`, every number is converted, and every record is checked for a key that comes twice.
    """
    rows_path, columns = _rows_path(resource, label), _columns(resource, label)
    known = frozenset(tuple(path.split(".")) for path in resource.not_kept)
    if label in TOTALS and resource.proof:  # of a total only the compared fields are checked
        known |= {(column.name,) for column in resource.proof.columns}
    typed = Typed(Contract(rows_path, columns, known))
    parameter_names = [column.name for column in columns if column.is_asked]
    pages = [
        (page, {name: call.query[name][0] for name in parameter_names})
        for call in landed.manifest.calls
        if call.label == label
        for page in call.pages
    ]
    with lines.open("wb") as file:
        for number, (page, parameters) in enumerate(pages, start=1):
            outer = {"_page": number, **parameters}
            try:
                with one_body():
                    _write_page(file, landed.body(page), outer, typed, is_each=is_each)
            except FaletlError as error:
                raise error.at(page=number, request_id=page.request_id) from None
    return typed


def _write_page(
    file: BinaryIO, body: bytes, outer: Mapping[str, Any], typed: Typed, *, is_each: bool
) -> None:
    """Write the records of a page and quarantine those of other types; `outer` has its number."""
    columns = typed.contract.columns
    names = _names_of_numbers(columns)
    body = as_json(body)
    breaches = typed.contract.breaches(body)
    levels = _levels(body, typed.contract.rows_path)
    if is_each:
        breaches = {**_rows_with_a_key_twice(levels), **breaches}
    is_one_line = b"\n" not in body and b"\r" not in body
    for lines in _raw_lines(levels, columns, outer, breaches, is_one_line=is_one_line):
        text = _with_texts_as_numbers(lines, columns, typed.contract)
        text, rounded = with_exact_numbers(text, names, is_each=is_each)
        typed.rounded += rounded
        file.write(text)
    _quarantine_untyped(typed, outer["_page"], breaches, levels)


def _quarantine_untyped(
    typed: Typed, page: int, breaches: Mapping[int, str], levels: Sequence[Level]
) -> None:
    typed.breaches += len(breaches)
    if breaches and len(typed.quarantined) < _MAX_QUARANTINED_ROWS:
        records = [record for _, records in levels for record in records]
        first = list(breaches.items())[: _MAX_QUARANTINED_ROWS - len(typed.quarantined)]
        more = [QuarantinedRow.of(page, row, why, bytes(records[row - 1])) for row, why in first]
        typed.quarantined = _first([*typed.quarantined, *more])


def _write_typed(
    connection: duckdb.DuckDBPyConnection,
    landed: SealedExtract,
    resource: Resource,
    label: str,
    lines: Path,
    path: Path,
) -> None:
    columns, manifest = _columns(resource, label), landed.manifest
    outer = [column for column in columns if column.is_outer or column.is_asked]
    inner = tuple(column for column in columns if column not in outer)
    read = {"_page": "integer", "_row": "integer", **{column.name: "varchar" for column in outer}}
    read["record"] = read_type(tree_of(inner))
    types = ", ".join(f"{quoted(name)}: {quoted(kind)}" for name, kind in read.items())
    source = (  # in SQL: DuckDB's method of that name imports pandas, which nothing here needs
        f"read_json({quoted(lines)}, format = 'newline_delimited', columns = {{{types}}}, "
        f"maximum_object_size = {LARGEST_RECORD})"
    )
    is_bounded = label not in TOTALS  # a sum may be larger than any amount
    fields = ", ".join(
        f'{original_text(column)} as "text of {column.name}", '
        f'{typed_expression(column, is_bounded=is_bounded)} as "{column.name}"'
        for column in columns
    )
    typed = ", ".join(f'"{column.name}"' for column in columns)
    connection.execute(f"""
        copy (
            select
                {quoted(manifest.account)} as _account, '{manifest.load_id}' as _load_id, _page, _row,
                {"".join(f"{more}, " for more in _more_columns(landed, resource, label))}
                {typed},
                {breach_expression(columns, contradictions(resource, label))} as _breach,
                {unusable_expression(columns)} as _unusable
            from (select _page, _row, {fields} from {source})
        ) to {quoted(path)} (format parquet, row_group_size {_ROW_GROUP})
    """)


def _more_columns(landed: SealedExtract, resource: Resource, label: str) -> Iterator[str]:
    """Yield SQL for the columns of the file that are not fields of a record."""
    window = landed.manifest.window
    if resource.nothing_without:
        yield f'"text of {resource.nothing_without}" is not null as _is_inside'
    elif label in TOTALS or resource.time is None:
        yield "true as _is_inside"
    else:
        start, end = _asked_bounds(landed.manifest, label)
        yield f'"{resource.time}" >= {start} and "{resource.time}" < {end} as _is_inside'
    if label in TOTALS:
        return
    if resource.window == "snapshot":
        yield f"timestamptz '{instant(window.start)}' as _snapshot_at"
    if resource.identity:
        yield f"{hash_expression(landed.manifest.account, resource)} as _hash"
        yield "1 as _ordinal"


def _asked_bounds(manifest: Manifest, label: str) -> tuple[str, str]:
    """Return SQL for the bounds of the question that a record's page answers: those of its part."""
    windows = [
        call.bounds or manifest.window
        for call in manifest.calls
        if call.label == label
        for _ in call.pages
    ]
    if set(windows) <= {manifest.window}:
        windows = [manifest.window]
    start, end = (
        [f"timestamptz '{instant(at)}'" for at in edge]
        for edge in zip(*((window.start, window.end) for window in windows), strict=True)
    )
    if len(windows) == 1:
        return start[0], end[0]
    return f"([{', '.join(start)}])[_page]", f"([{', '.join(end)}])[_page]"


def _columns(resource: Resource, label: str) -> tuple[Column, ...]:
    return _proof_columns(resource) if label in TOTALS else resource.columns


_NUMBER_IN_TEXT = rb'("%b"\s*:\s*)"(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)"'


def _names_of_numbers(columns: tuple[Column, ...]) -> frozenset[bytes]:
    """Return the names of the JSON fields with numbers, as `with_exact_numbers` expects them."""
    numbers = [c for c in columns if c.kind in (Kind.AMOUNT, Kind.WHOLE, Kind.SECONDS)]
    names = {column.steps[-1] for column in numbers} | {c.fallback for c in numbers if c.fallback}
    return frozenset(b'"%b"' % name.encode() for name in names)


def _with_texts_as_numbers(body: bytes, columns: tuple[Column, ...], contract: Contract) -> bytes:
    """Return the lines with numbers in place of numeric texts, in columns that may have these."""
    for column in columns:
        is_lenient = column.may_be_text or column.kind is Kind.SECONDS
        if is_lenient and column.steps in contract.retyped:
            body = re.sub(_NUMBER_IN_TEXT % column.steps[-1].encode(), rb"\1\2", body)
    return body


def _levels(body: bytes, rows_path: tuple[str, ...]) -> list[Level]:
    """Return the objects that contain records, and their records.

    Raises:
        ContractError: an object around the records has a key twice (DuckDB finds this in records), or
            is too large.
        DataRefusedError: a record is too large.
    """
    if not rows_path:
        require_small(body)
        return [({}, [msgspec.Raw(body.strip())])]
    objects: list[bytes | msgspec.Raw] = [body]
    for step in rows_path:
        fields = [OBJECT.decode(text) for text in objects]
        for text, decoded in zip(objects, fields, strict=True):
            require_small_around(text, decoded[step])
            _require_keys_once(_without(text, decoded[step]))
        lists = [LIST.decode(decoded[step]) for decoded in fields]
        objects = [inner for rows in lists for inner in rows]
    for record in objects:
        require_small(record)
    return list(zip(fields, lists, strict=True))


def _without(text: bytes | msgspec.Raw, rows: msgspec.Raw) -> bytes:
    """Return the JSON object with an empty list in place of its records; unchanged if it has none."""
    body = bytes(text)  # a large page is not copied
    start, end = body.find(memoryview(rows)[:_PROBE_BYTES]), len(memoryview(rows))
    is_found = start >= 0 and memoryview(body)[start : start + end] == memoryview(rows)
    return body[:start] + b"[]" + body[start + end :] if is_found else body


def _require_keys_once(text: bytes) -> None:
    """Raise ContractError where an object has a key twice, because either value could be right."""
    try:
        json.loads(text, object_pairs_hook=_once, parse_int=str, parse_float=str, strict=False)
    except (RecursionError, ValueError) as error:
        raise ContractError(f"fal's answer cannot be read: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ContractError(f"fal's answer has the key {twice[:80]!a} twice in one object")


def _rows_with_a_key_twice(levels: Sequence[Level]) -> dict[int, str]:
    """Return the rows of a page whose records have a key twice, each with its reason."""
    breaches: dict[int, str] = {}
    all_records = (record for _, records in levels for record in records)
    for row, record in enumerate(all_records, start=1):
        try:
            _require_keys_once(bytes(record))
        except ContractError as error:
            breaches[row] = error.message
    return breaches


def _raw_lines(
    levels: Sequence[Level],
    columns: tuple[Column, ...],
    outer: Mapping[str, Any],
    without: Container[int],
    *,
    is_one_line: bool,
) -> Iterator[bytes]:
    """Yield the records of a page unchanged, one on each line, after its page, row and outer fields.

    They come in chunks, so that a large page is not in memory twice.
    """
    names = [column.name for column in columns if column.is_outer]
    lead, lines, size, row = msgspec.json.encode(outer)[:-1], list[bytes](), 0, 0
    for level, records in levels:
        fields = b"".join(
            b',"%s":%s' % (name.encode(), bytes(level.get(name, b"null"))) for name in names
        )
        head = lead + fields + b',"_row":'
        for record in records:
            row += 1
            if row in without:
                continue
            text = record if is_one_line else _one_line(record)
            lines.append(b'%b%d,"record":%b}\n' % (head, row, text))
            size += len(lines[-1])
            if size > _CHUNK_BYTES:
                yield b"".join(lines)
                lines, size = [], 0
    yield b"".join(lines)


def _one_line(record: msgspec.Raw) -> bytes:
    """Return a JSON object without its line breaks, which can only be between its tokens."""
    return bytes(record).replace(b"\n", b" ").replace(b"\r", b" ")


def _proof_columns(resource: Resource) -> tuple[Column, ...]:
    proof = resource.with_any_sign.proof  # a sum may have any sign
    names = (*proof.key, *proof.sums, "currency") if proof else ()
    return tuple(column for column in (proof.columns if proof else ()) if column.name in names)


def of_endpoint(endpoint_id: str | None) -> str:
    """Return the endpoint in parentheses, to follow the number of a row; empty where it is unknown."""
    return f" ({ascii(endpoint_id)[1:-1][:80]})" if endpoint_id else ""
