"""JSON as fal sends it: bytes before and after a parser."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

Params = Mapping[str, str | tuple[str, ...]]


class MalformedBodyError(Exception):
    """A body is not a complete JSON document, so the request must be repeated."""


_BOM = b"\xef\xbb\xbf"

# A text without an end matches up to the end of the body: a try at each of its quotes would be endless.
TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'

_TEXT_OR_NO_NUMBER = re.compile(TEXT + rb"|-?(?:NaN|Infinity)", re.DOTALL)

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes of another form: also for what is far from JSON, or too deep."""


def as_json(body: bytes) -> bytes:
    """Return the body as strict JSON: without a byte order mark, with NaN and Infinity as texts.

    JSON has no such numbers, but Python's own encoder writes them. A row that is quarantined is better
    than a page that cannot be decoded.
    """
    body = body.removeprefix(_BOM)
    # A search for a single byte that is absent is much faster than one for a word.
    if (b"N" in body and b"NaN" in body) or (b"I" in body and b"Infinity" in body):
        return _TEXT_OR_NO_NUMBER.sub(lambda m: m[0] if m[0][:1] == b'"' else b'"%s"' % m[0], body)
    return body


OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])

LIST = msgspec.json.Decoder(list[msgspec.Raw])
"""Decoders of one level; the values in it stay bytes."""
