"""The HTTP side of the sandbox: key check, parameters, pages, errors, and faults on demand.

openapi.json, of today or of an earlier day, defines the parameters of a path, its permissions and the
fields of its answers. A World supplies the data.
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
PAGE_SIZE = 1000  # default; also the maximum if the document has none

ERROR_TYPES = {
    400: "validation_error",
    401: "authorization_error",
    403: "authorization_error",
    404: "not_found",
    405: "not_implemented",
    429: "rate_limited",
}

# Documented parameters that the sandbox has no data for: it refuses them instead of ignoring them.
NOT_OFFERED = {
    ("/models", "sort"),
    ("/models", "expand"),
    ("/models/usage", "tag"),
    ("/models/billing-events", "tag"),
}

# The value that each filter compares, in every record of a world that has the filter.
FILTERS = {
    "endpoint_id": attrgetter("endpoint_id"),
    "request_id": attrgetter("request_id"),
    "api_key_id": attrgetter("credential.api_key_id"),
    "login_username": attrgetter("credential.login_username"),
}
# Lines that differ in one of these fields become different rows.
USAGE_GRAIN = ("endpoint_id", "unit", "unit_price", "percent_discount", "currency")
EXACT = Context(prec=200)  # enough digits for any invented amount
DOUBLE_DIGITS = 15  # a double can represent any number with this many digits

# The kinds of estimate: the field of the quantity, and its minimum.
ESTIMATES = {
    "unit_price": ("unit_quantity", Decimal("0.000001")),
    "historical_api_price": ("call_quantity", Decimal(1)),
}
MAX_QUANTITY = 10**15  # of an estimate

# One and a half times a bucket: its start plus this is always inside the next bucket, even when daylight
# saving or the calendar changes its length.
PAST_NEXT_BORDER = {
    "minute": timedelta(seconds=90),
    "hour": timedelta(minutes=90),
    "day": timedelta(hours=36),
    "week": timedelta(days=10),
    "month": timedelta(days=45),
}
# The default timeframe of a range shorter than each length; of longer ranges, months.
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
    """One request as it arrived. `path` is relative to /v1, header names are in lower case.

    `status` is that of the answer: 0 before it is sent, or if it was dropped.
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
    """How to break one answer on the wire. Parts that are not set stay as they are.

    A `status` without a body gets fal's error body. `headers` add or replace; an empty value removes
    the header, and without a length the body ends when the connection closes. `truncate_to` announces
    the whole body, sends this many bytes of it, and closes the connection; `drop` closes it without an
    answer. The answer starts after `delay_seconds`.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay_seconds: float = 0
    truncate_to: int | None = None
    drop: bool = False


Span = tuple[datetime, datetime]
"""A half-open span of instants `[start, end)` on the clock of the world."""


@dataclass(frozen=True)
class Conduct:
    """What fal may do to an account without announcing it, by the clock of the world.

    Usage, charges and requests of UTC days that ended more than `retention_days` days ago are no longer
    served. During `brown_outs` no day that has ended is served: rows and totals are empty. During
    `account_refused`, /account/billing answers 403. From each instant in `renamed`, the account has that
    name.
    """

    retention_days: int | None = None
    brown_outs: Sequence[Span] = ()
    account_refused: Sequence[Span] = ()
    renamed: Sequence[tuple[datetime, str]] = ()

    def first_served(self, now: datetime) -> datetime:
        """The first instant whose usage, charges and requests are served."""
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
    """A refused request: answered with fal's error body and this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sandbox:
    """A server on loopback. Construction binds `port` (0: any free one); `with` starts the answers.

    `host` is another address of this machine to listen on, or 0.0.0.0 for all of them; `url` then
    names loopback. `keys` maps each key to its preset, or to its permissions, comma-separated. A page
    has at most `page_size` rows; `limit` may lower it. Without `page_size`, `limit` may also raise it,
    up to the documented maximum. `fault` sees each request before the answer and may return a Fault for
    it. With `as_of`, the API is that of the day, without later additions, even if the world has data for
    them. With `has_time_cursors`, a cursor of usage, analytics or billing events is a bare instant, as
    in an example of fal's: rows of that second (or bucket) that did not fit on the page before are lost.
    `conduct` is what else fal may do to an account.
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
        # With the default poll of half a second, every test would take that long to stop.
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
        """Serve until Ctrl-C (KeyboardInterrupt), then return."""
        with nullcontext() if self._thread else self, suppress(KeyboardInterrupt):
            threading.Event().wait()


def answer(sandbox: Sandbox, request: Request) -> bytes:
    """Return the JSON that answers a request.

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
        raise Refusal(405, f"{request.method} is not allowed on this path")
    check_key(sandbox.keys, request, operation)
    if "requestBody" in operation:
        parameters: Any = read_body(request)
    else:
        parameters = read_query(request, parameters_of(request.path, sandbox.as_of))
    try:
        content = ANSWERS[request.path](sandbox, parameters)
    except OverflowError:
        raise Refusal(400, "start or end is outside the calendar") from None
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    return to_json(content if sandbox.as_of is None else documented(content, schema, document)).encode()


