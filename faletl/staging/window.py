"""Staging: landed pages → typed, proven rows of one window, set-wise in DuckDB.

Records go to DuckDB as they are, one a line, and every number is cast from its text to DECIMAL. DuckDB
reads a JSON number through a double, which keeps 15 digits for certain: so a longer one becomes a JSON
text with the exact amount (faletl/money.py), and where anything cannot be taken that way, each number
does. The result is a Parquet file of all records, written once, and a query over it for the rows of the
window, with the columns of the raw table, which any warehouse can take in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import duckdb
import msgspec

from faletl import duck
from faletl.config import Settings
from faletl.errors import (
    ContractError,
    DataRefusedError,
    ExhaustedError,
    FaletlError,
    StorageError,
    TamperedError,
    UnprovenError,
)
from faletl.fal.bodies import one_body
from faletl.fal.pages import as_json
from faletl.findings import Drift, Findings, SetAside, acceptance_key
from faletl.landing.decisions import accept_command
from faletl.landing.extracts import MANIFEST, Landed, Manifest, Part
from faletl.landing.storage import room
from faletl.money import (
    DECIMAL_TYPE,
    HALF_NANO,
    LARGEST,
    SCALE,
    decimal_of,
    plain,
    text_of,
    with_exact_numbers,
)
from faletl.resources import RESOURCES, WHOLE_SINCE, Column, Kind, Proof, Resource
from faletl.staging.contract import (
    LARGEST_RECORD,
    LIST,
    OBJECT,
    TOO_LARGE,
    Contract,
    Tree,
    records_of,
    require_small,
    require_small_around,
    tree_of,
)
from faletl.warehouse import quoted
from faletl.windows import Window, instant

log = logging.getLogger(__name__)


_ROW_GROUP = 20_480
"""Rows of a group in a file, of which each thread holds one in memory. An insert of groups larger than
the 122,880 rows of DuckDB's own takes twice as long."""

DIGEST_FORM = "-2"
"""How a digest ends that is made as it is now. One of another form is never equal to it: such a window
is loaded once more when it is read again."""

_TEXTS = (Kind.TEXT, Kind.LIST)
_TELL = 3  # so many offenders are named in an error
_KEEP = 1000  # so many are kept in ops.quarantine of one read; the landed pages have all
_KEEP_CHARACTERS = 2**21  # of the texts of these rows
_LITTLE = 2**20  # compressed bytes of pages
_TOGETHER = 2**20  # bytes of records whose numbers are looked at together
_ENOUGH = 200  # bytes of a list, to find where in its object it stands

Level: TypeAlias = tuple[Mapping[str, msgspec.Raw], list[msgspec.Raw]]
"""An object of a page that holds records, and these, as bytes."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Typed rows of one window, ready to be loaded.

    `source` is the SQL of DuckDB for them, to stand behind `from`: a query over Parquet `files`, with
    the columns of the raw table. `digest` depends on the rows alone: not on their order, their pages, or
    the load. `proof` says how completeness was shown: `summary`, `two walks`, `none` (the resource has
    no control total) or `differs` (a day still open, or one that a person accepted: `is_accepted`).
    `control_total` is fal's own sum of the window's
    cost, where it told one. `asked_ids` are the endpoints that the rows speak for; None where they speak
    for all.
    """

    source: str
    files: tuple[Path, ...]
    landed: Landed
    resource: Resource
    rows: int
    digest: str
    proof: str
    control_total: str | None
    landed_rows: int
    dropped_rows: int
    repeated_rows: int
    doubtful_rows: int
    rounded_amounts: int
    cost_total: str
    is_accepted: bool
    findings: Findings
    endpoint_ids: frozenset[str]
    asked_ids: frozenset[str] | None

    def discard(self) -> None:
        """Delete the files; the rows are loaded, or nobody will."""
        for file in self.files:
            file.unlink(missing_ok=True)


def stage_window(
    settings: Settings, landed: Landed, scratch: Path, accepted: Container[str] = ()
) -> Staged:
    """Type, check and prove the rows of a complete read; Parquet files go to `scratch`.

    `accepted` are keys of what people accepted of rows that break their contract: then
    negative amounts are taken as they are, and the window is loaded without what cannot be typed.

    Raises:
        TamperedError: a landed page is not the one that was landed.
        ContractError, DataRefusedError: a record is not what the catalogue says.
        UnprovenError: the rows do not add up to fal's control total, and the window is closed.
    """
    manifest = landed.manifest
    resource = RESOURCES[manifest.resource]
    try:
        # A window with a large page keeps its turn to the end: the engine holds much of it, too.
        with one_body(), _engine(settings, scratch, landed) as connection:
            return _stage(connection, landed, resource, scratch, accepted)
    except FaletlError as error:
        raise error.at(resource=resource.name, window=str(manifest.window)) from None
    except duckdb.InvalidInputException as error:
        is_huge = "maximum_object_size" in str(error)
        said = str(error).splitlines()[0]
        sentence = f"fal's records cannot be read: {said}; the window is not loaded"
        raise DataRefusedError(
            TOO_LARGE if is_huge else sentence, resource=resource.name, window=str(manifest.window)
        ) from None
    except duckdb.OutOfMemoryException as error:
        raise ExhaustedError.of_engine(
            "staging", error, resource=resource.name, window=str(manifest.window)
        ) from None
    except (OSError, duckdb.IOException) as error:
        raise StorageError(
            f"staging failed: {str(error).splitlines()[0]} ({room(scratch)}); make room below "
            f"{scratch.parent}, or set TMPDIR", resource=resource.name, window=str(manifest.window),
        ) from None  # fmt: skip


