"""The HTTP side of the sandbox: key check, parameters, pages, errors, and faults on demand.

What a path takes, who may ask it and which fields come back is read from openapi.json, as it stands or
as it stood on a day; what is in them, from a World.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import socket
import socketserver
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import cache, reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json.encoder import encode_basestring_ascii
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

from faletl.invented import HEADER, KEYS
from faletl.sandbox.world import BillingEvent, Calls, Credential, UsageLine, World, as_double

BASE_PATH = "/v1"
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104 only where --host asks for it
MAX_VALUES = 50  # of a list parameter
PAGE_SIZE = 1000  # where nobody says otherwise; also the ceiling where the document names none

ERROR_TYPES = {
    400: "validation_error",
    401: "authorization_error",
    403: "authorization_error",
    404: "not_found",
    405: "not_implemented",
    429: "rate_limited",
}

# Documented parameters that the sandbox has no data for: it refuses them rather than ignore them.
NOT_OFFERED = {
    ("/models", "sort"),
    ("/models", "expand"),
    ("/models/usage", "tag"),
    ("/models/billing-events", "tag"),
}

# What a filter compares, in any record of a world that the documented path gives out.
FILTERS = {
    "endpoint_id": attrgetter("endpoint_id"),
    "request_id": attrgetter("request_id"),
    "api_key_id": attrgetter("credential.api_key_id"),
    "login_username": attrgetter("credential.login_username"),
}
# Lines that differ in one of these make rows of their own.
USAGE_GRAIN = ("endpoint_id", "unit", "unit_price", "percent_discount", "currency")
EXACT = Context(prec=200)  # whatever amounts a world makes up
DOUBLE_DIGITS = 15  # with which any number is a double's text

# The kinds of estimate: what a quantity is called, and the least one.
ESTIMATES = {
    "unit_price": ("unit_quantity", Decimal("0.000001")),
    "historical_api_price": ("call_quantity", Decimal(1)),
}
MOST = 10**15  # of which the sandbox makes an estimate

# Half as long again as a bucket: from its start this lands inside the next one, whatever daylight
# saving or the calendar makes of its length.
PAST_NEXT_BORDER = {
    "minute": timedelta(seconds=90),
    "hour": timedelta(minutes=90),
    "day": timedelta(hours=36),
    "week": timedelta(days=10),
    "month": timedelta(days=45),
}
# Below each length of range, the timeframe that is picked where none was asked for; else months.
TIMEFRAME_BELOW = (
    (timedelta(hours=2), "minute"),
    (timedelta(days=2), "hour"),
    (timedelta(days=64), "day"),
    (timedelta(days=183), "week"),
)

PERCENTILE = re.compile(r"p(\d+)_(\w+)")
RFC_3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}([Tt ]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2}))?", re.ASCII
)

Json = dict[str, Any]
Query = dict[str, list[str]]
T = TypeVar("T")
Hourly = TypeVar("Hourly", UsageLine, Calls)


@dataclass
class Request:
    """One request as it came in. `path` is the one below /v1, header names are in lower case.

    `status` is what was answered: 0 until then, and for good where the answer was dropped.
    """

    method: str
    path: str
    query: Query
    headers: dict[str, str]
    request_id: str
    status: int = 0
    body: bytes = b""


@dataclass(frozen=True)
class Fault:
    """How to break one answer, for real. What is not set stays as it would have been.

    A `status` without a body takes fal's error body for it. `headers` add or replace; an empty
    value leaves the header out, and without a length the body ends where the connection does.
    `truncate_to` announces the whole body, sends so many bytes of it, and closes the connection;
    `drop` closes it without a word. `delay_seconds` passes before anything else.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay_seconds: float = 0
    truncate_to: int | None = None
    drop: bool = False


Span = tuple[datetime, datetime]
"""From an instant until another one, exclusive, on the clock of the world."""


@dataclass(frozen=True)
class Conduct:
    """What fal may do to an account, as data; by the clock of the world. No answer tells of it.

    Usage, charges and requests of days (UTC) that ended more than `retention_days` days ago are no
    longer served, and in each of the `brown_outs` those of no day that has ended: empty, totals and
    all. In each of the spans of `account_refused`, /account/billing answers 403. From each instant of
    `renamed` on, the account bears that name.
    """

    retention_days: int | None = None
    brown_outs: Sequence[Span] = ()
    account_refused: Sequence[Span] = ()
    renamed: Sequence[tuple[datetime, str]] = ()

    def first_served(self, now: datetime) -> datetime:
        """The instant from which on usage, charges and requests are served."""
        today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if _is_within(now, self.brown_outs):
            return today
        if self.retention_days is None:
            return datetime.min.replace(tzinfo=UTC)
        return today - timedelta(days=self.retention_days)

    def name_at(self, now: datetime, account: str) -> str:
        """The name of the account; `account` until it is renamed."""
        names = [name for instant, name in sorted(self.renamed) if instant <= now]
        return names[-1] if names else account


