"""The cursor walk: pages in order until fal states that there is no next one, and only then."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import msgspec

from faletl.errors import AstrayError, ContractError
from faletl.fal.bodies import one_body
from faletl.fal.client import FalClient
from faletl.wire import TEXT, UNREADABLE, MalformedBodyError, Params, as_json

log = logging.getLogger(__name__)

MAX_PAGES = 100_000
MAX_BYTES = 32 * 2**30
"""Bytes of JSON in one walk: some hundred million charges."""

MAX_EMPTY_PAGES = 100
"""Empty pages in a row: a walk that gives more of them would never end."""

MAX_RECORDS = 100_000
"""Records of one page, ten times what fal documents. Lists around records (buckets) count as well."""

MAX_FIELDS = 10_000
"""Fields of one JSON object, a hundred times what fal sends."""

MAX_CURSOR_BYTES = 16_384
"""Bytes of a cursor as fal sent it: a longer one fits no URL."""

_MAX_UNCOUNTED_COMMAS = 400_000
"""A page with more commas has its records counted before any becomes a Python object: this many objects
take 28 MiB. A page of 10,000 charges has some 150,000 commas."""

_MAX_DEPTH = 10_000
"""Levels of nesting up to which elements are counted; a parser refuses far fewer levels."""

_NUL = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")  # not an escaped backslash before u0000
_TEXT_OR_MARK = re.compile(TEXT + rb"|[\[\]{},]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of a walk. `rows` is the number of its records, `number` counts from 1.

    `date` is the time of the answer by fal's clock; None where fal did not send it, and for pages that
    landed before.
    """

    number: int
    body: bytes
    request_id: str | None
    rows: int
    next_cursor: str | None
    date: datetime | None = None


def read_envelope(body: bytes, rows_path: tuple[str, ...]) -> tuple[int, str | None]:
    """Return the number of records in the body, and the cursor of the next page (None at the end).

    Raises:
        MalformedBodyError: the body is not a complete JSON document.
        ContractError: the document has no record list, too many records, a cursor that is not valid,
            or one that `has_more` contradicts.
    """
    if body.count(b",") > (_MAX_UNCOUNTED_COMMAS if rows_path else MAX_FIELDS):
        require_uncrowded(body)
    try:
        envelope = _envelope(rows_path).decode(as_json(body))
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's answer does not have the documented form: {error}") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is not a complete JSON document ({error})") from None
    if b"\\" in body and b"\\u0000" in body and _NUL.search(body):
        raise ContractError("fal's answer contains a NUL character")
    if not rows_path:
        return 1, None
    cursor = _cursor(envelope)
    if cursor == "" and not envelope.has_more:
        cursor = None  # contract.py records this as drift
    if envelope.has_more is None:
        log.warning("fal left out has_more, so only the cursor decides whether there is a next page")
    elif envelope.has_more != (cursor is not None):
        contradiction = (
            "a next page but gave no cursor" if envelope.has_more else "no next page but a cursor"
        )
        raise ContractError(f"fal announced {contradiction}; the walk cannot be complete")
    return _count(envelope, rows_path), cursor


def walk(
    client: FalClient,
    path: str,
    params: Params,
    rows_path: tuple[str, ...],
    landed: Iterator[bytes],
    *,
    metrics: bool,
) -> Generator[tuple[Page, bool]]:
    """Yield every page and whether it is new: first the `landed` ones, then those that follow from fal.

    Only a missing cursor ends the walk: not a short page, not an empty one.

    Raises:
        AstrayError: a cursor came twice, or there are too many pages, empty pages or bytes.
    """
    seen_cursors: set[str] = set()
    cursor: str | None = None
    size = empty = 0
    for number in range(1, MAX_PAGES + 1):
        with one_body():
            page = _landed_page(number, landed, rows_path)
            is_new = page is None
            if page is None:
                landed = iter(())  # ask fal from here on
                question = params if cursor is None else {**params, "cursor": cursor}
                page = _new_page(client, path, question, rows_path, number, metrics=metrics)
            yield page, is_new
            following, request_id = page.next_cursor, page.request_id
            size, empty = size + len(page.body), 0 if page.rows else empty + 1
            del page  # before the next page is requested
        if following is None:
            return
        if why := _why_astray(empty, size, is_repeated=following in seen_cursors):
            raise AstrayError(why).at(page=number, request_id=request_id)
        seen_cursors.add(following)
        cursor = following
    raise AstrayError(f"fal announced more than {MAX_PAGES:,} pages").at(page=MAX_PAGES)