def check_key(keys: Mapping[str, str], request: Request, operation: Json) -> None:
    """Refuse a request whose key is missing, unknown or lacks a permission."""
    if {} in operation["security"]:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "key" or key not in keys:
        raise Refusal(401, "Authentication required")
    presets, needed = operation["x-key-presets"], operation["x-permissions"]
    if keys[key] not in presets and not set(needed) <= set(keys[key].split(",")):
        raise Refusal(403, f"Access denied: the key lacks one of {', '.join(needed)}")


def read_query(request: Request, known: Mapping[str, Parameter]) -> Query:
    """Return the parameters as lists of values, comma-separated ones split, with defaults for others.

    Raises:
        Refusal: a name, number, choice or count of values that the document does not allow.
    """
    query = {name: parameter.default for name, parameter in known.items() if parameter.default}
    for name, sent in request.query.items():
        if name not in known:
            raise Refusal(400, f"Unknown parameter: {name}")
        if (request.path, name) in NOT_OFFERED:
            raise Refusal(400, f"{name} is not supported by the sandbox")
        # The catalogue documents only the repeated form: there a comma is part of the value.
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
    """Return the JSON object in the body, its fractions as Decimals.

    Raises:
        Refusal: the body is not a JSON object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number in JSON")

    try:
        body = json.loads(request.body, parse_float=Decimal, parse_constant=refuse)
    except (ValueError, ArithmeticError, RecursionError):
        raise Refusal(400, "The body is not a JSON document") from None
    if not isinstance(body, dict):
        raise Refusal(400, "The body is not a JSON object")
    return body


class Parameter(NamedTuple):
    """One documented query parameter. No `choices` means any text."""

    name: str
    is_required: bool
    is_list: bool
    is_integer: bool
    choices: frozenset[str]
    default: list[str]

    def check(self, values: list[str]) -> list[str]:
        """Return the values if they are allowed.

        Raises:
            Refusal: they are not allowed.
        """
        limit = MAX_VALUES if self.is_list else 1
        if len(values) > limit:
            raise Refusal(400, f"{self.name} takes at most {limit} values")
        for value in values:
            if self.is_list and not value:
                raise Refusal(400, f"{self.name} has an empty value")
            if self.choices and value not in self.choices:
                raise Refusal(400, f"{self.name} must be one of {', '.join(sorted(self.choices))}")
            if self.is_integer and not re.fullmatch("0*[1-9][0-9]{0,8}", value):
                raise Refusal(400, f"{self.name} must be a whole number, at least 1")
        return values


def models(sandbox: Sandbox, query: Query) -> Json:
    """A page of the catalogue. Unknown ids are left out."""
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

    matching = [model for model in sandbox.world.models() if matches(model)]
    page, cursor = cut_page(sandbox, "/models", matching, query)
    return {"models": page, **cursor}


def pricing(sandbox: Sandbox, query: Query) -> Json:
    """The prices of known ids; ids without a price are left out, one unknown id refuses all."""
    requested_ids = list(dict.fromkeys(query["endpoint_id"]))
    prices = sandbox.world.prices()
    check_known(requested_ids, listed_endpoints(sandbox.world))
    listed = [prices[endpoint_id] for endpoint_id in requested_ids if endpoint_id in prices]
    return {"prices": listed, "next_cursor": None, "has_more": False}


def estimate(sandbox: Sandbox, body: Json) -> Json:
    """The total cost of units at list prices, or of calls at their average cost in the last 30 days."""
    kind, endpoints = body.get("estimate_type"), body.get("endpoints")
    if not isinstance(kind, str) or kind not in ESTIMATES:
        raise Refusal(400, f"estimate_type must be one of {', '.join(ESTIMATES)}")
    if not isinstance(endpoints, dict) or not endpoints:
        raise Refusal(400, "endpoints must name at least one endpoint")
    name, minimum = ESTIMATES[kind]
    quantities = {
        endpoint_id: read_quantity(fields, name, minimum) for endpoint_id, fields in endpoints.items()
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


def read_quantity(fields: object, name: str, minimum: Decimal) -> Decimal:
    """Return the quantity of one endpoint; a whole number if the minimum is 1.

    Raises:
        Refusal: it is missing, or not a number within the bounds.
    """
    value = fields.get(name) if isinstance(fields, dict) else None
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        quantity = Decimal(value)
        is_whole = quantity <= MAX_QUANTITY and quantity == quantity.to_integral_value()
        if minimum <= quantity <= MAX_QUANTITY and (is_whole or minimum < 1):
            return quantity
    kind = "number" if minimum < 1 else "whole number"
    raise Refusal(400, f"{name} must be a {kind} from {minimum} to {MAX_QUANTITY}")


def charges_per_call(world: World) -> dict[str, Decimal]:
    """The average cost of a request in the last 30 days, in USD, to twelve decimals, by endpoint."""
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
    """A page of the usage report. Only documented fields are part of its grain."""
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
    """A page of the analytics report. Endpoints without requests have no row; unknown ones fail."""
    metrics = [name for name in query["expand"] if name not in ("time_series", "summary")]
    if not metrics:
        raise Refusal(400, "expand needs at least one metric")
    check_known(query["endpoint_id"], listed_endpoints(sandbox.world) | called_endpoints(sandbox.world))

    def called_hours(start: datetime, end: datetime) -> Iterable[Calls]:
        return (calls for calls in sandbox.world.calls(start, end) if calls.request_count)

    return report(
        sandbox,
        "/models/analytics",
        query,
        called_hours,
        attrgetter("endpoint_id"),
        lambda calls: analytics_row(calls, metrics),
    )


def report(
    sandbox: Sandbox,
    path: str,
    query: Query,
    records_of: Callable[[datetime, datetime], Iterable[Hourly]],
    grain: Callable[[Hourly], object],
    row: Callable[[Sequence[Hourly]], Json],
) -> Json:
    """A page of a report: rows of the time series in bucket order, then rows of the summary.

    `records_of` returns the world's records of a range; those of one bucket and `grain` become a `row`.
    A bucket that does not fit continues under the same name on the next page.
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
    records = [record for record in records_of(start, end) if passes_filters(record, query)]
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
    for (bucket, _), group_records in page:
        buckets.setdefault(bucket, []).append(row(group_records))
    parts = {
        "summary": buckets.pop(None, []),
        "time_series": [{"bucket": name, "results": rows} for name, rows in buckets.items()],
    }
    return {name: parts[name] for name in ("time_series", "summary") if name in expand} | cursor