def _is_within(instant: datetime, spans: Iterable[Span]) -> bool:
    return any(start <= instant < end for start, end in spans)


class Refusal(Exception):  # noqa: N818 a proper answer, not a failure of the sandbox
    """Answered as fal's error body with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sandbox:
    """A server on loopback, from construction on `port` (0: any free one), answering once entered.

    `host` is another address of this machine to listen on, or 0.0.0.0 for all of them; `url` then
    names loopback. `keys` maps each key to its preset, or to its permissions, comma-separated. A page
    holds at most `page_size` rows; `limit` may lower it. Without `page_size`, `limit` may also raise
    it, as far as the document says. `fault` sees each request before it is answered and may say how to
    break the answer. With `as_of`, the API is the one of that day: what was added later is unknown to
    it, whatever the world holds. With `has_time_cursors`, a cursor of usage, analytics or billing events
    is a bare instant, as in an example of fal's: rows of that second (or bucket) that did not fit on
    the page before are lost. `conduct` is what else fal may do to an account.
    """

    def __init__(
        self,
        world: World,
        port: int = 0,
        *,
        host: str = LOOPBACK,
        keys: Mapping[str, str] = KEYS,
        page_size: int | None = None,
        fault: Callable[[Request], Fault | None] | None = None,
        as_of: date | None = None,
        has_time_cursors: bool = False,
        conduct: Conduct | None = None,
    ) -> None:
        self.world = world
        self.has_time_cursors = has_time_cursors
        self.conduct = conduct or Conduct()
        self.as_of = as_of
        self.keys = keys
        self.page_size = page_size
        self.fault = fault
        self.requests: list[Request] = []
        self._server = _Server(self, host, port)
        address, port = self._server.socket.getsockname()
        self.url = f"http://{LOOPBACK if address == EVERYWHERE else address}:{port}{BASE_PATH}"
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        # The default poll of half a second is how long every test would take to stop.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="sandbox", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def serve_forever(self) -> None:
        """Answer until Ctrl-C (KeyboardInterrupt), which ends the wait without an error."""
        with nullcontext() if self._thread else self, suppress(KeyboardInterrupt):
            threading.Event().wait()


def answer(sandbox: Sandbox, request: Request) -> bytes:
    """The JSON that answers a request.

    Raises:
        Refusal: the path, method, key or a parameter is not as documented.
    """
    document = document_as_of(sandbox.as_of)
    if (request.method, request.path) == ("GET", "/openapi.json"):
        return json.dumps(document).encode()
    if request.path not in ANSWERS:
        raise Refusal(404, f"No such path: {request.path}")
    operation = document["paths"][request.path].get(request.method.lower())
    if operation is None:
        raise Refusal(405, f"{request.method} is not offered here")
    check_key(sandbox.keys, request, operation)
    if "requestBody" in operation:
        asked: Any = read_body(request)
    else:
        asked = read_query(request, parameters_of(request.path, sandbox.as_of))
    try:
        whole = ANSWERS[request.path](sandbox, asked)
    except OverflowError:
        raise Refusal(400, "start or end lies outside the calendar") from None
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    return to_json(whole if sandbox.as_of is None else documented(whole, schema, document)).encode()


def check_key(keys: Mapping[str, str], request: Request, operation: Json) -> None:
    """Refuse a request whose key is missing, unknown or lacks a permission, by itself or its preset."""
    if {} in operation["security"]:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "key" or key not in keys:
        raise Refusal(401, "Authentication required")
    presets, needed = operation["x-key-presets"], operation["x-permissions"]
    if keys[key] not in presets and not set(needed) <= set(keys[key].split(",")):
        raise Refusal(403, f"Access denied: the key lacks one of {', '.join(needed)}")


def read_query(request: Request, known: Mapping[str, Parameter]) -> Query:
    """The parameters as lists of values, comma-separated ones split, those left out by default.

    Raises:
        Refusal: a name, number, choice or count of values that the document does not allow.
    """
    query = {name: parameter.default for name, parameter in known.items() if parameter.default}
    for name, sent in request.query.items():
        if name not in known:
            raise Refusal(400, f"Unknown parameter: {name}")
        if (request.path, name) in NOT_OFFERED:
            raise Refusal(400, f"{name} is not offered by the sandbox")
        # The catalogue documents the repeated form only; there a comma is part of the value.
        is_split = known[name].is_list and request.path != "/models"
        values = [value for text in sent for value in text.split(",")] if is_split else sent
        query[name] = known[name].check(values)
    for name, parameter in known.items():
        if parameter.is_required and name not in query:
            raise Refusal(400, f"{name} is required")
    if "source" in query and query["source"] != known["source"].default:
        raise Refusal(400, "Tagged sources are not enabled for this account")
    return query


def read_body(request: Request) -> Json:
    """The JSON object that was sent, its fractions as Decimals.

    Raises:
        Refusal: it is none.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        body = json.loads(request.body, parse_float=Decimal, parse_constant=refuse)
    except (ValueError, ArithmeticError, RecursionError):
        raise Refusal(400, "The body is no JSON document") from None
    if not isinstance(body, dict):
        raise Refusal(400, "The body is no JSON object")
    return body


