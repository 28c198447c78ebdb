"""The sandbox over real HTTP: it answers as fal's document says, and breaks only where told to."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

import faletl.sandbox
from faletl.sandbox import (
    BILLING_KEY,
    DEFAULT_KEYS,
    FULL_KEY,
    READONLY_KEY,
    BillingEvent,
    Calls,
    Conduct,
    Credential,
    Fault,
    Request,
    Sandbox,
    UsageLine,
    World,
    invented_world,
)
from faletl.sandbox.world import (
    FAILING,
    FOUNDED,
    as_double,
    calls_of_hour,
    changes_of_hour,
    events_of_hour,
    lines_of_hour,
    runaways_of_hour,
)

DOCUMENT = json.loads(Path(faletl.sandbox.__file__).with_name("openapi.json").read_bytes())
NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
ONE_DAY = {"start": "2026-11-18", "end": "2026-11-19"}
EXACT = {**ONE_DAY, "timeframe": "hour", "timezone": "UTC", "bound_to_timeframe": "false"}
TIMEFRAMES = ("minute", "hour", "day", "week", "month")
AUTH = ["auth_method", "auth_method_structured"]
WHO = ["time_series", *AUTH]
METRICS = list(DOCUMENT["components"]["schemas"]["AnalyticsRow"]["properties"])[1:]
A_MORNING = {"start": "2026-11-18T09:00:00Z", "end": "2026-11-18T12:00:00Z"}
AMOUNTS = ("quantity", "cost_subtotal", "cost_discount", "cost_total", "cost")
NAMES = ("endpoint_id", "unit", "unit_price", "percent_discount", "currency")

Query = dict[str, Any]
Row = dict[str, Any]


@dataclass
class SmallWorld:
    """A world whose lines a test chooses."""

    lines: list[UsageLine] = field(default_factory=list)
    events: list[BillingEvent] = field(default_factory=list)
    hours: list[Calls] = field(default_factory=list)
    account: str = "small"

    def models(self) -> list[dict[str, Any]]:
        return [{"endpoint_id": "acme/a"}]

    def prices(self) -> dict[str, dict[str, Any]]:
        return {}

    def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
        return [line for line in self.lines if start <= line.hour < end]

    def billing_events(self, start: datetime, end: datetime) -> Iterable[BillingEvent]:
        return [event for event in self.events if start <= event.timestamp < end]

    def calls(self, start: datetime, end: datetime) -> Iterable[Calls]:
        return [calls for calls in self.hours if start <= calls.hour < end]

    def credits(self) -> dict[str, Any]:
        return {"current_balance": Decimal("1E-9"), "currency": "USD"}


def frozen_world(**kwargs: Any) -> World:
    return invented_world(now=lambda: NOW, **kwargs)


def line_at(hour: str, **changed: Any) -> UsageLine:
    one = Decimal(1)
    line = UsageLine(
        datetime.fromisoformat(hour), "acme/a", "images", one, one, None, one, Decimal(0), one,
        "USD", Credential("None"),
    )  # fmt: skip
    return replace(line, **changed)


def event_at(instant: str, **changed: Any) -> BillingEvent:
    one = Decimal(1)
    event = BillingEvent(
        datetime.fromisoformat(instant), "r-1", "acme/a", "images", one, one, None, one, Decimal(0), one,
        Credential("None"),
    )  # fmt: skip
    return replace(event, **changed)


def connect(sandbox: Sandbox, key: str | None = FULL_KEY) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Key {key}"}
    return httpx.Client(base_url=sandbox.url, headers=headers, trust_env=False)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(frozen_world()) as running:
        yield running


@pytest.fixture(scope="module")
def client(sandbox: Sandbox) -> Iterator[httpx.Client]:
    with connect(sandbox) as connected:
        yield connected


def read(client: httpx.Client, path: str, query: Query) -> Any:
    """The body of a good answer, every number exact."""
    response = client.get(path, params=query)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_float=Decimal, parse_int=Decimal)


def walk(client: httpx.Client, path: str, query: Query) -> list[Any]:
    """All pages of a walk."""
    pages = [read(client, path, query)]
    while pages[-1]["has_more"]:
        pages.append(read(client, path, {**query, "cursor": pages[-1]["next_cursor"]}))
    assert pages[-1]["next_cursor"] is None
    return pages


def usage_rows(client: httpx.Client, query: Query, path: str = "/models/usage") -> list[Row]:
    """The rows of a report; those of the time series with their bucket."""
    pages = walk(client, path, query)
    series = [bucket for page in pages for bucket in page.get("time_series", [])]
    rows = [{"bucket": b["bucket"], **row} for b in series for row in b["results"]]
    return rows + [row for page in pages for row in page.get("summary", [])]


def analytics_rows(client: httpx.Client, query: Query) -> list[Row]:
    return usage_rows(client, query, "/models/analytics")


def event_rows(client: httpx.Client, query: Query) -> list[Row]:
    pages = walk(client, "/models/billing-events", query)
    return [row for page in pages for row in page["billing_events"]]


def totals(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Decimal]]:
    """The sums of every amount per line of the bill, to the 11th decimal: fal adds up doubles."""
    sums: dict[tuple[Any, ...], list[Decimal]] = {}
    for row in rows:
        key = tuple(row[name] for name in NAMES)
        before = sums.get(key, [Decimal(0)] * len(AMOUNTS))
        sums[key] = [a + row[name] for a, name in zip(before, AMOUNTS, strict=True)]
    return {key: [round(amount, 11) for amount in amounts] for key, amounts in sums.items()}


def is_near(one: Decimal | float, other: Decimal | float, parts: float = 1e-12) -> bool:
    """Whether doubles that were added up or multiplied in another order may be so far apart."""
    return math.isclose(one, other, rel_tol=parts, abs_tol=1e-12)


def check_against_document(path: str, response: httpx.Response, document: Any = DOCUMENT) -> None:
    registry: Registry[Any] = Registry().with_resource("urn:fal", Resource.opaque(document))
    operation = document["paths"].get(path, {}).get("get", {"responses": {}})
    pointer = "#/components/schemas/Error"
    if response.status_code == 200:
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        pointer = schema["$ref"]
    elif operation["responses"]:
        assert str(response.status_code) in operation["responses"]
    validator = Draft202012Validator({"$ref": f"urn:fal{pointer}"}, registry=registry)
    validator.validate(response.json())


GOOD: list[tuple[str, Query]] = [
    ("/models", {}),
    ("/models", {"limit": 10}),
    ("/models", {"endpoint_id": ["fal-ai/flux/dev", "acme/private-endpoint", "no/such"]}),
    ("/models", {"status": "deprecated", "category": "text-to-image", "q": "diffusion"}),
    ("/models/pricing", {"endpoint_id": "fal-ai/flux/dev"}),
    ("/models/pricing", {"endpoint_id": "fal-ai/flux/dev,fal-ai/any-llm,fal-ai/flux-2"}),
    ("/models/pricing", {"endpoint_id": ["fal-ai/flux/dev"] * 50}),
    ("/models/usage", {}),
    ("/models/usage", {**EXACT, "expand": WHO}),
    ("/models/usage", {**EXACT, "expand": "summary"}),
    ("/models/usage", {**EXACT, "expand": "summary,time_series,auth_method"}),
    ("/models/usage", {**EXACT, "timeframe": "minute", "limit": 3}),
    ("/models/usage", {**ONE_DAY, "timeframe": "week", "source": "estimate"}),
    ("/models/usage", {"start": "2026-08-30", "end": "2026-11-01", "timezone": "Asia/Kolkata"}),
    ("/models/usage", {"start": "2026-11-18T00:00:00.5+05:45", "end": "2026-11-18t06:00:00z"}),
    ("/models/usage", {**ONE_DAY, "endpoint_id": "fal-ai/flux/dev,fal-ai/flux-2", "limit": 99999}),
    ("/models/usage", {**ONE_DAY, "api_key_id": "sandbox-key-1", "login_username": "alice"}),
    ("/models/usage", {"start": "2027-01-01", "end": "2027-01-02"}),
    ("/models/billing-events", {}),
    ("/models/billing-events", {**ONE_DAY, "expand": ",".join(AUTH), "limit": 10000}),
    ("/models/billing-events", {**ONE_DAY, "source": "billed", "endpoint_id": ["fal-ai/flux-2"] * 50}),
    ("/models/billing-events", {**ONE_DAY, "api_key_id": "sandbox-key-1", "login_username": "alice"}),
    ("/models/billing-events", {**ONE_DAY, "request_id": "never,seen"}),
    ("/models/billing-events", {"start": "2026-11-18T00:00:00.5+05:45", "end": "2026-11-18t06:00:00z"}),
    ("/models/billing-events", {"start": "0001-01-01", "end": "0001-01-02"}),
    ("/models/analytics", {"endpoint_id": "fal-ai/flux/dev"}),
    ("/models/analytics", {**EXACT, "endpoint_id": "fal-ai/flux/dev", "expand": ["summary", *METRICS]}),
    ("/models/analytics", {**EXACT, "endpoint_id": list(FAILING), "expand": ["time_series", *METRICS]}),
    ("/models/analytics", {**ONE_DAY, "endpoint_id": "acme/product-photo", "timezone": "Asia/Kolkata"}),
    ("/models/analytics", {"endpoint_id": "fal-ai/any-llm", "expand": "summary,p99_duration"}),
    ("/account/billing", {}),
    ("/account/billing", {"expand": "credits"}),
]
BAD: list[tuple[str, Query, int]] = [
    ("/models", {"page": 2}, 400),
    ("/models", {"limit": 0}, 400),
    ("/models", {"limit": "ten"}, 400),
    ("/models", {"status": "retired"}, 400),
    ("/models", {"endpoint_id": ["a/b"] * 51}, 400),
    ("/models", {"sort": "recent"}, 400),
    ("/models/pricing", {}, 400),
    ("/models/pricing", {"endpoint_id": ""}, 400),
    ("/models/pricing", {"endpoint_id": ",".join(["fal-ai/flux/dev"] * 51)}, 400),
    ("/models/pricing", {"endpoint_id": ["fal-ai/flux/dev", "no/such"]}, 404),
    ("/models/pricing", {"endpoint_id": "acme/product-photo"}, 404),
    ("/models/usage", {"start_date": "2026-11-01"}, 400),
    ("/models/usage", {"start": "2026-11-18 00:00"}, 400),
    ("/models/usage", {"start": "2026-11-18T00:00:00"}, 400),
    ("/models/usage", {"end": "2026-02-29"}, 400),
    ("/models/usage", {"start": "2026-11-19", "end": "2026-11-18"}, 400),
    ("/models/usage", {"start": ["2026-11-18", "2026-11-19"]}, 400),
    ("/models/usage", {"end": "9999-12-31T23:59:59Z", "timeframe": "month"}, 400),
    ("/models/usage", {"timeframe": "year"}, 400),
    ("/models/usage", {"timezone": "America"}, 400),
    ("/models/usage", {"timezone": "../UTC"}, 400),
    ("/models/usage", {"bound_to_timeframe": "no"}, 400),
    ("/models/usage", {"expand": "auth_method"}, 400),
    ("/models/usage", {"expand": ["time_series", "costs"]}, 400),
    ("/models/usage", {"source": "tagged-estimate"}, 400),
    ("/models/usage", {"tag": "env=prod"}, 400),
    ("/models/billing-events", {"timeframe": "hour"}, 400),
    ("/models/billing-events", {"limit": 10001}, 400),
    ("/models/billing-events", {"start": "2026-11-19", "end": "2026-11-18"}, 400),
    ("/models/billing-events", {"end": "9999-12-31T23:59:59-05:00"}, 400),
    ("/models/billing-events", {"expand": "time_series"}, 400),
    ("/models/billing-events", {"source": "tagged-billed"}, 400),
    ("/models/billing-events", {"tag": "env=prod"}, 400),
    ("/models/billing-events", {"request_id": ",".join("r" * 51)}, 400),
    ("/models/analytics", {}, 400),
    ("/models/analytics", {"endpoint_id": ["fal-ai/flux/dev"] * 51}, 400),
    ("/models/analytics", {"endpoint_id": "fal-ai/flux/dev", "expand": "time_series"}, 400),
    ("/models/analytics", {"endpoint_id": "fal-ai/flux/dev", "expand": "p50_duration"}, 400),
    ("/models/analytics", {"endpoint_id": "fal-ai/flux/dev", "expand": "summary,p51_duration"}, 400),
    ("/models/analytics", {"endpoint_id": "fal-ai/flux/dev", "api_key_id": "x"}, 400),
    ("/models/analytics", {"endpoint_id": ["fal-ai/flux/dev", "no/such"]}, 404),
    ("/account/billing", {"expand": "debts"}, 400),
    ("/models/billing", {}, 404),
]


@pytest.mark.parametrize(("path", "query", "status"), [(path, query, 200) for path, query in GOOD] + BAD)
def test_every_answer_is_as_the_document_says(
    client: httpx.Client, path: str, query: Query, status: int
) -> None:
    response = client.get(path, params=query)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    check_against_document(path, response)
    if status != 200:
        error = response.json()["error"]
        assert error["type"] == ("not_found" if status == 404 else "validation_error")
        assert error["request_id"] == response.headers["x-fal-request-id"]
    assert response.headers["x-fal-request-id"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/openapi.json", {None, "unknown:key", *DEFAULT_KEYS}),
        ("/models", {None, "unknown:key", *DEFAULT_KEYS}),
        ("/models/pricing?endpoint_id=fal-ai/flux/dev", set(DEFAULT_KEYS)),
        ("/models/usage", {FULL_KEY, BILLING_KEY}),
        ("/models/billing-events", {FULL_KEY, BILLING_KEY}),
        ("/models/analytics?endpoint_id=fal-ai/flux/dev", {FULL_KEY, READONLY_KEY}),
        ("/account/billing", {FULL_KEY, BILLING_KEY, READONLY_KEY}),
    ],
)
@pytest.mark.parametrize("key", [None, "unknown:key", *DEFAULT_KEYS])
def test_a_key_opens_what_its_preset_carries(
    sandbox: Sandbox, path: str, key: str | None, allowed: set[str | None]
) -> None:
    with connect(sandbox, key) as client:
        response = client.get(path)
    refused = 403 if key in DEFAULT_KEYS else 401
    assert response.status_code == (200 if key in allowed else refused)
    if response.status_code != 200:
        check_against_document(path.partition("?")[0], response)
        assert response.json()["error"]["type"] == "authorization_error"


@pytest.mark.parametrize("scheme", ["Bearer", "Keys", "Key x"])
def test_a_key_under_another_scheme_is_refused(client: httpx.Client, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {FULL_KEY}"}
    assert client.get("/account/billing", headers=headers).status_code == 401


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE"])
def test_only_documented_methods_are_offered(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/models", content=None if method == "HEAD" else b"{}")
    assert response.status_code == 405
    assert (response.content == b"") == (method == "HEAD")
    assert client.get("/models", params={"limit": 1}).status_code == 200
    assert client.get("/models/pricing/estimate").status_code == 405


def ask_estimate(client: httpx.Client, body: str) -> Any:
    response = client.post("/models/pricing/estimate", content=body)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_float=Decimal)


def test_units_are_estimated_by_their_list_price(client: httpx.Client) -> None:
    asked = (
        '{"fal-ai/flux/dev": {"unit_quantity": 1.123456789012}, "fal-ai/veo3.1": {"unit_quantity": 2}}'
    )
    found = ask_estimate(client, f'{{"estimate_type": "unit_price", "endpoints": {asked}}}')
    prices = frozen_world().prices()
    total = prices["fal-ai/flux/dev"]["unit_price"] * Decimal("1.123456789012")
    total += prices["fal-ai/veo3.1"]["unit_price"] * 2
    assert found == {"estimate_type": "unit_price", "total_cost": total, "currency": "USD"}
    asked = '{"fal-ai/any-llm": {"unit_quantity": 1e-6}}'  # known, but without a price
    found = ask_estimate(client, f'{{"estimate_type": "unit_price", "endpoints": {asked}}}')
    assert found["total_cost"] == 0


def test_calls_are_estimated_by_what_calls_cost_in_the_last_thirty_days() -> None:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    world = SmallWorld(
        lines=[
            line_at((now - days * 24 * HOUR).isoformat(), cost_total=Decimal(cost))
            for days, cost in ((1, "1"), (29, "0.5"), (31, "7"))
        ],
        hours=[
            Calls(now - days * 24 * HOUR, "acme/a", success_count=2, user_error_count=1)
            for days in (1, 29, 31)
        ],
    )
    with Sandbox(world) as server, connect(server) as client:
        for calls, cost in (("1", "0.25"), ("1000", "250"), ("3.0", "0.75")):
            asked = f'{{"acme/a": {{"call_quantity": {calls}}}}}'
            body = f'{{"estimate_type": "historical_api_price", "endpoints": {asked}}}'
            assert ask_estimate(client, body)["total_cost"] == Decimal(cost)
        world.lines.clear()
        assert ask_estimate(client, body)["total_cost"] == 0


@pytest.mark.parametrize(
    ("kind", "endpoints", "status"),
    [
        ("unit_price", '{"no/such": {"unit_quantity": 1}}', 404),
        ("historical_api_price", '{"no/such": {"call_quantity": 1}}', 404),
        (
            "unit_price",
            '{"fal-ai/flux/dev": {"unit_quantity": 1}, "no/such": {"unit_quantity": 1}}',
            404,
        ),
        ("unit_price", '{"fal-ai/flux/dev": {"call_quantity": 1}}', 400),
        ("historical_api_price", '{"fal-ai/flux/dev": {"unit_quantity": 1}}', 400),
        ("historical_api_price", '{"fal-ai/flux/dev": {"call_quantity": 1.5}}', 400),
        ("historical_api_price", '{"fal-ai/flux/dev": {"call_quantity": 0}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": 0.0000009}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": -1}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": true}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": "1"}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": NaN}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": 1e999999999}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": {"unit_quantity": 1e9999999999999999999999}}', 400),
        ("unit_price", '{"fal-ai/flux/dev": 1}', 400),
        ("unit_price", "{}", 400),
        ("unit_price", "[]", 400),
        ("unit_price", "", 400),
        ("guess", '{"fal-ai/flux/dev": {"unit_quantity": 1}}', 400),
    ],
)
def test_an_estimate_of_something_else_is_refused(
    kind: str, endpoints: str, status: int, client: httpx.Client
) -> None:
    body = f'{{"estimate_type": "{kind}", "endpoints": {endpoints}}}'
    assert client.post("/models/pricing/estimate", content=body).status_code == status
    for body in ("", "[]", "null", '{"estimate_type": ["unit_price"]}', "[" * 100_000, "\udcff"):
        sent = body.encode("utf-8", "surrogateescape")
        assert client.post("/models/pricing/estimate", content=sent).status_code == 400


def test_an_estimate_takes_any_key_but_takes_one(sandbox: Sandbox) -> None:
    body = '{"estimate_type": "unit_price", "endpoints": {"fal-ai/flux/dev": {"unit_quantity": 1}}}'
    for key, status in ((None, 401), ("no:key", 401), *((key, 200) for key in DEFAULT_KEYS)):
        with connect(sandbox, key) as client:
            assert client.post("/models/pricing/estimate", content=body).status_code == status


@pytest.mark.parametrize("path", ["/models", "/v1", "/v1/", "/v1/models/", "/v1models", "/"])
def test_nothing_is_served_beside_the_documented_paths(sandbox: Sandbox, path: str) -> None:
    origin = sandbox.url.removesuffix("/v1")
    response = httpx.get(f"{origin}{path}", trust_env=False)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found"


def test_the_document_is_served(client: httpx.Client) -> None:
    assert client.get("/openapi.json").json() == DOCUMENT


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize(
    ("all_rows", "query"),
    [
        (
            lambda client, query: [r for p in walk(client, "/models", query) for r in p["models"]],
            {"q": "image"},
        ),
        (usage_rows, {**ONE_DAY, "timeframe": "day", "expand": "time_series,summary"}),
        (usage_rows, {**EXACT, "expand": WHO, "api_key_id": "sandbox-key-2"}),
        (event_rows, {**A_MORNING, "expand": AUTH, "endpoint_id": "fal-ai/flux/dev,fal-ai/flux-2"}),
        (
            analytics_rows,
            {**A_MORNING, "endpoint_id": ["fal-ai/flux/dev", "fal-ai/flux-2"],
             "timeframe": "hour", "expand": ["time_series", "summary", *METRICS]},
        ),
    ],
)  # fmt: skip
def test_page_size_does_not_change_the_rows(
    client: httpx.Client, all_rows: Callable[[httpx.Client, Query], list[Row]], query: Query, size: int
) -> None:
    whole = all_rows(client, query)
    assert whole
    assert all_rows(client, {**query, "limit": size}) == whole
    with Sandbox(frozen_world(), page_size=size) as small, connect(small) as other:
        assert all_rows(other, {**query, "limit": size + 1000}) == whole
        pages = -(-len(whole) // size)
        assert len(small.requests) == pages


@pytest.mark.parametrize(
    ("given", "limit", "as_of", "first_page"),
    [
        (None, None, None, 1000),
        (None, 10_000, None, 1234),
        (None, 1200, None, 1200),
        (500, 10_000, None, 500),
        (5000, None, None, 1234),
        (None, None, date(2026, 5, 7), 100),
        (500, None, date(2026, 5, 7), 100),
        (30, 100, date(2026, 5, 7), 30),
    ],
)
def test_a_page_of_events_is_as_large_as_asked(
    given: int | None, limit: int | None, as_of: date | None, first_page: int
) -> None:
    world = SmallWorld(events=[event_at("2026-11-18T05:00+00:00")] * 1234)
    query = ONE_DAY if limit is None else {**ONE_DAY, "limit": limit}
    with Sandbox(world, page_size=given, as_of=as_of) as sandbox, connect(sandbox) as client:
        pages = walk(client, "/models/billing-events", query)
    assert len(pages[0]["billing_events"]) == first_page
    assert sum(len(page["billing_events"]) for page in pages) == 1234


@pytest.mark.parametrize(
    "changed",
    [
        {"limit": 6},
        {"start": "2026-11-17"},
        {"expand": "summary"},
        {"cursor": ""},
        {"cursor": "Mg=="},
        {"cursor": "garbage"},
        {"cursor": "é"},
    ],
)
def test_a_cursor_holds_for_its_own_request_only(client: httpx.Client, changed: Query) -> None:
    query: Query = {**EXACT, "limit": 5}
    cursor = read(client, "/models/usage", query)["next_cursor"]
    assert read(client, "/models/usage", {**query, "cursor": cursor})["time_series"]
    response = client.get("/models/usage", params={**query, "cursor": cursor, **changed})
    assert response.status_code == 400
    check_against_document("/models/usage", response)


def test_a_cursor_holds_for_its_own_path_only(client: httpx.Client) -> None:
    cursor = read(client, "/models", {"limit": 5})["next_cursor"]
    response = client.get("/models/usage", params={"limit": 5, "cursor": cursor})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("accepts", "encoding"),
    [("gzip", "gzip"), ("br, GZIP;q=0.5", "gzip"), ("identity", None), ("gzip;q=0", None)],
)
def test_gzip_comes_to_those_who_accept_it(
    client: httpx.Client, accepts: str, encoding: str | None
) -> None:
    response = client.get("/models", headers={"Accept-Encoding": accepts})
    assert response.headers.get("content-encoding") == encoding
    assert len(response.json()["models"]) > 170


@pytest.mark.parametrize("timeframe", TIMEFRAMES)
def test_summary_is_the_sum_of_the_time_series(client: httpx.Client, timeframe: str) -> None:
    query = {"start": "2026-10-30", "end": "2026-11-04", "timeframe": timeframe}
    query |= {"bound_to_timeframe": "false"}
    series = usage_rows(client, {**query, "expand": WHO})
    summary = usage_rows(client, {**query, "expand": "summary"})
    assert totals(summary) == totals(series)
    assert len(summary) == len(totals(summary))
    for row in series + summary:
        assert is_near(row["cost_subtotal"], row["quantity"] * row["unit_price"])
        assert is_near(row["cost_discount"], row["cost_subtotal"] * (row["percent_discount"] or 0) / 100)
        assert is_near(row["cost_total"], row["cost_subtotal"] - row["cost_discount"])
        assert row["cost_total"] == row["cost"]


def test_rows_are_split_by_credential_only_when_expanded(client: httpx.Client) -> None:
    plain = usage_rows(client, EXACT)
    assert not {"auth_method", "auth_method_structured"} & set().union(*plain)
    split = usage_rows(client, {**EXACT, "expand": WHO})
    assert len(split) > len(plain)
    assert totals(split) == totals(plain)
    seen = {json.dumps(row["auth_method_structured"], sort_keys=True) for row in split}
    assert all(row["auth_method_structured"]["detail"] == row["auth_method"] for row in split)
    assert {frozenset(json.loads(who)) for who in seen} == {
        frozenset({"detail"}),
        frozenset({"detail", "api_key_id"}),
        frozenset({"detail", "login_username"}),
    }


@pytest.mark.parametrize(
    ("filters", "field_name", "allowed"),
    [
        ({"endpoint_id": "fal-ai/flux/dev,fal-ai/flux-2"}, None, None),
        ({"api_key_id": ["sandbox-key-1", "x"]}, "api_key_id", {"sandbox-key-1"}),
        ({"login_username": "alice"}, "login_username", {"alice"}),
    ],
)
def test_filters_keep_only_what_was_asked(
    client: httpx.Client, filters: Query, field_name: str | None, allowed: set[str] | None
) -> None:
    rows = usage_rows(client, {**EXACT, "expand": WHO, **filters})
    if field_name is None:
        assert {row["endpoint_id"] for row in rows} == {"fal-ai/flux/dev", "fal-ai/flux-2"}
    else:
        assert {row["auth_method_structured"].get(field_name) for row in rows} == allowed


@pytest.mark.parametrize(
    ("hours", "timeframe"),
    [
        (1, "minute"),
        (2, "hour"),
        (2 * 24 - 1, "hour"),
        (2 * 24, "day"),
        (64 * 24 - 1, "day"),
        (64 * 24, "week"),
        (183 * 24 - 1, "week"),
        (183 * 24, "month"),
    ],
)
def test_the_timeframe_follows_from_the_length_of_the_range(hours: int, timeframe: str) -> None:
    end = datetime(2026, 11, 2, tzinfo=UTC)
    line = line_at("2026-11-01T23:30+00:00")
    world = SmallWorld([replace(line, hour=line.hour - n * HOUR) for n in range(200 * 24)])
    query = {"start": (end - hours * HOUR).isoformat(), "end": end.isoformat()}
    with Sandbox(world) as sandbox, connect(sandbox) as client:
        picked = usage_rows(client, query)
        answers = {name: usage_rows(client, {**query, "timeframe": name}) for name in TIMEFRAMES}
    assert [name for name, rows in answers.items() if rows == picked] == [timeframe]


@pytest.mark.parametrize(
    ("query", "first", "last", "zone"),
    [
        # Aligned bounds stay; others are widened unless told not to be.
        ({"timeframe": "day"}, "2026-11-18T00:00", "2026-11-19T00:00", "UTC"),
        (
            {"start": "2026-11-17T10:30:00Z", "end": "2026-11-18T10:00:01Z", "timeframe": "hour"},
            "2026-11-17T10:00", "2026-11-18T11:00", "UTC",
        ),
        (
            {"start": "2026-11-17T10:30:00Z", "bound_to_timeframe": "false", "timeframe": "day"},
            "2026-11-17T11:00", "2026-11-19T00:00", "UTC",
        ),
        ({"timeframe": "week"}, "2026-11-16T00:00", "2026-11-23T00:00", "UTC"),
        ({"timeframe": "month"}, "2026-11-01T00:00", "2026-12-01T00:00", "UTC"),
        # Days of another zone: midnight UTC is the evening before, on a day of 25 hours.
        (
            {"start": "2026-11-02", "end": "2026-11-02", "timeframe": "day"},
            "2026-11-01T04:00", "2026-11-02T05:00", "America/New_York",
        ),
        (
            {"start": "2026-11-18", "end": "2026-11-18", "timeframe": "day"},
            "2026-11-17T18:30", "2026-11-18T18:30", "Asia/Kolkata",
        ),
    ],
)  # fmt: skip
def test_the_range_is_widened_to_whole_buckets(
    client: httpx.Client, query: Query, first: str, last: str, zone: str
) -> None:
    query = {**ONE_DAY, **query, "timezone": zone, "expand": "summary"}
    exact = {"start": f"{first}:00Z", "end": f"{last}:00Z", "bound_to_timeframe": "false"}
    assert totals(usage_rows(client, query)) == totals(
        usage_rows(client, {**exact, "expand": "summary"})
    )


def test_buckets_are_named_with_the_offset_of_their_zone() -> None:
    # Each first or last hour of a bucket, in New York; 1 November has 25 hours there.
    lines = [
        line_at("2026-11-01T03:00+00:00"),
        line_at("2026-11-01T04:00+00:00"),
        line_at("2026-11-02T04:00+00:00"),
        line_at("2026-11-02T05:00+00:00"),
    ]
    query = {"start": "2026-11-01", "end": "2026-11-03", "timezone": "America/New_York"}
    with Sandbox(SmallWorld(lines)) as sandbox, connect(sandbox) as client:
        days = Counter(r["bucket"] for r in usage_rows(client, {**query, "timeframe": "day"}))
        hours = [r["bucket"] for r in usage_rows(client, {**query, "timeframe": "hour"})]
        total = usage_rows(client, {**query, "timeframe": "day"})[1]["quantity"]
    assert list(days) == [
        "2026-10-31T00:00:00-04:00",
        "2026-11-01T00:00:00-04:00",
        "2026-11-02T00:00:00-05:00",
    ]
    assert total == 2
    assert hours == [
        "2026-10-31T23:00:00-04:00",
        "2026-11-01T00:00:00-04:00",
        "2026-11-01T23:00:00-05:00",
        "2026-11-02T00:00:00-05:00",
    ]


def test_lines_are_kept_apart_by_price_discount_unit_and_currency_only() -> None:
    hour = "2026-11-18T05:00+00:00"
    apart: list[Query] = [
        {},
        {"unit": "image"},
        {"unit_price": Decimal("1.5")},
        {"percent_discount": Decimal(0)},
        {"currency": "EUR"},
        {"endpoint_id": "acme/b"},
    ]
    who = [Credential("None"), Credential("a", api_key_id="k")]
    lines = [line_at(hour, credential=w, **changed) for changed in apart for w in who]
    with Sandbox(SmallWorld(lines)) as sandbox, connect(sandbox) as client:
        assert len(usage_rows(client, EXACT)) == len(apart)
        assert len(usage_rows(client, {**EXACT, "expand": WHO})) == len(lines)


def test_amounts_are_written_digit_by_digit() -> None:
    half, whole = (
        "10000000000000000000.000000000000000001",
        "20000000000000000000.000000000000000002",
    )
    line = line_at("2026-11-18T05:00+00:00", quantity=Decimal(half))
    with Sandbox(SmallWorld([line, line])) as sandbox, connect(sandbox) as client:
        text = client.get("/models/usage", params=EXACT).text
    assert f'"quantity":{whole},' in text


@pytest.mark.parametrize(
    ("amounts", "text"),
    [
        ([124831 / 48000], "2.6006458333333335"),
        ([0.1 + 0.2], "0.30000000000000004"),
        ([0.1, 0.2], "0.3"),  # sums do not depend on the order of lines
        ([0.1] * 10, "1"),
        ([1e-05], "1e-05"),
        ([6.25 / 3600], "0.001736111111111111"),
        ([20.0], "20"),
        ([0.0], "0"),
    ],
)
def test_amounts_are_doubles_as_an_encoder_writes_them(amounts: list[float], text: str) -> None:
    lines = [line_at("2026-11-18T05:00+00:00", quantity=as_double(amount)) for amount in amounts]
    with Sandbox(SmallWorld(lines)) as sandbox, connect(sandbox) as client:
        assert f'"quantity":{text},' in client.get("/models/usage", params=EXACT).text
        balance = client.get("/account/billing", params={"expand": "credits"}).text
    assert '"current_balance":1e-09,' in balance


def test_the_invented_amounts_are_what_real_accounts_send() -> None:
    start = datetime(2026, 11, 18, tzinfo=UTC)
    lines = list(frozen_world().usage(start, start + 24 * HOUR))
    events = list(frozen_world().billing_events(start, start + 24 * HOUR))
    for name in ("quantity", "unit_price", "cost_subtotal", "cost_total"):
        digits = [len(getattr(line, name).as_tuple().digits) for line in lines]
        assert 16 <= max(digits) <= 17, name
    assert any(len((event.quantity or Decimal(0)).as_tuple().digits) == 17 for event in events)
    assert {line.unit for line in lines} >= {"30 frames", "1000 characters ", "second"}
    prices = Counter((one.hour, one.endpoint_id, one.unit, one.credential) for one in lines)
    assert {key[1] for key, many in prices.items() if many == 2} == {
        "fal-ai/birefnet/v2", "acme/product-photo",
    }  # fmt: skip
    assert {line.percent_discount for line in lines} == {None, Decimal(0), Decimal(10)}
    assert {event.percent_discount for event in events} == {Decimal(0), Decimal(10)}
    assert all(event.cost_total == round(event.cost_total, 9) for event in events)
    charged = sum((one.cost_total for one in events), Decimal(0))
    used = sum((one.cost_total for one in lines), Decimal(0))
    assert 0 < abs(charged - used) <= len(events) * Decimal("0.5e-9")


def test_a_world_may_change_between_requests() -> None:
    world = SmallWorld()
    with Sandbox(world) as sandbox, connect(sandbox) as client:
        assert usage_rows(client, EXACT) == []
        world.lines.append(line_at("2026-11-18T05:00+00:00"))
        assert len(usage_rows(client, EXACT)) == 1


def make_anew() -> None:
    """Forget what was invented, so that the next who asks makes it again."""
    for made in (lines_of_hour, runaways_of_hour, changes_of_hour, events_of_hour, calls_of_hour):
        made.cache_clear()


def test_the_same_hour_has_the_same_lines_however_it_is_asked() -> None:
    start, end = datetime(2026, 11, 17, tzinfo=UTC), datetime(2026, 11, 19, tzinfo=UTC)
    whole = list(frozen_world().usage(start, end))
    make_anew()
    later = invented_world(now=lambda: NOW + timedelta(days=400))
    hours = [start + n * HOUR for n in reversed(range(48))]
    pieces = [list(later.usage(hour, hour + HOUR)) for hour in hours]
    assert [line for piece in reversed(pieces) for line in piece] == whole
    assert list(frozen_world(seed=8).usage(start, end)) != whole
    # Pinned, so that the demo's figures change on purpose only.
    assert sum(line.cost_total for line in whole) == Decimal("705.3184455900000154767")


@settings(max_examples=25, derandomize=True, database=None)
@given(
    day=st.integers(-1, 4 * 365),
    minutes=st.lists(st.integers(0, 2 * 24 * 60), min_size=2, max_size=5).map(sorted),
    zone=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45))]),
    late=st.booleans(),
)
def test_any_range_is_the_sum_of_its_pieces(
    day: int, minutes: list[int], zone: timezone, late: bool
) -> None:
    world = invented_world(now=lambda: datetime(2029, 1, 1, tzinfo=UTC), late=late)
    cuts = [(FOUNDED + timedelta(days=day, minutes=n)).astimezone(zone) for n in minutes]
    for held in (world.usage, world.billing_events, world.calls):
        make_anew()
        whole = Counter(held(cuts[0], cuts[-1]))
        pieces: Counter[object] = Counter()
        for piece in reversed(list(pairwise(cuts))):
            make_anew()
            pieces.update(held(*piece))
        assert pieces == whole


def test_the_command_serves_the_seed_it_is_given() -> None:
    day = {"start": "2025-11-06", "end": "2025-11-07", "expand": "summary"}
    command = [
        sys.executable,
        "-c",
        "from faletl.cli import main; main()",
        "sandbox",
        "--port",
        "0",
    ]
    spent = []
    for arguments in ([], ["--seed", "8"]):
        with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            url = process.stdout.readline().split()[4].rstrip(";")
            headers = {"Authorization": f"Key {FULL_KEY}"}
            with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
                spent.append(sum(row["cost_total"] for row in usage_rows(client, day)))
            process.send_signal(signal.SIGINT)
        assert process.returncode == 0
    start = datetime(2025, 11, 6, tzinfo=UTC)
    worlds = (frozen_world(seed=7, late=True), frozen_world(seed=8, late=True))
    told = [sum(float(x.cost_total) for x in w.usage(start, start + 24 * HOUR)) for w in worlds]
    assert all(map(is_near, spent, told))
    assert not is_near(*told)


@pytest.mark.skipif(sys.platform != "linux", reason="only there all of 127.0.0.0/8 is this machine")
@pytest.mark.parametrize(
    ("host", "told", "answering"),
    [
        (None, "127.0.0.1", {"127.0.0.1"}),
        ("127.0.0.2", "127.0.0.2", {"127.0.0.2"}),
        ("0.0.0.0", "127.0.0.1", {"127.0.0.1", "127.0.0.2"}),  # noqa: S104 what is tested
    ],
)
def test_it_listens_where_it_is_told_and_tells_an_address_that_answers(
    host: str | None, told: str, answering: set[str]
) -> None:
    def answers(url: httpx.URL) -> bool:
        with suppress(httpx.ConnectError):
            return httpx.get(f"{url}/openapi.json", trust_env=False).status_code == 200
        return False

    world = SmallWorld()
    with Sandbox(world, host=host) if host else Sandbox(world) as server:
        url = httpx.URL(server.url)
        addresses = ("127.0.0.1", "127.0.0.2")
        reached = {address for address in addresses if answers(url.copy_with(host=address))}
    assert (url.host, reached) == (told, answering)


def test_only_hours_that_have_ended_are_there() -> None:
    lines = frozen_world().usage(NOW - 3 * HOUR, NOW + 3 * HOUR)
    assert {line.hour.hour for line in lines} == {10, 11}
    at_the_border = invented_world(now=lambda: datetime(2026, 11, 20, 12, tzinfo=UTC))
    assert {line.hour.hour for line in at_the_border.usage(NOW - 3 * HOUR, NOW)} == {10, 11}


def test_the_invented_team_is_plausible() -> None:
    start = datetime(2026, 10, 1, tzinfo=UTC)
    world = frozen_world()
    lines = list(world.usage(start, start + timedelta(days=49)))
    spend: Counter[datetime] = Counter()
    runaways = [line for line in lines if line.cost_total > 300]
    assert 1 <= len(runaways) <= 3
    for line in lines:
        if line not in runaways:
            spend[line.hour.replace(hour=0)] += line.cost_total  # type: ignore[assignment]  # starts at 0
    assert len(spend) == 49
    assert all(100 < total < 600 for total in spend.values())
    units: dict[str, set[str]] = {}
    for line in lines:
        units.setdefault(line.endpoint_id, set()).add(line.unit)
    models = {model["endpoint_id"]: model for model in world.models()}
    prices = world.prices()
    assert 25 <= len(units) <= 40
    assert units.keys() - models.keys() == {"acme/product-photo"}
    assert {i for i, billed in units.items() if len(billed) == 2} == {
        "fal-ai/flux-2",  # one after the other
        "xai/grok-imagine-image/quality/text-to-image",  # both at once
    }
    assert sum(units[i] != {p["unit"]} for i, p in prices.items() if i in units) > 3
    assert len({line.credential for line in lines}) == 4
    assert {line.percent_discount for line in lines} == {None, Decimal(0), Decimal(10)}
    assert len(models.keys() - prices.keys()) > 2
    assert not prices.keys() - models.keys()
    facts = [model.get("metadata") for model in models.values()]
    assert Counter(f and f["status"] for f in facts).keys() == {None, "active", "deprecated"}


def list_changes(start: datetime, days: int) -> list[tuple[datetime, str, Row, Row]]:
    """When which entry of the price list changed, from what to what."""
    clock = [start]
    world = invented_world(now=lambda: clock[0])

    def prices_at(instant: datetime) -> dict[str, Row]:
        clock[0] = instant
        return world.prices()

    changes = []
    for day in (start + timedelta(days=n) for n in range(days)):
        if prices_at(day) != prices_at(day + timedelta(days=1)):
            for hour in (day + n * HOUR for n in range(1, 25)):
                before, after = prices_at(hour - timedelta.resolution), prices_at(hour)
                changes += [(hour, i, before[i], after[i]) for i in after if before[i] != after[i]]
    return changes


def test_two_months_hold_several_price_changes_in_any_year() -> None:
    changes = list_changes(FOUNDED, 4 * 365)
    for day in range(4 * 365 - 60):
        start = FOUNDED + timedelta(days=day)
        within = [change for change in changes if start < change[0] <= start + timedelta(days=60)]
        assert 3 <= len(within) <= 6
        assert any(instant.hour for instant, *_ in within)
    of_same_unit = [(old, new) for *_, old, new in changes if old["unit"] == new["unit"]]
    assert {old["endpoint_id"] for _, _, old, new in changes if old["unit"] != new["unit"]} == {
        "fal-ai/flux-2"
    }
    rises = sum(old["unit_price"] < new["unit_price"] for old, new in of_same_unit)
    assert 0.3 < rises / len(of_same_unit) < 0.7
    used = {line.endpoint_id for line in frozen_world().usage(NOW - 24 * HOUR, NOW)}
    assert {endpoint_id for _, endpoint_id, *_ in changes} - used == {"fal-ai/nano-banana-pro"}


@pytest.mark.parametrize(
    ("endpoint_id", "billed_from", "before", "after", "listed_days_before"),
    [
        ("fal-ai/flux/dev", "2026-11-12T15", ("megapixels", "0.022"), ("megapixels", "0.025"), 0),
        (
            "fal-ai/flux-2", "2026-10-28T00", ("compute seconds", "0.00167"), ("megapixels", "0.012"), 0,
        ),
        (
            "fal-ai/kling-video/v3/pro/image-to-video", "2026-11-13T00",
            ("seconds", "0.14"), ("seconds", "0.168"), 9,
        ),
    ],
)  # fmt: skip
def test_the_bill_follows_the_list_at_once_or_days_later(
    endpoint_id: str,
    billed_from: str,
    before: tuple[str, str],
    after: tuple[str, str],
    listed_days_before: int,
) -> None:
    change = datetime.fromisoformat(billed_from).replace(tzinfo=UTC)
    lines = frozen_world().usage(change - 24 * HOUR, change + 24 * HOUR)
    billed: dict[bool, set[tuple[str, str]]] = {}
    for line in lines:
        if line.endpoint_id == endpoint_id:
            billed.setdefault(line.hour < change, set()).add((line.unit, str(line.unit_price)))
    assert billed == {True: {before}, False: {after}}
    day_before = change - timedelta(days=listed_days_before + 1)
    [(listed_from, _, old, new)] = [one for one in list_changes(day_before, 1) if one[1] == endpoint_id]
    assert listed_from == change - timedelta(days=listed_days_before)
    assert [(row["unit"], str(row["unit_price"])) for row in (old, new)] == [before, after]


def test_a_price_agreed_on_stays_when_the_list_changes() -> None:
    agreed, start = "fal-ai/recraft-v3", datetime(2026, 9, 1, tzinfo=UTC)
    lines = frozen_world().usage(start, start + timedelta(days=30))
    assert {str(line.unit_price) for line in lines if line.endpoint_id == agreed} == {"0.04"}
    [(_, _, old, new)] = [change for change in list_changes(start, 30) if change[1] == agreed]
    assert (str(old["unit_price"]), str(new["unit_price"])) == ("0.04", "0.05")


def test_every_amount_follows_from_quantity_price_and_discount() -> None:
    world = invented_world(now=lambda: datetime(2029, 1, 1, tzinfo=UTC))
    for month in range(0, 48, 5):  # all streams flow, and prices take their turns
        start = FOUNDED + timedelta(days=30 * month)
        for line in world.usage(start, start + 24 * HOUR):
            subtotal = float(line.quantity) * float(line.unit_price)
            assert line.cost_subtotal == as_double(subtotal)
            assert is_near(line.cost_discount, subtotal * float(line.percent_discount or 0) / 100)
            assert is_near(line.cost_total, line.cost_subtotal - line.cost_discount)


@pytest.mark.parametrize("seed", [7, 8])
def test_a_charge_runs_away_in_any_sixty_days(seed: int) -> None:
    hours = (FOUNDED + n * HOUR for n in range(4 * 365 * 24))
    found = [line for hour in hours for line in runaways_of_hour(seed, hour)]
    instants = [FOUNDED, *(line.hour for line in found), FOUNDED + timedelta(days=4 * 365)]
    assert max(later - earlier for earlier, later in pairwise(instants)) < timedelta(days=60)
    # A week is topped up to 5,000 USD: two such charges could empty it.
    assert min(later - earlier for earlier, later in pairwise(instants[1:-1])) > timedelta(days=7)
    assert all(400 < line.cost_total < 2000 for line in found)
    assert len({line.endpoint_id for line in found}) == 3


@pytest.mark.parametrize("late", [False, True])
def test_a_runaway_is_one_request_and_one_charge_far_outside_its_history(late: bool) -> None:
    start = datetime(2026, 9, 26, tzinfo=UTC)
    world = frozen_world(late=late)
    charges = list(world.billing_events(start, NOW))
    runaways = [charge for charge in charges if charge.cost_total > 300]
    assert len(runaways) == 2
    for charge in runaways:
        [of_request] = [one for one in charges if one.request_id == charge.request_id]
        others = [c.cost_total for c in charges if c.endpoint_id == charge.endpoint_id]
        assert charge.cost_total > 50 * sorted(others)[-2]
        hour = charge.timestamp.replace(minute=0, second=0, microsecond=0)
        [line] = [line for line in world.usage(hour, hour + HOUR) if line.cost_total > 300]
        for name in ("endpoint_id", "unit", "quantity", "unit_price", "credential"):
            assert getattr(line, name) == getattr(of_request, name)
        assert round(line.cost_subtotal, 9) == of_request.cost_subtotal


def test_the_credit_falls_with_spend_and_is_topped_up() -> None:
    clock = [datetime(2026, 11, 10, tzinfo=UTC)]
    world = invented_world(now=lambda: clock[0])
    levels = []
    for _ in range(8 * 24):
        levels.append(world.credits()["current_balance"])
        clock[0] += HOUR
    rises = [after > before for before, after in pairwise(levels)]
    assert sum(rises) == 1
    assert min(levels) > 0
    start = datetime(2026, 11, 10, tzinfo=UTC)
    spent = sum(line.cost_total for line in world.usage(start, start + 24 * HOUR))
    assert is_near(levels[0] - levels[24], spent)


# --- Billing events and analytics -----------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_the_events_of_a_day_add_up_to_its_usage(late: bool) -> None:
    # Of the days before, two bring other prices and one a charge that ran away.
    before = [date(2026, 10, 28), date(2026, 11, 2), date(2026, 11, 12)]
    with Sandbox(frozen_world(late=late)) as sandbox, connect(sandbox) as client:
        for day in (*before, *(date(2026, 11, n) for n in range(15, 20))):
            query = {"start": f"{day}", "end": f"{day + timedelta(days=1)}"}
            rows = usage_rows(client, {**query, "expand": ["summary", *AUTH]})
            events = event_rows(client, {**query, "expand": AUTH, "limit": 10_000})
            check_they_agree(events, rows, "endpoint_id", "unit_price", "auth_method")
            of_unit = quantities(row for row in rows if is_whole(row, events))
            assert of_unit
            assert all(is_near(quantities(events)[key], many) for key, many in of_unit.items())


def check_they_agree(events: Iterable[Row], rows: Iterable[Row], *by: str) -> None:
    """The charges are the usage, but for half a nano-dollar for each; two for a discount."""
    charged, used = costs(events, *by), costs(rows, *by)
    many = Counter(tuple(event[name] for name in by) for event in events)
    assert charged.keys() == used.keys()
    for key, amounts in used.items():
        for n, (ours, theirs) in enumerate(zip(charged[key], amounts, strict=True)):
            most = many[key] * Decimal("0.5e-9") * (2 if n == 1 else 1)
            assert abs(ours - theirs) <= most + Decimal("1e-11"), key


def costs(rows: Iterable[Row], *by: str) -> dict[tuple[Any, ...], list[Decimal]]:
    sums: dict[tuple[Any, ...], list[Decimal]] = {}
    for row in rows:
        amounts = [row["cost_subtotal"], row["cost_discount"], row["cost_total"]]
        key = tuple(row[name] for name in by)
        sums[key] = [a + b for a, b in zip(sums.get(key, [Decimal(0)] * 3), amounts, strict=True)]
    return sums


def quantities(rows: Iterable[Row]) -> dict[tuple[str, str], Decimal]:
    sums: dict[tuple[str, str], Decimal] = {}
    for row in rows:
        key = row["endpoint_id"], row["unit"]
        sums[key] = sums.get(key, Decimal(0)) + (row["quantity"] or 0)
    return sums


def is_whole(row: Row, events: Iterable[Row]) -> bool:
    """Whether all the events of the row's endpoint tell unit and quantity."""
    theirs = [e for e in events if e["endpoint_id"] == row["endpoint_id"]]
    return all(None not in (event["unit"], event["quantity"]) for event in theirs)


