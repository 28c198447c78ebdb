"""Estimate: what fal says that units or calls would cost, beside what was really charged of late."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Context, Decimal

import msgspec
import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import ContractError, KeyRefusedError, NotFoundError, UsageError
from faletl.fal.client import FalClient
from faletl.line import accounts
from faletl.money import EXACT_TEXT, exact_text, plain
from faletl.warehouse import open_warehouse
from faletl.wire import UNREADABLE, MalformedBodyError, as_json

PATH = "/models/pricing/estimate"
DAYS = 30
"""How many days of charges are looked at, up to the newest day of spend."""

LEAST_UNITS = Decimal("0.000001")
_EXACT = Context(prec=100)  # two amounts of 38 digits multiply to 76


@dataclass(frozen=True, slots=True)
class Planned:
    """How many units, or calls, of an endpoint."""

    endpoint_id: str
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Charged:
    """What one unit as billed, or one call (`unit` is None), really cost, and so many at that price."""

    unit: str | None
    cost_per_unit: Decimal
    cost: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Fal's figure for one plan, 0 where fal knows nothing to go by; and a line per unit billed."""

    planned: Planned
    total_cost: Decimal
    currency: str
    charged: Sequence[Charged]


@dataclass(frozen=True, slots=True)
class History:
    """Whose charges were looked at, and of which days, both inclusive."""

    account: str
    first_day: date
    last_day: date


@dataclass(frozen=True, slots=True)
class Estimates:
    """An estimate for each plan that fal knows the endpoint of, and the ids of the others.

    `history` is None where nothing is published.
    """

    found: Sequence[Estimate]
    unknown: Sequence[str]
    history: History | None


def planned(text: str, *, by_calls: bool) -> Planned:
    """Read ENDPOINT=QUANTITY; the endpoint's id may hold a = itself.

    Raises:
        UsageError: there is no endpoint, or no quantity that fal could take.
    """
    endpoint_id, _, number = text.rpartition("=")
    if not endpoint_id.strip():
        raise UsageError(f"{text!r} is not like fal-ai/flux/dev=100: an endpoint, =, how many")
    written, is_rounded = exact_text(number.strip())
    if is_rounded or not re.fullmatch(EXACT_TEXT, written, re.ASCII):
        raise UsageError(f"{text!r}: {number!r} is no number like 100 or 2.5, of at most 12 decimals")
    quantity = Decimal(written)
    if by_calls and (quantity < 1 or quantity != quantity.to_integral_value()):
        raise UsageError(f"{text!r}: calls are a whole number from 1 on")
    if quantity < LEAST_UNITS:
        raise UsageError(f"{text!r}: fal estimates no less than {LEAST_UNITS} units")
    return Planned(endpoint_id.strip(), quantity)


def estimate(settings: Settings, plans: Sequence[Planned], *, by_calls: bool) -> Estimates:
    """Ask fal for each plan on its own, as it adds up all endpoints of a call; then the warehouse.

    Raises:
        UsageError: FAL_KEY is not set, or there is no such kind of warehouse.
        KeyRefusedError, ApiUnavailableError, ContractError: see `FalClient`.
    """
    settings.require_key()
    warehouse = open_warehouse(settings)
    figures: list[tuple[Planned, Decimal, str]] = []
    unknown = []
    with FalClient(settings) as client:
        for plan in plans:
            try:
                figures.append((plan, *_ask(client, plan, by_calls=by_calls)))
            except NotFoundError:
                unknown.append(plan.endpoint_id)
            except KeyRefusedError as error:
                raise KeyRefusedError(
                    f"{error.message}; check FAL_KEY: any key that fal accepts may ask for an estimate",
                    **error.facts,
                ) from None
        with warehouse.published() as connection:
            history = _history(connection, client, settings) if connection is not None else None
            found = [
                Estimate(plan, cost, currency, _charged(connection, history, plan, by_calls=by_calls))
                for plan, cost, currency in figures
            ]
    return Estimates(found, unknown, history)


def _ask(client: FalClient, plan: Planned, *, by_calls: bool) -> tuple[Decimal, str]:
    """Fal's figure for one endpoint, and its currency."""
    kind, name = (
        ("historical_api_price", "call_quantity") if by_calls else ("unit_price", "unit_quantity")
    )
    quantity = msgspec.Raw(plain(plan.quantity).encode())  # every digit as it was typed
    body = msgspec.json.encode(
        {"estimate_type": kind, "endpoints": {plan.endpoint_id: {name: quantity}}}
    )
    return client.post(PATH, body, lambda answer: _read(answer, kind))[1]


class _Answer(msgspec.Struct):
    estimate_type: str
    total_cost: msgspec.Raw
    currency: str


def _read(body: bytes, kind: str) -> tuple[Decimal, str]:
    try:
        answer = msgspec.json.decode(as_json(body), type=_Answer)
    except msgspec.ValidationError as error:
        raise ContractError(f"fal's estimate is not what was asked for: {error}") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is no whole JSON document ({error})") from None
    if answer.estimate_type != kind:
        raise ContractError(f"fal made another estimate than {kind}, which was asked for")
    written, _ = exact_text(bytes(answer.total_cost).decode("utf-8", "replace"))
    if not re.fullmatch(EXACT_TEXT, written, re.ASCII):
        raise ContractError("fal's estimate must be an amount below 10^15")
    return Decimal(written), answer.currency


# --- What was charged -----------------------------------------------------------------------------

_ACCOUNTS = "select account, max(usage_date) as newest from reports.rpt_spend_daily group by account"

_PER_UNIT = """
select unit, currency, quotient(sum(cost_total), sum(quantity)) as cost_per_unit
from reports.rpt_spend_daily
where
    account = :account
    and endpoint_id = :endpoint_id
    and usage_date between :first_day and :last_day
group by unit, currency
order by sum(cost_total) desc, unit, currency
"""

# Days of which no calls are known are left out on both sides.
_PER_CALL = """
with calls as (
    select usage_date, sum(request_count) as request_count
    from marts.fct_requests
    where
        account = :account
        and endpoint_id = :endpoint_id
        and usage_date between :first_day and :last_day
    group by usage_date
)

select
    null as unit,
    currency,
    quotient(sum(cost_total), (select sum(request_count) from calls)) as cost_per_unit
from reports.rpt_spend_daily
where
    account = :account
    and endpoint_id = :endpoint_id
    and usage_date in (select usage_date from calls)
group by currency
order by sum(cost_total) desc, currency
"""


def _history(connection: sa.Connection, client: FalClient, settings: Settings) -> History | None:
    """The account of the key, as far as the warehouse leaves a choice, and its last days of spend."""
    newest = {row.account: row.newest for row in connection.execute(sa.text(_ACCOUNTS))}
    if settings.account or len(newest) > 1:
        account = accounts.look_up(client, settings, accounts.known_to_readers(connection))
    else:
        account = next(iter(newest), "")
    if account not in newest:
        return None
    return History(account, newest[account] - timedelta(DAYS - 1), newest[account])


def _charged(
    connection: sa.Connection | None, history: History | None, plan: Planned, *, by_calls: bool
) -> list[Charged]:
    if connection is None or history is None:
        return []
    query = sa.text(_PER_CALL if by_calls else _PER_UNIT).bindparams(
        account=history.account,
        endpoint_id=plan.endpoint_id,
        first_day=history.first_day,
        last_day=history.last_day,
    )
    return [
        Charged(unit, cost_per_unit, _EXACT.multiply(cost_per_unit, plan.quantity), currency)
        for unit, currency, cost_per_unit in connection.execute(query)
        if cost_per_unit is not None
    ]