class Parameter(NamedTuple):
    """What the document says of one query parameter. No `choices` means any text."""

    name: str
    is_required: bool
    is_list: bool
    is_integer: bool
    choices: frozenset[str]
    default: list[str]

    def check(self, values: list[str]) -> list[str]:
        """The values, when they are allowed.

        Raises:
            Refusal: they are not.
        """
        most = MAX_VALUES if self.is_list else 1
        if len(values) > most:
            raise Refusal(400, f"{self.name} takes at most {most} values")
        for value in values:
            if self.is_list and not value:
                raise Refusal(400, f"{self.name} has an empty value")
            if self.choices and value not in self.choices:
                raise Refusal(400, f"{self.name} is one of {', '.join(sorted(self.choices))}")
            if self.is_integer and not re.fullmatch("0*[1-9][0-9]{0,8}", value):
                raise Refusal(400, f"{self.name} is a whole number from 1 on")
        return values


def models(sandbox: Sandbox, query: Query) -> Json:
    """A page of the catalogue. Ids that it does not hold are left out."""
    ids, words = query.get("endpoint_id"), query.get("q", [""])[0].lower()
    wanted = {name: query[name][0] for name in ("category", "status") if name in query}

    def matches(model: Json) -> bool:
        facts = model.get("metadata", {})
        texts = (model["endpoint_id"], *map(facts.get, ("display_name", "description", "category")))
        return (
            (ids is None or model["endpoint_id"] in ids)
            and all(facts.get(name) == value for name, value in wanted.items())
            and any(words in text.lower() for text in texts if text)
        )

    found = [model for model in sandbox.world.models() if matches(model)]
    page, cursor = cut_page(sandbox, "/models", found, query)
    return {"models": page, **cursor}


def pricing(sandbox: Sandbox, query: Query) -> Json:
    """The prices of known ids; those without a price are left out, one unknown id refuses all."""
    asked = list(dict.fromkeys(query["endpoint_id"]))
    prices = sandbox.world.prices()
    check_known(asked, listed_endpoints(sandbox.world))
    listed = [prices[endpoint_id] for endpoint_id in asked if endpoint_id in prices]
    return {"prices": listed, "next_cursor": None, "has_more": False}


def estimate(sandbox: Sandbox, body: Json) -> Json:
    """What so many units cost by list, or so many calls by what they cost of late; one sum over all."""
    kind, endpoints = body.get("estimate_type"), body.get("endpoints")
    if not isinstance(kind, str) or kind not in ESTIMATES:
        raise Refusal(400, f"estimate_type is one of {', '.join(ESTIMATES)}")
    if not isinstance(endpoints, dict) or not endpoints:
        raise Refusal(400, "endpoints names no endpoint")
    name, least = ESTIMATES[kind]
    quantities = {
        endpoint_id: read_quantity(asked, name, least) for endpoint_id, asked in endpoints.items()
    }
    world = sandbox.world
    if kind == "unit_price":
        check_known(quantities, listed_endpoints(world))
        prices = {endpoint_id: price["unit_price"] for endpoint_id, price in world.prices().items()}
    else:
        check_known(quantities, listed_endpoints(world) | called_endpoints(world))
        prices = charges_per_call(world)
    costs = [
        EXACT.multiply(prices.get(endpoint_id, Decimal(0)), quantity)
        for endpoint_id, quantity in quantities.items()
    ]
    return {"estimate_type": kind, "total_cost": total(costs), "currency": "USD"}