def test_events_come_newest_first_and_are_consistent(client: httpx.Client) -> None:
    events = event_rows(client, {**ONE_DAY, "expand": AUTH, "limit": 10_000})
    instants = [event["timestamp"] for event in events]
    assert instants == sorted(instants, reverse=True)
    assert all("2026-11-18T" in instant and instant.endswith("Z") for instant in instants)
    for event in events:
        total = event["cost_total"]
        assert total == event["cost_subtotal"] - event["cost_discount"]
        assert event["cost_estimate_nano_usd"] == total * 10**9
        assert event["output_units"] == event["quantity"]
        assert event["percent_discount"] is not None
        if event["quantity"] is not None:
            product = event["quantity"] * event["unit_price"]
            assert abs(event["cost_subtotal"] - product) < Decimal("0.5000001e-9")
        assert event["auth_method_structured"]["detail"] == event["auth_method"]
    assert 0.01 < sum(event["unit"] is None for event in events) / len(events) < 0.03
    assert 0.005 < sum(event["quantity"] is None for event in events) / len(events) < 0.02
    of_request = Counter(event["request_id"] for event in events)
    assert 0.005 < sum(many == 2 for many in of_request.values()) / len(of_request) < 0.03
    of_line = Counter((e["timestamp"][:13], e["endpoint_id"], e["auth_method"]) for e in events)
    assert max(of_line.values()) <= 8  # four of a line; one endpoint has two lines an hour


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"endpoint_id": "fal-ai/flux/dev"}, lambda event: event["endpoint_id"] == "fal-ai/flux/dev"),
        ({"api_key_id": "sandbox-key-1"}, lambda event: event["auth_method"] == "backend-prod"),
        ({"login_username": "alice"}, lambda event: event["auth_method"] == "User token"),
    ],
)
def test_filters_keep_only_the_events_asked_for(
    client: httpx.Client, filters: Query, told: Callable[[Row], bool]
) -> None:
    query = {**A_MORNING, "expand": AUTH}
    whole = event_rows(client, query)
    found = event_rows(client, {**query, **filters})
    assert found == [event for event in whole if told(event)]
    assert found
    ids = [found[0]["request_id"], found[-1]["request_id"]]
    assert {e["request_id"] for e in event_rows(client, {**query, "request_id": ids})} == set(ids)


