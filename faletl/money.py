"""Exact amounts: from the text of a JSON number to DECIMAL(38,12), or refused.

A money number is never a float here. What fal's server made with floats may carry binary noise in its
text (0.1 + 0.2 is written 0.30000000000000004): digits behind the twelfth decimal are rounded away only
when that changes less than the fifteenth significant digit, the last that a double is sure of;
otherwise they are meant, and an amount that we cannot hold exactly is refused (docs/decisions.md,
"Amounts").
"""

from __future__ import annotations

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal

PRECISION = 38
SCALE = 12
DOUBLE_DIGITS = 15
LONGEST = 1000
"""Characters of a number that could still be meant."""

HALF_NANO = "0.0000000005"
"""What a sum may differ from fal's, per row summed: fal rounds each amount to a nano-dollar."""

DECIMAL_TYPE = f"decimal({PRECISION},{SCALE})"

# What most amounts fit in. DuckDB keeps it in 64 bits, and turns texts into it, and back, much faster.
_NARROW_TYPE = f"decimal(18,{SCALE})"

# What DuckDB casts to DECIMAL(38,12) without losing a digit.
EXACT_TEXT = rf"\d{{1,{PRECISION - SCALE}}}(\.\d{{1,{SCALE}}})?"

_exact = re.compile(EXACT_TEXT, re.ASCII)
_number = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d{1,3})?", re.ASCII)
_QUANTUM = Decimal(1).scaleb(-SCALE)
_WIDE = Context(prec=3000, rounding=ROUND_HALF_EVEN)


def exact_text(number: str) -> tuple[str, bool]:
    """The text of a JSON number as plain decimal text that DECIMAL(38,12) holds exactly.

    Returns the text, and whether binary noise was rounded off it. A number that cannot be held comes
    back as it was given: it does not match `EXACT_TEXT`, and so the staging step refuses it by name.
    """
    if _exact.fullmatch(number) or not _number.fullmatch(number) or len(number) > LONGEST:
        return number, False
    value = _WIDE.create_decimal(number)
    rounded = value.quantize(_QUANTUM, context=_WIDE)
    is_rounded = rounded != value
    last_sure_digit = Decimal(1).scaleb(value.adjusted() - DOUBLE_DIGITS + 1)
    if is_rounded and abs(rounded - value) >= last_sure_digit:
        return number, False
    plain = f"{rounded:f}".rstrip("0").rstrip(".")
    plain = "0" if plain == "-0" else plain
    return (plain, is_rounded) if _exact.fullmatch(plain) else (number, False)


def plain(amount: Decimal) -> str:
    """The amount in plain notation, without trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def decimal_of(text: str) -> str:
    """The SQL of DuckDB for a text as DECIMAL(38,12); null where it is none."""
    narrow = f"cast(try_cast({text} as {_NARROW_TYPE}) as {DECIMAL_TYPE})"
    return f"coalesce({narrow}, try_cast({text} as {DECIMAL_TYPE}))"


def text_of(amount: str) -> str:
    """The SQL of DuckDB for the text of a DECIMAL(38,12), with all of its decimals."""
    narrow = f"cast(try_cast({amount} as {_NARROW_TYPE}) as varchar)"
    return f"coalesce({narrow}, cast({amount} as varchar))"