def read_quantity(asked: object, name: str, least: Decimal) -> Decimal:
    """The quantity of one endpoint; a whole number where the least one is.

    Raises:
        Refusal: it is missing, or no number in the bounds.
    """
    value = asked.get(name) if isinstance(asked, dict) else None
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        quantity = Decimal(value)
        is_whole = quantity <= MOST and quantity == quantity.to_integral_value()
        if least <= quantity <= MOST and (is_whole or least < 1):
            return quantity
    kind = "number" if least < 1 else "whole number"
    raise Refusal(400, f"{name} is a {kind} from {least} to {MOST}")


def charges_per_call(world: World) -> dict[str, Decimal]:
    """What a request of the last 30 days cost on average, in USD, to twelve decimals."""
    end = now_of(world)
    start = end - timedelta(days=30)
    costs: dict[str, Decimal] = {}
    for line in world.usage(start, end):
        if line.currency == "USD":
            before = costs.get(line.endpoint_id, Decimal(0))
            costs[line.endpoint_id] = EXACT.add(before, line.cost_total)
    counts: Counter[str] = Counter()
    for calls in world.calls(start, end):
        counts[calls.endpoint_id] += calls.request_count
    return {
        endpoint_id: EXACT.divide(cost, counts[endpoint_id]).quantize(Decimal("1e-12"), context=EXACT)
        for endpoint_id, cost in costs.items()
        if counts[endpoint_id]
    }


def usage(sandbox: Sandbox, query: Query) -> Json:
    """A page of the usage report. What the document does not show cannot keep rows apart."""
    fields = document_as_of(sandbox.as_of)["components"]["schemas"]["UsageRow"]["properties"]
    grain = [name for name in USAGE_GRAIN if name in fields]
    if not {"auth_method", "auth_method_structured"}.isdisjoint(query["expand"]):
        grain.append("credential")
    return report(
        sandbox,
        "/models/usage",
        query,
        sandbox.world.usage,
        attrgetter(*grain),
        lambda lines: usage_row(lines, query["expand"]),
    )


def analytics(sandbox: Sandbox, query: Query) -> Json:
    """A page of the analytics report. Endpoints without requests have no row, unknown ones no report."""
    metrics = [name for name in query["expand"] if name not in ("time_series", "summary")]
    if not metrics:
        raise Refusal(400, "expand needs at least one metric")
    check_known(query["endpoint_id"], listed_endpoints(sandbox.world) | called_endpoints(sandbox.world))

    def held(start: datetime, end: datetime) -> Iterable[Calls]:
        return (calls for calls in sandbox.world.calls(start, end) if calls.request_count)

    return report(
        sandbox,
        "/models/analytics",
        query,
        held,
        attrgetter("endpoint_id"),
        lambda calls: analytics_row(calls, metrics),
    )


def report(
    sandbox: Sandbox,
    path: str,
    query: Query,
    held: Callable[[datetime, datetime], Iterable[Hourly]],
    grain: Callable[[Hourly], object],
    row: Callable[[Sequence[Hourly]], Json],
) -> Json:
    """A page of rows: those of the time series in bucket order, then those of the summary.

    The records that the world has `held` in a range and that are of one bucket and `grain` make a
    `row`. A bucket that does not fit goes on under the same name on the next page.
    """
    expand = query["expand"]
    if not {"time_series", "summary"} & set(expand):
        raise Refusal(400, "expand needs time_series or summary")
    zone = read_zone(query["timezone"][0])
    start, end, timeframe = widen(*read_range(sandbox.world, query), query, zone)

    @cache
    def bucket_name(hour: datetime) -> str:
        return bucket_of(hour, timeframe, zone).astimezone(zone).isoformat()

    start = max(start, first_served(sandbox))
    records = [record for record in held(start, end) if is_asked(record, query)]
    records.sort(key=attrgetter("hour"))
    groups: dict[tuple[str | None, object], list[Hourly]] = {}  # None is the bucket of the summary
    if "time_series" in expand:
        for record in records:
            groups.setdefault((bucket_name(record.hour), grain(record)), []).append(record)
    if "summary" in expand:
        for record in records:
            groups.setdefault((None, grain(record)), []).append(record)
    page, cursor = cut_page(sandbox, path, list(groups.items()), query, lambda group: group[0][0])
    buckets: dict[str | None, list[Json]] = {}
    for (bucket, _), together in page:
        buckets.setdefault(bucket, []).append(row(together))
    parts = {
        "summary": buckets.pop(None, []),
        "time_series": [{"bucket": name, "results": rows} for name, rows in buckets.items()],
    }
    return {name: parts[name] for name in ("time_series", "summary") if name in expand} | cursor