def test_events_are_of_the_very_instants_asked_for(client: httpx.Client) -> None:
    whole = event_rows(client, A_MORNING)
    border = whole[len(whole) // 2]["timestamp"]
    later = event_rows(client, {**A_MORNING, "start": border})
    earlier = event_rows(client, {**A_MORNING, "end": border})
    assert later + earlier == whole
    assert later[-1]["timestamp"] == border


@pytest.mark.parametrize(
    ("cost", "nano"),
    [("0.0000000005", 0), ("0.0000000015", 2), ("0.00000000150000000000000001", 2), ("1E+3", 10**12)],
)
def test_nano_dollars_are_rounded_half_even(cost: str, nano: int) -> None:
    event = event_at("2026-11-18T05:00+00:00", cost_total=Decimal(cost))
    with Sandbox(SmallWorld(events=[event])) as sandbox, connect(sandbox) as client:
        text = client.get("/models/billing-events", params=ONE_DAY).text
    assert f'"cost_estimate_nano_usd":{nano}}}' in text


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        ("2026-11-18T05:00:00+00:00", "2026-11-18T05:00:00.000000000Z"),
        ("2026-11-18T05:00:00.000250+00:00", "2026-11-18T05:00:00.000250000Z"),
        ("2026-11-18T05:00:00+05:45", "2026-11-17T23:15:00.000000000Z"),
    ],
)
def test_timestamps_of_events_are_in_utc(instant: str, text: str) -> None:
    query = {"start": "2026-11-17", "end": "2026-11-19"}
    with Sandbox(SmallWorld(events=[event_at(instant)])) as sandbox, connect(sandbox) as client:
        assert event_rows(client, query)[0]["timestamp"] == text


