"""The sandbox over real HTTP: it answers as fal's document says, and breaks only where told to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

import faletl.sandbox
from faletl.sandbox import (
    BILLING_KEY,
    DEFAULT_KEYS,
    FULL_KEY,
    READONLY_KEY,
    Credential,
    Fault,
    Request,
    Sandbox,
    UsageLine,
    World,
    invented_world,
)
from faletl.sandbox.world import lines_of_hour

DOCUMENT = json.loads(Path(faletl.sandbox.__file__).with_name("openapi.json").read_bytes())
REGISTRY: Registry[Any] = Registry().with_resource("urn:fal", Resource.opaque(DOCUMENT))
NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
ONE_DAY = {"start": "2026-11-18", "end": "2026-11-19"}
EXACT = {**ONE_DAY, "timeframe": "hour", "timezone": "UTC", "bound_to_timeframe": "false"}
TIMEFRAMES = ("minute", "hour", "day", "week", "month")
WHO = ["time_series", "auth_method", "auth_method_structured"]
AMOUNTS = ("quantity", "cost_subtotal", "cost_discount", "cost_total", "cost")
NAMES = ("endpoint_id", "unit", "unit_price", "percent_discount", "currency")

Query = dict[str, Any]
Row = dict[str, Any]


@dataclass
class SmallWorld:
    """A world whose lines a test chooses."""

    lines: list[UsageLine] = field(default_factory=list)
    account: str = "small"

    def models(self) -> list[dict[str, Any]]:
        return [{"endpoint_id": "acme/a"}]

    def prices(self) -> dict[str, dict[str, Any]]:
        return {}

    def usage(self, start: datetime, end: datetime) -> Iterable[UsageLine]:
        return [line for line in self.lines if start <= line.hour < end]

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


def usage_rows(client: httpx.Client, query: Query) -> list[Row]:
    """The rows of a usage report; those of the time series with their bucket."""
    pages = walk(client, "/models/usage", query)
    series = [bucket for page in pages for bucket in page.get("time_series", [])]
    rows = [{"bucket": b["bucket"], **row} for b in series for row in b["results"]]
    return rows + [row for page in pages for row in page.get("summary", [])]


def totals(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Decimal]]:
    """The sums of every amount per line of the bill."""
    sums: dict[tuple[Any, ...], list[Decimal]] = {}
    for row in rows:
        key = tuple(row[name] for name in NAMES)
        before = sums.get(key, [Decimal(0)] * len(AMOUNTS))
        sums[key] = [a + row[name] for a, name in zip(before, AMOUNTS, strict=True)]
    return sums


def check_against_document(path: str, response: httpx.Response) -> None:
    operation = DOCUMENT["paths"].get(path, {}).get("get", {"responses": {}})
    pointer = "#/components/schemas/Error"
    if response.status_code == 200:
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        pointer = schema["$ref"]
    elif operation["responses"]:
        assert str(response.status_code) in operation["responses"]
    validator = Draft202012Validator({"$ref": f"urn:fal{pointer}"}, registry=REGISTRY)
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
def test_only_get_is_offered(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/models", content=None if method == "HEAD" else b"{}")
    assert response.status_code == 405
    assert (response.content == b"") == (method == "HEAD")
    assert client.get("/models", params={"limit": 1}).status_code == 200


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
    ("path", "query", "rows"),
    [
        ("/models", {"q": "image"}, "models"),
        ("/models/usage", {**ONE_DAY, "timeframe": "day", "expand": "time_series,summary"}, None),
        ("/models/usage", {**EXACT, "expand": WHO, "api_key_id": "sandbox-key-2"}, None),
    ],
)
def test_page_size_does_not_change_the_rows(
    client: httpx.Client, path: str, query: Query, rows: str | None, size: int
) -> None:
    def all_rows(client: httpx.Client, query: Query) -> list[Row]:
        if rows is None:
            return usage_rows(client, query)
        return [row for page in walk(client, path, query) for row in page[rows]]

    whole = all_rows(client, query)
    assert whole
    assert all_rows(client, {**query, "limit": size}) == whole
    with Sandbox(frozen_world(), page_size=size) as small, connect(small) as other:
        assert all_rows(other, {**query, "limit": size + 1000}) == whole
        pages = -(-len(whole) // size)
        assert len(small.requests) == pages


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
def test_summary_is_the_exact_sum_of_the_time_series(client: httpx.Client, timeframe: str) -> None:
    query = {"start": "2026-10-30", "end": "2026-11-04", "timeframe": timeframe}
    query |= {"bound_to_timeframe": "false"}
    series = usage_rows(client, {**query, "expand": WHO})
    summary = usage_rows(client, {**query, "expand": "summary"})
    assert totals(summary) == totals(series)
    assert len(summary) == len(totals(summary))
    for row in series + summary:
        assert row["cost_subtotal"] == row["quantity"] * row["unit_price"]
        assert row["cost_discount"] == row["cost_subtotal"] * (row["percent_discount"] or 0) / 100
        assert row["cost_total"] == row["cost"] == row["cost_subtotal"] - row["cost_discount"]
        assert all(-row[name].as_tuple().exponent <= 9 for name in AMOUNTS)


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
    line = line_at("2026-11-18T05:00+00:00", quantity=Decimal(half), unit_price=Decimal("1E-7"))
    with Sandbox(SmallWorld([line, line])) as sandbox, connect(sandbox) as client:
        text = client.get("/models/usage", params=EXACT).text
        balance = client.get("/account/billing", params={"expand": "credits"}).text
    assert f'"quantity":{whole},' in text
    assert '"unit_price":0.0000001,' in text
    assert '"current_balance":0.000000001,' in balance


def test_a_world_may_change_between_requests() -> None:
    world = SmallWorld()
    with Sandbox(world) as sandbox, connect(sandbox) as client:
        assert usage_rows(client, EXACT) == []
        world.lines.append(line_at("2026-11-18T05:00+00:00"))
        assert len(usage_rows(client, EXACT)) == 1


def test_the_same_hour_has_the_same_lines_however_it_is_asked() -> None:
    start, end = datetime(2026, 11, 17, tzinfo=UTC), datetime(2026, 11, 19, tzinfo=UTC)
    whole = list(frozen_world().usage(start, end))
    lines_of_hour.cache_clear()
    later = invented_world(now=lambda: NOW + timedelta(days=400))
    hours = [start + n * HOUR for n in reversed(range(48))]
    pieces = [list(later.usage(hour, hour + HOUR)) for hour in hours]
    assert [line for piece in reversed(pieces) for line in piece] == whole
    assert list(frozen_world(seed=8).usage(start, end)) != whole
    # Pinned, so that the demo's figures change on purpose only.
    assert sum(line.cost_total for line in whole) == Decimal("682.3877587")


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
    for line in lines:
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
    assert sum(len(billed) == 2 for billed in units.values()) == 1
    assert sum(units[i] != {p["unit"]} for i, p in prices.items() if i in units) > 3
    assert len({line.credential for line in lines}) == 4
    assert {line.percent_discount for line in lines} == {None, Decimal(10)}
    assert len(models.keys() - prices.keys()) > 2
    assert not prices.keys() - models.keys()
    facts = [model.get("metadata") for model in models.values()]
    assert Counter(f and f["status"] for f in facts).keys() == {None, "active", "deprecated"}


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
    assert levels[0] - levels[24] == spent


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