def billing_events(sandbox: Sandbox, query: Query) -> Json:
    """A page of charges, newest first."""
    path = "/models/billing-events"
    start, end = read_range(sandbox.world, query)
    longest = limits_of(path, sandbox.as_of).get("range_days_max")
    if longest and end - start > timedelta(days=longest):
        raise Refusal(400, f"start and end lie more than {longest} days apart")
    start = max(start, first_served(sandbox))
    events = [event for event in sandbox.world.billing_events(start, end) if is_asked(event, query)]
    events.sort(key=attrgetter("timestamp", "request_id"), reverse=True)
    page, cursor = cut_page(
        sandbox, path, events, query, lambda event: event.timestamp.replace(microsecond=0).isoformat()
    )
    return {"billing_events": [event_row(event, query.get("expand", ())) for event in page], **cursor}


def billing(sandbox: Sandbox, query: Query) -> Json:
    """The account's name, and its credits when asked for."""
    now = now_of(sandbox.world)
    if _is_within(now, sandbox.conduct.account_refused):
        raise Refusal(403, "Access denied")
    credits_asked = "credits" in query.get("expand", [])
    extra = {"credits": sandbox.world.credits()} if credits_asked else {}
    return {"username": sandbox.conduct.name_at(now, sandbox.world.account), **extra}


ANSWERS: Mapping[str, Callable[[Sandbox, Any], Json]] = {  # of a query, or of a body
    "/models": models,
    "/models/pricing": pricing,
    "/models/pricing/estimate": estimate,
    "/models/usage": usage,
    "/models/analytics": analytics,
    "/models/billing-events": billing_events,
    "/account/billing": billing,
}


