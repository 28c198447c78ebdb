"""Targets: what reads bytes that others wrote, and the law that it keeps whatever these are."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import httpx
import msgspec
import zstandard

from faletl import duck
from faletl.config import Settings
from faletl.errors import ContractError, FaletlError, MalformedAnswerError, TamperedError, UsageError
from faletl.fal.client import Answer, FalClient, _http_date, _Question, _retry_after
from faletl.fal.pages import read_envelope, walk
from faletl.fal.questions import bounds, first_endpoint
from faletl.landing import extracts
from faletl.landing.extracts import Call, LandedPage, Manifest, OpenExtract, Receipt, SealedExtract
from faletl.line.accounts import read_username
from faletl.line.distributed import read_plan
from faletl.money import LARGEST, SCALE, exact_text
from faletl.operations.estimate import _read as read_estimate
from faletl.resources import MODELS, RESOURCES, USAGE, Column, Kind, Resource
from faletl.sandbox import FULL_KEY, Sandbox
from faletl.staging.records import _rows_path, _write_lines, typed_records
from faletl.windows import Window
from faletl.wire import MalformedBodyError, as_json
from tests import truth
from tests.fuzz.mutations import NUMBERS, Tokens, tokens_of
from tests.unit.test_catalogue import FIXTURES, records

KEY = "QZJXWVKY-7931:GHQZPLKX4680+/WVQJZ"
BREAK = b"\x1e"
"""Between parts, where a target takes several."""


@dataclass(frozen=True)
class Target:
    """Something that reads bytes; `check` raises unless it kept its word, and says if they were taken.

    Of all executions a `share` goes to it, in proportion to those of the others.
    """

    name: str
    seeds: Sequence[Tokens]
    check: Callable[[bytes], bool]
    share: float = 1


# --- Pages ----------------------------------------------------------------------------------------


def document(text: bytes, number: Callable[[str], str] = str) -> Any:
    """What Python's own parser finds, numbers as text; it lets pass what texts may not hold."""
    said = text.decode("utf-8", "surrogateescape")
    return json.loads(said, parse_int=str, parse_float=number, parse_constant=str, strict=False)


def check_envelope(rows_path: tuple[str, ...], body: bytes) -> bool:
    """A page that is taken has the rows and the cursor that are in it, and no NUL."""
    try:
        rows, cursor = read_envelope(body, rows_path)
    except (MalformedBodyError, ContractError):
        return False
    found = document(as_json(body))
    assert rows == len(list(records(found, rows_path)))
    assert cursor == (found.get("next_cursor") if rows_path else None)
    assert not rows_path or found.get("has_more") in (None, cursor is not None)
    assert b"\\u0000" not in body or not holds_nul(found)
    return True


def holds_nul(found: Any) -> bool:
    """Whether any text or name has one."""
    if isinstance(found, dict):
        return any(holds_nul(name) or holds_nul(value) for name, value in found.items())
    return any(map(holds_nul, found)) if isinstance(found, list) else "\0" in str(found)


