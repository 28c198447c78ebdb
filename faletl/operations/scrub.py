"""Scrub a landed page: replace private values, so that it can be published in an issue.

Nothing is copied from the page unless a rule allows it. A text stays if the catalogue knows its field
and it has the expected form: an instant, a currency, a known unit or a public endpoint. Any other text
becomes `text-1`, `text-2` and so on; equal texts stay equal. A number becomes another number of the
same length. Structure, types and number formats stay, so that the contract gives the same findings for
the scrubbed page (faletl/staging/contract.py).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import msgspec
import zstandard

from faletl.errors import DamagedExtractError, UsageError
from faletl.files import sql_folder
from faletl.landing.storage import backend_for, parse_location, write_durably
from faletl.resources import RESOURCES, Column, Kind
from faletl.wire import UNREADABLE, as_json

READABLE = (
    "field names, times, fal-ai/… endpoint ids, known units, currencies and the number of rows stay "
    "readable, as do the length, sign and zeros of each number"
)
"""What a scrubbed page still shows."""

KEEPS_LENGTH = 1000
"""Bytes. A longer text keeps its length, because the catalogue has limits on longer texts."""

_ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of a compressed file

_TOKEN = re.compile(
    rb'[ \t\n\r]+|[\[\]{},:]|true|false|null|"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    rb"|-?(?:NaN|Infinity|\d[\d.eE+-]*+)",
    re.DOTALL,
)
_COPIED = frozenset(b" \t\n\rtfn:")  # first bytes of white space, of true, false and null, and the colon
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_NUMBERS = frozenset({Kind.AMOUNT, Kind.WHOLE, Kind.SECONDS})
_NEW_FIELD = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
_INSTANT = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?)? ?(Z|[+-]\d\d:?\d\d)?"


def read_page(name: str) -> bytes:
    """Return the JSON of a page: a file of the landing folder, or one that is not compressed.

    Raises:
        UsageError: there is no such file, or it is not JSON.
        DamagedExtractError: the compressed file is damaged.
        StorageError: the object store does not answer.
    """
    path = parse_location(name)
    try:
        content = backend_for(path).read(path)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot read {name}: {why}; name a page of the landing folder") from None
    if content.startswith(_ZSTD):
        try:
            content = zstandard.ZstdDecompressor().decompress(content)
        except (zstandard.ZstdError, MemoryError):  # an impossible size
            raise DamagedExtractError(f"{name} is damaged; run faletl verify", file=name) from None
    try:
        msgspec.json.decode(as_json(content), type=msgspec.Raw)
    except UNREADABLE:
        raise UsageError(f"{name} is not JSON; name a page ….json.zst of the landing folder") from None
    return content


def write_page(scrubbed: bytes, path: Path) -> None:
    """Write the page to a new file; raises UsageError if it exists, or StorageError."""
    if path.exists():
        raise UsageError(f"{path} exists; name a new file")
    write_durably(path, scrubbed + b"\n")


def scrubbed(body: bytes, *, keep_amounts: bool = False) -> bytes:
    """Return a page of JSON, in ASCII, with private values replaced.

    With `keep_amounts`, numbers stay in fields that the catalogue knows as numbers.
    """
    return b"".join(_Scrubber(keep_amounts=keep_amounts).tokens(body))


class _Scrubber:
    """The scanner of one page: its position, and the replacements so far."""

    def __init__(self, *, keep_amounts: bool) -> None:
        self._keep_amounts = keep_amounts
        self._fields: list[str | None] = []
        """The current field of each open object; None for a list and before the first field."""
        self._opened: list[bytes] = []
        self._is_name_next = False
        self._texts: dict[str, str] = {}
        self._numbers: dict[str, dict[str, str]] = {}

    def tokens(self, body: bytes) -> Iterator[bytes]:
        """Yield the tokens of the scrubbed page; text that is not a JSON token is left out."""
        for match in _TOKEN.finditer(body):
            token = match[0]
            if token[0] in _COPIED:
                yield token
            elif token[:1] == b'"':
                yield self._name(token) if self._is_name_next else self._text(token)
            elif token[:1] in b"[{}],":
                self._move(token)
                yield token
            else:
                yield self._number(token.decode()).encode()

    def _move(self, mark: bytes) -> None:
        if mark in b"[{":
            self._opened.append(mark)
            self._fields.append(None)
        elif mark in b"]}":
            self._opened.pop()
            self._fields.pop()
        self._is_name_next = mark in b"{," and self._opened[-1:] == [b"{"]

    def _column(self) -> Column | None:
        return column_of(tuple(name for name in self._fields if name is not None))

    def _name(self, token: bytes) -> bytes:
        """Return a field name of the catalogue, or one that is new next to those; replace any other."""
        name = _decoded(token)
        outer_fields = [known for known in self._fields[:-1] if known is not None]
        is_next_to_fals = not outer_fields or outer_fields[-1] in _OBJECTS
        self._fields[-1], self._is_name_next = name, False
        if name in _NAMES or (is_next_to_fals and _NEW_FIELD.fullmatch(name)):
            return b'"%b"' % name.encode()
        return b'"%b"' % self._stand_in(name).encode()

    def _text(self, token: bytes) -> bytes:
        text, column = _decoded(token), self._column()
        if not text or (column is not None and _is_public(column, text)):
            return b'"%b"' % text.encode()
        if column is not None and column.kind in _NUMBERS and _NUMBER.fullmatch(text):
            return b'"%b"' % self._number(text).encode()
        stand_in, size = self._stand_in(text), len(text.encode("utf-8", "replace"))
        return b'"%b"' % (stand_in.ljust(size, "-") if size > KEEPS_LENGTH else stand_in).encode()

    def _stand_in(self, text: str) -> str:
        return self._texts.setdefault(text, f"text-{len(self._texts) + 1}")

    def _number(self, number: str) -> str:
        """Return the number or its replacement: all digits but zeros are replaced; an exponent stays.

        Different numbers stay different. A limit of the catalogue, such as 100 for percentages, stays,
        and other numbers stay on their side of it.
        """
        column = self._column()
        if self._keep_amounts and column is not None and column.kind in _NUMBERS:
            return number
        digits, *exponent = re.split("(?=[eE])", number)
        shape = re.sub("[1-9]", "1", digits)
        known = self._numbers.setdefault(shape, {shape: shape} if _LIMIT.fullmatch(shape) else {})
        return known.setdefault(digits, _nth_of(shape, len(known))) + "".join(exponent)


def _nth_of(shape: str, number: int) -> str:
    """Replace the ones of the shape with the number, written in base nine with digits from 1."""
    filled = []
    for character in reversed(shape):
        if character == "1":
            number, digit = divmod(number, 9)
            character = str(digit + 1)
        filled.append(character)
    return "".join(reversed(filled))


def _decoded(token: bytes) -> str:
    try:
        return msgspec.json.decode(token, type=str)
    except UNREADABLE:  # an invalid escape: the raw text still differs from others
        return token.decode("utf-8", "replace")


# --- Public values --------------------------------------------------------------------------------


@cache
def column_of(path: tuple[str, ...]) -> Column | None:
    """Return the column whose steps end the path of a field; None if the catalogue has none.

    A page does not name its resource, and need not: all resources use the same names.
    """
    for start in range(len(path)):
        if column := _COLUMNS.get(path[start:]):
            return column
    return None


def _is_public(column: Column, text: str) -> bool:
    if column.kind is Kind.INSTANT:
        return re.fullmatch(_INSTANT, text, re.ASCII) is not None
    pattern = public_texts().get(column.name) if column.kind is Kind.TEXT else None
    return pattern is not None and re.fullmatch(pattern, text, re.ASCII) is not None


@cache
def public_texts() -> Mapping[str, str]:
    """Return for each text column the pattern of values that are fal's own words, so not private."""
    with (sql_folder() / "seeds" / "unit.csv").open(encoding="utf-8", newline="") as file:
        units = "|".join(re.escape(row["unit"]) for row in csv.DictReader(file) if row["unit"])
    return {
        "endpoint_id": r"fal-ai(/[A-Za-z0-9._-]+)+",
        "unit": rf"(\d+ )?({units}) ?",
        "currency": "[A-Z]{3}",
        "auth_method": "None|User token|User key",
        "auth_detail": "None|User token|User key",
        "status": "active|deprecated",
        "kind": "inference|training",
        "license_type": "commercial|research|private",
        "updated_at": _INSTANT,
        "date": _INSTANT,
    }


def _catalogued() -> Iterator[tuple[tuple[str, ...], Column]]:
    for resource in RESOURCES.values():
        for column in (*resource.columns, *(resource.proof.columns if resource.proof else ())):
            yield column.steps, column
            if column.fallback:
                yield (*column.steps[:-1], column.fallback), column


_COLUMNS: Mapping[tuple[str, ...], Column] = dict(reversed(list(_catalogued())))
_OBJECTS = {step for steps in _COLUMNS for step in steps[:-1]}.union(
    *(resource.rows_path for resource in RESOURCES.values()),
    *(resource.proof.rows_path for resource in RESOURCES.values() if resource.proof),
)
"""Fields whose value is an object with catalogued fields."""
_LIMIT = re.compile(rf"({'|'.join({str(c.at_most) for c in _COLUMNS.values() if c.at_most})})(\.0+)?")
_NAMES = _OBJECTS.union(
    *_COLUMNS, *(field.split(".") for resource in RESOURCES.values() for field in resource.not_kept)
)
"""All field names in the catalogue."""
