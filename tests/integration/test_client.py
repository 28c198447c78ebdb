"""The client against real servers on loopback that break in every way a server can."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Self
from urllib.parse import quote

import pytest
import tenacity
import trustme

from faletl.config import Settings
from faletl.errors import (
    AccountLockedError,
    ApiUnavailableError,
    CircuitOpenError,
    ContractError,
    CursorRefusedError,
    FaletlError,
    KeyRefusedError,
    NotFoundError,
    WebPageError,
)
from faletl.fal import client as client_module
from faletl.fal.client import Answer, FalClient
from faletl.fal.limiter import MAX_FAILURES, Patience
from faletl.fal.pages import read_envelope
from faletl.fal.transport import StoppedError
from faletl.sandbox import FULL_KEY, Fault, Request, Sandbox
from faletl.wire import Params
from tests import truth

KEY = "0d5c2a7e-key-id:5ecf0ad97b31-secret"
SECRET = KEY.split(":")[1]
BODY = b'{"models":[{"endpoint_id":"a"}],"next_cursor":null,"has_more":false}'
GZIPPED = gzip.compress(BODY, mtime=0)
HTML = b"<html><body><h1>Gateway</h1></body></html>"
LONG = 10.0
"""Seconds: only something broken takes so long."""

Hook = Callable[[Request], Fault | None]
Speak = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.01)


def settings_of(url: str, **given: object) -> Settings:
    return Settings.isolated(**{"key": KEY, "api_url": url, "rate": 0, **given})


def read(body: bytes) -> int:
    return read_envelope(body, ("models",))[0]


def ask(url: str, **given: object) -> tuple[Answer, int]:
    """One question by a client of its own."""
    with FalClient(settings_of(url, **given)) as client:
        return client.get("/models", {}, read)


@contextmanager
def served(hook: Hook) -> Iterator[Sandbox]:
    with Sandbox(truth.Account(), keys={KEY: "FULL"}, fault=hook) as sandbox:
        yield sandbox


def first(count: int, fault: Fault) -> Hook:
    """Break so many answers, then give the good one."""
    left = iter(range(count))
    return lambda _: fault if next(left, None) is not None else Fault(body=BODY)


def always(fault: Fault) -> Hook:
    return lambda _: fault


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not is_true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


class RawServer:
    """TCP on loopback: reads the head of a request, lets `speak` answer, and closes.

    `speak` is called with the connection; of a list, each is called once and the last for ever.
    """

    def __init__(self, *speak: Speak, tls: ssl.SSLContext | None = None) -> None:
        self.heads: list[bytes] = []
        self.is_over = threading.Event()
        self._speak = speak
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.address}/v1"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self.is_over.is_set():
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self._tls is None:
                self._answer(connection)
                return
            with self._tls.wrap_socket(connection, server_side=True) as secured:
                self._answer(secured)

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            received = connection.recv(65536)
            if not received:
                return
            head += received
        self.heads.append(head)
        self._speak[min(len(self.heads), len(self._speak)) - 1](connection)


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def good(connection: socket.socket) -> None:
    connection.sendall(head(f"Content-Length: {len(BODY)}") + BODY)


def close_at_once(connection: socket.socket) -> None:
    pass


def cut_in_the_head(connection: socket.socket) -> None:
    connection.sendall(head(f"Content-Length: {len(BODY)}")[:25])


def cut_short_of_the_length(connection: socket.socket) -> None:
    connection.sendall(head(f"Content-Length: {len(BODY)}") + BODY[:-10])


def reset_in_the_body(connection: socket.socket) -> None:
    connection.sendall(head(f"Content-Length: {len(BODY)}") + BODY[:20])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def cut_between_chunks(connection: socket.socket) -> None:
    chunk = b"%x\r\n%s\r\n" % (len(BODY), BODY)
    connection.sendall(head("Transfer-Encoding: chunked") + chunk)


def cut_inside_a_chunk(connection: socket.socket) -> None:
    connection.sendall(head("Transfer-Encoding: chunked") + b"%x\r\n%s" % (len(BODY), BODY[:-10]))


def cut_without_a_length(connection: socket.socket) -> None:
    connection.sendall(head("Connection: close") + BODY[:-10])


def no_http(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


def flood_of_headers(connection: socket.socket) -> None:
    connection.sendall(head(*(f"X-Filler-{n}: {'x' * 20}" for n in range(10_000))) + BODY)


def one_huge_header(connection: socket.socket) -> None:
    connection.sendall(head(f"X-Filler: {'x' * 200_000}") + BODY)


def gzip_without_its_end(connection: socket.socket) -> None:
    connection.sendall(
        head("Content-Encoding: gzip", f"Content-Length: {len(GZIPPED) - 8}") + GZIPPED[:-8]
    )


UNREACHABLE: list[Speak] = [
    close_at_once,
    cut_in_the_head,
    cut_short_of_the_length,
    reset_in_the_body,
    cut_between_chunks,
    cut_inside_a_chunk,
    no_http,
    flood_of_headers,
    one_huge_header,
]
UNREADABLE: list[Speak] = [cut_without_a_length, gzip_without_its_end]

MALFORMED = {
    "html": Fault(body=HTML),
    "empty": Fault(body=b""),
    "no content": Fault(status=204, body=b""),
    "created": Fault(status=201, body=BODY),
    "a part": Fault(status=206, body=BODY),
    "cut json": Fault(body=BODY[:-1]),
    "gzip of half": Fault(
        headers={"content-encoding": "gzip"}, body=GZIPPED[: len(GZIPPED) // 2]
    ),
    "a byte called gzip": Fault(headers={"content-encoding": "gzip"}, body=b"<"),
    "gzip with a wrong checksum": Fault(
        headers={"content-encoding": "gzip"},
        body=GZIPPED[:-8] + bytes(byte ^ 1 for byte in GZIPPED[-8:-4]) + GZIPPED[-4:],
    ),
    "gzip with something behind it": Fault(
        headers={"content-encoding": "gzip"}, body=GZIPPED + b"x"
    ),
    "plain text called gzip": Fault(headers={"content-encoding": "gzip"}, body=BODY),
    "gzip called plain text": Fault(body=GZIPPED),
}  # fmt: skip


# --- Trying again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("speak", UNREACHABLE + UNREADABLE)
def test_a_broken_connection_is_tried_again_until_it_works(speak: Speak) -> None:
    with RawServer(speak, speak, good) as server:
        answer, rows = ask(server.url)
        assert (answer.body, rows, len(server.heads)) == (BODY, 1, 3)


@pytest.mark.parametrize("speak", UNREACHABLE)
def test_a_connection_that_always_breaks_is_given_up_as_unavailable(speak: Speak) -> None:
    with RawServer(speak) as server:
        with pytest.raises(ApiUnavailableError) as caught:
            ask(server.url)
        assert len(server.heads) == client_module.TRIES
    assert (caught.value.exit_code, caught.value.is_retryable) == (1, True)
    assert caught.value.facts["cause"] == "connection"


@pytest.mark.parametrize("speak", UNREADABLE)
def test_a_body_that_always_ends_early_is_given_up(speak: Speak) -> None:
    with RawServer(speak) as server:
        with pytest.raises(ContractError):
            ask(server.url)
        assert len(server.heads) == client_module.TRIES


def test_a_refused_connection_is_given_up_as_unavailable() -> None:
    with RawServer(good) as server:
        url = server.url
    with pytest.raises(ApiUnavailableError, match="refused") as caught:
        ask(url)
    assert caught.value.facts["cause"] == "refused"


def test_a_host_without_an_address_is_told_from_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ApiUnavailableError, match="not known") as caught:
        ask("https://nowhere.invalid/v1")
    assert caught.value.facts["cause"] == "dns"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 520])
def test_a_busy_or_broken_fal_is_tried_again_until_it_works(status: int) -> None:
    limits = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "99999999999"}  # of another feature
    with served(first(3, Fault(status=status, headers=limits))) as sandbox:
        assert ask(sandbox.url)[0].body == BODY
        assert len(sandbox.requests) == 4


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 520])
def test_a_fal_that_stays_busy_or_broken_is_given_up_with_its_own_words(status: int) -> None:
    with served(always(Fault(status=status))) as sandbox:
        with pytest.raises(ApiUnavailableError, match="configured to answer like this") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == (MAX_FAILURES if status == 429 else client_module.TRIES)
        assert caught.value.facts["request_id"] == sandbox.requests[-1].request_id
    assert caught.value.facts["status"] == status
    assert (caught.value.exit_code, caught.value.is_retryable) == (1, True)


@pytest.mark.parametrize("fault", MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_is_no_whole_json_is_asked_for_again(fault: Fault) -> None:
    with served(first(2, fault)) as sandbox:
        assert ask(sandbox.url)[0].body == BODY
        assert len(sandbox.requests) == 3


@pytest.mark.parametrize("fault", MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_is_never_whole_json_breaks_the_contract(fault: Fault) -> None:
    with served(always(fault)) as sandbox:
        with pytest.raises(ContractError) as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == client_module.TRIES
        assert caught.value.facts["request_id"] == sandbox.requests[-1].request_id
    assert (caught.value.exit_code, caught.value.is_retryable) == (3, False)
    assert caught.value.facts["status"] == (fault.status or 200)


def test_a_gateways_refusal_in_html_is_no_refusal_of_the_key() -> None:
    fault = Fault(status=403, headers={"content-type": "text/html"}, body=b"\n " + HTML)
    with served(first(2, fault)) as sandbox:
        assert ask(sandbox.url)[0].body == BODY
    with served(always(fault)) as sandbox:
        with pytest.raises(ApiUnavailableError, match=r"403.*Gateway"):
            ask(sandbox.url)
        assert len(sandbox.requests) == client_module.TRIES


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ContractError),
        (401, KeyRefusedError),
        (402, AccountLockedError),
        (403, KeyRefusedError),
        (404, NotFoundError),
        (405, ContractError),
        (410, ContractError),
        (422, ContractError),
    ],
)
def test_a_refusal_is_not_tried_again(status: int, error: type[FaletlError]) -> None:
    with served(always(Fault(status=status))) as sandbox:
        with pytest.raises(error, match="configured to answer like this") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == 1
        assert caught.value.facts["request_id"] == sandbox.requests[0].request_id
    assert type(caught.value) is error
    assert str(status) in str(caught.value)
    assert caught.value.facts["status"] == status
    assert not caught.value.is_retryable


def test_a_400_is_a_refused_cursor_only_where_one_was_sent() -> None:
    with served(always(Fault(status=400))) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        with pytest.raises(CursorRefusedError):
            client.get("/models", {"cursor": ""}, read)
        with pytest.raises(ContractError) as caught:
            client.get("/models", {}, read)
    assert not isinstance(caught.value, CursorRefusedError)


def test_a_reader_of_bodies_that_refuses_one_is_not_asked_twice() -> None:
    def refuse(_: bytes) -> int:
        raise ContractError("not what was asked for")

    with served(always(Fault(body=BODY))) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        with pytest.raises(ContractError, match="not what was asked for") as caught:
            client.get("/models", {}, refuse)
        assert len(sandbox.requests) == 1
        assert caught.value.facts["request_id"] == sandbox.requests[0].request_id


def test_a_web_page_is_told_from_other_answers_that_are_no_json() -> None:
    for fault, is_page in ((Fault(body=b"\n " + HTML), True), (Fault(body=BODY[:-1]), False)):
        with served(always(fault)) as sandbox, pytest.raises(ContractError) as caught:
            ask(sandbox.url)
        assert isinstance(caught.value, WebPageError) == is_page


def test_a_question_in_a_body_is_asked_like_any_other() -> None:
    body = b'{"quantity":0.1}'
    with served(first(2, Fault(status=503))) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        assert client.post("/models/pricing/estimate", body, read)[1] == 1
    sent = [(r.method, r.body, r.query, r.headers["content-type"]) for r in sandbox.requests]
    assert sent == [("POST", body, {}, "application/json")] * 3
    assert {request.headers["authorization"] for request in sandbox.requests} == {f"Key {KEY}"}


def test_a_client_has_the_patience_that_it_is_given() -> None:
    patience = Patience(tries=3, deadline_seconds=LONG, retry_after_seconds=0)
    for fault, tries in ((Fault(status=503), 3), (Fault(status=503, headers={"retry-after": "1"}), 1)):
        with served(always(fault)) as sandbox:
            with (
                FalClient(settings_of(sandbox.url), patience) as client,
                pytest.raises(ApiUnavailableError),
            ):
                client.get("/models", {}, read)
            assert len(sandbox.requests) == tries
    with (
        RawServer(hang) as server,
        FalClient(settings_of(server.url), Patience(1, 0.2, 0, 0)) as client,
        pytest.raises(ApiUnavailableError) as caught,
    ):
        client.get("/models", {}, read)
    assert caught.value.facts["cause"] == "timeout"


@pytest.mark.parametrize(("tries", "longest"), [(1, 1), (2, 2), (5, 16), (6, 20), (9, 20)])
def test_waits_of_our_own_grow_and_differ(tries: int, longest: float) -> None:
    counted = client_module._Tries(Patience(tries=9, deadline_seconds=1, retry_after_seconds=1))
    counted.count = tries
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    waits = [counted.pause(state) for _ in range(500)]
    assert longest / 4 <= min(waits) < longest / 2
    assert longest * 3 / 4 < max(waits) <= longest


LOCKED = "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing."


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("shape", [{"detail": LOCKED}, {"error": {"message": LOCKED}}])
def test_a_locked_account_is_told_from_a_refused_key(status: int, shape: dict[str, object]) -> None:
    fault = Fault(status=status, body=json.dumps(shape).encode())
    with served(always(fault)) as sandbox:
        with pytest.raises(AccountLockedError, match="Exhausted balance") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == 1
    assert "another key will not help" in str(caught.value)
    assert (caught.value.exit_code, caught.value.is_retryable) == (2, False)
    assert not isinstance(caught.value, KeyRefusedError)


@pytest.mark.parametrize(
    "detail",
    ["No user found for Key ID and Secret", "The door is open: User is locked", ["User is locked"]],
)
def test_a_refusal_in_another_shape_is_one_of_the_key(detail: object) -> None:
    fault = Fault(status=403, body=json.dumps({"detail": detail}).encode())
    with served(always(fault)) as sandbox, pytest.raises(KeyRefusedError, match="403"):
        ask(sandbox.url)


# --- When fal answers nothing any more ------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429), Fault(body=HTML)])
def test_the_circuit_opens_after_twenty_failures_in_a_row_of_all_threads(fault: Fault) -> None:
    with (
        served(always(fault)) as sandbox,
        FalClient(settings_of(sandbox.url)) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        failures = [
            one.exception(LONG)
            for one in [pool.submit(client.get, "/models", {}, read) for _ in range(40)]
        ]
        assert MAX_FAILURES <= len(sandbox.requests) < MAX_FAILURES + 4
        opened = [one for one in failures if isinstance(one, CircuitOpenError)]
        assert len(opened) >= 40 - MAX_FAILURES // client_module.TRIES
        assert len({one.message for one in opened}) == 1
        assert "stopped asking fal: 20 tries in a row failed; " in opened[0].message
        with pytest.raises(CircuitOpenError):
            client.get("/models", {}, read)
    assert (opened[0].exit_code, opened[0].is_retryable) == (1, True)


def test_an_answer_closes_the_count_of_failures() -> None:
    answers = iter([*[Fault(status=429)] * (MAX_FAILURES - 1), Fault(body=BODY)] * 3)
    with served(lambda _: next(answers)) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        for _ in range(3):
            assert client.get("/models", {}, read)[1] == 1
        assert len(sandbox.requests) == 3 * MAX_FAILURES


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_shows_that_fal_is_there(status: int) -> None:
    answers = iter([Fault(status=503), Fault(status=status)] * MAX_FAILURES)
    with served(lambda _: next(answers)) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        for _ in range(MAX_FAILURES):
            with pytest.raises(FaletlError) as caught:
                client.get("/models", {}, read)
            assert not isinstance(caught.value, CircuitOpenError)


def test_nothing_is_waited_for_once_the_circuit_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits as fal asked is woken when fal asks another for too much."""
    monkeypatch.setattr(client_module, "RETRY_AFTER_SECONDS", 90)
    waits = iter(["80", "100"])
    with (
        served(
            lambda _: Fault(status=429, headers={"retry-after": next(waits)}, delay_seconds=0.1)
        ) as sandbox,
        FalClient(settings_of(sandbox.url, rate=0)) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        begun = time.monotonic()
        failures = [
            one.exception(LONG)
            for one in [pool.submit(client.get, "/models", {}, read) for _ in range(2)]
        ]
        assert time.monotonic() - begun < LONG
    assert all(isinstance(one, CircuitOpenError) for one in failures)


def test_a_wait_that_leaves_no_hope_within_two_minutes_ends_the_asking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fal asks for counts, together with what went before."""
    monkeypatch.setattr(client_module, "GIVE_UP_SECONDS", 1.5)
    fault = Fault(status=429, headers={"retry-after": "1"})
    with served(always(fault)) as sandbox:
        with pytest.raises(CircuitOpenError, match="2 tries in a row failed") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == 2
    assert caught.value.facts["retry_after"] == 1


# --- Retry-After ----------------------------------------------------------------------------------


def in_seconds(seconds: float, form: str = "IMF") -> str:
    """A date so far ahead, in one of the three forms that HTTP knows."""
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    if form == "IMF":
        return format_datetime(at, usegmt=True)
    return at.strftime({"RFC 850": "%A, %d-%b-%y %H:%M:%S GMT", "asctime": "%a %b %d %H:%M:%S %Y"}[form])


@pytest.mark.parametrize(("value", "seconds"), [("1.2", 2), ("a date", 1)])
def test_no_thread_asks_earlier_than_fal_said(
    value: str, seconds: int, caplog: pytest.LogCaptureFixture
) -> None:
    times: list[float] = []

    def hook(_: Request) -> Fault:
        times.append(time.monotonic())
        if len(times) > 1:
            return Fault(body=BODY)
        if value != "a date":
            return Fault(status=429, headers={"retry-after": value})
        behind = -4 * 60  # seconds of fal's clock behind ours; not enough for a warning
        return Fault(
            status=429,
            headers={"retry-after": in_seconds(behind + seconds), "date": in_seconds(behind)},
        )

    with (
        served(hook) as sandbox,
        FalClient(settings_of(sandbox.url)) as client,
        ThreadPoolExecutor() as pool,
    ):
        held = pool.submit(client.get, "/models", {}, read)
        wait_until(lambda: "trying again" in caplog.text)
        others = [pool.submit(client.get, "/models", {}, read) for _ in range(3)]
        for future in (held, *others):
            assert future.result(LONG)[1] == 1
    assert len(times) == 5
    assert min(times[1:]) - times[0] >= seconds
    assert "/models: fal answered 429 to /models: " in caplog.text
    assert f"; trying again in {seconds}.0 s (more slowly)" in caplog.text


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("1.5", 2), ("0.001", 1), ("99999999999", 99999999999)]
)
def test_a_wait_that_is_too_long_is_given_up_at_once_naming_its_seconds(
    value: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_AFTER_SECONDS", 0)
    with served(always(Fault(status=429, headers={"retry-after": value}))) as sandbox:
        with pytest.raises(CircuitOpenError, match=rf"\b{seconds} s\b.*Z\)") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == 1
    assert caught.value.facts["retry_after"] == seconds


def test_the_longest_wait_that_is_taken_is_that_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "RETRY_AFTER_SECONDS", 1)
    for asked, requests in ((1, 2), (2, 1)):
        fault = Fault(status=503, headers={"retry-after": str(asked)})
        with served(first(1, fault)) as sandbox:
            with suppress(ApiUnavailableError):
                ask(sandbox.url)
            assert len(sandbox.requests) == requests


@pytest.fixture
def _far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "America/Los_Angeles")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_far_from_utc")
@pytest.mark.parametrize("form", ["IMF", "RFC 850", "asctime"])
@pytest.mark.parametrize("ahead", [None, -86_400, 86_400])
def test_a_date_to_come_back_is_one_of_fals_clock_in_utc_in_each_of_its_forms(
    form: str, ahead: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_AFTER_SECONDS", 0)
    headers = {
        "retry-after": in_seconds((ahead or 0) + 1800, form),
        "date": "" if ahead is None else in_seconds(ahead, form),
    }
    fault = Fault(status=429, headers=headers)
    with served(always(fault)) as sandbox, pytest.raises(ApiUnavailableError) as caught:
        ask(sandbox.url)
    assert isinstance(caught.value.facts["retry_after"], int)
    assert 1800 - LONG < caught.value.facts["retry_after"] <= 1800


@pytest.mark.parametrize(
    "value",
    ["0", "-5", "-0.5", "abc", "nan", "inf", "-inf", "1,5", "0x10", "Sun, 99 Foo 2026 99:99:99 GMT",
     *(in_seconds(-3600, form) for form in ("IMF", "RFC 850", "asctime"))],
    ids=["zero", "negative", "negative fraction", "word", "nan", "inf", "-inf", "comma", "hex",
         "no date", "past IMF", "past RFC 850", "past asctime"],
)  # fmt: skip
def test_a_wait_that_means_nothing_is_taken_for_none(
    value: str, caplog: pytest.LogCaptureFixture
) -> None:
    with served(first(2, Fault(status=429, headers={"retry-after": value}))) as sandbox:
        assert ask(sandbox.url)[0].body == BODY
        assert len(sandbox.requests) == 3
    assert "trying again in 0.0 s" in caplog.text
    assert "asks for a retry" not in caplog.text


def test_an_empty_retry_after_is_taken_for_none() -> None:
    def busy(connection: socket.socket) -> None:
        connection.sendall(head("Retry-After: ", "Content-Length: 0", status="429 Busy"))

    with RawServer(busy, good) as server:
        assert ask(server.url)[0].body == BODY


def test_requests_of_all_threads_together_keep_to_the_rate() -> None:
    with (
        served(always(Fault(body=BODY))) as sandbox,
        FalClient(settings_of(sandbox.url, rate=20)) as client,
        ThreadPoolExecutor() as pool,
    ):
        begun = time.monotonic()
        for future in [pool.submit(client.get, "/models", {}, read) for _ in range(11)]:
            future.result(LONG)
    assert time.monotonic() - begun >= 10 / 20


# --- What is sent, and where to -------------------------------------------------------------------


def test_the_key_is_sent_in_one_header_and_nowhere_else() -> None:
    with RawServer(good) as server:
        ask(server.url)
    (sent,) = server.heads
    assert sent.startswith(b"GET /v1/models HTTP/1.1\r\n")
    lines = [line for line in sent.split(b"\r\n") if SECRET.encode() in line]
    assert [line.partition(b": ")[2] for line in lines] == [f"Key {KEY}".encode()]
    assert lines[0].lower().startswith(b"authorization:")


def test_no_header_is_sent_for_a_key_that_is_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(netrc))
    with RawServer(good) as server:
        ask(server.url, key=None)
    assert b"authorization" not in server.heads[0].lower()


def test_the_metrics_key_is_sent_for_metrics_only() -> None:
    given = settings_of("http://127.0.0.1", metrics_key=FULL_KEY)
    with (
        served(always(Fault(body=BODY))) as sandbox,
        FalClient(given.model_copy(update={"api_url": sandbox.url})) as client,
    ):
        client.get("/models", {}, read)
        client.get("/models", {}, read, metrics=True)
    sent = [request.headers["authorization"] for request in sandbox.requests]
    assert sent == [f"Key {KEY}", f"Key {FULL_KEY}"]


def test_parameters_arrive_as_they_were_given() -> None:
    params: Params = {"expand": ("summary", "time_series"), "q": "a+b &=%41/é 🂡", "cursor": ""}
    with served(always(Fault(body=BODY))) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        client.get("/models", params, read)
    assert sandbox.requests[0].query == {
        "expand": ["summary", "time_series"],
        "q": ["a+b &=%41/é 🂡"],
        "cursor": [""],
    }


def test_a_question_too_long_for_a_url_is_a_typed_error_and_not_asked() -> None:
    for params in ({"cursor": "c" * 70_000}, {"endpoint_id": ("🂡" * 300,) * 50}):
        with served(always(Fault(body=BODY))) as sandbox, FalClient(settings_of(sandbox.url)) as client:
            with pytest.raises(ContractError, match="too long for a URL"):
                client.get("/models", params, read)
            assert sandbox.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location",
    ["{other}", "//{address}/v1/models", "{same}", "/v1/models", "", "http://[", "file:///etc/passwd"],
)
def test_a_redirect_is_refused_and_the_key_goes_nowhere(status: int, location: str) -> None:
    with RawServer(good) as other, served(lambda request: fault) as sandbox:
        to = location.format(
            other=f"{other.url}/models", address=other.address, same=f"{sandbox.url}/models"
        )
        fault = Fault(status=status, headers={"location": to}, body=b"")
        with pytest.raises(ContractError, match="redirect"):
            ask(sandbox.url)
        assert len(sandbox.requests) == 1
    assert other.heads == []


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(good) as proxy, served(always(Fault(body=BODY))) as sandbox:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
            monkeypatch.setenv(name.lower(), f"http://{proxy.address}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        ask(sandbox.url)
        assert len(sandbox.requests) == 1
    assert proxy.heads == []


def test_a_proxy_that_was_set_is_used() -> None:
    with RawServer(good) as proxy:
        ask("http://127.0.0.1:9/v1", proxy=f"http://{proxy.address}")
    assert proxy.heads[0].startswith(b"GET http://127.0.0.1:9/v1/models HTTP/1.1\r\n")


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def tls_of(
    authority: trustme.CA, name: str = "127.0.0.1", not_after: datetime | None = None
) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    not_before = not_after and not_after - timedelta(days=9)
    issued = authority.issue_cert(name, not_before=not_before, not_after=not_after)
    issued.configure_cert(context)
    return context


def test_a_server_that_the_given_authority_vouches_for_is_trusted(
    authority: trustme.CA, ca_file: Path
) -> None:
    with RawServer(good, tls=tls_of(authority)) as server:
        assert ask(server.url, ca_file=ca_file)[0].body == BODY
    assert f"Key {KEY}".encode() in server.heads[0]


def test_a_secured_connection_that_breaks_is_tried_again(authority: trustme.CA, ca_file: Path) -> None:
    faults = (reset_in_the_body, close_at_once, cut_between_chunks)
    with RawServer(*faults, good, tls=tls_of(authority)) as server:
        assert ask(server.url, ca_file=ca_file)[0].body == BODY
        assert len(server.heads) == 4


def unknown(authority: trustme.CA) -> ssl.SSLContext:
    return tls_of(trustme.CA())


def for_another_host(authority: trustme.CA) -> ssl.SSLContext:
    return tls_of(authority, "api.fal.ai")


def expired(authority: trustme.CA) -> ssl.SSLContext:
    return tls_of(authority, not_after=datetime.now(UTC) - timedelta(days=1))


def outdated(authority: trustme.CA) -> ssl.SSLContext:
    context = tls_of(authority)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def test_a_server_that_only_speaks_outdated_tls_never_sees_the_key(
    authority: trustme.CA, ca_file: Path
) -> None:
    with (
        RawServer(good, tls=outdated(authority)) as server,
        pytest.raises(ApiUnavailableError, match=r"(?i)protocol"),
    ):
        ask(server.url, ca_file=ca_file)
    assert server.heads == []


@pytest.mark.parametrize("context", [unknown, for_another_host, expired])
def test_a_server_that_cannot_prove_itself_never_sees_the_key(
    context: Callable[[trustme.CA], ssl.SSLContext], authority: trustme.CA, ca_file: Path
) -> None:
    with (
        RawServer(good, tls=context(authority)) as server,
        pytest.raises(ApiUnavailableError, match="certificate") as caught,
    ):
        ask(server.url, ca_file=ca_file)
    assert server.heads == []
    assert caught.value.facts["cause"] == "certificate"


def test_an_authority_is_trusted_only_where_it_was_given(authority: trustme.CA) -> None:
    with (
        RawServer(good, tls=tls_of(authority)) as server,
        pytest.raises(ApiUnavailableError, match="certificate"),
    ):
        ask(server.url)
    assert server.heads == []


# --- Sizes and encodings --------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["br", "zstd", "deflate", "compress", "gzip, gzip", "gzip, br", "x"])
def test_an_encoding_that_was_not_asked_for_is_refused(coding: str) -> None:
    fault = Fault(headers={"content-encoding": coding}, body=GZIPPED)
    with served(always(fault)) as sandbox:
        with pytest.raises(ContractError, match="encoding") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == 1
        assert caught.value.facts["request_id"] == sandbox.requests[0].request_id
        assert sandbox.requests[0].headers["accept-encoding"] == "gzip"
    assert caught.value.facts["status"] == 200


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZip", "identity", "Identity"])
def test_encodings_that_are_known_are_decoded(coding: str) -> None:
    body = BODY if "identity" in coding.lower() else GZIPPED
    fault = Fault(headers={"content-encoding": coding}, body=body)
    with served(always(fault)) as sandbox:
        assert ask(sandbox.url)[0].body == BODY


@pytest.mark.parametrize("coding", ["gzip", "identity"])
@pytest.mark.parametrize("length", [0, 10, 300_000])
def test_an_answer_may_be_as_large_as_the_settings_say_and_no_byte_larger(
    coding: str, length: int
) -> None:
    body = BODY + b" " * length
    sent = gzip.compress(body) if coding == "gzip" else body
    fault = Fault(headers={"content-encoding": coding}, body=sent)
    with served(always(fault)) as sandbox:
        assert ask(sandbox.url, max_body=len(body))[0].body == body
        with pytest.raises(ContractError, match="FALETL_MAX_BODY"):
            ask(sandbox.url, max_body=len(body) - 1)
        assert len(sandbox.requests) == 2


def bomb() -> bytes:
    """Some 300 KB that unpack to 300 MiB."""
    packer = zlib.compressobj(9, wbits=31)
    first, again = (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * 299


def garbage() -> bytes:
    """A whole gzip body, and much behind it."""
    return GZIPPED + bytes(120 * 2**20)


@pytest.mark.parametrize(
    ("body", "said"),
    [(bomb, "larger than 67,108,864 bytes"), (garbage, "followed by other bytes")],
)
def test_a_huge_body_is_refused_in_little_more_memory_than_the_largest_takes(
    body: Callable[[], bytes], said: str
) -> None:
    fault = Fault(headers={"content-encoding": "gzip"}, body=body())
    with (
        served(always(fault)) as sandbox,
        FalClient(settings_of(sandbox.url), Patience(1, LONG, 0)) as client,
    ):
        tracemalloc.start()
        try:
            with pytest.raises(ContractError, match=said):
                client.get("/models", {}, read)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(sandbox.requests) == 1
    assert peak < 100 * 2**20


@pytest.mark.parametrize("speak", [flood_of_headers, one_huge_header])
def test_a_flood_of_headers_takes_little_memory(speak: Speak) -> None:
    with (
        RawServer(speak) as server,
        FalClient(settings_of(server.url), Patience(1, LONG, 0)) as client,
    ):
        tracemalloc.start()
        try:
            with pytest.raises(ApiUnavailableError):
                client.get("/models", {}, read)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 8 * 2**20


def test_a_refusal_with_a_huge_body_is_refused_too() -> None:
    fault = Fault(status=500, body=b"x" * 2**20)
    with served(always(fault)) as sandbox, pytest.raises(ContractError, match="FALETL_MAX_BODY"):
        ask(sandbox.url, max_body=2**19)


# --- Slow servers, and being stopped --------------------------------------------------------------


def drip(text: bytes, lead: bytes = b"") -> Speak:
    def speak(connection: socket.socket) -> None:
        connection.sendall(lead)
        for position in range(len(text)):
            connection.sendall(text[position : position + 1])
            time.sleep(0.05)

    return speak


def hang(connection: socket.socket) -> None:
    connection.recv(1)


def hang_in_the_body(connection: socket.socket) -> None:
    connection.sendall(head(f"Content-Length: {len(BODY)}") + BODY[:20])
    connection.recv(1)


def hint_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(head(status="103 Early Hints"))
        time.sleep(0.01)


SLOW = [
    pytest.param(hint_for_ever, id="hints"),
    pytest.param(drip(b" " * 400, head("Content-Length: 400")), id="body"),
    pytest.param(drip(b"1\r\n \r\n" * 70, head("Transfer-Encoding: chunked")), id="chunks"),
    pytest.param(drip(head(f"X-Filler: {'x' * 400}")), id="head"),
]


@pytest.mark.parametrize("speak", SLOW)
def test_a_drip_is_ended_by_the_deadline_of_the_whole_request(
    speak: Speak, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "DEADLINE_SECONDS", 0.3)
    monkeypatch.setattr(client_module, "TRIES", 2)
    with RawServer(speak) as server:
        begun = time.monotonic()
        with pytest.raises(ApiUnavailableError, match=r"no complete answer within 0 s|timed out"):
            ask(server.url)
        assert time.monotonic() - begun < LONG
        assert len(server.heads) == 2


def test_a_connection_that_is_never_taken_is_ended_by_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "DEADLINE_SECONDS", 0.3)
    monkeypatch.setattr(client_module, "TRIES", 2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        with ExitStack() as waiting:
            for _ in range(4):  # more than the queue takes: the others are never answered
                one = waiting.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(address)
            begun = time.monotonic()
            with pytest.raises(ApiUnavailableError) as caught:
                ask(f"http://{address[0]}:{address[1]}/v1")
            assert time.monotonic() - begun < LONG
    assert caught.value.facts["cause"] == "timeout"


@pytest.mark.parametrize("speak", [hang, hang_in_the_body])
def test_a_silent_server_is_given_up(speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "READ_SECONDS", 0.1)
    monkeypatch.setattr(client_module, "TRIES", 2)
    with RawServer(speak) as server:
        begun = time.monotonic()
        with pytest.raises(ApiUnavailableError):
            ask(server.url)
        assert time.monotonic() - begun < LONG
        assert len(server.heads) == 2


def test_a_server_that_is_silent_before_the_connection_is_secured_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(client_module, "TRIES", 2)
    with RawServer(hang) as server:
        begun = time.monotonic()
        with pytest.raises(ApiUnavailableError) as caught:
            ask(f"https://{server.address}/v1")
        assert time.monotonic() - begun < LONG
    assert caught.value.facts["cause"] == "timeout"


def test_a_deadline_is_that_of_one_try_and_not_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "DEADLINE_SECONDS", 1.0)
    slow_and_cut = drip(b" " * 8, head("Content-Length: 9"))  # 0.4 seconds
    with RawServer(slow_and_cut, slow_and_cut, slow_and_cut, good) as server:
        assert ask(server.url)[0].body == BODY


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize("speak", [hang, hang_in_the_body, *SLOW])
def test_a_client_that_is_stopped_ends_what_is_under_way_and_asks_no_more(
    speak: Speak, is_secured: bool, authority: trustme.CA, ca_file: Path
) -> None:
    with (
        RawServer(speak, tls=tls_of(authority) if is_secured else None) as server,
        FalClient(settings_of(server.url, ca_file=ca_file)) as client,
        ThreadPoolExecutor() as pool,
    ):
        futures = [pool.submit(client.get, "/models", {}, read) for _ in range(3)]
        wait_until(lambda: len(server.heads) == 3)
        begun = time.monotonic()
        client.stop()
        for future in futures:
            with pytest.raises(StoppedError):
                future.result(LONG)
        assert time.monotonic() - begun < LONG / 2
        with pytest.raises(StoppedError):
            client.get("/models", {}, read)
        assert len(server.heads) == 3


def test_a_client_that_is_stopped_waits_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    fault = Fault(status=429, headers={"retry-after": "100"})
    with (
        served(always(fault)) as sandbox,
        FalClient(settings_of(sandbox.url)) as client,
        ThreadPoolExecutor() as pool,
    ):
        futures = [pool.submit(client.get, "/models", {}, read)]
        wait_until(lambda: "trying again" in caplog.text)
        futures.append(pool.submit(client.get, "/models", {}, read))  # held by the same word
        begun = time.monotonic()
        client.stop()
        for future in futures:
            with pytest.raises(StoppedError):
                future.result(LONG)
        assert time.monotonic() - begun < LONG / 2
        assert len(sandbox.requests) == 1


# --- What is told ---------------------------------------------------------------------------------

ECHOES = {
    "whole": f"bad header Authorization: Key {KEY}",
    "secret": f"no such secret {SECRET}",
    "percent-encoded": f"GET /?key={quote(KEY, safe='')}",
    "base64": f"Basic {base64.b64encode(KEY.encode()).decode()}",
    "base64 of the header": f"{base64.b64encode(f'Key {KEY}'.encode()).decode()}",
}


def assert_nothing_told(error: BaseException, caplog: pytest.LogCaptureFixture, echo: str) -> None:
    told = f"{error}\n{error!r}\n{caplog.text}"
    if isinstance(error, FaletlError):
        told += json.dumps(error.as_dict())
    assert KEY not in told
    assert SECRET not in told
    word = echo.split()[-1]
    assert not any(word[first : first + 12] in told for first in range(len(word) - 11))


@pytest.mark.parametrize("status", [200, 401, 403, 404, 422, 500])
@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("is_enveloped", [True, False])
def test_an_error_never_shows_the_key_that_fal_echoed(
    status: int, echo: str, is_enveloped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="faletl")
    message = json.dumps({"error": {"message": echo}}) if is_enveloped else echo
    with (
        served(always(Fault(status=status, body=message.encode()))) as sandbox,
        pytest.raises(FaletlError) as caught,
    ):
        ask(sandbox.url)
    assert_nothing_told(caught.value, caplog, echo)


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_a_transport_error_never_shows_the_key_that_was_echoed(
    echo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="faletl")

    def speak(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 what? {echo}\r\n\r\n".encode())

    with RawServer(speak) as server, pytest.raises(ApiUnavailableError) as caught:
        ask(server.url)
    assert_nothing_told(caught.value, caplog, echo)


def test_what_fal_says_is_quoted_short_on_one_line_and_printable() -> None:
    said = "first\nERROR fake log line\r\x1b[31mred\x00\u202e" + "é" * 1000
    fault = Fault(status=422, body=json.dumps({"error": {"message": said}}).encode())
    with served(always(fault)) as sandbox, pytest.raises(ContractError) as caught:
        ask(sandbox.url)
    told = str(caught.value)
    assert told.isprintable()
    assert told.isascii()
    assert "first\\nERROR" in told
    assert len(told) < 2500


def test_of_an_answer_that_is_no_json_only_the_beginning_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompt = "a portrait of Ann Example, 12 Private Road\n" * 100
    body = json.dumps({"models": [{"endpoint_id": prompt}]}).encode()[:-1]
    with served(always(Fault(body=body))) as sandbox, pytest.raises(ContractError) as caught:
        ask(sandbox.url)
    for told in (str(caught.value), *(record.getMessage() for record in caplog.records)):
        assert told.count("Private Road") <= 2
        assert len(told) < 500


@pytest.mark.parametrize("label", ["text/html; charset=utf-8", "application/octet-stream", "\x1b[31m"])
def test_an_answer_with_a_wrong_label_is_taken_and_told_once(
    label: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(headers={"content-type": label}, body=BODY)
    with served(always(fault)) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        for _ in range(2):
            assert client.get("/models", {}, read)[1] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"labelled its response to /models as {label!a}; it parses as JSON" in caplog.text


@pytest.mark.parametrize("label", ["", "application/json; charset=utf-8", "application/problem+JSON"])
def test_an_answer_with_a_right_label_or_none_is_not_told(
    label: str, caplog: pytest.LogCaptureFixture
) -> None:
    with served(always(Fault(headers={"content-type": label}, body=BODY))) as sandbox:
        ask(sandbox.url)
    assert caplog.records == []


ODD_HEADS = [
    head("Content-Length: -1"), head("Content-Length: 1, 2"), head("Content-Length: 9" * 3),
    head("Content-Length: 5", "Transfer-Encoding: chunked"), head("Transfer-Encoding: gzip, chunked"),
    head("Date: 0 0 0 0 0", "Content-Length: 0"), head("Connection: upgrade", status="101 Switching"),
    head("Date: Mon, 01 Jan 99999 00:00:00 +9999999", "Retry-After: Mon, 01 Jan 0000 00:00:00 GMT",
         "Content-Length: 0", status="429 Busy"),
    head("Retry-After: " + "9" * 5000, "Content-Length: 0", status="503 Busy"),
    head("Retry-After: 1e308", "Content-Length: 0", status="503 Busy"),
    head("Content-Length: 0", status="999 Odd"), head(status="20 Short"), head(status="abc"),
    head("X-Request-Id: \x1b[31m\u202e", "Content-Length: 0", status="422 No"),
    b"HTTP/1.1 422 \xff\xfe\r\nX-Fal-Request-Id: \xff\xfe\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n : \r\n\r\n", b"HTTP/2 200\r\n\r\n", b"\x00" * 70_000, b"\n" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("sent", ODD_HEADS, ids=range(len(ODD_HEADS)))
def test_any_head_of_an_answer_ends_in_a_typed_error(sent: bytes) -> None:
    def speak(connection: socket.socket) -> None:
        connection.sendall(sent)

    with (
        RawServer(speak) as server,
        FalClient(settings_of(server.url), Patience(1, LONG, 0, 0)) as client,
        pytest.raises(FaletlError) as caught,
    ):
        client.get("/models", {}, read)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"error": []}', b'{"error": {"message": null}}', b"null",
     b'{"error": {"message": "\\ud800"}}', b"9" * 9_999],
    ids=["empty", "bytes", "nested", "list", "null message", "null", "surrogate", "number"],
)  # fmt: skip
def test_a_refusal_in_any_words_is_a_typed_error(body: bytes) -> None:
    with served(always(Fault(status=422, body=body))) as sandbox:
        with pytest.raises(ContractError, match="422") as caught:
            ask(sandbox.url)
        assert len(sandbox.requests) == 1
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("minutes", [-600, -6, 6, 600])
def test_clocks_that_are_far_apart_are_told_once(minutes: int, caplog: pytest.LogCaptureFixture) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    fault = Fault(headers={"date": date}, body=BODY)
    with served(always(fault)) as sandbox, FalClient(settings_of(sandbox.url)) as client:
        for _ in range(3):
            client.get("/models", {}, read)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "clock" in caplog.text
    assert client.clock_skew_seconds == pytest.approx(abs(minutes) * 60, abs=LONG)


@pytest.mark.parametrize("date", ["", "yesterday", "0", "Sun, 99 Foo 2026 99:99:99 GMT"])
def test_clocks_that_agree_or_are_not_told_are_not_warned_of(
    date: str, caplog: pytest.LogCaptureFixture
) -> None:
    with served(always(Fault(headers={"date": date}, body=BODY))) as sandbox:
        ask(sandbox.url)
    with served(always(Fault(body=BODY))) as sandbox:
        ask(sandbox.url)
    assert caplog.records == []
