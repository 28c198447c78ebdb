"""Walks and landing over HTTP: where pages end, what is taken up again, what lies on the disk."""

from __future__ import annotations

import json
import logging
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import time_machine
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import (
    ApiUnavailableError,
    ContractError,
    CursorRefusedError,
    FaletlError,
    KeyRefusedError,
    TamperedError,
)
from faletl.fal import client as client_module
from faletl.fal.client import FalClient
from faletl.fal.pages import MAX_EMPTY_PAGES, MAX_RECORDS, read_envelope, walk
from faletl.landing import extracts
from faletl.landing.extracts import Receipt, SealedExtract
from faletl.line.accounts import look_up
from faletl.line.fetch import Retry, RunContext, fetch_window
from faletl.redaction import REDACTED
from faletl.resources import BILLING_EVENTS, CREDITS, MODELS, PRICES, USAGE, Resource
from faletl.sandbox import BILLING_KEY, FULL_KEY, Fault, Request, Sandbox
from faletl.sandbox.server import answer
from faletl.selection import Asked
from faletl.staging.window import stage_window
from faletl.windows import Window
from faletl.wire import MalformedBodyError
from tests import truth
from tests.conftest import ask, settings_for
from tests.leaks import everything_in

DAY = Window.of_day(truth.day(21))
SNAPSHOT = Window.snapshot(truth.NOW)
BOM = b"\xef\xbb\xbf"

few_requests = settings(max_examples=30)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "TRIES", 2)


def fetch(
    given: Settings,
    resource: Resource = MODELS,
    window: Window = SNAPSHOT,
    *,
    account: str = "acme",
    ids: Sequence[str] = (),
    retry: Retry | None = None,
    client: FalClient | None = None,
) -> SealedExtract:
    """One window, by a client of its own unless one is given."""
    origin = RunContext(account, "run", datetime.now(UTC), 1, planned_from={}, unknown_ids={})
    with nullcontext(client) if client else FalClient(given) as asking:
        return fetch_window(asking, given, resource, window, origin=origin, ids=ids, retry=retry)


def again_of(landed: SealedExtract) -> Retry:
    """Ask for all of it once more, beside the rows of that extract."""
    return Retry(landed, compared=landed.manifest.parts)


def page(
    rows: Sequence[Any] = (), cursor: str | None = None, *, name: str = "models", **more: Any
) -> bytes:
    """A body as fal writes it; `more` adds fields, or replaces them, or leaves them out (`...`)."""
    body = {name: list(rows), "next_cursor": cursor, "has_more": cursor is not None, **more}
    return json.dumps({key: value for key, value in body.items() if value is not ...}).encode()


def bodies(landed: SealedExtract, label: str = "rows") -> list[bytes]:
    return [landed.body(one) for one in landed.manifest.pages(label)]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@dataclass
class Script:
    """Serves one body per cursor, and remembers the cursors that were asked for."""

    pages: dict[str | None, bytes] = field(default_factory=dict)
    asked: list[str | None] = field(default_factory=list)

    def __call__(self, request: Request) -> Fault:
        cursor = request.query.get("cursor", [None])[0]
        self.asked.append(cursor)
        return Fault(body=self.pages.get(cursor, b"no such cursor"))


@pytest.fixture(scope="module")
def scripted() -> Iterator[Sandbox]:
    """One server for the many examples of a property; each sets its own `fault`."""
    with Sandbox(truth.Account()) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def client(scripted: Sandbox) -> Iterator[FalClient]:
    """A client for that server; to make one takes longer than to ask it."""
    with FalClient(settings_for(scripted.url, Path())) as client:
        yield client


# --- Where a walk ends ----------------------------------------------------------------------------


@few_requests
@given(cursors=st.lists(st.text(max_size=40), max_size=6, unique=True))
@example(cursors=[""])
@example(cursors=["+/=", "a+b c&d=e#f?g", "%2B", "%", "%00", "%zz"])
@example(cursors=["https://example.com/?cursor=2#x", "//example.com", "../../etc/passwd", "?", "#"])
@example(cursors=["null", "None", "0", " ", "\t", "\r\nX-Evil: 1", "\N{NO-BREAK SPACE}"])
@example(cursors=["\N{ZERO WIDTH SPACE}", "é", "e\N{COMBINING ACUTE ACCENT}", "🂡", "c" * 2000])
@example(cursors=[" leading", "trailing ", "UPPER", "upper"])
def test_any_cursor_comes_back_as_it_was_and_only_its_absence_ends_the_walk(
    scripted: Sandbox, client: FalClient, cursors: list[str]
) -> None:
    cursors = [cursor.replace("\0", "") for cursor in cursors]
    cursors = list(dict.fromkeys(cursors))
    served = {
        asked: page([{"endpoint_id": str(number)}], following)
        for number, (asked, following) in enumerate(zip([None, *cursors], [*cursors, None], strict=True))
    }
    scripted.fault = script = Script(served)
    with TemporaryDirectory() as folder:
        landed = fetch(settings_for(scripted.url, Path(folder)), client=client)
        assert bodies(landed) == list(served.values())
        assert {path.name for path in Path(folder).iterdir()} == {"landing"}
    assert script.asked == [None, *cursors]


@few_requests
@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=8))
@example(sizes=[0])
@example(sizes=[0, 0, 1, 0, 0, 2, 0])
def test_empty_pages_are_walked_over(scripted: Sandbox, client: FalClient, sizes: list[int]) -> None:
    names = [None, *(f"c{number}" for number in range(1, len(sizes)))]
    served = {
        asked: page([{"endpoint_id": str(number)} for number in range(size)], following)
        for size, asked, following in zip(sizes, names, [*names[1:], None], strict=True)
    }
    scripted.fault = Script(served)
    with TemporaryDirectory() as folder:
        landed = fetch(settings_for(scripted.url, Path(folder)), client=client)
        assert [one.rows for one in landed.manifest.pages("rows")] == sizes
        assert len(landed.manifest.calls) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("lead", [0, 2])
