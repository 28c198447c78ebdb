"""Mutations: valid bytes with something odd in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

Tokens = Sequence[bytes]

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[0-9.eE+-]+|[A-Za-z_]+|[ \r\n\t]+|.', re.DOTALL)

NUMBERS = (
    b"0", b"-0", b"-0.0", b"-1", b"1e400", b"1e-400", b"-1e-400", b"1E5", b"100000e-5", b"01", b"+1",
    b".5", b"1.", b"1e", b"0x10", b"0.30000000000000004", b"0.1234567890123", b"12345678.123456789012",
    b"1234567890123456", b"9007199254740993", b"9223372036854775808", b"18446744073709551616",
    b"9" * 26 + b"." + b"9" * 12, b"9" * 26 + b"." + b"9" * 13, b"1" + b"0" * 38, b"7" * 400,
    b"1" * 5000, b"0." + b"0" * 400 + b"1", b"1e99999999999", b"NaN", b"-NaN", b"Infinity", b"-Infinity",
)  # fmt: skip
TEXTS = (
    b"null", b"true", b"[]", b"{}", b"[null]", b'{"a": 1}', b'""', b'"\\u0000"', b'"\\\\u0000"',
    b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0022\\u0022"', b'"\\""', b'"\xff"', b'"\xed\xa0\x80"',
    b'"NaN"', b'"\\"NaN"', b'"1e-400"', b'"0"', b'"a\x00"', b'"\n"', b'"\\u2028"', b'"e\xcc\x81"',
    b'"2026-02-29T00:00:00Z"', b'"2026-11-22T24:00:00Z"', b'"2026-11-22T23:59:60Z"', b'"2026-11-22"',
    b'"2026-11-22 09:14:22.1234567891+05:45"', b'"2026-11-22t09:14z"', b'"2026-11-22T00:00:00"',
    b'"9999-12-31T23:59:59-23:59"', b'"0001-01-01T00:00:00+23:59"', b'"_row"', b'"_page"', b'"bucket"',
    b'"results"', b'"next_cursor"', b'"has_more"', b'"a.b[0]"', b'"text of quantity"',
    b'"\'; drop table x; --"', b'"../../x"', b'".."', b'"/"', b'"' + b"\\\\" * 300 + b'"',
    b'"' + b"x" * 3000 + b'"', b"[" * 300 + b"]" * 300,
)  # fmt: skip
ODD = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"", b"\\", b"\\u0000", b"\xef\xbb\xbf", b"\x00", b"\xff",
    b"NaN", b"[" * 3000, b'{"a":' * 3000,
)  # fmt: skip


def tokens_of(text: bytes) -> Tokens:
    """The text in pieces that mean something in JSON; joined they are the text again."""
    return tuple(_TOKEN.findall(text))


def mutated(random: Random, seeds: Sequence[Tokens]) -> bytes:
    """One of the seeds with a few changes to its tokens, perhaps to its bytes; seldom only noise."""
    if random.random() < 0.02:
        return random.randbytes(random.randrange(64))
    tokens = list(random.choice(seeds))
    for _ in range(random.choice((0, 1, 1, 1, 1, 2, 4))):
        _change_token(random, tokens, seeds)
    text = b"".join(tokens)
    return _change_bytes(random, bytearray(text)) if random.random() < 0.15 else text


def _change_token(random: Random, tokens: list[bytes], seeds: Sequence[Tokens]) -> None:
    at = random.randrange(len(tokens) + 1)
    if random.random() < 0.6:  # mostly JSON still, so that somebody looks inside
        while at < len(tokens) and not _is_value(tokens, at):
            at += 1
        tokens[at : at + 1] = [random.choice(random.choice((NUMBERS, TEXTS, random.choice(seeds))))]
        return
    match random.randrange(5):
        case 0:
            del tokens[at : at + random.choice((1, 1, 2, 4, 8))]
        case 1:  # a name twice, a record twice, half of one
            tokens[at:at] = tokens[at : at + random.choice((1, 2, 4, 8, 16, 64))]
        case 2:
            tokens[at:at] = [random.choice(ODD)]
        case 3:
            tokens[at : at + 1] = [random.choice(random.choice((ODD, TEXTS)))]
        case _ if at < len(tokens):
            tokens[at] = _change_bytes(random, bytearray(tokens[at]))


def _is_value(tokens: Sequence[bytes], at: int) -> bool:
    return tokens[at][:1] not in b" \r\n\t{}[],:" and tokens[at + 1 : at + 2] != [b":"]


def _change_bytes(random: Random, text: bytearray) -> bytes:
    at = random.randrange(len(text) + 1)
    match random.randrange(5):
        case 0 if at < len(text):
            text[at] ^= 1 << random.randrange(8)
        case 1:
            text[at:at] = random.randbytes(random.choice((1, 1, 2, 4)))
        case 2:
            del text[at : at + random.choice((1, 1, 2, 8))]
        case 3:
            del text[at:]
        case _:
            text[at:at] = random.choice(ODD)
    return bytes(text)
