"""JSON as fal sends it: bytes before and after a parser."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

Params = Mapping[str, str | tuple[str, ...]]


class MalformedBodyError(Exception):
    """Raised by a reader of bodies: this is no whole JSON document, so ask for it again."""


_BOM = b"\xef\xbb\xbf"


# A text without an end goes on to that of the body: to try again at each mark in it would take forever.
TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'


_TEXT_OR_NO_NUMBER = re.compile(TEXT + rb"|-?(?:NaN|Infinity)", re.DOTALL)


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they should be: even far from JSON, or too deep."""


def as_json(body: bytes) -> bytes:
    """The body as JSON proper: without a byte order mark, NaN and Infinity as texts.

    JSON has no such numbers, but Python's own encoder writes them: better one row that cannot be
    right than a page that cannot be read.
    """
    body = body.removeprefix(_BOM)
    # A byte that is not there is found missing much faster than a word.
    if (b"N" in body and b"NaN" in body) or (b"I" in body and b"Infinity" in body):
        return _TEXT_OR_NO_NUMBER.sub(lambda m: m[0] if m[0][:1] == b'"' else b'"%s"' % m[0], body)
    return body


OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


LIST = msgspec.json.Decoder(list[msgspec.Raw])
"""What they hold stays bytes."""