def test_a_cycle_of_cursors_is_refused_within_one_round(length: int, lead: int, tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(lead + length)]
    following = dict(zip([None, *names], [*names, names[lead]], strict=True))
    script = Script({asked: page(cursor=cursor) for asked, cursor in following.items()})
    with Sandbox(truth.Account(), fault=script) as sandbox:
        with pytest.raises(ContractError, match="same cursor") as caught:
            fetch(settings_for(sandbox.url, tmp_path))
        assert len(script.asked) == lead + length + 1
        last = sandbox.requests[-1].request_id
    told = str(caught.value)
    assert told.startswith(f"models, window {SNAPSHOT}, page {lead + length + 1}: ")
    assert told.endswith(f"(fal request {last})")
    assert list(extracts.complete_reads(settings_for(sandbox.url, tmp_path))) == []


def test_endless_new_cursors_come_to_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("faletl.fal.pages.MAX_PAGES", 7)
    with Sandbox(truth.Account(), fault=lambda r: Fault(body=page(cursor=r.request_id))) as sandbox:
        with pytest.raises(ContractError, match="more than 7 pages") as caught:
            fetch(settings_for(sandbox.url, tmp_path))
        assert len(sandbox.requests) == caught.value.facts["page"] == 7


def test_a_walk_of_more_bytes_than_can_be_meant_comes_to_an_end_and_leaves_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = page(cursor="c" * 1000)
    monkeypatch.setattr("faletl.fal.pages.MAX_BYTES", 2 * len(body))
    endless = Script({cursor: page(cursor=str(n) * 1000) for n, cursor in enumerate([None, "0" * 1000])})
    endless.pages["1" * 1000] = body
    with Sandbox(truth.Account(), fault=endless) as sandbox:
        with pytest.raises(ContractError, match="and announced more") as caught:
            fetch(settings_for(sandbox.url, tmp_path))
        assert len(sandbox.requests) == caught.value.facts["page"] == 3
    assert list(tmp_path.rglob("*.zst")) == []


