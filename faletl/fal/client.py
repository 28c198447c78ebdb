"""HTTP with fal: the key, timeouts, one deadline for each request, retries, size limits, errors.

A request either returns the whole decoded body of a 200, proven complete as far as transport can
prove it, or raises a typed error. This module does not interpret the body.
"""

from __future__ import annotations

import email.utils
import json
import logging
import math
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from typing import TypeVar

import httpx
import tenacity

from faletl import __version__, invented
from faletl.config import Settings
from faletl.errors import (
    AccountLockedError,
    ApiUnavailableError,
    CircuitOpenError,
    ContractError,
    CursorRefusedError,
    Fact,
    FaletlError,
    KeyRefusedError,
    MalformedAnswerError,
    NotFoundError,
    WebPageError,
)
from faletl.fal.bodies import chain, forget_frames, one_body, passed_on, take_turn
from faletl.fal.limiter import MAX_FAILURES, TOO_MANY_REQUESTS, Limiter, Patience
from faletl.fal.transport import (
    DeadlineBackend,
    StoppedError,
    current_deadline,
    extend_deadline,
    transport,
)
from faletl.wire import MalformedBodyError, Params

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
DEADLINE_SECONDS = 120.0
TRIES = 6
BACKOFF_SECONDS = 20.0  # the longest wait that we choose ourselves
RETRY_AFTER_SECONDS = 120  # the longest wait that fal may ask for; beyond it the run stops asking
GIVE_UP_SECONDS = 120.0  # without any answer from fal, after which the run stops asking
CLOCK_SKEW_SECONDS = 300.0
LOCKED = "User is locked"  # how fal's message begins then (docs/fal-api.md, "Errors")
QUOTED_CHARACTERS = 300  # of fal's message of an error
SHOWN_CHARACTERS = 80  # of a text that may be data
CHUNK_BYTES = 2**20  # a packed body is unpacked in chunks of at most this size
KEPT_OF_REFUSAL = 2**16  # bytes of the body of a status other than 200; no more of it is ever shown

_CHATTY = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy")
"""Loggers that log all headers of an answer, in which fal may echo the key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete, decoded body that fal sent with status 200; a key that fal echoed is redacted.

    `date` is the time of the answer by fal's clock, if fal sent it.
    """

    body: bytes
    request_id: str | None
    date: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    """The content of a request, and whether it uses the metrics key."""

    method: str
    path: str
    params: Params = field(default_factory=dict)
    metrics: bool = False
    body: bytes | None = None