def billing_events(sandbox: Sandbox, query: Query) -> Json:
    """A page of charges, newest first."""
    path = "/models/billing-events"
    start, end = read_range(sandbox.world, query)
    max_days = limits_of(path, sandbox.as_of).get("range_days_max")
    if max_days and end - start > timedelta(days=max_days):
        raise Refusal(400, f"start and end are more than {max_days} days apart")
    start = max(start, first_served(sandbox))
    events = [
        event for event in sandbox.world.billing_events(start, end) if passes_filters(event, query)
    ]
    events.sort(key=attrgetter("timestamp", "request_id"), reverse=True)
    page, cursor = cut_page(
        sandbox, path, events, query, lambda event: event.timestamp.replace(microsecond=0).isoformat()
    )
    return {"billing_events": [event_row(event, query.get("expand", ())) for event in page], **cursor}


def billing(sandbox: Sandbox, query: Query) -> Json:
    """The account's name, and its credits if requested."""
    now = now_of(sandbox.world)
    if _is_within(now, sandbox.conduct.account_refused):
        raise Refusal(403, "Access denied")
    has_credits = "credits" in query.get("expand", [])
    extra = {"credits": sandbox.world.credits()} if has_credits else {}
    return {"username": sandbox.conduct.name_at(now, sandbox.world.account), **extra}


