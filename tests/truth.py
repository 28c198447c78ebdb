"""A fal account that a test holds in its hands: what the API serves, and what faletl must make of it.

A test writes down what is due to the last digit; the account serves it as fal would: in doubles.
The figures are computed here from the served lines with Python's own Decimal and Fraction, by other
code than the warehouse's: each served amount is rounded half-even at the 12th decimal, then added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from typing import Any

from faletl.sandbox import BillingEvent, Calls, Credential, UsageLine

NANO = Decimal("1e-9")
NOW = datetime(2026, 11, 23, 10, 30, tzinfo=UTC)
KEY = Credential("backend", api_key_id="key-1")
LOGIN = Credential("User token", login_username="alice")
NOBODY = Credential("None")

OTHER_KEY = "other-account:0123456789abcdef"
"""A key for a second account: fal knows an account by its keys."""

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
    percent = None if percent_discount is None else Decimal(percent_discount)
    return UsageLine(
        hour=hour,
        endpoint_id=endpoint_id,
        unit=unit,
        quantity=Decimal(quantity),
        unit_price=Decimal(unit_price),
        percent_discount=percent,
        **costs(Decimal(quantity), Decimal(unit_price), percent),
        currency=currency,
        credential=credential,
    )


def costs(quantity: Decimal, unit_price: Decimal, percent_discount: Decimal | None) -> dict[str, Any]:
    """What so much costs, to the last digit."""
    with localcontext(prec=60):
        subtotal = quantity * unit_price
        discount = subtotal * (percent_discount or 0) / 100
        total = subtotal - discount
    return {"cost_subtotal": subtotal, "cost_discount": discount, "cost_total": total}


def as_sent(one: UsageLine) -> UsageLine:
    """The line with its costs as products of doubles, as fal sends them.

    Costs that a test made up, and those of numbers that no double is, stay as they are.
    """
    factors = (one.quantity, one.unit_price, one.percent_discount or Decimal(0))
    due = costs(one.quantity, one.unit_price, one.percent_discount)
    is_made_up = any(getattr(one, name) != cost for name, cost in due.items())
    if is_made_up or any(nearest_double(factor) != factor for factor in factors):
        return one
    quantity, unit_price, percent = map(float, factors)
    subtotal = quantity * unit_price
    total = subtotal * (1 - percent / 100)
    sent = {"cost_subtotal": subtotal, "cost_discount": subtotal - total, "cost_total": total}
    texts: dict[str, Any] = {name: Decimal(repr(cost)) for name, cost in sent.items()}
    return replace(one, **texts)


def nearest_double(number: Decimal) -> Decimal:
    """The double that is nearest to the number, as its text says it."""
    return Decimal(repr(float(number)))


@dataclass
class Account:
    """What fal holds of one account; a `World` that a test changes between runs.

    Its charges and requests follow from the lines of usage, two charges and one request for each,
    unless a test says otherwise; endpoints of `failing` have requests in each hour that only fail. The
    ids of its requests begin with `requests`: two accounts of fal never share one.
    """

    account: str = "acme"
    lines: list[UsageLine] = field(default_factory=list)
    events: list[BillingEvent] | None = None
    failing: list[Calls] = field(default_factory=list)
    catalogue: list[dict[str, Any]] = field(default_factory=list)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    balance: Decimal = Decimal("24.5")
    requests: str = ""
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    def now(self) -> datetime:
        """The present, as fal's clock tells it."""
        return self.clock()

    def models(self) -> list[dict[str, Any]]:
        """The catalogue."""
        return self.catalogue

    def prices(self) -> dict[str, dict[str, Any]]:
        """The price list."""
        return self.listed

    def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
        """The lines of the hours asked for."""
        return [as_sent(one) for one in self.lines if start <= one.hour < end]

    def billing_events(self, start: datetime, end: datetime) -> Iterable[BillingEvent]:
        """The charges of the instants asked for."""
        events = self.events if self.events is not None else charges(self.lines, self.requests)
        return [one for one in events if start <= one.timestamp < end]

    def calls(self, start: datetime, end: datetime) -> Iterable[Calls]:
        """The requests of the hours asked for."""
        hours = Counter((one.hour, one.endpoint_id) for one in self.lines)
        succeeded = [
            Calls(hour, endpoint_id, count, durations=tuple(map(Decimal, range(1, count + 1))))
            for (hour, endpoint_id), count in hours.items()
        ]
        return [one for one in [*succeeded, *self.failing] if start <= one.hour < end]

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


