"""Exact amounts: from the text of a JSON number to DECIMAL(38,12).

A money number is never a float here. Fal computes some amounts in doubles, so their texts may have 17
digits (a third, or 124831 / 48000 seconds): what is behind the twelfth decimal is rounded half-even,
from the text, and counted. Nothing is refused for its digits (docs/decisions.md, "Amounts").
"""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache

PRECISION = 38
SCALE = 12
DOUBLE_DIGITS = 15
"""Digits that survive a double, through which DuckDB reads a JSON number."""

LARGEST = 10**15
"""An amount of this size or more is refused: the models multiply and divide what is below it."""

HALF_NANO = "0.0000000005"
"""What a sum may differ from fal's for each amount in it, as fal rounds each one to a nano-dollar."""

DECIMAL_TYPE = f"decimal({PRECISION},{SCALE})"

EXACT_TEXT = rf"\d{{1,{len(str(LARGEST)) - 1}}}(\.\d{{1,{SCALE}}})?"
"""What an amount looks like that is held to its last digit."""


# What every amount below `LARGEST` fits in, and no other.
BOUNDED_TYPE = f"decimal({len(str(LARGEST)) - 1 + SCALE},{SCALE})"

_number = re.compile(r"(-?)(\d+(?:\.\d+)?)(?:[eE]([+-]?)0*(\d*))?", re.ASCII)
_plain = re.compile(rf"-?\d+(?:\.\d{{1,{SCALE}}})?", re.ASCII)
_LONGEST_EXPONENT = 9  # digits; no text is long enough to make up for more
_QUANTUM = Decimal(1).scaleb(-SCALE)
_WIDE = Context(prec=2 * PRECISION, rounding=ROUND_HALF_EVEN)


def exact_text(number: str) -> tuple[str, bool]:
    """Return a JSON number in plain notation, rounded half-even at the 12th decimal; and if it was.

    What no column could hold comes back as it was given, so that it is refused with that text: a number
    that is not zero but rounds to zero, one with more than 26 digits in front of the point, or a text
    that is not a number.
    """
    if _plain.fullmatch(number) and not number.startswith("-0"):
        return number, False
    found = _number.fullmatch(number)
    if found is None or number[-1] in "eE+-":
        return number, False
    sign, mantissa, exponent_sign, exponent = found.groups(default="")
    if not mantissa.strip("0."):
        return "0", False
    if len(exponent) > _LONGEST_EXPONENT:
        return number, False
    value = Decimal(f"{sign}{mantissa}e{exponent_sign}{exponent or 0}")
    if not -SCALE - 2 < value.adjusted() < PRECISION - SCALE:
        return number, False
    rounded = value.quantize(_QUANTUM, context=_WIDE)
    if not rounded:
        return number, False
    text = f"{rounded:f}".rstrip("0").rstrip(".")
    return text, rounded != value


_known_text = lru_cache(maxsize=4096)(exact_text)  # amounts come twice in a record, prices in many
_LONGEST_KNOWN = 40  # characters of a number that is remembered

# A number with so many digits and points has more digits than a double keeps, or more decimals than we
# do; one near zero may become zero. It follows the name of a field that ends in a letter, a digit or an
# underscore, as all of fal's do: within a text, a quotation mark has a backslash in front of it.
_LONG_NUMBER = re.compile(
    rb'":(?<=\w":)\s*(-?(?:[\d.]{%d,}(?:[eE][+-]?\d+)?|\d[\d.]*[eE]-\d{3,}))' % DOUBLE_DIGITS
)
_BLANK_BEFORE_COLON = (b'" :', b'"\n:', b'"\r:', b'"\t:')
_TEXT_OR_NUMBER = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?\d[\d.eE+-]*', re.DOTALL)


def with_exact_numbers(body: bytes, names: Collection[bytes], *, is_each: bool) -> tuple[bytes, int]:
    """Return a JSON document with exact amounts, as texts, for numbers that a double may not hold.

    `is_each` says that every number is replaced. The count is of those that were rounded, in fields of
    these `names` (in quotation marks).
    """
    name, rounded = b"", 0

    def exact(number: bytes) -> bytes:
        nonlocal rounded
        known = _known_text if len(number) <= _LONGEST_KNOWN else exact_text
        text, is_rounded = known(number.decode().lower())  # in SQL an exponent is found by its e
        rounded += is_rounded and (name in names or b"\\" in name)
        return b'"%b"' % text.encode()

    def long_number(found: re.Match[bytes]) -> bytes:
        nonlocal name
        end = found.start() + 1
        name = body[body.rfind(b'"', 0, end - 1) : end]
        return b'":' + exact(found[1])

    def each_number(found: re.Match[bytes]) -> bytes:
        nonlocal name
        if found[0][:1] == b'"':
            name = found[0]
            return name
        return exact(found[0])

    has_long = is_each or has_long_number(body)
    if is_each or (has_long and any(mark in body for mark in _BLANK_BEFORE_COLON)):
        body = _TEXT_OR_NUMBER.sub(each_number, body)
    elif has_long:
        body = _LONG_NUMBER.sub(long_number, body)
    return body, rounded


_DIGITS = bytes.maketrans(b".123456789E", b"0000000000e")


def has_long_number(body: bytes) -> bool:
    """Whether a document may hold a number that a double does not hold: many digits, or near zero."""
    digits = body.translate(_DIGITS)
    # From the end, where CPython looks for the first byte of what it seeks: three times as fast here.
    return digits.rfind(b"0" * DOUBLE_DIGITS) >= 0 or _has_number_before(digits, b"e-000")


def _has_number_before(digits: bytes, mark: bytes) -> bool:
    """Whether a number token ends in the mark; in texts, as in ids in hexadecimal, it is frequent."""
    at = digits.rfind(mark)
    while at >= 0:
        before = digits[max(0, at - 400) : at].rstrip(b"0").removesuffix(b"-")
        if before[-1:] in (b":", b",", b"[", b" ", b"\n", b"\t", b"\r"):
            return True
        at = digits.rfind(mark, 0, at + len(mark) - 1)
    return False


# --- In SQL ---------------------------------------------------------------------------------------


def plain(amount: Decimal) -> str:
    """The amount in plain notation, without trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def product_of(one: str, other: str) -> str:
    """The SQL of DuckDB for the product of two amounts below `LARGEST`, to about 6 decimals.

    `one * other` would overflow from 10^14 on. So whole parts and fractions are multiplied apart: each
    of these products fits, and so does their sum.
    """
    wholes = [f"cast(trunc({amount}) as decimal(19,0))" for amount in (one, other)]  # 18 stay 18
    fractions = [f"cast(({amount}) % 1 as decimal(19,{SCALE}))" for amount in (one, other)]
    products = (f"{a} * {b}" for a in (wholes[0], fractions[0]) for b in (wholes[1], fractions[1]))
    return f"({' + '.join(f'cast({product} as {PRODUCT_TYPE})' for product in products)})"


PRODUCT_TYPE = f"decimal({PRECISION},6)"
"""What a product of two amounts fits in."""
