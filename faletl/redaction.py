"""Redaction: remove a secret that fal echoes, in any form from which it could be restored.

These forms are: another case, JSON escapes and percent-encoding, in any mixture; hex; base64.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Self

REDACTED = "[key]"

MIN_SECRET_CHARACTERS = 8
"""A shorter secret would redact harmless texts; the halves of fal's keys are much longer."""

_JSON_ESCAPE = re.compile(rb"\\u00([2-7][0-9a-fA-F])")
_PERCENT_ESCAPE = re.compile(rb"%([2-7][0-9a-fA-F])")


def without(body: bytes, secrets: Iterable[str]) -> bytes:
    """Return the body with `REDACTED` in place of each secret."""
    longest_first = sorted(
        {s for s in secrets if len(s) >= MIN_SECRET_CHARACTERS}, key=len, reverse=True
    )
    # A secret that contains another is only where that is, so a large page is searched for few texts.
    innermost = [s for s in longest_first if not any(o in s for o in longest_first if o != s)]
    if not _may_contain(body, [_Forms.of(secret) for secret in innermost]):
        return body
    for secret in longest_first:
        for form in (_escaped(secret), secret.encode().hex().encode()):
            body = re.sub(form, REDACTED.encode(), body, flags=re.IGNORECASE)
        for coded in _in_base64(secret):
            body = re.sub(_escaped_signs(coded), REDACTED.encode(), body)
    return body


class _Forms(NamedTuple):
    """Texts that show that a secret may be in a body: in any case, without escapes, or exact."""

    folded: tuple[bytes, ...]
    folded_flat: tuple[bytes, ...]
    flat: tuple[bytes, ...]

    @classmethod
    def of(cls, secret: str) -> Self:
        """Return the forms of one secret."""
        plain = secret.lower().encode()
        flat = (plain.replace(b"\\", b""), _flat(plain))
        return cls((plain, secret.encode().hex().encode()), flat, tuple(_in_base64(secret)))

    @property
    def longest(self) -> int:
        """The number of bytes of the longest form."""
        return max(len(form) for form in chain.from_iterable(self))


_CHUNK_BYTES = 2**17
"""A body is searched in chunks: removing escapes from a whole page takes many times its size."""


def _may_contain(body: bytes, secrets: Sequence[_Forms]) -> bool:
    """Whether a secret may be in the body: each chunk is searched with the end of the one before."""
    overlap = max((forms.longest for forms in secrets), default=1) - 1
    start, folded_end, flat_end, has_escapes = 0, b"", b"", False
    while secrets and start < len(body):
        end = _end_of_chunk(body, start)
        chunk = body[start:end]
        without_escapes = _flat(chunk)
        had_escapes, has_escapes = has_escapes, without_escapes is not chunk
        flat, folded = flat_end + without_escapes, folded_end + chunk.lower()
        folded_flat = flat.lower() if has_escapes or had_escapes else folded
        if any(_is_in(forms, flat, folded, folded_flat) for forms in secrets):
            return True
        start, folded_end, flat_end = end, folded[-overlap:], flat[-overlap:]
    return False


def _is_in(forms: _Forms, flat: bytes, folded: bytes, folded_flat: bytes) -> bool:
    return (
        any(form in folded for form in forms.folded)
        or (folded_flat is not folded and any(form in folded_flat for form in forms.folded_flat))
        or any(form in flat for form in forms.flat)
    )


def _end_of_chunk(body: bytes, start: int) -> int:
    """Return the end of the chunk that begins at `start`, never within an escape."""
    end = start + _CHUNK_BYTES
    if end >= len(body):
        return len(body)
    marks = (body.rfind(b"\\", end - 5, end), body.rfind(b"%", end - 2, end))
    return min((mark for mark in marks if mark >= 0), default=end)


def _flat(text: bytes) -> bytes:
    """Return the text without escapes; the same object where it has none."""
    if b"%" in text:
        text = _PERCENT_ESCAPE.sub(_character, text)
    if b"\\" in text:
        text = _JSON_ESCAPE.sub(_character, text).replace(b"\\", b"")
    return text


def _character(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode())


def _escaped(text: str) -> bytes:
    """Return a pattern for the text, of which any character may be escaped, even more than once."""
    return b"".join(map(_character_pattern, text))


def _character_pattern(character: str) -> bytes:
    cases = sorted({character, character.lower(), character.upper()})
    codes = b"|".join(b"%02x" % ord(case) for case in cases)
    return b"(?:(?:\\\\+u00|%%)(?:%b)|\\\\*%b)" % (codes, re.escape(character.encode()))


def _escaped_signs(coded: bytes) -> bytes:
    """Return a pattern for base64, in which JSON escapes slashes, and a URL both signs."""
    slash, plus = b"(?:\\\\*/|%2[fF])", b"(?:[+]|%2[bB])"
    return re.escape(coded).replace(b"/", slash).replace(b"\\+", plus)


def _in_base64(secret: str) -> Iterator[bytes]:
    """Yield the base64 texts that a secret gives inside longer base64, in either alphabet.

    There are three alignments. The first and last characters also depend on the neighbours and are left
    out.
    """
    for lead in range(3):
        coded = base64.b64encode(b"\0" * lead + secret.encode())
        inner = coded[4 if lead else 0 : len(coded) // 4 * 4 - 4]
        if len(inner) >= MIN_SECRET_CHARACTERS:
            yield from {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