@pytest.mark.parametrize(
    ("cursor", "more", "said"),
    [
        (None, {"has_more": True}, "gave no cursor"),
        (None, {"has_more": True, "next_cursor": ...}, "gave no cursor"),
        ("c", {"has_more": False}, "but a cursor"),
        ("c", {"has_more": "yes"}, "has_more"),
        (None, {"next_cursor": 2}, "next_cursor"),
        (None, {"next_cursor": {"after": "c"}}, "next_cursor"),
    ],
)
def test_a_cursor_and_has_more_that_disagree_are_refused_at_once(
    cursor: str | None, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    script = Script({None: page([{"endpoint_id": "a"}], cursor, **more)})
    with Sandbox(truth.Account(), fault=script) as sandbox:
        with pytest.raises(ContractError, match=said) as caught:
            fetch(settings_for(sandbox.url, tmp_path))
        assert script.asked == [None]
        assert caught.value.facts["request_id"] == sandbox.requests[0].request_id
    assert caught.value.facts["page"] == 1


def test_a_hundred_empty_pages_in_a_row_end_a_walk_that_would_never_end(tmp_path: Path) -> None:
    with Sandbox(truth.Account(), fault=lambda r: Fault(body=page(cursor=r.request_id))) as sandbox:
        with pytest.raises(ContractError, match="100 empty pages in a row") as caught:
            fetch(settings_for(sandbox.url, tmp_path))
        assert len(sandbox.requests) == caught.value.facts["page"] == MAX_EMPTY_PAGES
    assert list(tmp_path.rglob("*.zst")) == []


@pytest.mark.parametrize("at", [0, 1, 98, 99])
def test_fewer_empty_pages_in_a_row_are_walked_over(
    at: int, scripted: Sandbox, client: FalClient
) -> None:
    """Two times ninety-nine of them, but for a row among each."""
    names = [None, *(f"c{number}" for number in range(1, 199))]
    pages = {
        name: page([{"endpoint_id": "a"}] if number in (at, at + 99) else [], following)
        for number, (name, following) in enumerate(zip(names, [*names[1:], None], strict=True))
    }
    scripted.fault = script = Script(pages)
    walked = list(walk(client, "/models", {}, ("models",), iter(()), metrics=False))
    assert (len(walked), len(script.asked)) == (199, 199)


@pytest.mark.parametrize("has_more", [False, None, ...])
def test_an_empty_cursor_ends_a_walk_unless_more_is_announced(has_more: Any, tmp_path: Path) -> None:
    served = {None: page([{}], "c"), "c": page([{}], "", has_more=has_more), "": page([{}])}
    script = Script(served)
    with Sandbox(truth.Account(), fault=script) as sandbox:
        assert len(bodies(fetch(settings_for(sandbox.url, tmp_path)))) == 2
        served["c"] = page([{}], "", has_more=True)
        assert len(bodies(fetch(settings_for(sandbox.url, tmp_path)))) == 3
    assert script.asked == [None, "c", None, "c", ""]


def test_an_empty_cursor_is_noted_and_warned_about_once(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = b'"next_cursor": "" , "has_more": false}'

    def end_so(request: Request) -> Fault | None:
        if request.path != "/models/usage":
            return None
        return Fault(
            body=answer(sandbox, request).replace(b'"next_cursor":null,"has_more":false}', last)
        )

    with Sandbox(truth.two_days(), fault=end_so) as sandbox:
        mine = settings_for(sandbox.url, tmp_path)
        assert pipeline.run(mine, Asked(truth.day(21), truth.day(23), ["usage"])).exit_code == 0
        assert pipeline.run(mine, Asked(truth.day(21), truth.day(23), ["usage"])).exit_code == 0
    noted = "select field, kind, sample from ops.contract_drift where resource = 'usage'"
    assert ask(mine, noted) == [("$.next_cursor", "retyped", '""')]
    assert caplog.text.count("$.next_cursor with another type") == 1


@pytest.mark.parametrize("has_more", [..., None])
def test_without_has_more_the_cursor_decides_and_a_warning_says_so(
    has_more: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script({None: page(cursor="c", has_more=has_more), "c": page(has_more=has_more)})
    with Sandbox(truth.Account(), fault=script) as sandbox:
        fetch(settings_for(sandbox.url, tmp_path))
    assert script.asked == [None, "c"]
    assert "has_more" in caplog.text


# --- What a page must be --------------------------------------------------------------------------

ENVELOPE = b'"next_cursor":null,"has_more":false}'


@pytest.mark.parametrize(
    ("resource", "body"),
    [
        (MODELS, b'{"error":{"type":"server_error","message":"sorry"}}'),
        (MODELS, b"{}"),
        (MODELS, b"[]"),
        (MODELS, b"null"),
        (MODELS, b'"models"'),
        (MODELS, b"{" + ENVELOPE),
        (MODELS, b'{"models":null,' + ENVELOPE),
        (MODELS, b'{"models":{},' + ENVELOPE),
        (MODELS, b'{"models":"",' + ENVELOPE),
        (MODELS, b'{"Models":[],' + ENVELOPE),
        (USAGE, b'{"time_series":{},' + ENVELOPE),
        (USAGE, b'{"time_series":[1],' + ENVELOPE),
        (USAGE, b'{"time_series":[{"bucket":"x"}],' + ENVELOPE),
        (USAGE, b'{"time_series":[{"bucket":"x","results":null}],' + ENVELOPE),
        (USAGE, b'{"summary":[],' + ENVELOPE),
        (CREDITS, b"[]"),
    ],
)
def test_another_document_than_was_asked_for_is_refused_at_once(
    resource: Resource, body: bytes, tmp_path: Path
) -> None:
    with Sandbox(truth.Account(), fault=lambda _: Fault(body=body)) as sandbox:
        given = settings_for(sandbox.url, tmp_path)
        window = DAY if resource is USAGE else SNAPSHOT
        with pytest.raises(ContractError) as caught:
            fetch(given, resource, window)
        assert len(sandbox.requests) == 1
    assert caught.value.facts["resource"] == resource.name
    assert caught.value.exit_code == 3
    assert list(map(extracts.open_read, extracts.complete_reads(given))) == []


def test_a_page_is_counted_by_its_records() -> None:
    buckets = b'{"results":[{},{},{}]},{"results":[]},{"results":[{}]}'
    nested = b'{"time_series":[%b],"has_more":false}' % buckets
    assert read_envelope(nested, USAGE.rows_path) == (4, None)
    assert read_envelope(page([{}, {}], "c"), ("models",)) == (2, "c")
    assert read_envelope(b"{}", CREDITS.rows_path) == (1, None)
    backslash = page([{"endpoint_id": "\\u0000"}])  # no NUL, but the text of one
    assert read_envelope(backslash, ("models",)) == (1, None)
    with pytest.raises(ContractError, match="fal's answer contains a NUL"):
        read_envelope(page([{"endpoint_id": "\\\0"}]), ("models",))
    with pytest.raises(MalformedBodyError, match="is not a complete JSON document"):
        read_envelope(nested[:-1], USAGE.rows_path)


CROWDS: dict[str, Callable[[int], bytes]] = {
    "zeros": lambda n: b'{"time_series":[{"results":[' + b"0," * (n - 1) + b"0]}]}",
    "objects": lambda n: b'{"time_series":[{"results":[' + b"{} , " * (n - 1) + b"{}]}]}",
    "texts with marks": lambda n: b'{"time_series":[{"results":[' + rb'"\",[{",' * (n - 1) + b'""]}]}',
    "buckets": lambda n: b'{"time_series":[' + b'{"results":[]},' * (n - 1) + b'{"results":[]}]}',
    "one in each bucket": lambda n: b'{"time_series":[' + b'{"results":[1]},' * (n - 1)
    + b'{"results":[1]}]}',
}  # fmt: skip


@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS)
def test_a_page_of_more_records_than_can_be_meant_is_refused_before_it_is_split(
    crowd: Callable[[int], bytes],
) -> None:
    assert read_envelope(crowd(MAX_RECORDS), USAGE.rows_path)[0] in (0, MAX_RECORDS)
    for count in (MAX_RECORDS + 1, 3 * MAX_RECORDS, 10 * MAX_RECORDS):
        with pytest.raises(ContractError, match="more than 100,000 records on one page"):
            read_envelope(crowd(count), USAGE.rows_path)


def test_a_page_of_many_records_is_refused_in_little_memory() -> None:
    body = CROWDS["zeros"](5_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(ContractError, match="100,000 records"):
            read_envelope(body, USAGE.rows_path)
        with pytest.raises(ContractError, match="100,000 records"):
            read_envelope(body, CREDITS.rows_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body)


def test_a_page_of_as_many_records_as_can_be_meant_is_taken_however_many_fields_they_have() -> None:
    """It has a million commas and more, so it is counted first."""
    record = {f"a{n}": f'x,[{{"{n}' for n in range(10)} | {"tags": [1, 2]}
    many = page([record] * 50_000)
    assert many.count(b",") > 1_000_000
    assert read_envelope(many, ("models",)) == (50_000, None)


@pytest.mark.parametrize("landed", [b'{"models":[', page(has_more=True)])
def test_a_landed_page_that_cannot_be_one_is_asked_for_again(
    landed: bytes, scripted: Sandbox, client: FalClient
) -> None:
    scripted.fault = script = Script({None: page(cursor="c"), "c": page([{}])})
    first = page([{}, {}], cursor="c")
    walked = walk(client, "/models", {}, ("models",), iter([first, landed, first]), metrics=False)
    assert [(one.number, one.rows, is_new) for one, is_new in walked] == [(1, 2, False), (2, 1, True)]
    assert script.asked == ["c"]


@pytest.mark.parametrize(
    ("body", "requests"),
    [
        pytest.param(page() + b"x", 2, id="garbage behind"),
        pytest.param(page() + page(), 2, id="two documents"),
        pytest.param(page()[:-1], 2, id="cut"),
        pytest.param(BOM + BOM + page(), 2, id="two byte order marks"),
        pytest.param(page().decode().encode("utf-16"), 2, id="UTF-16"),
        pytest.param(b'{"models":[' + b"[" * 200_000 + b"]" * 200_000 + b"]," + ENVELOPE, 2, id="deep"),
        pytest.param(b'{"a":' * 200_000, 2, id="deep objects"),
        pytest.param(b'{"models":[{"endpoint_id":"a\0"}],' + ENVELOPE, 2, id="raw NUL"),
        pytest.param(b'{"models":[{"endpoint_id":"\\ud800"}],' + ENVELOPE, 2, id="surrogate"),
        pytest.param(page(next_cursor="\ud800", has_more=True), 2, id="surrogate cursor"),
        pytest.param(b'{"models":[],"next_cursor":"\xff","has_more":true}', 2, id="bad UTF-8 cursor"),
        pytest.param(page([{"endpoint_id": "a\0"}]), 1, id="NUL"),
        pytest.param(page(cursor="\0"), 1, id="NUL cursor"),
        pytest.param(b'{"models":[{"endpoint_id":"\xff"}],' + ENVELOPE, 1, id="bad UTF-8"),
        pytest.param(b'{"models":[{"endpoint_id":"\xc0\x80"}],' + ENVELOPE, 1, id="overlong UTF-8"),
        pytest.param(b'{"models":[{"endpoint_id":"a","new":1,"\xff":1}],' + ENVELOPE, 1, id="both"),
        pytest.param(b'{"models":[],"has_more":true,' + ENVELOPE, 1, id="has_more twice"),
        pytest.param(b'{"models":[{"endpoint_id":"\xed\xa0\x80"}],' + ENVELOPE, 1, id="raw surrogate"),
        pytest.param(b'{"models":[{"endpoint_id":"a","\xff":1}],' + ENVELOPE, 1, id="bad UTF-8 name"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_kept_is_a_typed_error_before_it_is_a_row(
    body: bytes, requests: int, tmp_path: Path
) -> None:
    with Sandbox(truth.Account(), fault=lambda _: Fault(body=body)) as sandbox:
        given = settings_for(sandbox.url, tmp_path)
        with pytest.raises(FaletlError) as caught:
            stage_window(given, fetch(given), tmp_path)
        assert len(sandbox.requests) == requests
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("before", [b"", BOM, b" \r\n\t", BOM + b" "])
@pytest.mark.parametrize("after", [b"", b"\n"])
def test_a_byte_order_mark_and_blanks_around_a_document_are_taken(
    before: bytes, after: bytes, tmp_path: Path
) -> None:
    body = before + page([{"endpoint_id": "a"}]) + after
    with Sandbox(truth.Account(), fault=lambda _: Fault(body=body)) as sandbox:
        given = settings_for(sandbox.url, tmp_path)
        landed = fetch(given)
        assert bodies(landed) == [body]
        assert stage_window(given, landed, tmp_path).rows == 1


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b'{"username":' + b"[" * 200_000, b"{}", b'{"username":""}', b'{"username":" "}',
     b'{"username":5}', b'{"username":"a\\u0000"}', b'{"username":"\\u001b[31m"}',
     b'{"username":"a\\nb"}', b'{"username":"\\ud800"}', b'{"username":"\xff"}', b"<html>", b"",
     b'{"username":"%s"}' % (b"x" * 201)],
    ids=range(14),
)  # fmt: skip
def test_an_account_whose_name_can_be_no_label_ends_in_a_typed_error(
    body: bytes, tmp_path: Path
) -> None:
    with Sandbox(truth.Account(), fault=lambda _: Fault(body=body)) as sandbox:
        given = settings_for(sandbox.url, tmp_path)
        with FalClient(given) as asking, pytest.raises(ContractError) as caught:
            look_up(asking, given, {})
    assert str(caught.value).isprintable()


def test_days_are_asked_for_with_everything_said(tmp_path: Path) -> None:
    bounds = {"start": ["2026-11-21T00:00:00Z"], "end": ["2026-11-22T00:00:00Z"]}
    hours = {"timeframe": ["hour"], "timezone": ["UTC"], "bound_to_timeframe": ["false"]}
    who = ["auth_method_structured", "auth_method"]
    with Sandbox(truth.two_days()) as sandbox:
        for resource in (USAGE, BILLING_EVENTS):
            fetch(settings_for(sandbox.url, tmp_path), resource, DAY)
        summary = {**bounds, **hours, "expand": ["summary"]}
        assert [request.query for request in sandbox.requests] == [
            {**bounds, **hours, "expand": ["time_series", *who]}, summary,
            {**bounds, "limit": ["10000"], "expand": who}, summary,
        ]  # fmt: skip


# --- Starting over and taking up ------------------------------------------------------------------


@dataclass
class Switch:
    """Serves a real account, and fails every request that `breaks` while it is on."""

    breaks: Callable[[Request], bool]
    fault: Fault = field(default_factory=lambda: Fault(status=500))
    is_on: bool = True

    def __call__(self, request: Request) -> Fault | None:
        return self.fault if self.is_on and self.breaks(request) else None


def is_proof(request: Request) -> bool:
    return request.query["expand"] == ["summary"]


def rows_requests(requests: Sequence[Request]) -> list[Request]:
    """All but those for the control total."""
    return [one for one in requests if not is_proof(one)]


class Interrupted:
    """A read of a closed day that ended after three of its eight pages, with fal well again."""

    def __init__(self, sandbox: Sandbox, given: Settings, break_on: str = "page") -> None:
        start = len(sandbox.requests)

        def breaks(request: Request) -> bool:
            walked = len(rows_requests(sandbox.requests[start:])) - 1  # the first page comes twice
            return is_proof(request) and walked == 8 if break_on == "proof" else walked > 3

        sandbox.fault = switch = Switch(breaks)
        with pytest.raises(ApiUnavailableError):
            fetch(given, USAGE, DAY)
        switch.is_on = False
        self.landed = sorted(Path(given.landing).rglob("rows-*.zst"))
        self.requests_before = len(sandbox.requests)
        self._sandbox = sandbox

    def rows_asked_since(self) -> list[Request]:
        return rows_requests(self._sandbox.requests[self.requests_before :])


@pytest.fixture
def small_pages(account: truth.Account) -> Iterator[Sandbox]:
    """The day of fifteen rows in eight pages."""
    with Sandbox(account, page_size=2) as sandbox:
        yield sandbox


@pytest.fixture
def whole(small_pages: Sandbox, tmp_path: Path, clock: time_machine.Traveller) -> list[bytes]:
    """The pages of a read that nothing disturbed."""
    pages = bodies(fetch(settings_for(small_pages.url, tmp_path / "whole"), USAGE, DAY))
    assert len(pages) == 8
    return pages


def test_an_interrupted_read_of_a_closed_day_goes_on_at_the_page_where_it_ended(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    interrupted = Interrupted(small_pages, given)
    assert len(interrupted.landed) == 3
    files = [path.stat().st_ino for path in interrupted.landed]
    clock.shift(timedelta(minutes=30))
    landed = fetch(given, USAGE, DAY)

    assert bodies(landed) == whole
    assert [path.stat().st_ino for path in interrupted.landed] == files
    asked = interrupted.rows_asked_since()
    assert len(asked) == len(whole) - 3
    assert asked[0].query["cursor"] == [json.loads(whole[2])["next_cursor"]]


def test_a_read_whose_control_total_was_missed_asks_for_that_alone(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    interrupted = Interrupted(small_pages, given, break_on="proof")
    clock.shift(timedelta(minutes=59))
    assert bodies(fetch(given, USAGE, DAY)) == whole
    assert interrupted.rows_asked_since() == []


@pytest.mark.parametrize("is_forced", [False, True])
def test_a_read_that_was_interrupted_long_ago_or_is_asked_anew_starts_over(
    is_forced: bool,
    small_pages: Sandbox,
    whole: list[bytes],
    clock: time_machine.Traveller,
    tmp_path: Path,
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    unproven = fetch(settings_for(small_pages.url, tmp_path / "before"), USAGE, DAY)
    interrupted = Interrupted(small_pages, given)
    clock.shift(timedelta(minutes=1) if is_forced else timedelta(hours=2))
    landed = fetch(given, USAGE, DAY, retry=again_of(unproven) if is_forced else None)

    assert bodies(landed) == whole
    assert len(interrupted.rows_asked_since()) == len(whole) + 1  # the first page comes twice
    assert landed.folder != interrupted.landed[0].parent


def test_what_landed_of_a_broken_answer_does_not_lead_the_next_read_astray(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    same = Fault(body=page(cursor="same", name="time_series"))
    small_pages.fault = lambda request: None if is_proof(request) else same
    with pytest.raises(ContractError, match="same cursor"):
        fetch(given, USAGE, DAY)
    small_pages.fault = None
    assert bodies(fetch(given, USAGE, DAY)) == whole


def test_pages_before_an_answer_that_breaks_the_contract_are_kept(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given, before = settings_for(small_pages.url, tmp_path), len(rows_requests(small_pages.requests))
    broken = Fault(body=b'{"time_series":[],"next_cursor":null,"has_more":true}')

    def is_fourth(request: Request) -> bool:  # the first is asked for twice, a control total between
        return not is_proof(request) and len(rows_requests(small_pages.requests)) > before + 4

    small_pages.fault = switch = Switch(is_fourth, broken)
    with pytest.raises(ContractError, match="page 4: fal announced a next page but gave no cursor"):
        fetch(given, USAGE, DAY)
    switch.is_on, before = False, len(small_pages.requests)
    assert bodies(fetch(given, USAGE, DAY)) == whole
    assert len(rows_requests(small_pages.requests[before:])) == len(whole) - 3


def test_a_complete_read_that_was_not_loaded_is_only_asked_whether_it_is_still_all(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    first = fetch(given, USAGE, DAY)
    clock.shift(timedelta(minutes=30))
    for _ in range(2):
        before = len(small_pages.requests)
        landed = fetch(given, USAGE, DAY)
        assert bodies(landed) == whole
        assert rows_requests(small_pages.requests[before:]) == []
        assert len(small_pages.requests) > before
        assert landed.manifest.started_at == first.manifest.started_at  # as old as its pages

    extracts.refuse(landed.folder)
    before = len(small_pages.requests)
    anew = fetch(given, USAGE, DAY)
    assert len(rows_requests(small_pages.requests[before:])) == 1 + len(whole)
    extracts.leave_receipt(anew.folder, Receipt(1, truth.NOW, "loaded"))
    fetch(given, USAGE, DAY)
    assert len(rows_requests(small_pages.requests[before:])) == 2 * (1 + len(whole))


def test_an_extract_says_when_it_began_by_fals_own_clock(
    small_pages: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    """Also one that goes on with pages of before: as long ago as our own clock says."""
    behind = timedelta(hours=7)
    stated: list[datetime] = []

    def tell(_: Request) -> Fault | None:
        stated.append(datetime.now(UTC) - behind)
        return Fault(headers={"date": format_datetime(stated[-1], usegmt=True)})

    given = settings_for(small_pages.url, tmp_path)
    small_pages.fault = tell
    landed = fetch(given, USAGE, DAY)
    assert landed.manifest.fal_started_at == stated[0] == truth.NOW - behind

    other = settings_for(small_pages.url, tmp_path / "interrupted")
    Interrupted(small_pages, other)
    clock.shift(timedelta(minutes=30))
    small_pages.fault = tell
    stated.clear()
    landed = fetch(other, USAGE, DAY)
    assert stated[0] == truth.NOW - behind + timedelta(minutes=30)
    assert landed.manifest.fal_started_at == truth.NOW - behind


@pytest.mark.parametrize("date", ["", "yesterday"])
def test_an_extract_to_which_fal_names_no_time_says_none(date: str, tmp_path: Path) -> None:
    with Sandbox(truth.two_days(), fault=lambda _: Fault(headers={"date": date})) as sandbox:
        assert fetch(settings_for(sandbox.url, tmp_path), USAGE, DAY).manifest.fal_started_at is None


def test_an_interrupted_read_of_another_question_is_not_taken_up(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    interrupted = Interrupted(small_pages, given)
    fetch(given, USAGE, Window.of_day(truth.day(22)))
    fetch(given, USAGE, DAY, account="other")
    assert len(interrupted.rows_asked_since()) == 2 * (len(whole) + 1)


@pytest.mark.parametrize("resource", [MODELS, PRICES])
def test_a_snapshot_is_never_taken_up_again(
    resource: Resource, clock: time_machine.Traveller, account: truth.Account, tmp_path: Path
) -> None:
    account.catalogue = [{"endpoint_id": f"a/{number}"} for number in range(6)]
    ids = [f"a/{number}" for number in range(60)]
    account.listed = {name: {"endpoint_id": name} for name in ids}
    second_page = Switch(lambda _: len(sandbox.requests) in (2, 3))
    with Sandbox(account, page_size=2, fault=second_page) as sandbox:
        given = settings_for(sandbox.url, tmp_path)
        with pytest.raises(ApiUnavailableError):
            fetch(given, resource, ids=ids)
        landed = fetch(given, resource, ids=ids)
        pages = len(landed.manifest.pages("rows"))
        assert len(sandbox.requests) == 3 + pages
        assert pages >= 2


def test_an_open_day_is_never_taken_up_again(
    small_pages: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    open_day = Window(DAY.start, DAY.start + timedelta(hours=10))
    small_pages.fault = switch = Switch(is_proof)
    with pytest.raises(ApiUnavailableError):
        fetch(given, USAGE, open_day)
    switch.is_on = False
    before = len(small_pages.requests)
    landed = fetch(given, USAGE, open_day)
    asked = rows_requests(small_pages.requests[before:])
    assert len(asked) == len(landed.manifest.pages("rows"))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-3]), id="cut"),
        pytest.param(lambda path: path.write_bytes(b"\0" * 100), id="overwritten"),
        pytest.param(flip_a_bit, id="bit"),
        pytest.param(lambda path: path.unlink(), id="deleted"),
    ],
)
def test_a_damaged_page_of_an_interrupted_read_is_asked_for_again(
    damage: Callable[[Path], None],
    small_pages: Sandbox,
    whole: list[bytes],
    clock: time_machine.Traveller,
    tmp_path: Path,
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    interrupted = Interrupted(small_pages, given)
    damage(interrupted.landed[1])
    assert bodies(fetch(given, USAGE, DAY)) == whole
    assert len(interrupted.rows_asked_since()) == len(whole) - 1


def test_what_a_killed_run_left_half_written_is_gone_once_the_read_is_complete(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    interrupted = Interrupted(small_pages, given)
    folder = interrupted.landed[0].parent
    (folder / f".{interrupted.landed[2].name}.part").write_bytes(b"half")
    (folder / interrupted.landed[2].name.replace("-00003.", "-00033.")).write_bytes(b"older")
    landed = fetch(given, USAGE, DAY)
    assert landed.folder == folder
    assert {path.name for path in folder.iterdir()} == {extracts.MANIFEST} | {
        one.file for call in landed.manifest.calls for one in call.pages
    }


def test_two_reads_of_one_day_at_a_time_do_not_share_a_folder(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    given = settings_for(small_pages.url, tmp_path)
    Interrupted(small_pages, given)
    asked, go = threading.Event(), threading.Event()

    def hook(_: Request) -> None:
        asked.set()
        go.wait(10)

    small_pages.fault = hook
    results: list[SealedExtract] = []
    first = threading.Thread(target=lambda: results.append(fetch(given, USAGE, DAY)))
    first.start()
    try:
        assert asked.wait(10)
        small_pages.fault = None
        second = fetch(given, USAGE, DAY)
    finally:
        go.set()
        first.join()
    assert bodies(second) == whole
    assert bodies(results[0]) == whole
    assert results[0].folder != second.folder


def refuse_cursor(times: int) -> tuple[Callable[[Request], Fault | None], list[str | None]]:
    """A hook that refuses the cursor of the third page so many times; the cursors asked for."""
    asked: list[str | None] = []
    left = iter(range(times))

    def hook(request: Request) -> Fault | None:
        if is_proof(request):
            return None
        asked.append(request.query.get("cursor", [None])[0])
        third = len(asked) >= 3 and asked[-3] is None is not asked[-2]
        return Fault(status=400) if third and next(left, None) is not None else None

    return hook, asked


def test_a_cursor_that_expired_starts_the_read_over_once(
    small_pages: Sandbox, whole: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_pages.fault, asked = refuse_cursor(1)
    given = settings_for(small_pages.url, tmp_path)
    landed = fetch(given, USAGE, DAY)

    assert bodies(landed) == whole
    assert asked.count(None) == 4  # the first page comes twice each time
    assert len(asked) == 4 + len(whole) + 1
    assert "fetching from the first page" in caplog.text
    assert [read.folder for read in map(extracts.open_read, extracts.complete_reads(given))] == [
        landed.folder
    ]
    assert list(landed.folder.parent.iterdir()) == [landed.folder]


def test_a_cursor_that_expires_again_ends_the_read(
    small_pages: Sandbox, whole: list[bytes], tmp_path: Path
) -> None:
    small_pages.fault, asked = refuse_cursor(2)
    given = settings_for(small_pages.url, tmp_path)
    with pytest.raises(CursorRefusedError) as caught:
        fetch(given, USAGE, DAY)
    assert len(asked) == 8
    assert (caught.value.facts["window"], caught.value.facts["page"]) == (str(DAY), 3)
    assert list(map(extracts.open_read, extracts.complete_reads(given))) == []

    small_pages.fault = None
    assert bodies(fetch(given, USAGE, DAY)) == whole


def test_a_key_that_is_revoked_between_pages_ends_the_read_and_another_goes_on(
    small_pages: Sandbox, whole: list[bytes], clock: time_machine.Traveller, tmp_path: Path
) -> None:
    revoked, other = (
        settings_for(small_pages.url, tmp_path, key=key) for key in (FULL_KEY, BILLING_KEY)
    )
    before = len(small_pages.requests)

    def revoke_at_the_fourth(request: Request) -> None:
        if len(rows_requests(small_pages.requests[before:])) == 1 + 4:  # the first page comes twice
            small_pages.keys = {BILLING_KEY: "BILLING"}

    small_pages.fault = revoke_at_the_fourth
    with pytest.raises(KeyRefusedError, match="BILLING") as caught:
        fetch(revoked, USAGE, DAY)
    asked = len(small_pages.requests)
    assert len(rows_requests(small_pages.requests[before:])) == 1 + 4
    assert caught.value.facts["page"] == 4

    assert bodies(fetch(other, USAGE, DAY)) == whole
    assert len(rows_requests(small_pages.requests[asked:])) == len(whole) - 3


def test_a_refused_control_total_is_replaced_by_a_second_walk(
    account: truth.Account, tmp_path: Path
) -> None:
    with Sandbox(account, fault=Switch(is_proof, Fault(status=401))) as sandbox:
        landed = fetch(settings_for(sandbox.url, tmp_path), USAGE, DAY)
    assert bodies(landed, "rows") == bodies(landed, "again") != []
    assert bodies(landed, "proof") == []


def test_without_a_control_total_a_day_of_several_pages_is_asked_for_in_parts(
    small_pages: Sandbox, whole: list[bytes], tmp_path: Path
) -> None:
    """Down to an hour: two equal walks do not show what a cursor loses on each of them."""
    small_pages.fault = Switch(is_proof, Fault(status=403))
    before = len(small_pages.requests)
    landed = fetch(settings_for(small_pages.url, tmp_path), USAGE, DAY)
    parts = [(part.window, part.pages) for part in landed.manifest.parts]
    assert [part.start for part, _ in parts] == [DAY.start, *(part.end for part, _ in parts[:-1])]
    assert {part.end - part.start for part, pages in parts if pages > 1} == {timedelta(hours=1)}
    assert bodies(landed, "rows") == bodies(landed, "again")
    assert (
        sum(map(is_proof, small_pages.requests[before:])) == 1
    )  # what is refused once is not asked again
    found = [
        row
        for body in bodies(landed)
        for one in json.loads(body)["time_series"]
        for row in one["results"]
    ]
    assert len(found) == 15


# --- Batches of ids -------------------------------------------------------------------------------


@few_requests
@given(count=st.integers(0, 130), data=st.data())
def test_every_id_is_asked_in_batches_and_unknown_ones_are_found_by_halving(
    scripted: Sandbox, client: FalClient, count: int, data: st.DataObject
) -> None:
    ids = [f"acme/model-{number}" for number in range(count)]
    # A first batch without a single known id is another fault.
    unknown = data.draw(st.sets(st.sampled_from(ids[1:]), max_size=4)) if count > 1 else set()
    account = truth.Account()
    for name in ids:
        if name not in unknown:
            account.list_price(name, "0.5")
    scripted.world, scripted.fault = account, None
    before = len(scripted.requests)
    with TemporaryDirectory() as folder:
        given = settings_for(scripted.url, Path(folder))
        landed = fetch(given, PRICES, ids=ids, client=client)
        answered = [row["endpoint_id"] for body in bodies(landed) for row in json.loads(body)["prices"]]
        files = {path.name for path in landed.folder.iterdir()}
    assert answered == [name for name in ids if name not in unknown]
    assert landed.manifest.unknown_ids == sorted(unknown)
    assert files == {one.file for one in landed.manifest.pages("rows")} | {extracts.MANIFEST}

    requests = scripted.requests[before:]
    assert all(len(request.query["endpoint_id"]) <= 50 for request in requests)
    batches = -(-count // 50)
    # A batch of 50 is halved at most six times for each unknown id, at two requests a halving.
    assert batches <= len(requests) <= batches + 12 * len(unknown)


@pytest.mark.parametrize("listed", [truth.FLUX, "a/3"])  # one that was not asked for, one that was
def test_a_price_list_that_does_not_even_know_the_catalogue_is_another_fault(
    listed: str, tmp_path: Path
) -> None:
    account = truth.Account(catalogue=[{"endpoint_id": listed}])
    with (
        Sandbox(
            account,
            fault=lambda request: Fault(status=404) if request.path == PRICES.path else None,
        ) as sandbox,
        pytest.raises(ContractError, match="seems to be gone") as caught,
    ):
        fetch(settings_for(sandbox.url, tmp_path), PRICES, ids=[f"a/{n}" for n in range(10)])
    assert caught.value.facts["resource"] == "prices"


def test_no_id_is_asked_for_with_no_request(scripted: Sandbox, tmp_path: Path) -> None:
    before = len(scripted.requests)
    landed = fetch(settings_for(scripted.url, tmp_path), PRICES, ids=[])
    assert (landed.manifest.calls, len(scripted.requests)) == ([], before)


# --- On the disk ----------------------------------------------------------------------------------


def test_a_complete_read_can_be_opened_again_as_it_was(sandbox: Sandbox, tmp_path: Path) -> None:
    given = settings_for(sandbox.url, tmp_path)
    landed = fetch(given, USAGE, DAY)
    (read,) = map(extracts.open_read, extracts.complete_reads(given))
    assert read == landed
    assert bodies(read) == bodies(landed)
    assert read.manifest.window == DAY
    assert {one.request_id for one in read.manifest.pages("rows")} <= {
        request.request_id for request in sandbox.requests
    }


@pytest.mark.parametrize("label", ["rows", "proof"])
@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(lambda path: path.unlink(), id="deleted"),
        pytest.param(lambda path: path.write_bytes(b""), id="emptied"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="cut"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), id="longer"),
        pytest.param(
            lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(page())), id="forged"
        ),
        pytest.param(flip_a_bit, id="bit"),
    ],
)
def test_a_landed_page_that_was_changed_is_named_and_never_loaded(
    label: str, tamper: Callable[[Path], None], sandbox: Sandbox, tmp_path: Path
) -> None:
    given = settings_for(sandbox.url, tmp_path)
    landed = fetch(given, USAGE, DAY)
    path = landed.folder / landed.manifest.pages(label)[-1].file
    tamper(path)
    with pytest.raises(TamperedError) as caught:
        bodies(landed, label)
    assert caught.value.facts["file"] == str(path)
    assert path.name in str(caught.value)
    assert caught.value.exit_code == 4
    with pytest.raises(TamperedError, match="usage, window 2026-11-21"):
        stage_window(given, landed, tmp_path)


def test_pages_that_changed_places_are_told(sandbox: Sandbox, tmp_path: Path) -> None:
    landed = fetch(settings_for(sandbox.url, tmp_path), USAGE, DAY)
    one, other = (landed.folder / entry.file for entry in landed.manifest.pages("rows")[:2])
    content = one.read_bytes()
    other.replace(one)
    other.write_bytes(content)
    with pytest.raises(TamperedError):
        bodies(landed)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10_000, b'{"load_id": 1}', b"\0\0"])
def test_a_manifest_that_is_none_is_told(content: bytes, sandbox: Sandbox, tmp_path: Path) -> None:
    given = settings_for(sandbox.url, tmp_path)
    landed = fetch(given)
    (landed.folder / extracts.MANIFEST).write_bytes(content)
    with pytest.raises(TamperedError, match=r"manifest\.json"):
        list(map(extracts.open_read, extracts.complete_reads(given)))


LABELS = [
    "../../x", "..", ".", "/", "/etc/passwd", "~", "~root", "a/b", "a\\b", "CON", "nul.txt", "-rf",
    "a" * 300, "é" * 300, "日本", " ", "a b", "A", "a", "Å", "A\N{COMBINING RING ABOVE}", "\u202ex",
    "\n", "\0", ".hidden", "*", "$(id)", "'; drop table x", "%2e%2e", "account",
]  # fmt: skip


def test_no_account_label_leads_out_of_the_landing_folder_or_into_anothers(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    root = tmp_path / "a" / "b" / "c"
    given = settings_for(sandbox.url, root)
    folders = {}
    with FalClient(given) as client:
        for label in LABELS:
            landed = fetch(given, account=label, client=client)
            assert landed.manifest.account == label
            folders[label] = landed.folder.relative_to(root / "landing").parts[0]
    assert len({name.lower() for name in folders.values()}) == len(LABELS)
    assert all(len(name.encode()) <= 100 and name.isascii() for name in folders.values())
    for level in (tmp_path, tmp_path / "a", tmp_path / "a" / "b", root):
        assert len(list(level.iterdir())) == 1
    assert {path.name for path in (root / "landing").iterdir()} == set(folders.values())
    assert {
        read.manifest.account for read in map(extracts.open_read, extracts.complete_reads(given))
    } == set(LABELS)


def test_only_the_owner_can_read_what_landed(sandbox: Sandbox, tmp_path: Path) -> None:
    given = settings_for(sandbox.url, tmp_path)
    landed = fetch(given, USAGE, DAY)
    files = list(landed.folder.iterdir())
    assert len(files) == 1 + sum(len(call.pages) for call in landed.manifest.calls)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(landed.folder.stat().st_mode) == 0o700


def test_no_half_written_file_is_left(sandbox: Sandbox, tmp_path: Path) -> None:
    landed = fetch(settings_for(sandbox.url, tmp_path), USAGE, DAY)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {extracts.MANIFEST} | {
        one.file for call in landed.manifest.calls for one in call.pages
    }


def test_a_folder_that_cannot_be_made_is_a_typed_error(sandbox: Sandbox, tmp_path: Path) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    (tmp_path / "landing").write_text("in the way", encoding="utf-8")
    with pytest.raises(FaletlError, match="cannot write") as caught:
        fetch(settings)
    assert (caught.value.exit_code, caught.value.facts["resource"]) == (1, "models")


def test_a_key_that_fal_echoes_in_a_page_is_taken_out_before_it_lands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f"Authorization: Key {FULL_KEY}"
    script = Script(
        {
            None: page([{"endpoint_id": "a", "metadata": {"description": echo}}], "c"),
            "c": page([{"endpoint_id": "b"}], "d"),
            "d": page([{"endpoint_id": FULL_KEY.split(":")[1]}], more={"echo": [echo, echo]}),
        }
    )
    with Sandbox(truth.Account(), fault=script) as sandbox:
        landed = fetch(settings_for(sandbox.url, tmp_path))
    stored = everything_in(tmp_path) + caplog.text.encode()
    for secret in (FULL_KEY, *FULL_KEY.split(":")):
        assert secret.encode() not in stored
    assert landed.manifest.redacted_pages == 2
    pages = [json.loads(body) for body in bodies(landed)]
    assert pages[0]["models"][0]["metadata"]["description"] == f"Authorization: Key {REDACTED}"
    assert pages[2]["models"] == [{"endpoint_id": REDACTED}]
    assert bodies(landed)[1] == script.pages["c"]
    assert landed.manifest.started_at <= datetime.now(UTC)