def _stage(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    scratch: Path,
    accepted: Container[str],
) -> Staged:
    manifest = landed.manifest
    path = scratch / f"{manifest.load_id}.parquet"
    typed = _typed(connection, landed, resource, "rows", path)
    key = acceptance_key(manifest.account, _findings(landed, typed).rows_digest)
    is_accepted = typed.breaches > 0 and key in accepted
    as_read = resource.with_any_sign if is_accepted else resource
    if is_accepted:
        typed = _typed(connection, landed, as_read, "rows", path)
    findings = _findings(landed, typed)
    held, inside = connection.execute(
        f"select count(*), count(*) filter (where _is_inside) from {quoted(path)} where _breach = ''"
    ).fetchone() or (0, 0)
    dropped = held - inside
    if dropped:
        log.warning("%s, window %s: %s", resource.name, manifest.window, _why_dropped(resource, dropped))
    if typed.unusable:
        log.warning("%s, window %s: %s", resource.name, manifest.window, _why_empty(typed))
    source, files = _source(connection, resource, path)
    found = connection.execute(
        f"select {digest_sums(resource)}, {_doubtful_rows(resource)}, {_cost_total(resource)}, "
        f"{_endpoint_ids(resource)} from {source}"
    ).fetchone()
    rows, hashes, doubtful, total, endpoint_ids = found or (0, None, 0, "0", None)
    digest = digest_of((rows, hashes))
    try:
        proof, control_total = _prove(
            connection, landed, as_read, source, digest, typed, scratch, is_accepted=is_accepted
        )
    except FaletlError as error:
        error.findings = findings
        raise
    if typed.breaches:
        why = "" if resource.proof is None else (
            "fal's control total says that nothing of value is missing without them, so "
        )  # fmt: skip
        because = f"{why}they are quarantined and the others are loaded (faletl quarantine list)"
        log.warning("%s, window %s: %s", resource.name, manifest.window, _told(typed, because))
    return Staged(
        source=source,
        files=files,
        landed=landed,
        resource=resource,
        rows=rows,
        digest=digest,
        proof=proof,
        control_total=control_total,
        landed_rows=sum(page.rows for page in manifest.pages("rows")),
        dropped_rows=dropped,
        repeated_rows=inside - rows,
        doubtful_rows=doubtful,
        rounded_amounts=typed.rounded,
        cost_total=total,
        is_accepted=is_accepted,
        findings=findings,
        endpoint_ids=frozenset(endpoint_ids or ()),
        asked_ids=manifest.asked_ids if resource.ids_per_call else None,
    )


def _findings(landed: Landed, typed: Typed) -> Findings:
    """What was noticed of the rows."""
    drifts = tuple(_drifts(typed.contract, landed.manifest.window))
    return Findings(landed, typed.breaches, typed.set_aside, drifts)


def _why_dropped(resource: Resource, rows: int) -> str:
    """Why rows that keep their contract are not of the window, as a sentence."""
    if resource.nothing_without:
        return f"fal sent no {resource.nothing_without}, so there is nothing to load"
    return f"fal sent {rows} rows outside the window; they are dropped"


def _why_empty(typed: Typed) -> str:
    """Which values were left empty though fal sent something, as a sentence."""
    shown = "; ".join(typed.unusable_values) + "; …" * (typed.unusable > len(typed.unusable_values))
    return f"{typed.unusable:,} of fal's rows have values that cannot be used and stay empty ({shown})"


def _drifts(contract: Contract, window: Window) -> Iterator[Drift]:
    """What fal changed of its records, as far as the pages show.

    Days of before some field was known may well be without it.
    """
    for steps, sample in contract.new.items():
        yield Drift(".".join(steps), "new", sample)
    for steps, sample in contract.retyped.items():
        yield Drift(".".join(steps), "retyped", sample)
    for steps in contract.missing if window.day >= WHOLE_SINCE else ():
        yield Drift(".".join(steps), "missing", None)


def _doubtful_rows(resource: Resource) -> str:
    """SQL for the number of rows that are kept as fal sent them though something is odd about them."""
    odd = " or ".join(f"({predicate})" for predicate in resource.expected.values()) or "false"
    return f"count(*) filter (where {odd})"


def _cost_total(resource: Resource) -> str:
    """SQL for the text of what all rows cost, "0" where they cost nothing."""
    has_cost = any(column.name == "cost_total" for column in resource.columns)
    return f"cast(coalesce({'sum(cost_total)' if has_cost else 'null'}, 0) as varchar)"


def _engine(
    settings: Settings, scratch: Path, landed: Landed
) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    size = sum(page.bytes for call in landed.manifest.calls for page in call.pages)
    # More threads only get in each other's way over little; windows run side by side anyway.
    threads = {"threads": "1"} if size < _LITTLE else {}
    # Without an order of rows threads need not wait for each other.
    return duck.engine(settings.memory, scratch, preserve_insertion_order="false", **threads)


def _endpoint_ids(resource: Resource) -> str:
    """SQL for the list of endpoints that the rows are of; null where they are of none."""
    return "list(distinct endpoint_id)" if _has_ids(resource) else "null"


def _has_ids(resource: Resource) -> bool:
    return any(column.name == "endpoint_id" for column in resource.columns)


# --- From landed bytes to typed columns -----------------------------------------------------------


@dataclass(slots=True)
class Typed:
    """What became of the records of one walk: those that broke their contract were set aside.

    `breaches` counts all of them, `set_aside` holds the first ones. `unusable` counts the rows with a
    value that was left empty, `unusable_values` describes the first ones.
    """

    contract: Contract
    rounded: int = 0
    breaches: int = 0
    set_aside: tuple[SetAside, ...] = ()
    unusable: int = 0
    unusable_values: tuple[str, ...] = ()


def _typed(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    label: str,
    path: Path,
) -> Typed:
    """Write the records of the `label` calls as the columns of their raw table.

    Beside them stand `_is_inside` (the window), `_breach` (why the record cannot be taken, else empty)
    and `_unusable` (values that were left empty). Every `_ordinal` is 1 yet. Records that are not even
    of the right JSON types are left out.
    """
    lines = path.with_suffix(".ndjson")
    odd = f"select count(*) from {quoted(path)} where _breach <> '' or _unusable <> ''"
    try:
        typed = _write_lines(landed, resource, label, lines, is_each=False)
        _write_typed(connection, landed, resource, label, lines, path)
        is_odd = _count(connection, odd) > 0
    except duckdb.InvalidInputException:
        is_odd = True
    if is_odd:
        log.debug("%s: the records are typed number by number", resource.name)
        typed = _write_lines(landed, resource, label, lines, is_each=True)
        _write_typed(connection, landed, resource, label, lines, path)
        _set_breaches_aside(connection, landed, resource, label, path, typed)
        _note_unusable(connection, resource, path, typed)
    lines.unlink()
    return typed