def check_as_json(body: bytes) -> bool:
    """NaN and Infinity become texts, nothing else changes."""
    made = as_json(body)
    try:
        meant = document(body.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return False
    assert document(made) == meant
    assert not re.search(rb"NaN|Infinity", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", made, flags=re.DOTALL))
    return True


class Fal:
    """Answers a walk with one body after the other, and remembers the cursors it was asked for."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self.bodies = bodies
        self.asked: list[str | None] = []

    def get(self, _path: str, params: Any, read: Callable[[bytes], Any], **_: object) -> Any:
        """The next body, as FalClient.get gives it back; the last one for ever."""
        self.asked.append(params.get("cursor"))
        body = self.bodies[min(len(self.asked), len(self.bodies)) - 1]
        try:
            return Answer(body, None), read(body)
        except MalformedBodyError as error:
            raise MalformedAnswerError(str(error)) from None


def check_walk(body: bytes) -> bool:
    """A walk ends, asks for each cursor as it was given, and for none twice."""
    fal: Any = Fal(body.split(BREAK))
    given: list[Any] = [None]
    try:
        for page, _ in walk(fal, "/models", {}, ("models",), iter(()), metrics=False):
            found = document(as_json(page.body))
            assert (page.number, page.rows) == (len(given), len(found["models"]))
            given.append(found.get("next_cursor"))
    except (MalformedAnswerError, ContractError):
        is_whole = False
    else:
        is_whole = given.pop() is None
        assert is_whole
    assert fal.asked == given[: len(fal.asked)]
    assert len(set(fal.asked)) == len(fal.asked) <= len(fal.bodies) + 1
    return is_whole


def check_answers(body: bytes) -> bool:
    """What reads one figure or name out of an answer finds it, or refuses the answer."""
    is_taken = False
    for read in (read_username, partial(read_estimate, kind="unit_price"), first_endpoint):
        try:
            is_taken |= bool(read(body))
        except (MalformedBodyError, ContractError):
            continue
    return is_taken


# --- Numbers and records --------------------------------------------------------------------------


def check_exact_text(token: bytes) -> bool:
    """An amount is held to its twelfth decimal, said to be rounded where it was, or given back."""
    number = token.decode("latin-1")
    held, is_rounded = exact_text(number)
    if not re.fullmatch(rf"-?\d+(\.\d{{1,{SCALE}}})?", held, re.ASCII):
        assert (held, is_rounded) == (number, False)
        return False
    with localcontext(prec=100_000):
        value = Decimal(number)
        nearest = value.quantize(Decimal(1).scaleb(-SCALE), rounding=ROUND_HALF_EVEN)
        assert Decimal(held) == nearest
        assert is_rounded == (nearest != value)
    return True


class Memory:
    """A file that is in memory, and a folder in which each file is this one; as in an object store."""

    path = "memory"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __truediv__(self, _name: str) -> Memory:
        return self

    @property
    def fs(self) -> Memory:
        """What reads it."""
        return self

    def cat_file(self, _path: str) -> bytes:
        """The content."""
        return self.content

    @contextmanager
    def open(self, _mode: str) -> Iterator[io.BytesIO]:
        """Write it anew."""
        written = io.BytesIO()
        yield written
        self.content = written.getvalue()


def in_memory(content: bytes = b"") -> Any:
    """A path to that content: a real file takes longer than all that is looked at."""
    return Memory(content)


class OnePage(SealedExtract, frozen=True):
    """A landed read whose only page is in memory."""

    content: bytes = b""

    def body(self, page: LandedPage) -> bytes:
        """The page."""
        return self.content


def window_of(resource: Resource) -> Window:
    """A window of the kind that the resource has."""
    return Window.of_day(truth.day(22)) if resource.window == "day" else Window.snapshot(truth.NOW)


def landed_page(resource: Resource, label: str, body: bytes) -> OnePage:
    """A sealed read with that page."""
    window = window_of(resource)
    query = {name: [v] for name, v in resource.params[0].items() if isinstance(v, str)}
    page = LandedPage("rows-1.json.zst", 0, len(body), "")
    manifest = Manifest(
        "20261123T103000000000Z-5f2c1a", "run", "acme", resource.name, window.start, window.end,
        truth.NOW, truth.NOW, window.day, 0, [Call(label, resource.path, query, [page])],
    )  # fmt: skip
    return OnePage(Path(), manifest, body)


def held_text(number: str) -> str:
    """The number as staging hands it on."""
    return exact_text(number.lower())[0]


def with_outer(resource: Resource, label: str, body: bytes) -> list[tuple[Any, Any]]:
    """Each record of a page with the object that holds its list."""
    found, rows_path = document(as_json(body), held_text), _rows_path(resource, label)
    lists = records(found, rows_path[:-1]) if rows_path else [{"": [found]}]
    name = rows_path[-1] if rows_path else ""
    return [(around, record) for around in lists for record in around[name]]


def check_records(resource: Resource, label: str, body: bytes) -> bool:
    """Each record of a page is handed to DuckDB as it is, or set aside; in both ways of reading it."""
    try:
        rows, _ = read_envelope(body, _rows_path(resource, label))
    except (MalformedBodyError, ContractError):
        return False
    is_taken = False
    for is_each in (False, True):
        lines, landed = in_memory(), landed_page(resource, label, body)
        try:
            typed = _write_lines(landed, resource, label, lines, is_each=is_each)
        except FaletlError as error:
            check_sentence(error)
            continue
        written = {
            int(one["_row"]): one
            for one in (document(line, held_text) for line in lines.content.splitlines())
        }
        assert typed.breaches == len(typed.quarantined)
        assert sorted([*(one.row for one in typed.quarantined), *written]) == list(range(1, rows + 1))
        held = with_outer(resource, label, body)
        for row, one in written.items():
            around, record = held[row - 1]
            outer = {c.name: around[c.name] for c in resource.columns if c.is_outer and label == "rows"}
            query = landed.manifest.calls[0].query
            names = [c.name for c in resource.columns if c.is_asked and label == "rows"]
            asked = {name: query[name][0] for name in names}
            lead = {"_page": one["_page"], "_row": one["_row"], **asked, **outer}
            assert is_same(one, {**lead, "record": record})
        is_taken = is_taken or bool(written)
    return is_taken


def check_sentence(error: FaletlError) -> None:
    """What people read of an error is one line, not too long."""
    assert str(error).isprintable()
    assert 0 < len(str(error)) < 3000


def is_same(one: Any, other: Any) -> bool:
    """Whether two documents are equal; minus nought is nought, and some texts are taken for numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other) or (isinstance(other, str) and one == held_text(other))


@cache
def engine() -> duckdb.DuckDBPyConnection:
    """One engine for all pages."""
    made = duckdb.connect(config={**duck.config(settings().memory, None), "threads": "1"})
    return made.execute("set TimeZone = 'UTC'")


def check_types(resource: Resource, folder: Path, body: bytes) -> bool:
    """Each record becomes a row with the very texts and amounts of the page, or is set aside."""
    try:
        rows, _ = read_envelope(body, resource.rows_path)
        path = folder / "typed.parquet"
        typed = typed_records(engine(), landed_page(resource, "rows", body), resource, "rows", path)
    except (MalformedBodyError, FaletlError, duckdb.InvalidInputException):
        return False
    found = engine().execute(f"from '{path}' where _breach = ''")
    names = [column[0] for column in found.description or ()]
    kept = {row["_row"]: row for row in (dict(zip(names, r, strict=True)) for r in found.fetchall())}
    assert typed.breaches == len(typed.quarantined)
    assert sorted([*(one.row for one in typed.quarantined), *kept]) == list(range(1, rows + 1))
    held = with_outer(resource, "rows", body)
    for number, row in kept.items():
        for column in resource.columns:
            if not column.is_asked:
                assert is_kept(row[column.name], column, *held[number - 1]), (column.name, row)
    return bool(kept)


def is_kept(held: Any, column: Column, around: Any, record: Any) -> bool:
    """Whether a staged value is the one that the page has."""
    value, scale = around if column.is_outer else record, Decimal(1)
    for step in column.steps:
        value = (value or {}).get(step)
    if value is None and column.fallback:
        value, scale = record.get(column.fallback), Decimal(column.fallback_scale)
    if column.kind is Kind.SECONDS:
        return bool(held == duration_of(value))
    if value is None or held is None:
        return value is held
    with localcontext(prec=60):
        match column.kind:
            case Kind.AMOUNT | Kind.WHOLE:
                return bool(held == Decimal(held_text(value)) * scale)
            case Kind.LIST:
                return bool(json.loads(held) == value)
            case Kind.INSTANT:
                return bool(held == instant_of(value)) or "(BC)" in str(held)  # as Python cannot say
            case _:
                return bool(held == value)


def duration_of(value: Any) -> Decimal | None:
    """The seconds, where they can be any."""
    if not isinstance(value, str) or not re.fullmatch(r"-?\d[\d.eE+-]*", value, re.ASCII):
        return None
    text = held_text(value)
    seconds = Decimal(text) if re.fullmatch(rf"\d+(\.\d{{1,{SCALE}}})?", text) else None
    return seconds if seconds is not None and seconds < LARGEST else None


def instant_of(text: str) -> datetime:
    """The instant; digits behind the microsecond are cut off."""
    text = re.sub(r"([+-]\d\d)$", r"\1:00", text.upper())
    text, ends_the_day = re.subn(r"(?<=[T ])24:00:00", "00:00:00", text)
    at = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
    return at + timedelta(days=ends_the_day)


# --- Headers, refusals, compression ---------------------------------------------------------------


@cache
def settings() -> Settings:
    """Settings with a key."""
    return Settings.isolated(key=KEY, api_url="http://127.0.0.1:9", max_body=4096)


@cache
def client() -> FalClient:
    """A client that never asks anybody."""
    return FalClient(settings())


def check_dates(header: bytes) -> bool:
    """A wait is none, or whole seconds from now on; a date is an instant."""
    text = header.decode("latin-1")
    headers = httpx.Headers([(b"retry-after", header), (b"date", header)])
    wait, at = _retry_after(headers), _http_date(text)
    client()._check_clock(at)
    assert wait is None or (isinstance(wait, int) and wait >= 0)
    assert at is None or at.utcoffset() is not None
    if re.fullmatch(r"[0-9]{1,15}", text):
        assert wait == int(text)
    return wait is not None


def check_refusal(text: bytes) -> bool:
    """A refusal is a typed error of one short, printable line, without the key."""
    status, wait, request_id, body = (text.replace(b"@key", KEY.encode()) + BREAK * 3).split(BREAK)[:4]
    headers = [(b"retry-after", wait), (b"x-fal-request-id", request_id), (b"location", request_id)]
    response = httpx.Response(int.from_bytes(status[:2], "big") % 500 + 100, headers=headers)
    params = {"cursor": "x"} if len(text) % 2 else {}
    error = client()._refusal(_Question("GET", "/models", params), response, body)
    error = error.at(request_id=client()._request_id(response))
    check_sentence(error)
    told = json.dumps(error.as_dict())
    assert not any(half in told for half in KEY.split(":"))
    return error.is_retryable


def check_redaction(text: bytes) -> bool:
    """No form of the key or its secret half is left; where there was none nothing is touched."""
    key_id, secret = KEY.split(":")
    forms = [form for part in (KEY, secret) for form in (part, quote(part, safe=""))]
    for name, form in ((b"@key", KEY), (b"@secret", secret), (b"@coded", forms[1])):
        text = text.replace(name, form.encode())
    clean = settings().redact_bytes(text)
    assert not any(form.encode() in clean for form in forms)
    assert clean == text or any(form.encode() in text for form in forms)
    told = settings().redact(text.decode("utf-8", "replace"))
    assert not any(form in told for form in (*forms, key_id))
    return clean != text


class Stream(httpx.SyncByteStream):
    """A body as it comes from a socket, in pieces."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        for at in range(0, len(self.body), 50):
            yield self.body[at : at + 50]


def check_gzip(body: bytes) -> bool:
    """A body that is unpacked is the one that was packed, whole, and not too large."""
    response = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Stream(body))
    try:
        unpacked = client()._body(response)
    except ContractError:
        return False
    assert len(unpacked) <= int(settings().max_body)
    assert unpacked == gzip.decompress(body)
    return bool(unpacked)


# --- Files ----------------------------------------------------------------------------------------


def check_manifest(content: bytes) -> bool:
    """A manifest can be used for all that it is asked later, or it was tampered with."""
    try:
        landed = extracts.open_read(in_memory(content))
    except (TamperedError, UsageError):
        return False
    manifest = landed.manifest
    manifest.window.has_settled(manifest.started_at)
    assert manifest.resource in RESOURCES
    assert bounds(manifest.window) is not None
    assert len(manifest.asked_ids) >= 0
    assert not extracts.is_intact(landed.folder) or not any(call.pages for call in manifest.calls)
    assert re.fullmatch(r"[0-9a-fTZ-]+", manifest.load_id)
    return True


def check_receipt(content: bytes) -> bool:
    """A receipt is one of ours, or none."""
    receipt = extracts.receipt_of(in_memory(content))
    return receipt is not None and receipt.loaded_at >= truth.NOW


def check_plan(folder: Path, content: bytes) -> bool:
    """A plan is one of ours, or it was tampered with."""
    path = folder / "plan.json"
    path.write_bytes(content)
    try:
        return read_plan(str(path)).account != ""
    except TamperedError:
        return False


def check_landed(content: bytes) -> bool:
    """A page of an interrupted read is taken up if it can be unpacked, else asked for again."""
    attempt = OpenExtract.__new__(OpenExtract)  # without a folder and its lock
    attempt.folder, attempt._redacted = in_memory(content), 0
    attempt.earlier = {attempt.folder: [extracts.page_name("rows", {}, 1)]}
    taken = list(attempt.resumable_pages("rows", {}))
    assert len(taken) <= 1
    return bool(taken)


# --- What there is to begin with ------------------------------------------------------------------


@cache
def recorded() -> dict[str, list[bytes]]:
    """Answers of fal by resource, and those of `proof`: from fixtures and from the sandbox."""
    found = {name: [(FIXTURES / name / "first.json").read_bytes()] for name in RESOURCES}
    headers = {"authorization": f"Key {FULL_KEY}"}
    with (
        Sandbox(truth.two_days(), page_size=2) as sandbox,
        httpx.Client(base_url=sandbox.url, headers=headers) as http,
    ):
        for resource in RESOURCES.values():
            more: dict[str, Any] = {"endpoint_id": truth.FLUX} if resource.ids_per_call else {}
            more |= bounds(window_of(resource))
            asked: list[Any] = [(resource.name, resource.path, question) for question in resource.params]
            if resource.proof:
                asked.append(("proof", resource.proof.path, resource.proof.params))
            for name, path, question in asked:
                answer = http.get(path, params=httpx.QueryParams({**question, **more}))
                found.setdefault(name, []).append(answer.raise_for_status().content)
    return found


def targets(folder: Path) -> list[Target]:
    """All that is fuzzed, with a folder for what needs one."""
    answers = recorded()
    pages = [page for name in answers for page in answers[name]]
    models = answers["models"]
    manifests = [msgspec.json.encode(landed_page(one, "rows", b"").manifest) for one in (USAGE, MODELS)]
    receipt = msgspec.json.encode(Receipt(3, truth.NOW, "loaded"))
    plan = (
        b'{"run_id":"r","account":"acme","fencing_token":1,"planned_from":{"usage":"2026-11-21"},"windows":'
        b'[{"resource":"usage","start":"2026-11-21T00:00:00Z","end":"2026-11-22T00:00:00Z"}]}'
    )
    numbers = [token for page in pages for token in tokens_of(page) if token[:1].isdigit()]
    dates = (
        b"Sun, 06 Nov 1994 08:49:37 GMT", b"Sunday, 06-Nov-94 08:49:37 GMT", b"Sun Nov  6 08:49:37 1994",
        b"120", b"1.5", b"-5", b"99999999999", b"Mon, 23 Nov 2026 10:30:00 +0545",
    )  # fmt: skip
    refusals = [
        BREAK.join((status, date, b"req-1@key", body))
        for status in (b"\0\xc8", b"\0\0", b"\x01\x2c", b"\x01\x91", b"\x01\x49")
        for date in dates[:4]
        for body in (b'{"error":{"message":"no @key"}}', b"<html><b>@key</b></html>", b"", b"\xff @key")
    ]
    hidden = [page[:300] + b"@key" + page[300:600] + b"@secret@coded" for page in models]
    estimate = b'{"estimate_type":"unit_price","total_cost":1.88,"currency":"USD"}'
    packed = [gzip.compress(page[:1000], mtime=0) for page in (*pages, b"0" * 5000)]
    zipped = [zstandard.ZstdCompressor(write_checksum=True).compress(page) for page in pages[:4]]
    walks = [BREAK.join((models[1], page, models[0])) for page in models]
    found = []
    for resource in RESOURCES.values():
        mine = seeds(*answers[resource.name])
        found += [
            Target(f"envelope of {resource.name}", mine, partial(check_envelope, resource.rows_path), 3),
            Target(f"records of {resource.name}", mine, partial(check_records, resource, "rows")),
            Target(f"types of {resource.name}", mine, partial(check_types, resource, folder), 0.02),
        ]
    return [
        *found,
        Target("envelope of totals", seeds(*answers["proof"]), partial(check_envelope, ("summary",)), 3),
        Target("records of totals", seeds(*answers["proof"]), partial(check_records, USAGE, "proof")),
        Target("as_json", seeds(*pages), check_as_json, 3),
        Target("walk", seeds(*walks), check_walk),
        Target("answers", seeds(estimate, *answers["credits"], *models), check_answers, 2),
        Target("exact_text", seeds(*NUMBERS, *numbers), check_exact_text, 8),
        Target("dates", seeds(*dates), check_dates, 4),
        Target("refusal", seeds(*refusals), check_refusal, 2),
        Target("redaction", seeds(*hidden, KEY.encode()), check_redaction, 3),
        Target("gzip", [[one] for one in packed], check_gzip),
        Target("manifest", seeds(*manifests), check_manifest, 2),
        Target("receipt", seeds(receipt), check_receipt),
        Target("plan", seeds(plan), partial(check_plan, folder), 0.1),
        Target("landed", [[one] for one in zipped], check_landed),
    ]


def seeds(*texts: bytes) -> list[Tokens]:
    """The texts as mutations need them."""
    return [tokens_of(text) for text in texts]
