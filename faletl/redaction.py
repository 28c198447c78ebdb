"""Redaction: a secret that fal echoes is taken out of it, in any form that can be turned back.

That is in other case, as escapes of JSON and percent-encoded, in any mixture; as hex; in base64.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Self

REDACTED = "[key]"

SHORTEST = 8
"""A shorter text would redact innocent ones; the halves of fal's keys are much longer."""

_JSON_ESCAPE = re.compile(rb"\\u00([2-7][0-9a-fA-F])")
_PERCENT_ESCAPE = re.compile(rb"%([2-7][0-9a-fA-F])")


def without(body: bytes, secrets: Iterable[str]) -> bytes:
    """Return the body with `REDACTED` in place of each of the secrets."""
    longest_first = sorted({one for one in secrets if len(one) >= SHORTEST}, key=len, reverse=True)
    # A secret that holds another one cannot be where that is not: a large page is searched for few.
    innermost = [one for one in longest_first if not any(o in one for o in longest_first if o != one)]
    if not _may_show(body, [_Sought.of(one) for one in innermost]):
        return body
    for secret in longest_first:
        for form in (_escaped(secret), secret.encode().hex().encode()):
            body = re.sub(form, REDACTED.encode(), body, flags=re.IGNORECASE)
        for coded in _in_base64(secret):
            body = re.sub(_escaped_signs(coded), REDACTED.encode(), body)
    return body


class _Sought(NamedTuple):
    """What shows that a secret may be in a body: in any case, without escapes, and as it is."""

    folded: tuple[bytes, ...]
    folded_flat: tuple[bytes, ...]
    flat: tuple[bytes, ...]

    @classmethod
    def of(cls, secret: str) -> Self:
        """Of one secret."""
        plain = secret.lower().encode()
        flat = (plain.replace(b"\\", b""), _flat(plain))
        return cls((plain, secret.encode().hex().encode()), flat, tuple(_in_base64(secret)))

    @property
    def longest(self) -> int:
        """Bytes of the longest of them."""
        return max(len(one) for one in chain.from_iterable(self))


_PIECE = 2**17
"""Bytes that are looked at together: a page of escapes takes many times its size without them."""


def _may_show(body: bytes, sought: Sequence[_Sought]) -> bool:
    """Whether any of them is in the body; piece by piece, with the end of each in front of the next."""
    overlap = max((one.longest for one in sought), default=1) - 1
    start, folded_end, flat_end, has_escapes = 0, b"", b"", False
    while sought and start < len(body):
        end = _end_of_piece(body, start)
        piece = body[start:end]
        without_escapes = _flat(piece)
        had_escapes, has_escapes = has_escapes, without_escapes is not piece
        flat, folded = flat_end + without_escapes, folded_end + piece.lower()
        folded_flat = flat.lower() if has_escapes or had_escapes else folded
        if any(_is_shown(one, flat, folded, folded_flat) for one in sought):
            return True
        start, folded_end, flat_end = end, folded[-overlap:], flat[-overlap:]
    return False


def _is_shown(sought: _Sought, flat: bytes, folded: bytes, folded_flat: bytes) -> bool:
    return (
        any(one in folded for one in sought.folded)
        or (folded_flat is not folded and any(one in folded_flat for one in sought.folded_flat))
        or any(one in flat for one in sought.flat)
    )


def _end_of_piece(body: bytes, start: int) -> int:
    """Where a piece ends that begins there, never within an escape."""
    end = start + _PIECE
    if end >= len(body):
        return len(body)
    marks = (body.rfind(b"\\", end - 5, end), body.rfind(b"%", end - 2, end))
    return min((mark for mark in marks if mark >= 0), default=end)


def _flat(text: bytes) -> bytes:
    """The text without escapes; the same object where there are none."""
    if b"%" in text:
        text = _PERCENT_ESCAPE.sub(_character, text)
    if b"\\" in text:
        text = _JSON_ESCAPE.sub(_character, text).replace(b"\\", b"")
    return text


def _character(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode())


def _escaped(text: str) -> bytes:
    """A pattern for the text, of which any character may be escaped, even more than once."""
    return b"".join(map(_character_pattern, text))


def _character_pattern(one: str) -> bytes:
    codes = b"|".join(b"%02x" % ord(case) for case in sorted({one, one.lower(), one.upper()}))
    return b"(?:(?:\\\\+u00|%%)(?:%b)|\\\\*%b)" % (codes, re.escape(one.encode()))


def _escaped_signs(coded: bytes) -> bytes:
    """A pattern for base64, of which JSON escapes slashes, and a URL both signs."""
    slash, plus = b"(?:\\\\*/|%2[fF])", b"(?:[+]|%2[bB])"
    return re.escape(coded).replace(b"/", slash).replace(b"\\+", plus)


def _in_base64(secret: str) -> Iterator[bytes]:
    """What shows of the secret wherever it stands in longer base64, of either alphabet.

    It has one of three alignments there; its first and last characters also depend on the neighbours
    and are left out.
    """
    for lead in range(3):
        coded = base64.b64encode(b"\0" * lead + secret.encode())
        inner = coded[4 if lead else 0 : len(coded) // 4 * 4 - 4]
        if len(inner) >= SHORTEST:
            yield from {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