def read_zone(name: str) -> tzinfo:
    """The zone of that IANA name. UTC needs no zone files, which small images lack.

    Raises:
        Refusal: there is none.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: "America" is a folder
        raise Refusal(400, f"No such timezone: {name}") from None


def listed_endpoints(world: World) -> set[str]:
    """The ids of the catalogue and of the price list."""
    return world.prices().keys() | {model["endpoint_id"] for model in world.models()}


def called_endpoints(world: World) -> set[str]:
    """The ids that were ever called. A world of any size may know them without going through all."""
    known: Callable[[], set[str]] | None = getattr(world, "endpoints_called", None)
    if known:
        return known()
    ever = world.calls(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
    return {calls.endpoint_id for calls in ever}


def check_known(asked: Iterable[str], known: set[str]) -> None:
    """Refuse all the ids if one is unknown."""
    if not known.issuperset(asked):
        raise Refusal(404, "One or more endpoints were not found")


def read_range(world: World, query: Query) -> tuple[datetime, datetime]:
    """Start and end (exclusive). Without them: the last 24 hours. A plain date is midnight UTC."""
    now = now_of(world)
    start = read_instant(query["start"][0]) if "start" in query else now - timedelta(days=1)
    end = read_instant(query["end"][0]) if "end" in query else now
    if end < start:
        raise Refusal(400, "end lies before start")
    return start, end


def first_served(sandbox: Sandbox) -> datetime:
    """The instant from which on the sandbox serves what was used."""
    return sandbox.conduct.first_served(now_of(sandbox.world))


def now_of(world: World) -> datetime:
    """The present. An invented world has a clock of its own, which a test may have set."""
    now: datetime = getattr(world, "now", lambda: datetime.now(UTC))()
    return now


def widen(start: datetime, end: datetime, query: Query, zone: tzinfo) -> tuple[datetime, datetime, str]:
    """The range, as it is or widened to whole buckets, and the timeframe."""
    if "timeframe" in query:
        timeframe = query["timeframe"][0]
    else:
        shorter = (name for length, name in TIMEFRAME_BELOW if end - start < length)
        timeframe = next(shorter, "month")
    if query["bound_to_timeframe"] == ["true"]:
        start = bucket_of(start, timeframe, zone)
        last = bucket_of(end, timeframe, zone)
        if last < end:
            end = bucket_of(last + PAST_NEXT_BORDER[timeframe], timeframe, zone)
    return start, end, timeframe


def read_instant(text: str) -> datetime:
    """An RFC 3339 instant or a plain date, in UTC.

    Raises:
        Refusal: it is neither, or no such time exists.
    """
    if RFC_3339.fullmatch(text):
        with suppress(ValueError):
            instant = datetime.fromisoformat(text.upper())
            return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).astimezone(UTC)
    raise Refusal(400, f"Not a date or an RFC 3339 instant: {text}")


def bucket_of(instant: datetime, timeframe: str, zone: tzinfo) -> datetime:
    """The start of the bucket that holds `instant`, in UTC; its borders are those of the zone."""
    floor = instant.astimezone(zone).replace(second=0, microsecond=0)
    if timeframe != "minute":
        floor = floor.replace(minute=0)
    if timeframe in ("day", "week", "month"):
        floor = floor.replace(hour=0, fold=0)
    if timeframe == "week":
        floor -= timedelta(days=floor.weekday())
    if timeframe == "month":
        floor = floor.replace(day=1)
    return floor.astimezone(UTC)


def is_asked(record: object, query: Query) -> bool:
    """Whether the record passes every filter of the query."""
    return all(fact(record) in query[name] for name, fact in FILTERS.items() if name in query)


def usage_row(lines: Sequence[UsageLine], expand: Sequence[str]) -> Json:
    """One row of usage: what the lines have in common, and the sums of their amounts."""
    first = lines[0]
    cost_total = total(line.cost_total for line in lines)
    return {
        "endpoint_id": first.endpoint_id,
        "unit": first.unit,
        "quantity": total(line.quantity for line in lines),
        "unit_price": first.unit_price,
        "percent_discount": first.percent_discount,
        "cost_subtotal": total(line.cost_subtotal for line in lines),
        "cost_discount": total(line.cost_discount for line in lines),
        "cost_total": cost_total,
        "cost": cost_total,
        "currency": first.currency,
        **caller(first.credential, expand),
    }


def event_row(event: BillingEvent, expand: Sequence[str]) -> Json:
    """One charge."""
    nano_usd = event.cost_total.scaleb(9, EXACT)
    at = event.timestamp.astimezone(UTC)
    return {
        "request_id": event.request_id,
        "endpoint_id": event.endpoint_id,
        "timestamp": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond:06d}000Z",
        "quantity": event.quantity,
        "output_units": event.quantity,
        "unit": event.unit,
        "unit_price": event.unit_price,
        "percent_discount": event.percent_discount,
        "cost_subtotal": event.cost_subtotal,
        "cost_discount": event.cost_discount,
        "cost_total": event.cost_total,
        "cost_estimate_nano_usd": int(nano_usd.to_integral_value(ROUND_HALF_EVEN)),
        **caller(event.credential, expand),
    }


def caller(credential: Credential, expand: Sequence[str]) -> Json:
    """Who called, in the forms asked for."""
    forms = {"auth_method": credential.detail, "auth_method_structured": _structured(credential)}
    return {name: form for name, form in forms.items() if name in expand}


def analytics_row(calls: Sequence[Calls], metrics: Sequence[str]) -> Json:
    """One row of analytics: sums over the hours, and percentiles over all requests in them."""
    row: Json = {"endpoint_id": calls[0].endpoint_id}
    for name in metrics:
        if found := PERCENTILE.fullmatch(name):
            durations = sorted(second for hour in calls for second in getattr(hour, f"{found[2]}s"))
            if durations:  # the nearest rank: the first that so many percent do not exceed
                row[name] = durations[-(-len(durations) * int(found[1]) // 100) - 1]
        else:
            row[name] = total(getattr(hour, name) for hour in calls)  # of counts a whole number
    return row


def total(amounts: Iterable[Decimal]) -> Decimal:
    """The sum: the double that is nearest to it, or all its digits where an amount is no double."""
    summands = list(amounts)
    whole = reduce(EXACT.add, summands, Decimal(0))
    if len(whole.as_tuple().digits) <= DOUBLE_DIGITS or not all(map(is_double, summands)):
        return whole
    return as_double(float(whole))


def is_double(amount: Decimal | int) -> bool:
    """Whether the number is what a double is written as."""
    return as_double(float(amount)) == amount


def cut_page(
    sandbox: Sandbox,
    path: str,
    rows: Sequence[T],
    query: Query,
    instant_of: Callable[[T], str | None] | None = None,
) -> tuple[Sequence[T], Json]:
    """The page that the query's cursor asks for, with the fields that lead to the next one.

    Raises:
        Refusal: the limit is above the documented one, or the cursor was not made for this path and
            these parameters.
    """
    size = page_size(sandbox, path, query)
    instants = [instant_of(row) for row in rows] if sandbox.has_time_cursors and instant_of else []
    if any(instants):
        before = query.get("cursor", [""])[0]
        first = max((n + 1 for n, instant in enumerate(instants) if instant == before), default=0)
        following = instants[first + size - 1] if first + size < len(rows) else None
    else:
        first = read_cursor(path, query)
        following = cursor_of(first + size, path, query) if first + size < len(rows) else None
    return rows[first : first + size], {
        "next_cursor": following,
        "has_more": following is not None,
    }


def page_size(sandbox: Sandbox, path: str, query: Query) -> int:
    """How many rows a page may hold."""
    most: int | None = limits_of(path, sandbox.as_of).get("page_max")
    default = sandbox.page_size or PAGE_SIZE
    limit = int(query["limit"][0]) if "limit" in query else min(default, most or default)
    if most and limit > most:
        raise Refusal(400, f"limit is at most {most}")
    return min(limit, sandbox.page_size or most or PAGE_SIZE)


def cursor_of(first: int, path: str, query: Query) -> str:
    """A token for the rows from `first` on, bound to the path and all other parameters."""
    others = sorted((name, values) for name, values in query.items() if name != "cursor")
    digest = hashlib.sha256(json.dumps([path, others]).encode()).hexdigest()
    return base64.urlsafe_b64encode(f"{first}.{digest[:16]}".encode()).decode()


def read_cursor(path: str, query: Query) -> int:
    """The first row that the cursor asks for; 0 without a cursor.

    Raises:
        Refusal: it was not made for this path and these parameters.
    """
    if "cursor" not in query:
        return 0
    cursor = query["cursor"][0]
    with suppress(ValueError):
        first = int(base64.urlsafe_b64decode(cursor).split(b".")[0])
        if cursor == cursor_of(first, path, query):
            return first
    raise Refusal(400, "The cursor does not belong to this request")


def to_json(value: object) -> str:
    """JSON with every Decimal as a double is written; one that is no double, digit by digit."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, Decimal):
        text = repr(float(value)).removesuffix(".0")
        return text if Decimal(text) == value else format(value, "f")
    if isinstance(value, dict):
        fields = [f"{encode_basestring_ascii(k)}:{to_json(v)}" for k, v in value.items()]
        return "{" + ",".join(fields) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([to_json(item) for item in value]) + "]"
    return json.dumps(value)