@pytest.mark.parametrize("timeframe", ["hour", "day", "week"])
def test_analytics_are_those_of_the_calls_in_each_bucket(client: httpx.Client, timeframe: str) -> None:
    ids = ["fal-ai/flux/dev", "fal-ai/veo3.1", "acme/product-photo", *FAILING]
    query = {"start": "2026-11-09", "end": "2026-11-16", "timeframe": timeframe, "endpoint_id": ids}
    rows = analytics_rows(client, {**query, "expand": ["time_series", "summary", *METRICS]})
    start = datetime(2026, 11, 9, tzinfo=UTC)
    borders = {"hour": HOUR, "day": 24 * HOUR, "week": 7 * 24 * HOUR}
    calls = [one for one in frozen_world().calls(start, start + 7 * 24 * HOUR) if one.endpoint_id in ids]
    expected: dict[tuple[str | None, str], list[Calls]] = {}
    for one in calls:
        bucket = start + (one.hour - start) // borders[timeframe] * borders[timeframe]
        expected.setdefault((bucket.isoformat(), one.endpoint_id), []).append(one)
        expected.setdefault((None, one.endpoint_id), []).append(one)
    assert {(row.get("bucket"), row["endpoint_id"]) for row in rows} == expected.keys()
    assert len(rows) == len(expected)
    for row in rows:
        held = expected[row.get("bucket"), row["endpoint_id"]]
        for name in METRICS:
            if name.startswith("p"):
                assert row.get(name) == percentile(held, name)
            else:
                assert row[name] == sum(getattr(one, name) for one in held)
        assert row["request_count"] == sum(
            row[f"{kind}_count"] for kind in ("success", "user_error", "error")
        )


