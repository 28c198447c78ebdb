"""The contract of a page, from the catalogue: which records violate it, and what fal changed of it.

A page is decoded once by a strict type that is made from the catalogue. The result is thrown away (its
numbers are floats), but it checks at the speed of C. Only a page that this type refuses is checked
record by record: new fields are recorded, and records that violate the contract get their reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import msgspec

from faletl.errors import ContractError, DataRefusedError
from faletl.fal.bodies import LARGE_BODY
from faletl.fal.pages import MAX_FIELDS, require_uncrowded
from faletl.resources import Column, Kind, Resource
from faletl.wire import LIST, OBJECT, UNREADABLE, as_json

Tree: TypeAlias = "dict[str, Column | Tree | None]"
"""Columns as they are nested in a record; None for a field that is known but not loaded."""

Steps: TypeAlias = tuple[str, ...]
"""The path of a field in a record; the path of a field around the records begins with `$`."""

Json: TypeAlias = bytes | msgspec.Raw
"""A JSON value as fal sent it; a Raw is a part of the body, not a copy."""

_NULL = msgspec.Raw(b"null")

_ENVELOPE = frozenset({"next_cursor", "has_more", "ordering", "summary", "time_series"})
"""Fields around the records that fal is known to send, in addition to the record list itself."""

_NEXT_CURSOR = b'"next_cursor"'
_EMPTY_CURSOR = re.compile(_NEXT_CURSOR + rb'\s*:\s*""')

LARGEST_RECORD = 4 * 2**20
"""Bytes of JSON in one record, or around records; DuckDB reserves buffers of twice this size on each
thread."""

_MAX_SAMPLE_CHARACTERS = 80  # of a value in a drift
_MAX_NEW_FIELDS = 100  # at once: with more of them, the records are not fal's any more


@dataclass(slots=True)
class Contract:
    """The contract of one walk, and what its pages have shown so far.

    `new` are fields that the catalogue does not know, `retyped` fields with a value of another type,
    each with a sample. `missing` (complete after the last page) are fields that fal should send in
    every record, but that no record had. `known` are fields of the contract that are not loaded.
    """

    rows_path: tuple[str, ...]
    columns: tuple[Column, ...]
    known: frozenset[Steps] = frozenset()
    new: dict[Steps, str] = field(default_factory=dict)
    retyped: dict[Steps, str] = field(default_factory=dict)
    _rows: int = 0
    _present: set[str] = field(default_factory=set)

    @property
    def missing(self) -> list[Steps]:
        """Fields that no record had; empty if there were no records."""
        expected = _attributes_to_find(self.columns) if self._rows else ()
        return [(name,) for name in expected if name not in self._present]

    def breaches(self, body: bytes) -> dict[int, str]:
        """Return why rows of the page (numbered from 1) violate the contract; a later check finds more.

        A large page is checked record by record, so that only one record is decoded at a time.

        Raises:
            ContractError: the JSON around the records does not have the expected form, or is too large.
            DataRefusedError: a record is too large.
        """
        if _EMPTY_CURSOR.match(body, body.rfind(_NEXT_CURSOR)):  # fal sends null for no cursor
            self.retyped.setdefault(("$", "next_cursor"), '""')
        if len(body) > LARGE_BODY:
            return self._check_each_record(body)
        try:
            page = _page(self.rows_path, self.columns, self.known.union(self.new)).decode(body)
        except msgspec.ValidationError:
            return self._check_each_record(body)
        except UNREADABLE as error:
            raise _unreadable(error) from None
        rows = list(_inner(page, len(self.rows_path)))
        self._rows += len(rows)
        for name, attribute in _attributes_to_find(self.columns).items():
            if name not in self._present and any(
                getattr(row, attribute) is not msgspec.UNSET for row in rows
            ):
                self._present.add(name)
        return {}

    def _check_each_record(self, body: bytes) -> dict[int, str]:
        if body.count(b",") > MAX_FIELDS:
            require_uncrowded(body)
        tree = tree_of(_inside(self.columns), self.known)
        usable, as_promised = _record(self.columns), _record(self.columns, is_strict=True)
        around_decoder = _around(self.columns)
        breaches, row = dict[int, str](), 0
        for around, records in self._levels(body):
            reason = _reason(around_decoder, around)
            why_around = reason[0] if reason else None
            for record in records:
                row += 1
                require_small(record)
                self._note_fields(record, tree, ())
                self._note_type(record, _reason(as_promised, record))
                if why := why_around or self._note_type(record, _reason(usable, record)):
                    breaches[row] = why
        self._rows += row
        return breaches

    def _levels(self, body: bytes) -> Iterator[tuple[Json, list[Json]]]:
        """Yield the JSON around each list of records, and the records; record new fields around them."""
        if not self.rows_path:
            yield b"{}", [body]
            return
        objects: list[Json] = [body]
        place: Steps = ("$",)
        for step in self.rows_path:
            is_first, is_last = len(place) == 1, len(place) == len(self.rows_path)
            known = {step} | (_ENVELOPE if is_first else set())
            known |= {c.name for c in self.columns if c.is_outer} if is_last else set()
            inner: list[Json] = []
            for around in objects:
                fields = _decoded(OBJECT, around)
                rows = fields.get(step, b"null")
                require_small_around(around, rows)
                for name in sorted(fields.keys() - known):
                    self._note_new((*place, name), fields[name])
                items = _decoded(LIST, rows)
                if is_last:
                    yield around, items
                inner += items
            objects, place = inner, (*place, step)

    def _note_fields(self, record: Json, tree: Tree, place: Steps) -> None:
        for name, value in _fields_of(record).items():
            node = tree.get(name, ...)
            if node is ...:
                self._note_new((*place, name), value)
            elif node is not None:
                self._present |= {name} if not place else set()
                if isinstance(node, dict):
                    self._note_fields(value, node, (*place, name))

    def _note_new(self, path: Steps, value: Json) -> None:
        self.new.setdefault(path, _sample(value))
        if len(self.new) > _MAX_NEW_FIELDS:
            raise ContractError(f"fal's records have more than {_MAX_NEW_FIELDS} unknown fields")

    def _note_type(self, record: Json, reason: tuple[str, Steps | None] | None) -> str | None:
        """Record a value of another type, and return the sentence of the reason."""
        if reason is None:
            return None
        sentence, retyped = reason
        if retyped is not None:
            value = record
            for step in retyped:  # the last of two equal names counts, which may be of the right type
                value = _fields_of(value).get(step, b"null")
            self.retyped.setdefault(retyped, _sample(value))
        return sentence


def require_small(record: Json) -> None:
    """Raise DataRefusedError for a record that is too large."""
    if len(memoryview(record)) > LARGEST_RECORD:
        raise DataRefusedError(TOO_LARGE)


TOO_LARGE = (
    f"fal's records cannot be read: one is larger than {LARGEST_RECORD:,} bytes; "
    "the window is not loaded"
)


def require_small_around(whole: Json, rows: Json) -> None:
    """Raise ContractError where the JSON around the records is too large."""
    if len(memoryview(whole)) - len(memoryview(rows)) > LARGEST_RECORD:
        raise ContractError(f"fal's answer has more than {LARGEST_RECORD:,} bytes around its records")


def records_of(body: bytes, rows_path: tuple[str, ...]) -> list[Json]:
    """Return the records of a page as fal sent them, in order; raises ContractError without any."""
    return [record for _, records in Contract(rows_path, ())._levels(body) for record in records]


def has_value(body: bytes, resource: Resource, name: str) -> bool:
    """Whether the first record of a page has a value in the column of this name."""
    value = next(iter(records_of(as_json(body), resource.rows_path)), b"null")
    for step in resource.column(name).steps:
        value = _fields_of(value).get(step, b"null")
    return bytes(value) != b"null"


def _fields_of(text: Json) -> Mapping[str, msgspec.Raw]:
    """Return the undecoded fields of an object; none for another value, which is another breach."""
    try:
        return OBJECT.decode(text)
    except msgspec.ValidationError:
        return {}
    except UNREADABLE as error:
        raise _unreadable(error) from None


def _decoded(decoder: msgspec.json.Decoder[Any], text: Json) -> Any:
    try:
        return decoder.decode(text)
    except UNREADABLE as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ContractError:
    return ContractError(f"fal's answer cannot be read: {error}")


def _inner(page: Any, depth: int) -> Iterator[Any]:
    levels = [page]
    for _ in range(depth):
        levels = [inner for level in levels for inner in level.f0]
    yield from levels


# --- Types from the catalogue ---------------------------------------------------------------------


def tree_of(columns: tuple[Column, ...], known: frozenset[Steps] = frozenset()) -> Tree:
    """Return the columns as they are nested in a record; a fallback is a field of its own."""
    tree: Tree = {}
    for column in columns:
        level = _level(tree, column.steps)
        level[column.steps[-1]] = column
        if column.fallback:
            level.setdefault(column.fallback, Column(column.fallback, column.kind, ""))
    for steps in sorted(known):
        if steps[0] != "$":
            _level(tree, steps).setdefault(steps[-1], None)
    return tree


def _level(tree: Tree, steps: Steps) -> Tree:
    for step in steps[:-1]:
        inner = tree.setdefault(step, {})
        assert isinstance(inner, dict)  # noqa: S101  # the catalogue's own consistency
        tree = inner
    return tree


def _inside(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    return tuple(c for c in columns if not c.is_outer and not c.is_asked)


@cache
def _page(
    rows_path: tuple[str, ...], columns: tuple[Column, ...], known: frozenset[Steps]
) -> msgspec.json.Decoder[Any]:
    """Return a strict decoder of the whole page: names, types and nullability of every field.

    A page with a name that msgspec does not accept is always checked record by record.
    """
    named = frozenset(steps for steps in known if not _NOT_A_NAME.search("".join(steps)))
    within = _struct(tree_of(_inside(columns), named))
    for depth in reversed(range(len(rows_path))):
        place = ("$", *rows_path[:depth])
        around = {steps[-1] for steps in named if steps[:-1] == place}
        around |= _ENVELOPE if depth == 0 else frozenset()
        outer = {c.name: c for c in columns if c.is_outer and depth + 1 == len(rows_path)}
        others: Tree = dict.fromkeys(sorted(around - {rows_path[depth]}))
        within = _struct({rows_path[depth]: _list_of(within), **others, **outer})
    return msgspec.json.Decoder(within)


_NOT_A_NAME = re.compile(r'[\\"\x00-\x1f]')


def _list_of(kind: Any) -> Any:
    return list[kind]


@cache
def _record(columns: tuple[Column, ...], *, is_strict: bool = False) -> msgspec.json.Decoder[Any]:
    """Return a decoder of usable records; a strict one accepts only the types that fal promises."""
    types = _JSON_TYPES if is_strict else _USABLE_TYPES
    return msgspec.json.Decoder(_struct(tree_of(_inside(columns)), types, is_open=True))


@cache
def _around(columns: tuple[Column, ...]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_struct({c.name: c for c in columns if c.is_outer}, is_open=True))


@cache
def _attributes_to_find(columns: tuple[Column, ...]) -> Mapping[str, str]:
    """Return the fields that some record must have, each with its attribute in a decoded record.

    An object of which we load parts counts as a field as well.
    """
    return {
        name: f"f{number}"
        for number, (name, node) in enumerate(tree_of(_inside(columns)).items())
        if not _is_sparse(node)
    }


def _is_sparse(node: Column | Tree | None) -> bool:
    """Whether fal may leave the field out of every record: a column, or an object of such columns."""
    if isinstance(node, dict):
        return all(map(_is_sparse, node.values()))
    return node is not None and node.is_sparse


_JSON_TYPES: Mapping[Kind, Any] = {
    Kind.TEXT: str,
    Kind.AMOUNT: float,
    Kind.WHOLE: float,
    Kind.SECONDS: float,
    Kind.INSTANT: str,
    Kind.LIST: list[str],
}


_USABLE_TYPES: Mapping[Kind, Any] = {
    kind: type_ for kind, type_ in _JSON_TYPES.items() if kind is not Kind.SECONDS
}
"""The types that make a record usable: staging leaves a measured value of another type empty."""


def _struct(
    fields: Mapping[str, Any], types: Mapping[Kind, Any] = _JSON_TYPES, *, is_open: bool = False
) -> Any:
    """Return a msgspec type for a JSON object; a field whose value is already a type is required."""
    specs: list[Any] = []
    names = {f"f{number}": name for number, name in enumerate(fields)}
    for name, node in zip(names, fields.values(), strict=True):
        if node is None:
            specs.append((name, msgspec.Raw, _NULL))  # of any type and size: it is not decoded
        elif isinstance(node, Column) and node.kind not in types:
            continue
        elif isinstance(node, Column):
            kind = types[node.kind]
            if node.may_be_text and types is _USABLE_TYPES:
                kind |= str
            is_needed = node.required and not node.fallback
            optional = (name, kind | msgspec.UnsetType | None, msgspec.UNSET)
            specs.append((name, kind) if is_needed else optional)
        elif isinstance(node, dict):
            inner = _struct(node, types, is_open=is_open) | msgspec.UnsetType | None
            specs.append((name, inner, msgspec.UNSET))
        else:
            specs.append((name, node))
    return msgspec.defstruct(
        "Record",
        specs,
        rename=names,
        kw_only=True,
        gc=False,
        forbid_unknown_fields=not is_open,
    )


# --- Reasons --------------------------------------------------------------------------------------

_AT = r"( - at `\$\.?(?P<path>.*)`)?"
_MISMATCH = re.compile(r"Expected `(?P<type>.*)`, got `(?P<got>\w+)`" + _AT)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*?)`" + _AT)
_RANGE = re.compile(r"Number out of range" + _AT)
_TYPE_NAMES = {
    "float": "a number", "int": "a number", "str": "text", "bool": "true or false",
    "object": "an object", "array": "a list",
}  # fmt: skip


def _reason(decoder: msgspec.json.Decoder[Any], text: Json) -> tuple[str, Steps | None] | None:
    """Return why the object does not have the type, in plain words, and the field with another type.

    Raises:
        ContractError: it is not JSON.
    """
    try:
        decoder.decode(text)
    except msgspec.ValidationError as error:
        message = str(error)
    except UNREADABLE as error:
        raise _unreadable(error) from None
    else:
        return None
    if match := _MISSING.fullmatch(message):
        return f"{'.'.join(filter(None, (match['path'], match['name'])))} is missing", None
    if match := _RANGE.fullmatch(message):
        return f"{match['path']} is out of range", None
    if match := _MISMATCH.fullmatch(message):
        path, got = match["path"] or "", match["got"]
        if got == "null":
            return f"{path or 'the row'} is null", None
        wanted = match["type"].split(" | ")[0]
        is_kind, must_be = _TYPE_NAMES.get(got, got), _TYPE_NAMES.get(wanted, wanted)
        sentence = f"{path or 'the row'} is {is_kind} where {must_be} belongs"
        return sentence, tuple(path.split("[")[0].split(".")) if path else None
    return message, None


def _sample(value: Json) -> str:
    return bytes(memoryview(value)[: 4 * _MAX_SAMPLE_CHARACTERS]).decode("utf-8", "replace")[
        :_MAX_SAMPLE_CHARACTERS
    ]