ANSWERS: Mapping[str, Callable[[Sandbox, Any], Json]] = {  # arguments: sandbox, and query or body
    "/models": models,
    "/models/pricing": pricing,
    "/models/pricing/estimate": estimate,
    "/models/usage": usage,
    "/models/analytics": analytics,
    "/models/billing-events": billing_events,
    "/account/billing": billing,
}


def read_zone(name: str) -> tzinfo:
    """Return the zone of an IANA name. UTC needs no zone files, which small images lack.

    Raises:
        Refusal: there is no such zone.
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
    """The ids that were ever called. A large world may have `endpoints_called` to return them fast."""
    known: Callable[[], set[str]] | None = getattr(world, "endpoints_called", None)
    if known:
        return known()
    ever = world.calls(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
    return {calls.endpoint_id for calls in ever}


def check_known(requested_ids: Iterable[str], known: set[str]) -> None:
    """Refuse all the ids if one is unknown."""
    if not known.issuperset(requested_ids):
        raise Refusal(404, "One or more endpoints were not found")


def read_range(world: World, query: Query) -> tuple[datetime, datetime]:
    """Start and end (exclusive). Without them: the last 24 hours. A plain date is midnight UTC."""
    now = now_of(world)
    start = read_instant(query["start"][0]) if "start" in query else now - timedelta(days=1)
    end = read_instant(query["end"][0]) if "end" in query else now
    if end < start:
        raise Refusal(400, "end is before start")
    return start, end


def first_served(sandbox: Sandbox) -> datetime:
    """The first instant whose usage the sandbox serves."""
    return sandbox.conduct.first_served(now_of(sandbox.world))


def now_of(world: World) -> datetime:
    """The present time. An invented world has its own clock, which a test may set."""
    now: datetime = getattr(world, "now", lambda: datetime.now(UTC))()
    return now


def widen(start: datetime, end: datetime, query: Query, zone: tzinfo) -> tuple[datetime, datetime, str]:
    """Return the range, widened to whole buckets if requested, and the timeframe."""
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
    """Parse an RFC 3339 instant or a plain date, in UTC.

    Raises:
        Refusal: the text is neither, or there is no such time.
    """
    if RFC_3339.fullmatch(text):
        with suppress(ValueError):
            instant = datetime.fromisoformat(text.upper())
            return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).astimezone(UTC)
    raise Refusal(400, f"Not a date or an RFC 3339 instant: {text}")


def bucket_of(instant: datetime, timeframe: str, zone: tzinfo) -> datetime:
    """Return the start of the bucket that contains `instant`, in UTC; buckets follow the zone."""
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


def passes_filters(record: object, query: Query) -> bool:
    """Whether the record passes every filter of the query."""
    return all(fact(record) in query[name] for name, fact in FILTERS.items() if name in query)


def usage_row(lines: Sequence[UsageLine], expand: Sequence[str]) -> Json:
    """One row of usage: the common fields of the lines, and the sums of their amounts."""
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
    """One row of billing events: a charge."""
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
    """The caller, in the requested forms."""
    forms = {"auth_method": credential.detail, "auth_method_structured": _structured(credential)}
    return {name: form for name, form in forms.items() if name in expand}


def analytics_row(calls: Sequence[Calls], metrics: Sequence[str]) -> Json:
    """One row of analytics: sums over the hours, and percentiles over all requests in them."""
    row: Json = {"endpoint_id": calls[0].endpoint_id}
    for name in metrics:
        if match := PERCENTILE.fullmatch(name):
            durations = sorted(second for hour in calls for second in getattr(hour, f"{match[2]}s"))
            if durations:  # nearest rank: the first value that this percentage does not exceed
                row[name] = durations[-(-len(durations) * int(match[1]) // 100) - 1]
        else:
            row[name] = total(getattr(hour, name) for hour in calls)  # whole if they are counts
    return row


def total(amounts: Iterable[Decimal]) -> Decimal:
    """Return the sum as the nearest double, or with all digits if an amount is not a double."""
    summands = list(amounts)
    whole = reduce(EXACT.add, summands, Decimal(0))
    if len(whole.as_tuple().digits) <= DOUBLE_DIGITS or not all(map(is_double, summands)):
        return whole
    return as_double(float(whole))


def is_double(amount: Decimal | int) -> bool:
    """Whether the number is exactly the shortest text of a double."""
    return as_double(float(amount)) == amount


def cut_page(
    sandbox: Sandbox,
    path: str,
    rows: Sequence[T],
    query: Query,
    instant_of: Callable[[T], str | None] | None = None,
) -> tuple[Sequence[T], Json]:
    """Return the page of the query's cursor, and the fields that lead to the next page.

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
    """Return the maximum number of rows of a page."""
    page_max: int | None = limits_of(path, sandbox.as_of).get("page_max")
    default = sandbox.page_size or PAGE_SIZE
    limit = int(query["limit"][0]) if "limit" in query else min(default, page_max or default)
    if page_max and limit > page_max:
        raise Refusal(400, f"limit is at most {page_max}")
    return min(limit, sandbox.page_size or page_max or PAGE_SIZE)