def percentile(calls: Iterable[Calls], name: str) -> Decimal | None:
    """The least duration that so many percent of all stay at or below, by counting."""
    percent, of = name.removeprefix("p").split("_", 1)
    every = [duration for one in calls for duration in getattr(one, f"{of}s")]
    reached = (d for d in every if 100 * sum(e <= d for e in every) >= int(percent) * len(every))
    return min(reached, default=None)


@pytest.mark.parametrize(
    ("durations", "p25", "p50", "p99"),
    [
        (["0.1"], "0.1", "0.1", "0.1"),
        (["3", "1", "2", "4"], "1", "2", "4"),
        (["1", "1", "1", "0.30000000000000004"], "0.30000000000000004", "1", "1"),
        ([str(n) for n in range(1, 201)], "50", "100", "198"),
    ],
)
def test_percentiles_are_by_nearest_rank(durations: list[str], p25: str, p50: str, p99: str) -> None:
    seconds = tuple(map(Decimal, durations))
    at = datetime(2026, 11, 18, 5, tzinfo=UTC)
    halves = [
        Calls(at, "acme/a", success_count=1, durations=seconds[::2]),
        Calls(at + HOUR, "acme/a", success_count=1, durations=seconds[1::2]),
    ]
    expand = ["summary", "p25_duration", "p50_duration", "p99_duration"]
    with Sandbox(SmallWorld(hours=halves)) as sandbox, connect(sandbox) as client:
        [row] = analytics_rows(client, {**ONE_DAY, "endpoint_id": "acme/a", "expand": expand})
    assert (row["p25_duration"], row["p50_duration"], row["p99_duration"]) == (
        Decimal(p25), Decimal(p50), Decimal(p99),
    )  # fmt: skip