def _note_unusable(
    connection: duckdb.DuckDBPyConnection, resource: Resource, path: Path, typed: Typed
) -> None:
    """Note the rows of which a value was left empty."""
    unusable = f"from {quoted(path)} where _unusable <> '' and _breach = ''"
    typed.unusable = _count(connection, f"select count(*) {unusable}")
    if not typed.unusable:
        return
    endpoint_id = "endpoint_id" if _has_ids(resource) else "null"
    found = connection.execute(
        f"select _page, _row, {endpoint_id}, _unusable {unusable} order by _page, _row limit {_TELL}"
    ).fetchall()
    typed.unusable_values = tuple(
        f"page {page} row {row}{_of_endpoint(endpoint)}: {ascii(values)[1:-1]}"
        for page, row, endpoint, values in found
    )


def _set_breaches_aside(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    label: str,
    path: Path,
    typed: Typed,
) -> None:
    """Set the rows aside whose values cannot be taken; their text is in the landed page."""
    breached = f"from {quoted(path)} where _breach <> ''"
    typed.breaches += _count(connection, f"select count(*) {breached}")
    found = connection.execute(
        f"select _page, _row, _breach {breached} order by _page, _row limit {_KEEP}"
    ).fetchall()
    rows_path, pages = _rows_path(resource, label), landed.manifest.pages(label)
    for page, rows in groupby(found, key=lambda one: int(one[0])):
        with one_body():
            records = records_of(as_json(landed.body(pages[page - 1])), rows_path)
            typed.set_aside += tuple(
                SetAside.of(page, row, why, bytes(records[row - 1])) for _, row, why in rows
            )
            del records
    typed.set_aside = _kept(sorted(typed.set_aside, key=lambda one: (one.page, one.row)))


def _kept(set_aside: Sequence[SetAside]) -> tuple[SetAside, ...]:
    """The first of these rows, as many as are kept."""
    sizes = accumulate(len(one.raw_json) for one in set_aside[:_KEEP])
    return tuple(one for one, size in zip(set_aside, sizes, strict=False) if size <= _KEEP_CHARACTERS)


_TOTALS = ("before", "proof")
"""The walks that ask for fal's control total, in front of the rows and behind them."""


def _rows_path(resource: Resource, label: str) -> tuple[str, ...]:
    return resource.proof.rows_path if label in _TOTALS and resource.proof else resource.rows_path