def error_body(status: int, message: str, request_id: str) -> bytes:
    """Fal's error envelope."""
    kind = ERROR_TYPES.get(status, "validation_error" if status < 500 else "server_error")
    error = {"type": kind, "message": message, "request_id": request_id}
    return to_json({"error": error}).encode()


@cache
def document_as_of(day: date | None) -> Json:
    """The document as it stood on a day; None: as it stands."""
    document: Json = json.loads(Path(__file__).with_name("openapi.json").read_bytes())
    return document if day is None else _as_of(document, day)


def _as_of(node: Any, day: date) -> Any:
    """The node without all that came after the day: fields, parameters, their values, limits."""

    def has_come(part: Any) -> bool:
        return not isinstance(part, dict) or _first_day(part.get("x-since", "")) <= day

    if isinstance(node, list):
        return [_as_of(part, day) for part in node if has_come(part)]
    if not isinstance(node, dict):
        return node
    kept = {name: _as_of(part, day) for name, part in node.items() if has_come(part)}
    if "properties" in kept and "required" in kept:
        kept["required"] = [name for name in kept["required"] if name in kept["properties"]]
    if later := node.get("x-since-values"):
        values = kept["x-values"]
        kept["x-values"] = [v for v in values if _first_day(later.get(v, "")) <= day]
    for until, limits in node.get("x-limits-before", {}).items():
        if day < _first_day(until):
            kept["x-limits"] = limits
    return kept