def test_analytics_have_the_asked_metrics_and_no_row_without_requests() -> None:
    at = datetime(2026, 11, 18, 5, tzinfo=UTC)
    hours = [Calls(at, "acme/a"), Calls(at + HOUR, "acme/b", timeout_error_count=2), Calls(at, "acme/b")]
    query = {**EXACT, "endpoint_id": ["acme/a", "acme/b"]}
    with Sandbox(SmallWorld(hours=hours)) as sandbox, connect(sandbox) as client:
        assert analytics_rows(client, query) == [
            {"bucket": "2026-11-18T06:00:00+00:00", "endpoint_id": "acme/b", "request_count": 2}
        ]
        query["expand"] = ["summary", "p50_duration", "error_count", "total_billable_duration"]
        assert analytics_rows(client, query) == [
            {"endpoint_id": "acme/b", "error_count": 2, "total_billable_duration": 0}
        ]


@pytest.mark.parametrize("day", [ONE_DAY, {"start": "2026-11-02", "end": "2026-11-03"}])
def test_what_succeeded_was_charged_and_what_only_fails_was_not(
    client: httpx.Client, day: Query
) -> None:
    whole_day = {**day, "limit": 10_000}
    requests: dict[str, set[str]] = {endpoint_id: set() for endpoint_id in FAILING}
    for event in event_rows(client, whole_day):
        requests.setdefault(event["endpoint_id"], set()).add(event["request_id"])
    expand = ["summary", "success_count", "request_count", "cold_boot_count"]
    query = {**day, "endpoint_id": list(requests), "expand": expand}
    rows = {row["endpoint_id"]: row for row in analytics_rows(client, query)}
    assert {i: row["success_count"] for i, row in rows.items()} == {
        endpoint_id: len(ids) for endpoint_id, ids in requests.items()
    }
    assert all(row["request_count"] > 0 for row in rows.values())
    assert all(row["cold_boot_count"] <= row["success_count"] for row in rows.values())
    models = {model["endpoint_id"] for page in walk(client, "/models", {}) for model in page["models"]}
    assert len(FAILING.keys() & models) == 1