def _write_lines(landed: Landed, resource: Resource, label: str, lines: Path, *, is_each: bool) -> Typed:
    """Write each record on a line, behind its page, row, and what stood around it.

    `is_each` says that each number is to be looked at, and each record for a key that comes twice.
    """
    rows_path, columns = _rows_path(resource, label), _columns(resource, label)
    known = frozenset(tuple(path.split(".")) for path in resource.not_kept)
    if label in _TOTALS and resource.proof:  # of a total only what is compared is looked at
        known |= {(column.name,) for column in resource.proof.columns}
    typed = Typed(Contract(rows_path, columns, known))
    asked = [column.name for column in columns if column.is_asked]
    pages = [
        (page, {name: call.query[name][0] for name in asked})
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
    """Write the records of a page, and note what became of them; `outer` has its number."""
    columns = typed.contract.columns
    names = _names_of_numbers(columns)
    body = as_json(body)
    breaches = typed.contract.breaches(body)
    levels = _levels(body, typed.contract.rows_path)
    if is_each:
        breaches = {**_rows_with_a_key_twice(levels), **breaches}
    is_one_line = b"\n" not in body and b"\r" not in body
    for sent in _raw_lines(levels, columns, outer, breaches, is_one_line=is_one_line):
        text = _with_texts_as_numbers(sent, columns, typed.contract)
        text, rounded = with_exact_numbers(text, names, is_each=is_each)
        typed.rounded += rounded
        file.write(text)
    _set_untyped_aside(typed, outer["_page"], breaches, levels)


def _set_untyped_aside(
    typed: Typed, page: int, breaches: Mapping[int, str], levels: Sequence[Level]
) -> None:
    typed.breaches += len(breaches)
    if breaches and len(typed.set_aside) < _KEEP:
        records = [record for _, records in levels for record in records]
        first = list(breaches.items())[: _KEEP - len(typed.set_aside)]
        more = [SetAside.of(page, row, why, bytes(records[row - 1])) for row, why in first]
        typed.set_aside = _kept([*typed.set_aside, *more])


def _write_typed(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    label: str,
    lines: Path,
    path: Path,
) -> None:
    columns, manifest = _columns(resource, label), landed.manifest
    outer = [column for column in columns if column.is_outer or column.is_asked]
    inner = tuple(column for column in columns if column not in outer)
    read = {"_page": "integer", "_row": "integer", **{column.name: "varchar" for column in outer}}
    read["record"] = _read_type(tree_of(inner))
    types = ", ".join(f"{quoted(name)}: {quoted(kind)}" for name, kind in read.items())
    source = (  # in SQL: DuckDB's method of that name imports pandas, which nothing here needs
        f"read_json({quoted(lines)}, format = 'newline_delimited', columns = {{{types}}}, "
        f"maximum_object_size = {LARGEST_RECORD})"
    )
    is_bounded = label not in _TOTALS  # a sum of amounts may be larger than one
    fields = ", ".join(
        f'{_text(column)} as "text of {column.name}", '
        f'{_typed_expression(column, is_bounded=is_bounded)} as "{column.name}"'
        for column in columns
    )
    typed = ", ".join(f'"{column.name}"' for column in columns)
    connection.execute(f"""
        copy (
            select
                {quoted(manifest.account)} as _account, '{manifest.load_id}' as _load_id, _page, _row,
                {"".join(f"{more}, " for more in _more_columns(landed, resource, label))}
                {typed},
                {_breach_expression(columns, _contradiction(resource, label))} as _breach,
                {_unusable_expression(columns)} as _unusable
            from (select _page, _row, {fields} from {source})
        ) to {quoted(path)} (format parquet, row_group_size {_ROW_GROUP})
    """)


def _breach_expression(columns: tuple[Column, ...], more: Sequence[tuple[str, str]]) -> str:
    """SQL for why a record cannot be taken, with `more` reasons; empty where it can."""
    breaches = [*more, *(breach for column in columns for breach in _breaches(column))]
    is_breach = " or ".join(f"({predicate})" for predicate, _ in breaches)
    told = ", ".join(f"case when {predicate} then {reason} end" for predicate, reason in breaches)
    return f"case when {is_breach} then concat_ws('; ', {told}) else '' end"


def _contradiction(resource: Resource, label: str) -> list[tuple[str, str]]:
    """SQL for when rows with one key contradict each other, and for the sentence; nothing elsewhere.

    An answer to ids names each once. In a list that is walked, a row may come twice on two pages, and
    the later one counts; on one page it contradicts itself.
    """
    if resource.repeats or label in _TOTALS:
        return []
    names = ", ".join(f'"{column.name}"' for column in resource.columns)
    values = f"hash({names})"
    page = "" if resource.ids_per_call else "_page, "
    among = f"over (partition by {page}{', '.join(resource.key)})"
    sentence = f"'the same {', '.join(resource.key)} comes twice, with other values'"
    return [(f"min({values}) {among} <> max({values}) {among}", sentence)]


def _unusable_expression(columns: tuple[Column, ...]) -> str:
    """SQL for the measured values that are left empty though fal sent something; mostly empty."""
    told = [
        f'case when "text of {name}" is not null and "{name}" is null '
        f"then '{name} ' || left(\"text of {name}\", 80) end"
        for name in (column.name for column in columns if column.kind is Kind.SECONDS)
    ]
    return f"concat_ws('; ', {', '.join(told)})" if told else "''"


def _more_columns(landed: Landed, resource: Resource, label: str) -> Iterator[str]:
    """SQL for what stands beside the fields of a record."""
    window = landed.manifest.window
    if resource.nothing_without:
        yield f'"text of {resource.nothing_without}" is not null as _is_inside'
    elif label in _TOTALS or resource.time is None:
        yield "true as _is_inside"
    else:
        start, end = _asked_bounds(landed.manifest, label)
        yield f'"{resource.time}" >= {start} and "{resource.time}" < {end} as _is_inside'
    if label in _TOTALS:
        return
    if resource.window == "snapshot":
        yield f"timestamptz '{instant(window.start)}' as _snapshot_at"
    if resource.identity:
        yield f"{hash_expression(landed.manifest.account, resource)} as _hash"
        yield "1 as _ordinal"


def _asked_bounds(manifest: Manifest, label: str) -> tuple[str, str]:
    """SQL for the start and the end that a record's page was asked for: those of its part."""
    asked = [
        call.bounds or manifest.window
        for call in manifest.calls
        if call.label == label
        for _ in call.pages
    ]
    if set(asked) <= {manifest.window}:
        asked = [manifest.window]
    start, end = (
        [f"timestamptz '{instant(at)}'" for at in edge]
        for edge in zip(*((window.start, window.end) for window in asked), strict=True)
    )
    if len(asked) == 1:
        return start[0], end[0]
    return f"([{', '.join(start)}])[_page]", f"([{', '.join(end)}])[_page]"


def _columns(resource: Resource, label: str) -> tuple[Column, ...]:
    return _proof_columns(resource) if label in _TOTALS else resource.columns


_NUMBER_IN_TEXT = rb'("%b"\s*:\s*)"(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)"'


def _names_of_numbers(columns: tuple[Column, ...]) -> frozenset[bytes]:
    """The names of the JSON fields that hold amounts, as `with_exact_numbers` takes them."""
    numbers = [c for c in columns if c.kind in (Kind.AMOUNT, Kind.WHOLE, Kind.SECONDS)]
    names = {column.steps[-1] for column in numbers} | {c.fallback for c in numbers if c.fallback}
    return frozenset(b'"%b"' % name.encode() for name in names)


def _with_texts_as_numbers(body: bytes, columns: tuple[Column, ...], contract: Contract) -> bytes:
    """Return the page with numbers in place of numeric texts, in columns that may have these."""
    for column in columns:
        is_lenient = column.may_be_text or column.kind is Kind.SECONDS
        if is_lenient and column.steps in contract.retyped:
            body = re.sub(_NUMBER_IN_TEXT % column.steps[-1].encode(), rb"\1\2", body)
    return body


# --- Records of a page ----------------------------------------------------------------------------


def _levels(body: bytes, rows_path: tuple[str, ...]) -> list[Level]:
    """The objects that hold records, and their records.

    Raises:
        ContractError: an object around the records has a key twice (in records DuckDB sees to it), or
            holds much besides them.
        DataRefusedError: a record is too large.
    """
    if not rows_path:
        require_small(body)
        return [({}, [msgspec.Raw(body.strip())])]
    objects: list[bytes | msgspec.Raw] = [body]
    for step in rows_path:
        fields = [OBJECT.decode(one) for one in objects]
        for one, known in zip(objects, fields, strict=True):
            require_small_around(one, known[step])
            _require_keys_once(_without(one, known[step]))
        lists = [LIST.decode(one[step]) for one in fields]
        objects = [inner for rows in lists for inner in rows]
    for record in objects:
        require_small(record)
    return list(zip(fields, lists, strict=True))


def _without(text: bytes | msgspec.Raw, rows: msgspec.Raw) -> bytes:
    """The JSON object with an empty list in place of its records; as it is where these are not found."""
    body = bytes(text)  # a page may be large: it is not copied
    start, end = body.find(memoryview(rows)[:_ENOUGH]), len(memoryview(rows))
    is_there = start >= 0 and memoryview(body)[start : start + end] == memoryview(rows)
    return body[:start] + b"[]" + body[start + end :] if is_there else body


def _require_keys_once(text: bytes) -> None:
    """Raise ContractError where an object has a key twice: which of the values would be meant?"""
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
    """Why records of a page cannot be taken that have a key twice, by their rows."""
    found: dict[int, str] = {}
    for row, record in enumerate((one for _, records in levels for one in records), start=1):
        try:
            _require_keys_once(bytes(record))
        except ContractError as error:
            found[row] = error.message
    return found


def _raw_lines(
    levels: Sequence[Level],
    columns: tuple[Column, ...],
    outer: Mapping[str, Any],
    without: Container[int],
    *,
    is_one_line: bool,
) -> Iterator[bytes]:
    """The records of a page as they are, one a line, each behind its page, row and outer fields.

    They come some at a time, so that a large page is not held twice.
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
            if size > _TOGETHER:
                yield b"".join(lines)
                lines, size = [], 0
    yield b"".join(lines)


def _one_line(record: msgspec.Raw) -> bytes:
    """A JSON object without line breaks, which can only stand between its tokens."""
    return bytes(record).replace(b"\n", b" ").replace(b"\r", b" ")


def _read_type(tree: Column | Tree | None) -> str:
    """The type in which DuckDB reads a JSON field: every scalar as its text."""
    if not isinstance(tree, dict):
        return "varchar"
    inner = ", ".join(f'"{name}" {_read_type(child)}' for name, child in tree.items())
    return f"struct({inner})"


# An instant without an offset could mean any zone, so it is not one. No clock is 15 hours off UTC.
_INSTANT_TEXT = r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?([Zz]|[+-](0\d|1[0-4])(:?[0-5]\d)?)"

_NEEDS = {
    Kind.AMOUNT: f"must be a number below 10^{len(str(LARGEST)) - 1} that does not round to zero",
    Kind.WHOLE: "is no whole number",
    Kind.INSTANT: "is no instant with an offset",
}


def _field(column: Column) -> str:
    """The SQL for a field as it was read."""
    steps = ".".join(f'"{step}"' for step in column.steps)
    return steps if column.is_outer or column.is_asked else f"record.{steps}"


def _text(column: Column) -> str:
    """The SQL for the text of a field, or of the one that carried its value before."""
    own = _field(column)
    return f'coalesce({own}, record."{column.fallback}")' if column.fallback else own


def _cast(text: str, column: Column, *, is_bounded: bool) -> str:
    """The SQL for a field's text as its type; null where it cannot be kept whole.

    A database rounds what has more decimals than fit, so these are counted where a text is long enough
    to have them. `is_bounded`: see `decimal_of`.
    """
    point = f"strpos({text}, '.')"
    is_plain = f"{text} >= '0' and {text} < ':' and not contains({text}, 'e')"
    match column.kind:
        case Kind.AMOUNT | Kind.WHOLE if column.is_level:
            size = _cast(f"ltrim({text}, '-')", replace(column, is_level=False), is_bounded=is_bounded)
            return f"case when {text} < '0' then -({size}) else {size} end"
        case Kind.AMOUNT | Kind.SECONDS:
            is_short = f"strlen({text}) <= {len('0.') + SCALE}"
            is_good = (
                f"{is_plain} and ({is_short} or {point} = 0 or strlen({text}) - {point} <= {SCALE})"
            )
            # What is below a ten-thousandth DuckDB writes as 1.5e-06: a digit, decimals, an exponent.
            mantissa, exponent = (f"split_part({text}, 'e-', {part})" for part in (1, 2))
            decimals = f"greatest(strlen({mantissa}) - 2, 0) + try_cast({exponent} as integer)"
            is_tiny = f"{text} >= '0' and {text} < ':' and {decimals} <= {SCALE}"
            decimal = decimal_of(text, is_bounded=is_bounded)
            return f"case when {is_good} then {decimal} when {is_tiny} then {decimal} end"
        case Kind.WHOLE:
            is_digits = f"{is_plain} and not contains({text}, '.')"
            is_whole = f"{is_plain} and ltrim(substr({text}, {point} + 1), '0') = ''"
            before = f"split_part({text}, '.', 1)"
            return (
                f"case when {is_digits} then try_cast({text} as bigint) "
                f"when {is_whole} then try_cast({before} as bigint) end"
            )
        case Kind.INSTANT:  # DuckDB cuts what is behind the microsecond
            is_good = f"regexp_full_match({text}, '{_INSTANT_TEXT}')"
            return f"case when {is_good} then try_cast({text} as timestamptz) end"
        case _:
            return text


def _typed_expression(column: Column, *, is_bounded: bool) -> str:
    own = _field(column)
    if not column.fallback:
        return _cast(own, column, is_bounded=is_bounded)
    is_scaled = column.fallback_scale != "1"
    older = _cast(f'record."{column.fallback}"', column, is_bounded=is_bounded and not is_scaled)
    if is_scaled:
        older = f"cast({older} * {column.fallback_scale} as {DECIMAL_TYPE})"
    own_value = _cast(own, column, is_bounded=is_bounded)
    return f"case when {own} is null then {older} else {own_value} end"


def _breaches(column: Column) -> Iterator[tuple[str, str]]:
    """Why the field cannot be taken: SQL for when, and for the sentence. No two hold of one field."""
    text, typed = f'"text of {column.name}"', f'"{column.name}"'
    shown = f"left({text}, 80)"
    if column.required:
        yield f"{text} is null", f"'{column.name} is missing'"
    has_sign = column.kind in (Kind.AMOUNT, Kind.WHOLE) and not column.is_level
    if has_sign:
        yield f"{text} < '0'", f"'{column.name} is negative: ' || {shown}"
    if column.kind in _NEEDS:
        is_told = f"{text} >= '0'" if has_sign else f"{text} is not null"
        yield f"{typed} is null and {is_told}", f"'{column.name} {_NEEDS[column.kind]}: ' || {shown}"
    if column.at_most is not None:
        yield (
            f"{typed} > {column.at_most}",
            f"'{column.name} is more than {column.at_most}: ' || {shown}",
        )
    if column.kind is Kind.TEXT:
        if not column.may_be_empty:
            yield f"{text} = ''", f"'{column.name} is empty'"
        too_long = f"{column.name} is longer than {column.longest:,} bytes"
        yield f"strlen({text}) > {column.longest}", f"'{too_long}'"


def _refused(landed: Landed, label: str, typed: Typed, because: str, cure: str = "") -> DataRefusedError:
    """The error for a window whose rows cannot all be taken."""
    page = typed.set_aside[0].page
    return DataRefusedError(
        f"{_told(typed, because)}; the window is not loaded{cure}",
        page=page,
        rows=typed.breaches,
        request_id=landed.manifest.pages(label)[page - 1].request_id,
    )


def _told(typed: Typed, because: str) -> str:
    shown = typed.set_aside[:_TELL]
    told = "; ".join(
        f"page {one.page} row {one.row}{_of_endpoint(one.endpoint_id)}: {ascii(one.reason)[1:-1]}"
        for one in shown
    )
    rows = f"{typed.breaches:,} of fal's rows cannot be right"
    return f"{rows} ({told}{'; …' * (typed.breaches > _TELL)}); {because}"


def _of_endpoint(endpoint_id: str | None) -> str:
    return f" ({ascii(endpoint_id)[1:-1][:80]})" if endpoint_id else ""


def hash_expression(account: str, resource: Resource) -> str:
    """SQL of DuckDB for what tells a row from others where fal gives it no id; with the label in it."""
    values = [quoted(account), *(_value(resource.column(name)) for name in resource.identity)]
    return f"md5(concat({', chr(31), '.join(values)}))"  # to concat, null is an empty text


def _value(column: Column) -> str:
    """SQL for a typed value whose text is the same in all time zones, and for any width of decimals."""
    match column.kind:
        case Kind.AMOUNT | Kind.SECONDS:
            return text_of(f'"{column.name}"')
        case Kind.INSTANT:
            return f'epoch_us("{column.name}")'
        case _:
            return f'"{column.name}"'


_OWN = "_is_inside, _breach, _unusable"
"""Columns of a file that the raw table does not have."""


def _source(
    connection: duckdb.DuckDBPyConnection, resource: Resource, path: Path
) -> tuple[str, tuple[Path, ...]]:
    """The SQL of DuckDB for the rows that the window holds (see `Staged`), and the files it reads.

    Where a key comes twice (a shifted page), that is the later row.
    """
    twins, files = path.with_suffix(".twins.parquet"), [path]
    columns, rows, latest = f"* exclude ({_OWN})", f"{quoted(path)} as rows", ""
    if resource.identity and _number_twins(connection, resource, path, twins):
        columns = f"* exclude ({_OWN}, n) replace (coalesce(n, 1) as _ordinal)"
        rows += f" left join {quoted(twins)} as twins using (_page, _row)"
        files.append(twins)
    elif resource.key and not resource.repeats:
        key = ", ".join(resource.key)
        order = "order by _page desc, _row desc"
        latest = f"qualify row_number() over (partition by {key} {order}) = 1"
    return f"(select {columns} from {rows} where _is_inside and _breach = '' {latest})", tuple(files)


def _number_twins(
    connection: duckdb.DuckDBPyConnection, resource: Resource, path: Path, twins: Path
) -> bool:
    """Number the rows of the same `_hash` in a file, whatever order they came in; false without any.

    Only twins are numbered: a window over millions of rows would have to sort them all.
    """
    rows = f"from {quoted(path)} where _is_inside and _breach = ''"
    connection.execute(
        "create or replace temp table twin_hashes as "
        f"select _hash {rows} group by _hash having count(*) > 1"
    )
    if not _count(connection, "select count(*) from twin_hashes"):
        return False
    names = ", ".join(f'"{column.name}"' for column in resource.columns)
    order = f"over (partition by _hash order by {names}, _page, _row)"
    connection.execute(
        f"copy (select _page, _row, cast(row_number() {order} as integer) as n {rows} "
        f"and _hash in (from twin_hashes)) to {quoted(twins)} (format parquet)"
    )
    return True


def _digest(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> str:
    """A fingerprint of the multiset of rows: the same in whatever order and pages they came."""
    sums = connection.execute(f"select {digest_sums(resource)} from {source}").fetchone()
    return digest_of(sums)


def digest_sums(resource: Resource) -> str:
    """SQL for the sums over all rows from which `digest_of` makes the digest; in DuckDB's dialect.

    Of each row that is 64 bits of the MD5 of its values, of which no other row has the same text: first
    the numbers, then the lengths of texts, then these.
    """
    numbers = ["_hash", "_ordinal"] if resource.identity else []
    numbers += [_value(column) for column in resource.columns if column.kind not in _TEXTS]
    texts = [f'"{column.name}"' for column in resource.columns if column.kind in _TEXTS]
    numbers += [f"strlen({text})" for text in texts]
    values = ", ',', ".join([*numbers, ", ".join(texts)])
    return f"count(*), sum(cast(md5_number(concat({values})) >> 64 as hugeint))"


def digest_of(sums: Sequence[Any] | None) -> str:
    """The digest of rows whose sums are these, with its form at the end."""
    return hashlib.sha256(repr(tuple(sums or ())).encode()).hexdigest() + DIGEST_FORM


def _count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


# --- Proof ----------------------------------------------------------------------------------------


def _proof_columns(resource: Resource) -> tuple[Column, ...]:
    proof = resource.with_any_sign.proof  # a sum may have any sign
    names = (*proof.key, *proof.sums, "currency") if proof else ()
    return tuple(column for column in (proof.columns if proof else ()) if column.name in names)


@dataclass(frozen=True, slots=True)
class UnprovenPart:
    """A part of a window that is not proven.

    `has_lost` says that rows may be lost (or come twice) at an edge of its pages, so that its halves may
    add up; `has_moved`, that rows changed places between pages, or between two walks.
    """

    part: Part
    has_lost: bool
    has_moved: bool


@dataclass(frozen=True, slots=True)
class _Verdict:
    """How a part was proven, and fal's total; or, with a sentence, why it is not."""

    proof: str
    total: str | None
    why: str = ""
    unproven: UnprovenPart | None = None


def _prove(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    source: str,
    digest: str,
    typed: Typed,
    scratch: Path,
    *,
    is_accepted: bool,
) -> tuple[str, str | None]:
    """Show that the rows are all there; returns how, and fal's total. docs/fal-api.md, "Control totals".

    Fal's own sums do, part by part, and where there are none or those of another ledger, two equal
    walks. Quarantined rows may be missing only where fal's sums say that they are of no value.
    """
    manifest, parts = landed.manifest, landed.manifest.parts
    if resource.proof is None:  # a row that cannot be right decides for itself alone
        return "none", None
    _require_whole(landed)
    verdicts, first = list[_Verdict](), 1
    for part in parts:
        last = first + part.pages - 1
        if len(parts) == 1:
            rows = _Rows(source, digest, typed, first, last, is_accepted)
        else:
            own = f"(select * from {source} where _page between {first} and {last})"
            rows = _Rows(own, _digest(connection, resource, own), typed, first, last, is_accepted)
        verdicts.append(_prove_part(connection, landed, part, resource, rows, scratch))
        first = last + 1
    total = _sum(verdict.total for verdict in verdicts)
    proofs = {verdict.proof for verdict in verdicts}
    if proofs == {"summary"} and (why := _moved_between(connection, landed, resource, source, scratch)):
        verdicts = [_Verdict("differs", total, why, UnprovenPart(part, False, True)) for part in parts]
    unproven = [verdict for verdict in verdicts if verdict.unproven]
    if not unproven:
        return ("two walks" if "two walks" in proofs else "summary"), total
    if is_accepted:
        return "differs", total
    if manifest.window.is_provisional:
        log.warning("%s, window %s: the day is still open and does not add up to fal's control total "
                    "yet (%s)", resource.name, manifest.window, unproven[0].why)  # fmt: skip
        return "differs", total
    error = UnprovenError(
        f"{unproven[0].why}; the next run reads the window again",
        request_id=next((page.request_id for page in manifest.pages("proof")), None),
    )
    error.unproven = [verdict.unproven for verdict in unproven if verdict.unproven]
    raise error


def _moved_between(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    source: str,
    scratch: Path,
) -> str:
    """What shows that rows moved between the parts of a window, of which each adds up; else nothing."""
    whole, proof = landed.manifest.whole, resource.proof
    if whole is None or proof is None:
        return ""
    of_whole = Landed(landed.folder, landed.manifest.of(whole))
    compared = _compared(connection, of_whole, resource, proof, "proof", source, scratch)
    return f"the rows moved meanwhile ({compared.told})" if compared.differs else ""


_NO_TOTAL = (
    "no control total of fal's says that nothing of value is missing without them "
    "(faletl quarantine list shows them)"
)


def _sum(totals: Iterable[str | None]) -> str | None:
    """The exact sum of what fal said; None where it said nothing."""
    told = [Decimal(total) for total in totals if total is not None]
    with localcontext(prec=60):
        return plain(sum(told, Decimal(0))) if told else None


def _require_whole(landed: Landed) -> None:
    """Raises TamperedError where the parts of the window leave some of it out, or overlap."""
    window, parts = landed.manifest.window, landed.manifest.parts
    starts, ends = [part.window.start for part in parts], [part.window.end for part in parts]
    has_rows = all(part.has("rows") for part in parts)
    if not has_rows or [*starts, window.end] != [window.start, *ends]:
        raise TamperedError(
            f"the manifest in {landed.folder} does not cover its window; read the window again with "
            "faletl run --start … --end …",
            file=str(landed.folder / MANIFEST),
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a part: SQL for them, their digest, and the pages that they came on."""

    source: str
    digest: str
    typed: Typed
    first_page: int
    last_page: int
    is_accepted: bool

    @property
    def breaches(self) -> int:
        """How many rows of these pages are quarantined, as far as known, and not accepted."""
        if self.is_accepted:
            return 0
        aside = self.typed.set_aside
        of_others = sum(not self.first_page <= one.page <= self.last_page for one in aside)
        return self.typed.breaches - of_others


def _prove_part(
    connection: duckdb.DuckDBPyConnection,
    whole: Landed,
    part: Part,
    resource: Resource,
    rows: _Rows,
    scratch: Path,
) -> _Verdict:
    """Compare the rows of a part with fal's total of it, or with those of its other walk.

    Raises:
        DataRefusedError: rows of the part are quarantined that are of value, as far as fal's sums show.
    """
    landed = Landed(whole.folder, whole.manifest.of(part))
    proof, compared, moved = resource.proof, _Compared(), ""
    assert proof is not None  # noqa: S101  # who asks has looked
    has_total = part.has("proof")
    if has_total:
        compared = _compared(connection, landed, resource, proof, "proof", rows.source, scratch)
        if not compared.differs and part.has("before"):
            moved = _moved(connection, landed, resource, proof, rows.source, scratch)
        if not compared.differs and not moved:
            return _Verdict("summary", compared.total)
    has_lost = part.pages > 1 and bool(compared.differs) and (
        compared.is_less or _is_cut_badly(connection, resource, rows.source)
    )  # fmt: skip
    unproven = UnprovenPart(part, has_lost, not compared.differs)
    if rows.breaches and not moved:
        because = _NO_TOTAL if not compared.differs else (
            "fal's control total says that they are of value (faletl quarantine list shows them)"
        )  # fmt: skip
        cure = f"; to load it all the same: {accept_command(whole.manifest)} --reason TEXT"
        error = _refused(whole, "rows", rows.typed, because, cure)
        if has_lost and part.window.halves(resource.smallest_part):
            error.unproven = [unproven]  # what is missing may be lost between pages
        raise error
    can_stand_in = part.has("again") and (proof.two_walks_suffice or not compared.differs)
    is_equal = can_stand_in and (
        _digest_again(connection, landed, resource, rows.typed, scratch) == rows.digest
    )
    if is_equal:
        if compared.differs:
            is_settled = whole.manifest.window.has_settled(whole.manifest.started_at)
            log.log(logging.WARNING if is_settled else logging.INFO,
                    "%s, window %s: two walks agree, but fal's usage says otherwise (%s)",
                    resource.name, part.window, compared.told)  # fmt: skip
        return _Verdict("two walks", compared.total)
    if compared.differs:
        why = f"the rows do not add up to fal's control total ({compared.told})"
    else:
        why = f"the rows moved meanwhile ({moved or 'two walks one after the other gave other rows'})"
    return _Verdict("differs", compared.total, why, unproven)


def _moved(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    proof: Proof,
    source: str,
    scratch: Path,
) -> str:
    """What shows that rows moved between the pages of a walk, though their sum is right; else nothing.

    One row may have been lost at a page's edge and another, of the same amounts, seen twice. So the
    total was asked for in front of the rows as well, and no row comes on two pages: but for charges
    that are exact twins, and a second walk tells these.
    """
    compared = _compared(connection, landed, resource, proof, "before", source, scratch)
    if compared.differs:
        told = "; ".join(compared.differs[:_TELL])
        return f"fal's control total was another one before they were read: {told}"
    count = _on_two_pages(connection, resource, source)
    return f"{count:,} of them came on two pages" if count else ""


def _on_two_pages(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> int:
    """How many rows come on more than one page, exactly the same."""
    among = f"from {source}"
    if resource.identity:
        key, among = "_hash", f"{among} where _hash in (select _hash {among} where _ordinal > 1)"
    else:
        sums = resource.proof.sums if resource.proof else ()
        key = ", ".join((*resource.key, *sums))
    twice = f"select 1 {among} group by {key} having count(distinct _page) > 1"
    return _count(connection, f"select count(*) from ({twice})")


def _is_cut_badly(connection: duckdb.DuckDBPyConnection, resource: Resource, source: str) -> bool:
    """Whether a page ends and the next begins with rows of one instant, or a row is on two pages.

    A cursor that is an instant loses or repeats rows there, the same ones on every walk.
    """
    time = f'"{resource.time}"'
    edges = (
        f"select _page, arg_min({time}, _row) as first_at, arg_max({time}, _row) as last_at "
        f"from {source} group by _page"
    )
    shared = _count(
        connection,
        "select count(*) from (select first_at, lag(last_at) over (order by _page) as before_at "
        f"from ({edges})) where first_at = before_at",
    )
    return bool(shared or _on_two_pages(connection, resource, source))


@dataclass(frozen=True, slots=True)
class _Compared:
    """Where our sums are not fal's, as sentences; whether one is less; and fal's sum of all costs."""

    differs: Sequence[str] = ()
    is_less: bool = False
    total: str | None = None

    @property
    def told(self) -> str:
        """The first of the differences, and how many there are."""
        return f"{len(self.differs)} lines differ: {'; '.join(self.differs[:_TELL])}"


def _compared(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    proof: Proof,
    label: str,
    source: str,
    scratch: Path,
) -> _Compared:
    """Compare the sums of the rows with those of the total of that label."""
    totals = scratch / f"{landed.manifest.load_id}.{label}.parquet"
    typed = _typed(connection, landed, resource, label, totals)
    if typed.breaches:
        raise _refused(landed, label, typed, "they are of fal's control total")
    total = connection.execute(
        f"select coalesce(sum(cost_total), 0)::varchar from {quoted(totals)} where {proof.only}"
    ).fetchone()
    differs = _differences(connection, proof, source, totals)
    is_less = bool(differs) and _is_less(connection, proof, source, totals)
    totals.unlink()
    return _Compared(differs, is_less, str(total[0]) if total else "0")


def _is_less(connection: duckdb.DuckDBPyConnection, proof: Proof, source: str, totals: Path) -> bool:
    """Whether we hold less of something than fal says, by more than what fal may have rounded."""
    less = " or ".join(
        f"coalesce(fals.{name}, 0) - coalesce(ours.{name}, 0) > {_tolerance(name)}"
        for name in proof.sums
    )
    return (
        _count(connection, f"select count(*) from {_both_sums(proof, source, totals)} where {less}") > 0
    )


def _digest_again(
    connection: duckdb.DuckDBPyConnection,
    landed: Landed,
    resource: Resource,
    typed: Typed,
    scratch: Path,
) -> str:
    """The digest of the rows of the other walk; of this one `typed` is what became of them."""
    again = scratch / f"{landed.manifest.load_id}.again.parquet"
    found = _typed(connection, landed, resource, "again", again)
    if found.breaches > typed.breaches:
        raise _refused(landed, "again", found, "the other walk had no such rows")
    source, files = _source(connection, resource, again)
    digest = _digest(connection, resource, source)
    for file in files:
        file.unlink()
    return digest


def _differences(
    connection: duckdb.DuckDBPyConnection, proof: Proof, source: str, totals: Path
) -> list[str]:
    """Where our sums per key are not fal's, as sentences.

    A sum may differ by half a nano for each amount added up, ours and fal's, as fal rounds each to a
    nano-dollar. A quantity may also differ by one part in 10^12, as fal may have summed it in doubles.
    """
    off = " or ".join(
        f"abs(coalesce(ours.{name}, 0) - coalesce(fals.{name}, 0)) > {_tolerance(name)}"
        for name in proof.sums
    )
    figures = ", ".join(f"coalesce(ours.{name}, 0), coalesce(fals.{name}, 0)" for name in proof.sums)
    whose = ", ".join(f"coalesce(ours.{name}, fals.{name})" for name in proof.key)
    both = _both_sums(proof, source, totals)
    found = connection.execute(
        f"select {whose}, {figures} from {both} where {off} order by all"
    ).fetchall()
    return [_difference(proof, row[: len(proof.key)], row[len(proof.key) :]) for row in found]


def _both_sums(proof: Proof, source: str, totals: Path) -> str:
    """SQL for the sums per key, `ours` and `fals`, next to each other; with `n` amounts in each."""
    none = {column.name for column in proof.columns if column.zero_is_none}
    keys = ", ".join(f"nullif({name}, 0) as {name}" if name in none else name for name in proof.key)
    sums = ", ".join(f"sum({name}) as {name}" for name in proof.sums)
    numbers = ", ".join(str(number) for number in range(1, len(proof.key) + 1))
    same = " and ".join(f"ours.{name} is not distinct from fals.{name}" for name in proof.key)
    lines = f"select {keys}, count(*) as n, {sums} from"
    return (
        f"({lines} {source} group by {numbers}) as ours "
        f"full join ({lines} {quoted(totals)} where {proof.only} group by {numbers}) as fals on {same}"
    )


def _difference(proof: Proof, key: tuple[Any, ...], figures: tuple[Decimal, ...]) -> str:
    """One line that differs, as a sentence: which it is, what we hold, what fal says."""
    which = ", ".join(
        f"{name} {plain(value) if isinstance(value, Decimal) else ascii(value)}"
        for name, value in zip(proof.key, key, strict=True)
        if value is not None
    )
    ours, fals = figures[::2], figures[1::2]
    sums = ", ".join(
        f"{name} {plain(held)} held, {plain(said)} by fal"
        for name, held, said in zip(proof.sums, ours, fals, strict=True)
        if held != said
    )
    return f"{which}: {sums}"


def _tolerance(name: str) -> str:
    """SQL for what our sum of the amounts may differ from fal's."""
    each = HALF_NANO
    if name == "quantity":
        in_doubles = "cast(coalesce(fals.quantity, 0) as decimal(26,0)) * 0.000000000001"
        each = f"greatest({HALF_NANO}, {in_doubles})"
    return f"(coalesce(ours.n, 0) + coalesce(fals.n, 0)) * {each}"