def charges(lines: Iterable[UsageLine], requests: str = "") -> list[BillingEvent]:
    """Two charges of one request for each line in US dollars, with exact twins where lines are twins.

    A third of a line that costs something goes to the first charge; both are whole nano-dollars, each
    rounded by itself. Where nothing is taken off, a charge says 0.
    """
    events = []
    for one in lines:
        if one.currency != "USD":
            continue
        with localcontext(prec=60):
            first = (one.cost_total / 3).quantize(NANO, rounding=ROUND_DOWN)
            second = (one.cost_total - first).quantize(NANO)
            for part, cost in enumerate((first, second)):
                events.append(  # a comprehension would hide the split
                    BillingEvent(
                        timestamp=one.hour + timedelta(minutes=part, microseconds=part),
                        request_id=f"{requests}{one.endpoint_id}@{one.hour:%dT%H}",
                        endpoint_id=one.endpoint_id,
                        unit=one.unit if part else None,
                        quantity=one.quantity if part else None,
                        unit_price=one.unit_price,
                        percent_discount=one.percent_discount or Decimal(0),
                        cost_subtotal=cost,
                        cost_discount=Decimal(0),
                        cost_total=cost,
                        credential=one.credential,
                    )
                )
    return events


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
                line(at, VIDEO, "0.12345679", "0.4", unit="second", credential=NOBODY),
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
            one.percent_discount or None, one.currency, credential_id(one.credential),
        )  # fmt: skip
        quantity, cost = sums.get(key, (Decimal(0), Decimal(0)))
        with localcontext(prec=60):
            sums[key] = (quantity + one.quantity, cost + one.cost_total)
    return sums


def charged(account: Account, until: datetime = NOW) -> Counter[Row]:
    """The charges of fct_billing_event: instant, request, endpoint, credential, cost."""
    last = (until - timedelta(minutes=5)).replace(minute=0, second=0, microsecond=0)
    return Counter(
        (
            account.account, one.timestamp.replace(tzinfo=None), one.request_id, one.endpoint_id,
            credential_id(one.credential), rounded(one.cost_total),
        )
        for one in account.billing_events(datetime.min.replace(tzinfo=UTC), last)
    )  # fmt: skip


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
    """What a run at `until` may read, row by row: of hours that ended five minutes ago.

    Lines that fal does not tell apart are one row, whose amounts are added up as fal does. The amounts
    are those that are kept of the row's.
    """
    last = (until - timedelta(minutes=5)).replace(minute=0, second=0, microsecond=0)
    rows: dict[Row, list[UsageLine]] = {}
    for one in account.usage(datetime.min.replace(tzinfo=UTC), last):
        grain = (
            one.hour, one.endpoint_id, one.unit, one.unit_price, one.percent_discount, one.currency,
            one.credential,
        )  # fmt: skip
        rows.setdefault(grain, []).append(one)
    names = ("quantity", "cost_subtotal", "cost_discount", "cost_total")
    for lines in rows.values():
        kept: dict[str, Any] = {n: rounded(added_up([getattr(one, n) for one in lines])) for n in names}
        yield replace(lines[0], unit_price=rounded(lines[0].unit_price), **kept)


def added_up(amounts: list[Decimal]) -> Decimal:
    """The sum as fal sends it: a double, unless one of the amounts is none."""
    with localcontext(prec=60):
        exact = sum(amounts, Decimal(0))
    is_of_doubles = all(nearest_double(amount) == amount for amount in amounts)
    return nearest_double(exact) if is_of_doubles else exact


def at_hour(on: date, hour: int) -> datetime:
    """An hour of a UTC day."""
    return datetime.combine(on, time(hour), UTC)


def day(number: int) -> date:
    """A day of November 2026."""
    return date(2026, 11, number)


def rounded(amount: Decimal) -> Decimal:
    """Half-even to twelve decimals, as a column holds it."""
    with localcontext(prec=60):
        return amount.quantize(Decimal("1e-12"), rounding=ROUND_HALF_EVEN)