# --- The API as it was ----------------------------------------------------------------------------

EVENT_FIELDS = {
    "request_id", "endpoint_id", "timestamp", "output_units", "unit_price", "percent_discount",
    "cost_estimate_nano_usd", "auth_method",
}  # fmt: skip
USAGE_FIELDS = {
    "bucket",
    "endpoint_id",
    "unit",
    "quantity",
    "unit_price",
    "cost",
    "currency",
    "auth_method",
}
COSTS = {"cost_subtotal", "cost_discount", "cost_total"}
WHO_EXACTLY = {"auth_method_structured"}


@pytest.mark.parametrize(
    ("day", "path", "fields"),
    [
        ("2026-03-18", "/models/usage", USAGE_FIELDS),
        ("2026-06-16", "/models/usage", USAGE_FIELDS | WHO_EXACTLY),
        ("2026-07-20", "/models/usage", USAGE_FIELDS | WHO_EXACTLY),
        ("2026-07-21", "/models/usage", USAGE_FIELDS | WHO_EXACTLY | COSTS | {"percent_discount"}),
        ("2026-03-18", "/models/billing-events", EVENT_FIELDS),
        ("2026-07-03", "/models/billing-events", EVENT_FIELDS | WHO_EXACTLY),
        ("2026-07-29", "/models/billing-events", EVENT_FIELDS | WHO_EXACTLY),
        ("2026-07-30", "/models/billing-events", EVENT_FIELDS | WHO_EXACTLY | COSTS),
        ("2026-08-21", "/models/billing-events", EVENT_FIELDS | WHO_EXACTLY | COSTS),
        (
            "2026-08-22", "/models/billing-events",
            EVENT_FIELDS | WHO_EXACTLY | COSTS | {"unit", "quantity"},
        ),
    ],
)  # fmt: skip
def test_fields_that_came_later_are_left_out(
    client: httpx.Client, day: str, path: str, fields: set[str]
) -> None:
    expand = ["auth_method", *(WHO_EXACTLY & fields)]
    query: Query = {**A_MORNING, "expand": expand}
    rows: Callable[[httpx.Client, Query], list[Row]] = event_rows
    if path == "/models/usage":
        query = {**query, "timeframe": "hour", "expand": ["time_series", *expand]}
        rows = usage_rows
    with Sandbox(frozen_world(), as_of=date.fromisoformat(day)) as sandbox, connect(sandbox) as older:
        found = rows(older, query)
        document = older.get("/openapi.json").json()
        check_against_document(path, older.get(path, params=query), document)
    assert set().union(*found) == fields
    assert [{name: row[name] for name in fields} for row in rows(client, query)] == found


def test_rows_are_not_kept_apart_by_what_is_not_shown() -> None:
    hour = "2026-11-18T05:00+00:00"
    world = SmallWorld([line_at(hour), line_at(hour, percent_discount=Decimal(10))])
    for day, rows in ((date(2026, 7, 20), 1), (date(2026, 7, 21), 2)):
        with Sandbox(world, as_of=day) as sandbox, connect(sandbox) as client:
            found = usage_rows(client, EXACT)
        assert (len(found), sum(row["cost"] for row in found)) == (rows, 2)


FLUX = {"endpoint_id": "fal-ai/flux/dev"}


@pytest.mark.parametrize(
    ("path", "query", "since"),
    [
        ("/models", {"sort": "recent"}, None),
        ("/models/usage", {"api_key_id": "x"}, "2026-06-16"),
        ("/models/usage", {"login_username": "x"}, "2026-06-16"),
        ("/models/usage", {"expand": WHO}, "2026-06-16"),
        ("/models/usage", {"source": "estimate"}, "2026-08-22"),
        ("/models/billing-events", {"limit": 101}, "2026-05-08"),
        ("/models/billing-events", {"api_key_id": "x"}, "2026-07-03"),
        ("/models/billing-events", {"expand": AUTH}, "2026-07-03"),
        ("/models/billing-events", {"source": "billed"}, "2026-08-22"),
        ("/models/analytics", {**FLUX, "expand": "summary,p99_duration"}, "2026-06-01"),
        ("/models/analytics", {**FLUX, "expand": "summary,timeout_error_count"}, "2026-06-01"),
        ("/models/analytics", {**FLUX, "expand": "summary,p50_duration"}, "2026-01-01"),
    ],
)
def test_what_came_later_is_refused_before(path: str, query: Query, since: str | None) -> None:
    first = date.fromisoformat(since or "2026-08-22")
    for day in (first - timedelta(days=1), first):
        with Sandbox(frozen_world(), as_of=day) as sandbox, connect(sandbox) as client:
            response = client.get(path, params=query)
            document = client.get("/openapi.json").json()
        is_known = since == "2026-01-01" or (since is not None and day == first)
        assert response.status_code == (200 if is_known else 400), response.text
        check_against_document(path, response, document)