class FalClient:
    """One keep-alive connection pool to fal, shared by all threads of a run, with one limiter.

    It has FALETL_PARALLEL connections: a thread takes one of the `turns` before it asks for the pages of
    a window.

    Raises from every request: KeyRefusedError (401, 403), AccountLockedError, NotFoundError (404),
    ContractError (any other refusal, a redirect, an answer that does not match the request),
    ApiUnavailableError (network, 5xx, after `TRIES` tries, or those of the `patience` passed in),
    CircuitOpenError (fal no longer answers, or asks for too long a wait).
    """

    clock_skew_seconds: float | None = None
    """The difference between this machine's clock and fal's; set once it is too large."""

    is_sandbox = False
    """Whether the newest answer, or refusal, had the header of a sandbox."""

    _has_warned_of_label = False

    def __init__(self, settings: Settings, patience: Patience | None = None) -> None:
        self._settings = settings
        self._patience = patience or Patience(
            TRIES, DEADLINE_SECONDS, RETRY_AFTER_SECONDS, GIVE_UP_SECONDS, BACKOFF_SECONDS
        )
        self._limiter = Limiter(settings.rate, self._patience)
        self.turns = threading.BoundedSemaphore(settings.parallel)
        self._stop = threading.Event()
        self._wake = threading.Event()  # set when threads must not sleep any longer
        self._backend = DeadlineBackend(self._stop)
        self._http = httpx.Client(
            transport=transport(settings, self._backend),
            headers={
                "user-agent": f"faletl/{__version__}",
                "accept": "application/json",
                "accept-encoding": "gzip",
            },
            follow_redirects=False,
            event_hooks={"response": [_forget_location]},
            trust_env=False,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        )
        for name in _CHATTY:
            logging.getLogger(name).addFilter(self._hide)

    def __enter__(self) -> FalClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        for name in _CHATTY:
            logging.getLogger(name).removeFilter(self._hide)

    def stop(self) -> None:
        """End every running request at once, from another thread; no new one can begin."""
        self._stop.set()
        self._wake.set()
        self._backend.shut_down()

    def require_open(self) -> None:
        """Raise StoppedError or CircuitOpenError if no more requests may be sent."""
        if self._stop.is_set():
            raise StoppedError
        if circuit := self._limiter.circuit:
            raise CircuitOpenError(circuit.message, **circuit.facts)  # each thread adds its own place

    def get(
        self, path: str, params: Params, read: Callable[[bytes], T], *, metrics: bool = False
    ) -> tuple[Answer, T]:
        """Ask until `read` accepts the body of an answer; return the answer and the result of `read`.

        `read` raises MalformedBodyError for a body that is worth asking for again, ContractError for one
        that would be the same again.
        """
        return self._ask(_Question("GET", path, params, metrics), read)

    def post(self, path: str, body: bytes, read: Callable[[bytes], T]) -> tuple[Answer, T]:
        """Send a JSON body as `get` does. The request must change nothing, as it may be sent again."""
        return self._ask(_Question("POST", path, body=body), read)

    def _ask(self, question: _Question, read: Callable[[bytes], T]) -> tuple[Answer, T]:
        tries = _Tries(self._patience)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_worth_a_retry),
            stop=tries.are_over,
            wait=tries.pause,
            sleep=self._sleep,
            before_sleep=lambda state: self._report_retry(question.path, tries, state),
            reraise=True,
        )
        with one_body():
            answer: tuple[Answer, T] = retrying(self._try, question, read, tries)
            return answer

    def _try(self, question: _Question, read: Callable[[bytes], T], tries: _Tries) -> tuple[Answer, T]:
        """Ask once, when it is our turn, and report the result to the limiter."""
        request = self._request(question)
        while wait := self._limiter.turn():
            self._sleep(wait)
        self.require_open()
        sent_at = self._limiter.now()
        try:
            with passed_on():
                answer = self._send(question, request, read)
        except (ApiUnavailableError, MalformedAnswerError) as error:
            tries.is_first_failure = self._limiter.failed(sent_at, error)
            if self._limiter.circuit:
                self._wake.set()
                self.require_open()
            raise
        except FaletlError:  # a refusal is an answer as well
            self._limiter.answered(sent_at)
            raise
        self._limiter.answered(sent_at)
        return answer

    def _request(self, question: _Question) -> httpx.Request:
        try:
            return self._http.build_request(
                question.method,
                self._settings.api_url + question.path,
                params=[(name, v) for name, values in question.params.items() for v in _each(values)],
                content=question.body,
                headers=self._headers(question),
            )
        except httpx.InvalidURL:
            raise ContractError(
                f"the request to {question.path} is too long for a URL: the cursor or the endpoint ids "
                "that fal gave are not valid"
            ) from None

    def _send(
        self, question: _Question, request: httpx.Request, read: Callable[[bytes], T]
    ) -> tuple[Answer, T]:
        request_id: str | None = None
        seconds = self._patience.deadline_seconds
        deadline = current_deadline.set((time.monotonic() + seconds, seconds))
        try:
            response = self._http.send(request, stream=True)
            request_id = self._request_id(response)
            try:
                body = self._settings.redact_bytes(self._body(response))
            finally:
                response.close()
        except ContractError as error:
            raise error.at(request_id=request_id, status=response.status_code) from None
        except (httpx.TransportError, OSError) as error:
            if self._stop.is_set():
                raise StoppedError from None
            reason = self._settings.redact(str(error)) or type(error).__name__
            forget_frames(error)  # they contain the request as it was sent
            raise ApiUnavailableError(
                f"fal could not be reached ({reason})",
                request_id=request_id,
                cause=_cause(error),
            ) from None
        finally:
            current_deadline.reset(deadline)
        date = _http_date(response.headers.get("date"))
        self._check_clock(date)
        self.is_sandbox = invented.HEADER in response.headers
        if response.status_code != httpx.codes.OK:
            raise self._refusal(question, response, body).at(request_id=request_id)
        try:
            result = read(body)
        except MalformedBodyError as error:
            kind = WebPageError if _is_html(body) else MalformedAnswerError
            raise kind(f"{error}; fal sent {self._quote(body, SHOWN_CHARACTERS)}").at(
                status=200, request_id=request_id
            ) from None
        except ContractError as error:
            raise error.at(request_id=request_id) from None
        self._check_label(question.path, response.headers.get("content-type", ""))
        return Answer(body, request_id, date), result

    def _headers(self, question: _Question) -> dict[str, str]:
        """Return the headers of a request; in a variable, tracebacks with locals would show the key."""
        key = self._settings.key_for(metrics=question.metrics)
        headers = {"authorization": f"Key {key}"} if key else {}
        if question.body is not None:
            headers["content-type"] = "application/json"
        return headers

    def _body(self, response: httpx.Response) -> bytes:
        """Return the decoded body. Its size is limited as it arrives; a cut gzip stream is an error.

        Of a refusal only the beginning is kept, because only a sentence of it is ever shown.
        """
        cap = int(self._settings.max_body)
        kept = cap if response.status_code == httpx.codes.OK else KEPT_OF_REFUSAL
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", "", "gzip", "x-gzip"):
            raise ContractError("fal answered in an encoding that was not asked for")
        gunzip = zlib.decompressobj(wbits=31) if "gzip" in coding else None
        body = BytesIO()  # one buffer: many small parts would stay in the heap of each thread
        size, is_empty = 0, True
        for received in response.iter_raw():
            is_empty = False
            for part in _unpacked(gunzip, received) if gunzip else (received,):
                size += len(part)
                if size > cap:
                    raise ContractError(
                        f"the response is larger than {cap:,} bytes; if that is expected, "
                        "raise FALETL_MAX_BODY"
                    )
                if size - len(part) < kept:
                    extend_deadline(take_turn(min(size, kept)))
                    body.write(part[: kept - size + len(part)])
        if gunzip and not is_empty and not gunzip.eof:
            raise MalformedAnswerError("the gzip body is incomplete")
        return body.getvalue()

    def _refusal(self, question: _Question, response: httpx.Response, body: bytes) -> FaletlError:
        """Return the error for an answer other than 200 (docs/fal-api.md, "Errors")."""
        path, status = question.path, response.status_code
        quote = self._quote(body)
        facts: dict[str, Fact] = {"status": status, "path": path}
        is_gateway = status == 403 and _is_html(body)
        if status == TOO_MANY_REQUESTS or status >= 500 or is_gateway:
            wait = _retry_after(response.headers)
            delay = f"; it asks for a retry in {wait} s" if wait else ""
            return ApiUnavailableError(
                f"fal answered {status} to {path}: {quote}{delay}", retry_after=wait, **facts
            )
        if status == 402 or (status in (401, 403) and quote.startswith(LOCKED)):
            return AccountLockedError(
                f"fal has locked the account, not the key ({status}: {quote})", **facts
            )
        if status in (401, 403):
            return KeyRefusedError(f"fal refused the key for {path} ({status}: {quote})", **facts)
        if 300 <= status < 400:
            return ContractError(
                f"fal answered {status}, a redirect, to {path}; faletl never follows one", **facts
            )
        if status == httpx.codes.NOT_FOUND:
            return NotFoundError(f"fal answered 404 to {path}: {quote}", **facts)
        if status == httpx.codes.BAD_REQUEST and "cursor" in question.params:
            return CursorRefusedError(f"fal refused its own cursor (400: {quote})", **facts)
        if 200 <= status < 300:
            return MalformedAnswerError(f"fal answered {status} without data to {path}", **facts)
        return ContractError(f"fal answered {status} to {path}: {quote}", **facts)

    def _quote(self, body: bytes, max_characters: int = QUOTED_CHARACTERS) -> str:
        """Return fal's message: short, on one line, printable, without the key."""
        text = body[:10_000].decode("utf-8", "replace")
        try:
            answer = json.loads(text)
            text = str(answer["error"]["message"] if "error" in answer else answer["detail"])
        except (ValueError, KeyError, TypeError, RecursionError):
            text = re.sub(r"<[^>]*>|\s+", " ", text)
        text = self._settings.redact(text).strip()[:max_characters]
        return ascii(text)[1:-1] if text else "nothing"

    def _request_id(self, response: httpx.Response) -> str | None:
        headers = response.headers
        request_id = headers.get("x-fal-request-id") or headers.get("x-request-id")
        return ascii(self._settings.redact(request_id))[1:-1][:100] if request_id else None

    def _hide(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._settings.redact(record.getMessage()), ()
        return True

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._wake.wait(seconds)
        self.require_open()

    def _report_retry(self, path: str, tries: _Tries, state: tenacity.RetryCallState) -> None:
        """Warn of the first failure in a row; the next ones, of all threads, have the same cause."""
        error = state.outcome.exception() if state.outcome else None
        progress = f"try {tries.count} of {tries.limit}" if tries.count else "more slowly"
        log.log(
            logging.WARNING if tries.is_first_failure else logging.DEBUG,
            "%s: %s; trying again in %.1f s (%s)",
            path, error, max(state.upcoming_sleep, self._limiter.seconds_to_wait()), progress,
        )  # fmt: skip

    def _check_label(self, path: str, label: str) -> None:
        if label and "json" not in label.lower() and not self._has_warned_of_label:
            self._has_warned_of_label = True
            log.warning("fal labelled its response to %s as %s; it parses as JSON, so it was accepted",
                        path, ascii(label[:SHOWN_CHARACTERS]))  # fmt: skip

    def _check_clock(self, at: datetime | None) -> None:
        if at is None or self.clock_skew_seconds is not None:
            return
        skew = abs((datetime.now(UTC) - at).total_seconds())
        if skew > CLOCK_SKEW_SECONDS:
            self.clock_skew_seconds = skew
            log.warning("this machine's clock differs from fal's by %.0f s; check NTP", skew)


class _Tries:
    """The tries of one request. A 429 does not count: it ends by itself, or with the whole run."""

    def __init__(self, patience: Patience) -> None:
        self.limit = patience.tries
        self.count = 0
        self.is_first_failure = False
        self._refused = 0
        self._longest_pause = patience.pause_seconds

    def are_over(self, state: tenacity.RetryCallState) -> bool:
        """Count the try that has just failed; return whether it was the last."""
        error = state.outcome.exception() if state.outcome else None
        is_refused = isinstance(error, FaletlError) and error.facts.get("status") == TOO_MANY_REQUESTS
        self._refused += is_refused
        self.count += not is_refused
        return self.count >= self.limit or self._refused >= MAX_FAILURES

    def pause(self, _: tenacity.RetryCallState) -> float:
        """Exponential back-off with full jitter. Where fal asks for a wait, the limiter waits."""
        if not self.count:
            return 0
        longest = min(self._longest_pause, 0.5 * 2**self.count)
        return random.uniform(longest / 4, longest)  # noqa: S311  # spreading load, not secrecy


def _is_worth_a_retry(error: BaseException) -> bool:
    is_passing = isinstance(error, (ApiUnavailableError, MalformedAnswerError))
    return is_passing and not isinstance(error, CircuitOpenError)


# The root cause of a transport error, the most specific first; any other is a broken connection.
_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "dns"),
    (ssl.SSLCertVerificationError, "certificate"),
    (ConnectionRefusedError, "refused"),
    (httpx.ProxyError, "proxy"),
    (httpx.TimeoutException, "timeout"),
    (TimeoutError, "timeout"),
)