def _first_day(since: str) -> date:
    """The day from which a thing is known, by its `x-since`: a day, "after" one, or nothing."""
    if not since:
        return date.min
    return date.fromisoformat(since.removeprefix("after ")) + timedelta(since.startswith("after "))


def documented(value: Any, schema: Json, document: Json) -> Any:
    """The value without fields that the schema does not hold."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, dict) and "properties" in schema:
        fields = schema["properties"]
        return {k: documented(v, fields[k], document) for k, v in value.items() if k in fields}
    if isinstance(value, list | tuple) and "items" in schema:
        return [documented(item, schema["items"], document) for item in value]
    return value


def limits_of(path: str, day: date | None) -> Json:
    """`page_max` and `range_days_max`, where the document names them."""
    limits: Json = document_as_of(day)["paths"][path]["get"].get("x-limits", {})
    return limits


@cache
def parameters_of(path: str, day: date | None) -> Mapping[str, Parameter]:
    """What the document says of the query parameters of a path."""
    document = document_as_of(day)
    shared = document["components"]["parameters"]
    found = {}
    for entry in document["paths"][path]["get"]["parameters"]:
        spec = shared[entry["$ref"].rsplit("/", 1)[1]] if "$ref" in entry else entry
        schema = spec["schema"]
        default = schema.get("default", [])
        found[spec["name"]] = Parameter(
            name=spec["name"],
            is_required=spec["required"],
            is_list=any(choice["type"] == "array" for choice in schema.get("anyOf", [])),
            is_integer=schema.get("type") == "integer",
            choices=frozenset(schema.get("enum") or spec.get("x-values", [])),
            default=[default] if isinstance(default, str) else default,
        )
    return found


@cache
def _structured(credential: Credential) -> Json:
    return {name: value for name, value in asdict(credential).items() if value is not None}


class _Server(ThreadingHTTPServer):
    """Remembers its connections, so that stopping also ends kept-alive ones."""

    request_queue_size = 128

    def __init__(self, sandbox: Sandbox, host: str, port: int) -> None:
        self.sandbox = sandbox
        self.connections: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look up the name of the host here: seconds, where there is no network.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave when they like
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet

    def respond(self) -> None:
        """Log the request, answer it, and break the answer where the fault hook says so."""
        sandbox, url = self.server.sandbox, urlsplit(self.path)
        is_below_base = url.path.startswith(f"{BASE_PATH}/")
        request = Request(
            method=self.command,
            path=url.path.removeprefix(BASE_PATH) if is_below_base else f"..{url.path}",
            query=parse_qs(url.query, keep_blank_values=True),
            headers={name.lower(): value for name, value in self.headers.items()},
            request_id=str(uuid.uuid4()),
        )
        sandbox.requests.append(request)
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            request.body = self.rfile.read(int(length))
        fault = (sandbox.fault and sandbox.fault(request)) or Fault()
        time.sleep(fault.delay_seconds)
        if fault.drop:
            self.close_connection = True
        else:
            self._send(request, fault, *self._answer(request, fault))

    def _answer(self, request: Request, fault: Fault) -> tuple[int, bytes]:
        if fault.body is not None:
            return fault.status or 200, fault.body
        if fault.status is not None:
            message = "The sandbox was told to answer so"
            return fault.status, error_body(fault.status, message, request.request_id)
        try:
            return 200, answer(self.server.sandbox, request)
        except Refusal as refusal:
            return refusal.status, error_body(refusal.status, str(refusal), request.request_id)

    def _send(self, request: Request, fault: Fault, status: int, body: bytes) -> None:
        headers = {
            "Date": self.date_time_string(),
            "Content-Type": "application/json",
            "X-Fal-Request-Id": request.request_id,
            HEADER.title(): "1",
        }
        if fault.body is None and accepts_gzip(request.headers.get("accept-encoding", "")):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, compresslevel=1, mtime=0)
        headers["Content-Length"] = str(len(body))
        if request.method not in ("GET", "HEAD"):  # their bodies may be of unknown length
            headers["Connection"] = "close"
        headers |= {name.title(): value for name, value in fault.headers.items()}
        request.status = status
        self.send_response_only(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(body[: fault.truncate_to])
        if fault.truncate_to is not None or not headers["Content-Length"]:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = respond  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the name in the base class
        """Keep the terminal for what matters; `Sandbox.requests` has the log."""


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header names gzip without forbidding it."""
    return bool(re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", header, re.IGNORECASE))
