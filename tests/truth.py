"""A fal account that a test holds in its hands: what the API serves, and what faletl must make of it.

The figures are computed here from the served lines with Python's own Decimal and Fraction, by other
code than the warehouse's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from typing import Any

from faletl.sandbox import Credential, UsageLine

NOW = datetime(2026, 11, 23, 10, 30, tzinfo=UTC)
KEY = Credential("backend", api_key_id="key-1")
LOGIN = Credential("User token", login_username="alice")
NOBODY = Credential("None")

FLUX, VIDEO, VOICE = "fal-ai/flux/dev", "fal-ai/veo3.1", "fal-ai/kokoro"


def line(
    hour: datetime,
    endpoint_id: str = FLUX,
    quantity: str | Decimal = "1",
    unit_price: str = "0.025",
    *,
    unit: str = "images",
    percent_discount: str | None = None,
    currency: str = "USD",
    credential: Credential = KEY,
) -> UsageLine:
    """A line of usage whose costs follow from quantity, price and discount."""
    with localcontext(prec=60):
        subtotal = Decimal(quantity) * Decimal(unit_price)
        discount = subtotal * Decimal(percent_discount or 0) / 100
        return UsageLine(
            hour=hour,
            endpoint_id=endpoint_id,
            unit=unit,
            quantity=Decimal(quantity),
            unit_price=Decimal(unit_price),
            percent_discount=None if percent_discount is None else Decimal(percent_discount),
            cost_subtotal=subtotal,
            cost_discount=discount,
            cost_total=subtotal - discount,
            currency=currency,
            credential=credential,
        )


@dataclass
class Account:
    """What fal holds of one account; a `World` that a test changes between runs."""

    account: str = "acme"
    lines: list[UsageLine] = field(default_factory=list)
    catalogue: list[dict[str, Any]] = field(default_factory=list)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    balance: Decimal = Decimal("24.5")

    def models(self) -> list[dict[str, Any]]:
        """The catalogue."""
        return self.catalogue

    def prices(self) -> dict[str, dict[str, Any]]:
        """The price list."""
        return self.listed

    def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
        """The lines of the hours asked for."""
        return [one for one in self.lines if start <= one.hour < end]

    def credits(self) -> dict[str, Any]:
        """The balance."""
        return {"current_balance": self.balance, "currency": "USD"}

    def list_price(self, endpoint_id: str, unit_price: str, unit: str = "images") -> None:
        """Set the list price of an endpoint."""
        self.listed[endpoint_id] = {
            "endpoint_id": endpoint_id,
            "unit_price": Decimal(unit_price),
            "unit": unit,
            "currency": "USD",
        }


def two_days() -> Account:
    """A small account: yesterday and the day before, three endpoints, three credentials."""
    account = Account()
    for day in (21, 22):
        for hour in (0, 7, 23):
            at = datetime(2026, 11, day, hour, tzinfo=UTC)
            account.lines += [
                line(at, FLUX, "3", "0.025", percent_discount="10"),
                line(at, FLUX, "2", "0.025", credential=LOGIN),
                line(at, FLUX, "1.5", "0.03", unit="megapixels"),
                line(at, VIDEO, "0.123456789", "0.4", unit="second", credential=NOBODY),
                line(at, VOICE, "16.374837", "0.02", unit="1000 characters "),
            ]
    account.catalogue = [
        {"endpoint_id": FLUX, "metadata": {"display_name": "FLUX", "category": "text-to-image"}},
        {"endpoint_id": VOICE},
    ]
    account.list_price(FLUX, "0.025")
    account.list_price(VOICE, "0.02", "1000 characters")
    return account


# --- The oracle -----------------------------------------------------------------------------------

Row = tuple[Any, ...]


def spend_daily(account: Account, until: datetime = NOW) -> dict[Row, Row]:
    """rpt_spend_daily by its grain: quantity, subtotal, discount, total, effective unit price."""
    sums: dict[Row, list[Decimal]] = {}
    for one in _settled(account, until):
        key = (account.account, one.hour.date(), one.endpoint_id, one.unit, one.currency)
        amounts = (one.quantity, one.cost_subtotal, one.cost_discount, one.cost_total)
        held = sums.setdefault(key, [Decimal(0)] * 4)
        with localcontext(prec=60):
            sums[key] = [a + b for a, b in zip(held, amounts, strict=True)]
    return {key: (*held, quotient(held[1], held[0])) for key, held in sums.items()}


def spend_by_hour(account: Account, until: datetime = NOW) -> dict[Row, Row]:
    """fct_usage by its grain: quantity and cost_total."""
    sums: dict[Row, tuple[Decimal, Decimal]] = {}
    for one in _settled(account, until):
        key = (
            account.account, one.hour.replace(tzinfo=None), one.endpoint_id, one.unit, one.unit_price,
            one.percent_discount, one.currency, credential_id(one.credential),
        )  # fmt: skip
        quantity, cost = sums.get(key, (Decimal(0), Decimal(0)))
        with localcontext(prec=60):
            sums[key] = (quantity + one.quantity, cost + one.cost_total)
    return sums


def credential_id(credential: Credential) -> str:
    """The id that the warehouse gives a credential."""
    if credential.api_key_id:
        return f"key:{credential.api_key_id}"
    if credential.login_username:
        return f"user:{credential.login_username}"
    return "none" if credential.detail in ("", "None") else f"label:{credential.detail}"


def quotient(numerator: Decimal, denominator: Decimal) -> Decimal | None:
    """Exact to 12 decimals, half away from zero; None for a zero divisor."""
    if not denominator:
        return None
    scaled = Fraction(numerator) / Fraction(denominator) * 10**12
    whole = abs(scaled.numerator) * 2 + scaled.denominator
    rounded = whole // (2 * scaled.denominator)
    with localcontext(prec=60):
        return Decimal(rounded if scaled >= 0 else -rounded).scaleb(-12)


def _settled(account: Account, until: datetime) -> Iterator[UsageLine]:
    """The lines that a run at `until` may read: of hours that ended five minutes ago."""
    last = (until - timedelta(minutes=5)).replace(minute=0, second=0, microsecond=0)
    return (one for one in account.lines if one.hour < last)


def day(number: int) -> date:
    """A day of November 2026."""
    return date(2026, 11, number)


def rounded(amount: Decimal) -> Decimal:
    """To twelve decimals, as a column holds it."""
    return amount.quantize(Decimal("1e-12"), rounding=ROUND_HALF_UP)
