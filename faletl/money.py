"""Exact amounts: from the text of a JSON number to DECIMAL(38,12).

An amount is never a float here. Fal computes some amounts in doubles, so their texts may have 17 digits
(a third, or 124831 / 48000 seconds). A text is rounded half-even at the twelfth decimal, and each
rounded amount is counted. No amount is refused for its digits (docs/decisions.md, "Amounts").
"""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache

PRECISION = 38
SCALE = 12
DOUBLE_DIGITS = 15
"""Digits that a double keeps; DuckDB converts every JSON number to a double."""

LARGEST = 10**15
"""Amounts of this size or more are refused: below it the models can multiply and divide them."""

HALF_NANO = "0.0000000005"
"""The tolerance of a sum for each amount in it, because fal rounds each amount to a nano-dollar."""

DECIMAL_TYPE = f"decimal({PRECISION},{SCALE})"

EXACT_TEXT = rf"\d{{1,{len(str(LARGEST)) - 1}}}(\.\d{{1,{SCALE}}})?"
"""The pattern of an amount that is kept to its last digit."""


# The type of all amounts below `LARGEST`; larger ones do not fit.
BOUNDED_TYPE = f"decimal({len(str(LARGEST)) - 1 + SCALE},{SCALE})"

_number = re.compile(r"(-?)(\d+(?:\.\d+)?)(?:[eE]([+-]?)0*(\d*))?", re.ASCII)
_plain = re.compile(rf"-?\d+(?:\.\d{{1,{SCALE}}})?", re.ASCII)
_MAX_EXPONENT_DIGITS = 9  # no text is long enough to balance a larger exponent
_QUANTUM = Decimal(1).scaleb(-SCALE)
_WIDE = Context(prec=2 * PRECISION, rounding=ROUND_HALF_EVEN)


def exact_text(number: str) -> tuple[str, bool]:
    """Return a JSON number in plain notation, rounded half-even at the 12th decimal; and whether it was.

    A text that fits no column is returned unchanged, so that it is refused with that text: a number
    that is not zero but rounds to zero, one with more than 26 digits in front of the point, or a text
    that is not a number.
    """
    if _plain.fullmatch(number) and not number.startswith("-0"):
        return number, False
    match = _number.fullmatch(number)
    if match is None or number[-1] in "eE+-":
        return number, False
    sign, mantissa, exponent_sign, exponent = match.groups(default="")
    if not mantissa.strip("0."):
        return "0", False
    if len(exponent) > _MAX_EXPONENT_DIGITS:
        return number, False
    value = Decimal(f"{sign}{mantissa}e{exponent_sign}{exponent or 0}")
    if not -SCALE - 2 < value.adjusted() < PRECISION - SCALE:
        return number, False
    rounded = value.quantize(_QUANTUM, context=_WIDE)
    if not rounded:
        return number, False
    text = f"{rounded:f}".rstrip("0").rstrip(".")
    return text, rounded != value


_cached_text = lru_cache(maxsize=4096)(exact_text)  # amounts come twice in a record, prices in many
_MAX_CACHED_CHARACTERS = 40  # of a number in the cache

# A number with this many digits and points may have more digits than a double keeps, or more decimals
# than we keep; one near zero may become zero. It follows the name of a field that ends in a letter, a
# digit or an underscore, as all of fal's names do. Within a text, a quotation mark has a backslash in
# front of it.
_LONG_NUMBER = re.compile(
    rb'":(?<=\w":)\s*(-?(?:[\d.]{%d,}(?:[eE][+-]?\d+)?|\d[\d.]*[eE]-\d{3,}))' % DOUBLE_DIGITS
)
_BLANK_BEFORE_COLON = (b'" :', b'"\n:', b'"\r:', b'"\t:')
_TEXT_OR_NUMBER = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?\d[\d.eE+-]*', re.DOTALL)


def with_exact_numbers(body: bytes, names: Collection[bytes], *, is_each: bool) -> tuple[bytes, int]:
    """Return a JSON document with exact texts in place of numbers that a double may not represent.

    With `is_each`, every number is replaced. The number returned counts the rounded amounts in fields of
    these `names` (in quotation marks).
    """
    name, rounded = b"", 0

    def exact(number: bytes) -> bytes:
        nonlocal rounded
        convert = _cached_text if len(number) <= _MAX_CACHED_CHARACTERS else exact_text
        text, is_rounded = convert(number.decode().lower())  # SQL finds an exponent by its e
        rounded += is_rounded and (name in names or b"\\" in name)
        return b'"%b"' % text.encode()

    def long_number(match: re.Match[bytes]) -> bytes:
        nonlocal name
        end = match.start() + 1
        name = body[body.rfind(b'"', 0, end - 1) : end]
        return b'":' + exact(match[1])

    def each_number(match: re.Match[bytes]) -> bytes:
        nonlocal name
        if match[0][:1] == b'"':
            name = match[0]
            return name
        return exact(match[0])

    has_long = is_each or has_long_number(body)
    if is_each or (has_long and any(mark in body for mark in _BLANK_BEFORE_COLON)):
        body = _TEXT_OR_NUMBER.sub(each_number, body)
    elif has_long:
        body = _LONG_NUMBER.sub(long_number, body)
    return body, rounded


_DIGITS = bytes.maketrans(b".123456789E", b"0000000000e")


def has_long_number(body: bytes) -> bool:
    """Whether a document may have a number that a double cannot represent: many digits, or near zero."""
    digits = body.translate(_DIGITS)
    # A search from the end looks for the first byte of the mark, which is three times as fast here.
    return digits.rfind(b"0" * DOUBLE_DIGITS) >= 0 or _has_number_before(digits, b"e-000")


def _has_number_before(digits: bytes, mark: bytes) -> bool:
    """Whether a number contains the mark; texts, such as hexadecimal ids, often contain it as well."""
    at = digits.rfind(mark)
    while at >= 0:
        before = digits[max(0, at - 400) : at].rstrip(b"0").removesuffix(b"-")
        if before[-1:] in (b":", b",", b"[", b" ", b"\n", b"\t", b"\r"):
            return True
        at = digits.rfind(mark, 0, at + len(mark) - 1)
    return False


# --- In SQL ---------------------------------------------------------------------------------------


def plain(amount: Decimal) -> str:
    """Return the amount in plain notation, without trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def product_of(left: str, right: str) -> str:
    """Return DuckDB SQL for the product of two amounts below `LARGEST`, to about 6 decimals.

    `left * right` would overflow from 10^14 on. So whole parts and fractions are multiplied separately:
    each of these products fits, and so does their sum.
    """
    wholes = [f"cast(trunc({amount}) as decimal(19,0))" for amount in (left, right)]  # 18 stay 18
    fractions = [f"cast(({amount}) % 1 as decimal(19,{SCALE}))" for amount in (left, right)]
    products = (f"{a} * {b}" for a in (wholes[0], fractions[0]) for b in (wholes[1], fractions[1]))
    return f"({' + '.join(f'cast({product} as {PRODUCT_TYPE})' for product in products)})"


PRODUCT_TYPE = f"decimal({PRECISION},6)"
"""The type that a product of two amounts fits."""