def _landed_page(number: int, landed: Iterator[bytes], rows_path: tuple[str, ...]) -> Page | None:
    """Return the next page that landed before; None where there is none, or it is not valid."""
    body = next(landed, None)
    if body is None:
        return None
    try:
        rows, following = read_envelope(body, rows_path)
    except (MalformedBodyError, ContractError):
        return None
    return Page(number, body, None, rows, following)


def _new_page(
    client: FalClient,
    path: str,
    params: Params,
    rows_path: tuple[str, ...],
    number: int,
    *,
    metrics: bool,
) -> Page:
    answer, (rows, following) = client.get(
        path, params, lambda body: read_envelope(body, rows_path), metrics=metrics
    )
    return Page(number, answer.body, answer.request_id, rows, following, answer.date)


def _why_astray(empty: int, size: int, *, is_repeated: bool) -> str:
    """Return why a walk must stop although fal announced a next page; empty where it can continue."""
    if empty >= MAX_EMPTY_PAGES:
        return f"fal sent {MAX_EMPTY_PAGES} empty pages in a row and announced more"
    if size > MAX_BYTES:
        return f"fal sent more than {MAX_BYTES:,} bytes and announced more"
    return "fal gave the same cursor twice; the walk would never end" if is_repeated else ""


@cache
def _envelope(rows_path: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """Return a decoder of everything around the records; the records themselves stay unparsed bytes."""
    if not rows_path:
        return msgspec.json.Decoder(dict[str, msgspec.Raw])
    inner: Any = msgspec.Raw
    for step in reversed(rows_path[1:]):
        inner = msgspec.defstruct("Level", [("rows", list[inner])], rename={"rows": step})
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        ("rows", list[inner]),
        ("next_cursor", msgspec.Raw, msgspec.Raw(b"null")),
        ("has_more", bool | None, None),
    ]
    return msgspec.json.Decoder(msgspec.defstruct("Envelope", fields, rename={"rows": rows_path[0]}))


def _count(envelope: Any, rows_path: tuple[str, ...]) -> int:
    levels = [envelope]
    for _ in rows_path[1:]:
        levels = [inner for level in levels for inner in level.rows]
    count = sum(len(level.rows) for level in levels)
    if max(count, len(levels)) > MAX_RECORDS:
        raise ContractError(_CROWDED)
    return count


_CURSOR: msgspec.json.Decoder[str | None] = msgspec.json.Decoder(str | None)


def _cursor(envelope: Any) -> str | None:
    """Return the cursor; one that is too long is refused before it is decoded."""
    if len(memoryview(envelope.next_cursor)) > MAX_CURSOR_BYTES:
        raise ContractError(f"fal gave a cursor of more than {MAX_CURSOR_BYTES:,} bytes")
    try:
        return _CURSOR.decode(envelope.next_cursor)
    except msgspec.ValidationError as error:
        raise ContractError(
            f"fal's answer does not have the documented form: {error} at next_cursor"
        ) from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is not a complete JSON document ({error})") from None


def require_uncrowded(body: bytes) -> None:
    """Count the elements of lists, and the fields of each object, without a Python object for each.

    Raises:
        ContractError: there are too many records, or too many fields in one object.
    """
    fields, elements = list[int](), 0  # the number of fields of each open object; -1 for a list
    for token in _TEXT_OR_MARK.finditer(body):
        match body[token.start()]:
            case 0x2C if fields and fields[-1] < 0:  # a comma in a list
                elements += 1
                if elements >= MAX_RECORDS:
                    raise ContractError(_CROWDED)
            case 0x2C if fields:
                fields[-1] += 1
                if fields[-1] >= MAX_FIELDS:
                    raise ContractError(
                        f"fal's answer has more than {MAX_FIELDS:,} fields in one object"
                    )
            case 0x5B | 0x7B as opened:  # [ or {
                fields.append(-1 if opened == 0x5B else 0)
                if len(fields) > _MAX_DEPTH:
                    return
            case 0x5D | 0x7D if fields:  # ] or }
                fields.pop()


_CROWDED = f"fal's answer has more than {MAX_RECORDS:,} records on one page"
