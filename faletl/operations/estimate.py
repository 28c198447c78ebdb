"""Estimate: fal's estimate of a planned use, next to the charges of the last 30 days."""

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
"""Number of days of charges to compare with, up to the newest day of spend."""

MIN_UNITS = Decimal("0.000001")
_EXACT = Context(prec=100)  # two amounts of 38 digits multiply to 76


@dataclass(frozen=True, slots=True)
class PlannedUse:
    """A planned number of units, or calls, of an endpoint."""

    endpoint_id: str
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class PastCost:
    """The past cost of one billed unit or call (`unit` is None), and the planned quantity at it."""

    unit: str | None
    cost_per_unit: Decimal
    cost: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Fal's estimate for one plan, 0 if fal has no basis for one; and a past cost per billed unit."""

    planned: PlannedUse
    total_cost: Decimal
    currency: str
    charged: Sequence[PastCost]


@dataclass(frozen=True, slots=True)
class History:
    """The account and the days (both inclusive) that past charges are from."""

    account: str
    first_day: date
    last_day: date


@dataclass(frozen=True, slots=True)
class Estimates:
    """An estimate for each plan whose endpoint fal knows, and the unknown endpoint ids.

    `history` is None if no charges of the account are published.
    """

    found: Sequence[Estimate]
    unknown: Sequence[str]
    history: History | None


def planned(text: str, *, by_calls: bool) -> PlannedUse:
    """Parse ENDPOINT=QUANTITY; the endpoint id may contain = itself.

    Raises:
        UsageError: the endpoint is missing, or fal could not estimate the quantity.
    """
    endpoint_id, _, number = text.rpartition("=")
    if not endpoint_id.strip():
        raise UsageError(f"{text!r} is not ENDPOINT=QUANTITY, such as fal-ai/flux/dev=100")
    written, is_rounded = exact_text(number.strip())
    if is_rounded or not re.fullmatch(EXACT_TEXT, written, re.ASCII):
        raise UsageError(
            f"{text!r}: {number!r} must be a number such as 100 or 2.5, with at most 12 decimals"
        )
    quantity = Decimal(written)
    if by_calls and (quantity < 1 or quantity != quantity.to_integral_value()):
        raise UsageError(f"{text!r}: the number of calls must be a whole number, at least 1")
    if quantity < MIN_UNITS:
        raise UsageError(f"{text!r}: fal estimates at least {MIN_UNITS} units")
    return PlannedUse(endpoint_id.strip(), quantity)


def estimate(settings: Settings, plans: Sequence[PlannedUse], *, by_calls: bool) -> Estimates:
    """Ask fal for each plan in a call of its own, as fal adds up a call; then query the warehouse.

    Raises:
        UsageError: FAL_KEY is not set, or the kind of warehouse is unknown.
        KeyRefusedError, ApiUnavailableError, ContractError: see `FalClient`.
    """
    settings.require_key()
    warehouse = open_warehouse(settings)
    figures: list[tuple[PlannedUse, Decimal, str]] = []
    unknown = []
    with FalClient(settings) as client:
        for plan in plans:
            try:
                figures.append((plan, *_ask(client, plan, by_calls=by_calls)))
            except NotFoundError:
                unknown.append(plan.endpoint_id)
            except KeyRefusedError as error:
                raise KeyRefusedError(
                    f"{error.message}; check FAL_KEY: any valid key may ask for an estimate",
                    **error.facts,
                ) from None
        with warehouse.published() as connection:
            history = _history(connection, client, settings) if connection is not None else None
            estimates = [
                Estimate(plan, cost, currency, _past_costs(connection, history, plan, by_calls=by_calls))
                for plan, cost, currency in figures
            ]
    return Estimates(estimates, unknown, history)


def _ask(client: FalClient, plan: PlannedUse, *, by_calls: bool) -> tuple[Decimal, str]:
    """Return fal's estimate for one endpoint, and its currency."""
    kind, name = (
        ("historical_api_price", "call_quantity") if by_calls else ("unit_price", "unit_quantity")
    )
    quantity = msgspec.Raw(plain(plan.quantity).encode())  # exactly the typed digits
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
        raise ContractError(f"fal's estimate does not have the documented form: {error}") from None
    except UNREADABLE as error:
        raise MalformedBodyError(f"the answer is not a complete JSON document ({error})") from None
    if answer.estimate_type != kind:
        raise ContractError(f"fal's estimate is not of the requested type {kind}")
    written, _ = exact_text(bytes(answer.total_cost).decode("utf-8", "replace"))
    if not re.fullmatch(EXACT_TEXT, written, re.ASCII):
        raise ContractError("fal's estimate must be an amount below 10^15")
    return Decimal(written), answer.currency


# --- Past charges -----------------------------------------------------------------------------

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

# Days without known calls are left out of both charges and calls.
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
    """Return the account of the key, or the only one of the warehouse, and its last days of spend."""
    newest = {row.account: row.newest for row in connection.execute(sa.text(_ACCOUNTS))}
    if settings.account or len(newest) > 1:
        account = accounts.look_up(client, settings, accounts.known_to_readers(connection))
    else:
        account = next(iter(newest), "")
    if account not in newest:
        return None
    return History(account, newest[account] - timedelta(DAYS - 1), newest[account])


def _past_costs(
    connection: sa.Connection | None, history: History | None, plan: PlannedUse, *, by_calls: bool
) -> list[PastCost]:
    if connection is None or history is None:
        return []
    query = sa.text(_PER_CALL if by_calls else _PER_UNIT).bindparams(
        account=history.account,
        endpoint_id=plan.endpoint_id,
        first_day=history.first_day,
        last_day=history.last_day,
    )
    return [
        PastCost(unit, cost_per_unit, _EXACT.multiply(cost_per_unit, plan.quantity), currency)
        for unit, currency, cost_per_unit in connection.execute(query)
        if cost_per_unit is not None
    ]