def cursor_of(first: int, path: str, query: Query) -> str:
    """Return a token for the rows from `first`, bound to the path and all other parameters."""
    others = sorted((name, values) for name, values in query.items() if name != "cursor")
    digest = hashlib.sha256(json.dumps([path, others]).encode()).hexdigest()
    return base64.urlsafe_b64encode(f"{first}.{digest[:16]}".encode()).decode()


def read_cursor(path: str, query: Query) -> int:
    """Return the position of the first row of the cursor; 0 without a cursor.

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
    """Encode as JSON: a Decimal as the text of its double, or with all digits if it is not a double."""
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
    """Return the document as of a day; None for the current one."""
    document: Json = json.loads(Path(__file__).with_name("openapi.json").read_bytes())
    return document if day is None else _as_of(document, day)


def _as_of(node: Any, day: date) -> Any:
    """Return the node without later additions: fields, parameters, their values, limits."""

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
    """Return the first day of an `x-since`: a day, the day "after" one, or the first of all."""
    if not since:
        return date.min
    return date.fromisoformat(since.removeprefix("after ")) + timedelta(since.startswith("after "))


def documented(value: Any, schema: Json, document: Json) -> Any:
    """Return the value without fields that are not in the schema."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, dict) and "properties" in schema:
        fields = schema["properties"]
        return {k: documented(v, fields[k], document) for k, v in value.items() if k in fields}
    if isinstance(value, list | tuple) and "items" in schema:
        return [documented(item, schema["items"], document) for item in value]
    return value


def limits_of(path: str, day: date | None) -> Json:
    """Return `page_max` and `range_days_max` of a path, if the document has them."""
    limits: Json = document_as_of(day)["paths"][path]["get"].get("x-limits", {})
    return limits


@cache
def parameters_of(path: str, day: date | None) -> Mapping[str, Parameter]:
    """Return the documented query parameters of a path."""
    document = document_as_of(day)
    shared = document["components"]["parameters"]
    parameters = {}
    for entry in document["paths"][path]["get"]["parameters"]:
        spec = shared[entry["$ref"].rsplit("/", 1)[1]] if "$ref" in entry else entry
        schema = spec["schema"]
        default = schema.get("default", [])
        parameters[spec["name"]] = Parameter(
            name=spec["name"],
            is_required=spec["required"],
            is_list=any(choice["type"] == "array" for choice in schema.get("anyOf", [])),
            is_integer=schema.get("type") == "integer",
            choices=frozenset(schema.get("enum") or spec.get("x-values", [])),
            default=[default] if isinstance(default, str) else default,
        )
    return parameters


@cache
def _structured(credential: Credential) -> Json:
    return {name: value for name, value in asdict(credential).items() if value is not None}


class _Server(ThreadingHTTPServer):
    """A server that can also close kept-alive connections when it stops."""

    request_queue_size = 128

    def __init__(self, sandbox: Sandbox, host: str, port: int) -> None:
        self.sandbox = sandbox
        self.connections: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look up the host name here, which takes seconds without a network.
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
        if not isinstance(sys.exception(), ConnectionError):  # clients may disconnect at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet

    def respond(self) -> None:
        """Log the request, answer it, and break the answer if the fault hook returns a Fault."""
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
            message = "The sandbox was configured to answer like this"
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
        if request.method not in ("GET", "HEAD"):  # their bodies may have an unknown length
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
        """Print nothing; `Sandbox.requests` has the log."""


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header accepts gzip."""
    return bool(re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", header, re.IGNORECASE))