def _cause(error: BaseException) -> str:
    """Return one word for why fal could not be reached: one of the above, or `connection`."""
    causes = chain(error)
    for kind, word in _CAUSES:
        if any(isinstance(cause, kind) for cause in causes):
            return word
    return "connection"


def _forget_location(response: httpx.Response) -> None:
    """Drop the target of a redirect, which httpx would parse even where it must not follow it."""
    response.headers.pop("location", None)


def _unpacked(gunzip: zlib._Decompress, received: bytes) -> Iterator[bytes]:
    """Unpack what was received, in chunks, because one byte may unpack to a thousand."""
    has_more = True
    while has_more:
        try:
            part = gunzip.decompress(received, CHUNK_BYTES)
        except zlib.error as error:
            raise MalformedAnswerError(f"the gzip body is damaged: {error}") from None
        if gunzip.unused_data:  # zlib would collect it, whatever its size
            raise MalformedAnswerError("the gzip body is followed by other bytes")
        yield part
        received = gunzip.unconsumed_tail
        has_more = bool(received) or len(part) == CHUNK_BYTES


_HTML = re.compile(rb"\s*+<")


def _is_html(body: bytes) -> bool:
    return _HTML.match(body) is not None


def _retry_after(headers: httpx.Headers) -> int | None:
    """Return the whole seconds to wait, rounded up, never negative; None where the header is not valid.

    The header is a number of seconds or an HTTP date in any of its three forms (RFC 9110, 10.2.3). A
    date is by fal's clock, which may differ from ours, so it counts from the date of the answer.
    """
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        at, sent = _http_date(value), _http_date(headers.get("date")) or datetime.now(UTC)
        seconds = (at - sent).total_seconds() if at else math.nan
    return max(0, math.ceil(seconds)) if math.isfinite(seconds) else None


def _http_date(value: str | None) -> datetime | None:
    if not value:
        return None
    try:
        at = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)  # the asctime form names no zone; it is UTC


def _each(values: str | tuple[str, ...]) -> tuple[str, ...]:
    return (values,) if isinstance(values, str) else values