@pytest.mark.parametrize(
    ("as_of", "end", "status"),
    [
        (None, "2026-11-18", 200),
        (None, "2026-11-18T00:00:00.000001Z", 400),
        (date(2026, 5, 8), "2026-11-19", 400),
        (date(2026, 5, 7), "2026-12-31", 200),
    ],
)
def test_events_of_ninety_days_at_most_since_may(as_of: date | None, end: str, status: int) -> None:
    query = {"start": "2026-08-20", "end": end}
    with Sandbox(SmallWorld(), as_of=as_of) as sandbox, connect(sandbox) as client:
        assert client.get("/models/billing-events", params=query).status_code == status


# --- Late and restated ----------------------------------------------------------------------------

TEN_DAYS = [datetime(2026, 11, 1, tzinfo=UTC) + n * HOUR for n in range(240)]


def shown_after(age: timedelta) -> dict[tuple[Any, ...], UsageLine]:
    """The lines of ten days, each hour as it is shown so long after it began."""
    clock = [NOW]
    world = invented_world(now=lambda: clock[0], late=True)
    lines: list[UsageLine] = []
    for hour in TEN_DAYS:
        clock[0] = hour + age
        lines += world.usage(hour, hour + HOUR)
    return {(one.hour, one.endpoint_id, one.unit, one.unit_price, one.credential): one for one in lines}


def test_a_few_lines_come_late_are_restated_or_taken_back() -> None:
    first, settled = shown_after(HOUR), shown_after(73 * HOUR)
    assert shown_after(timedelta(days=100)) == settled
    both = first.keys() & settled.keys()
    restated = {key for key in both if first[key] != settled[key]}
    assert 0.005 < len(settled.keys() - first.keys()) / len(settled) < 0.015
    assert 0.003 < len(restated) / len(settled) < 0.007
    assert 0 < len(first.keys() - settled.keys()) / len(settled) < 0.003
    before, after = shown_after(48 * HOUR - timedelta.resolution), shown_after(48 * HOUR)
    assert all(before[key] == first[key] != after[key] == settled[key] for key in restated)
    assert all(settled[key].quantity != first[key].quantity for key in restated)


def test_at_any_instant_usage_its_summary_and_events_agree() -> None:
    clock = [NOW]
    span = {"start": "2026-11-16", "end": "2026-11-20"}
    query = {**span, "timeframe": "hour"}
    seen = []
    world = invented_world(now=lambda: clock[0], late=True)
    with Sandbox(world) as sandbox, connect(sandbox) as client:
        for _ in range(3):
            series = usage_rows(client, query)
            assert totals(usage_rows(client, {**query, "expand": "summary"})) == totals(series)
            events = event_rows(client, {**span, "limit": 10_000})
            check_they_agree(events, series, "endpoint_id")
            seen.append(totals(series))
            clock[0] += 12 * HOUR
        clock[0] = NOW
        assert totals(usage_rows(client, query)) == seen[0]
    assert seen[0] != seen[1] != seen[2]


def test_late_worlds_differ_by_seed_only() -> None:
    def amounts(seed: int) -> list[Decimal]:
        lines = frozen_world(seed=seed, late=True).usage(TEN_DAYS[0], NOW)
        return [one.cost_total for one in lines]

    assert amounts(7) == amounts(7) != amounts(8)


def test_nothing_was_used_before_the_team_was_founded(client: httpx.Client) -> None:
    ever = {
        "start": "0001-01-01",
        "end": "2025-01-01T01:00:00Z",
        "timeframe": "hour",
        "expand": "summary",
    }
    first_hour = {**ever, "start": FOUNDED.isoformat()}
    assert totals(usage_rows(client, ever)) == totals(usage_rows(client, first_hour)) != {}


# --- What fal may do to an account ----------------------------------------------------------------


@dataclass
class Moving:
    """A small world with a clock of its own, and one line and one charge in each hour of ten days."""

    small: SmallWorld
    at: datetime = NOW

    def now(self) -> datetime:
        return self.at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.small, name)


def ten_days() -> Moving:
    hours = [(NOW - timedelta(days=10)).replace(minute=0) + n * HOUR for n in range(10 * 24)]
    return Moving(
        SmallWorld(
            lines=[line_at(hour.isoformat()) for hour in hours],
            events=[event_at(hour.isoformat()) for hour in hours],
            hours=[Calls(hour, "acme/a", 1) for hour in hours],
        )
    )


def first_hours(client: httpx.Client) -> list[str | None]:
    """The first hour that has usage, charges and requests, as far as the total says the same."""
    query = {"start": "2026-11-01", "end": "2026-12-01", "timeframe": "hour"}
    series, summary = (
        usage_rows(client, {**query, "expand": part}) for part in ("time_series", "summary")
    )
    assert totals(series) == totals(summary)
    events = event_rows(client, {"start": "2026-11-01", "end": "2026-12-01"})
    requests = analytics_rows(client, {**query, "endpoint_id": "acme/a"})
    return [
        min((row["bucket"][:13] for row in series), default=None),
        min((row["timestamp"][:13] for row in events), default=None),
        min((row["bucket"][:13] for row in requests), default=None),
    ]


def test_days_that_are_older_than_what_is_kept_are_no_longer_served() -> None:
    world = ten_days()
    with (
        Sandbox(world, conduct=Conduct(retention_days=5)) as sandbox,
        connect(sandbox) as client,
    ):
        assert first_hours(client) == ["2026-11-15T00"] * 3
        world.at += timedelta(days=2)
        assert first_hours(client) == ["2026-11-17T00"] * 3
        world.at += timedelta(days=20)
        assert first_hours(client) == [None] * 3


def test_in_a_brown_out_no_day_that_has_ended_is_there() -> None:
    world = ten_days()
    conduct = Conduct(brown_outs=[(NOW, NOW + HOUR)])
    with Sandbox(world, conduct=conduct) as sandbox, connect(sandbox) as client:
        seen = []
        for instant in (NOW - timedelta.resolution, NOW, NOW + HOUR):
            world.at = instant
            seen.append(first_hours(client))
    assert seen == [["2026-11-10T12"] * 3, ["2026-11-20T00"] * 3, ["2026-11-10T12"] * 3]


def test_an_account_is_refused_for_a_while_and_renamed() -> None:
    world = ten_days()
    conduct = Conduct(
        account_refused=[(NOW + HOUR, NOW + 2 * HOUR)],
        renamed=[(NOW + 5 * HOUR, "third"), (NOW + 3 * HOUR, "second")],
    )
    told = []
    with Sandbox(world, conduct=conduct) as sandbox, connect(sandbox) as client:
        for hours in range(7):
            world.at = NOW + hours * HOUR
            response = client.get("/account/billing")
            check_against_document("/account/billing", response)
            told.append(response.json().get("username"))
            assert usage_rows(client, EXACT)  # asked with the same key
    assert told == ["small", None, "small", "second", "second", "third", "third"]


# --- Faults -----------------------------------------------------------------------------------------


def once(fault: Fault) -> Iterator[Fault | None]:
    yield fault
    while True:
        yield None


@pytest.mark.parametrize(
    ("fault", "status", "body"),
    [
        (Fault(status=503, headers={"Retry-After": "1"}), 503, None),
        (Fault(status=429), 429, None),
        (Fault(body=b"<html>", headers={"content-type": "text/html"}), 200, b"<html>"),
        (Fault(status=204, body=b""), 204, b""),
        (Fault(body=b"{}", headers={"Content-Length": ""}), 200, b"{}"),
    ],
)
def test_a_fault_replaces_one_answer(fault: Fault, status: int, body: bytes | None) -> None:
    faults = once(fault)
    running = Sandbox(frozen_world(), fault=lambda _: next(faults))
    with running as sandbox, connect(sandbox) as client:
        broken = client.get("/models")
        assert client.get("/models").status_code == 200
    assert broken.status_code == sandbox.requests[0].status == status
    if body is None:
        check_against_document("", broken)
    else:
        assert broken.content == body
    for name, value in fault.headers.items():
        assert broken.headers.get(name, "") == value


@pytest.mark.parametrize("fault", [Fault(truncate_to=100), Fault(truncate_to=0), Fault(drop=True)])
def test_a_fault_breaks_the_connection(fault: Fault) -> None:
    faults = once(fault)
    running = Sandbox(frozen_world(), fault=lambda _: next(faults))
    with running as sandbox, connect(sandbox) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/models")
        assert client.get("/models").status_code == 200
    assert [request.status for request in sandbox.requests] == [0 if fault.drop else 200, 200]


def test_the_fault_hook_and_the_log_see_what_was_asked() -> None:
    seen: list[Request] = []

    def hook(request: Request) -> None:
        assert request.status == 0
        seen.append(request)

    with Sandbox(frozen_world(), fault=hook) as sandbox, connect(sandbox) as client:
        response = client.get("/models/pricing", params={"endpoint_id": ["a", "b,c"]})
    assert seen == sandbox.requests
    [request] = seen
    assert (request.method, request.path, request.status) == ("GET", "/models/pricing", 404)
    assert request.query == {"endpoint_id": ["a", "b,c"]}
    assert request.headers["authorization"] == f"Key {FULL_KEY}"
    assert request.request_id == response.headers["x-fal-request-id"]


def test_stopping_ends_kept_alive_connections_too() -> None:
    with Sandbox(frozen_world()) as sandbox:
        client = connect(sandbox)
        assert client.get("/models", params={"limit": 1}).status_code == 200
    with pytest.raises(httpx.TransportError):
        client.get("/models")
    client.close()
