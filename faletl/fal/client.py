"""HTTP with fal: the key, timeouts, one deadline a request, retries, size caps, errors.

A request either returns the whole decoded body of a 200, proven complete as far as transport can
prove it, or raises a typed error. What the body means is not decided here.
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
GIVE_UP_SECONDS = 120.0  # how long fal may answer nothing before the run stops asking
CLOCK_SKEW_SECONDS = 300.0
LOCKED = "User is locked"  # how fal begins to say so (docs/fal-api.md, "Errors")
QUOTED_CHARACTERS = 300  # of what fal says of an error
SHOWN_CHARACTERS = 80  # of what may be data
PIECE = 2**20  # bytes to which a packed body is unpacked at a time
KEPT_OF_REFUSAL = 2**16  # bytes of the body of another status than 200; more of it is never shown

_CHATTY = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy")
"""Loggers that tell all headers of an answer, in which fal may echo the key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete, decoded body that fal sent with status 200, without the key should fal echo it.

    `date` is fal's clock when it answered, where it said so.
    """

    body: bytes
    request_id: str | None
    date: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    """What a request asks; whether it is one for the metrics key."""

    method: str
    path: str
    params: Params = field(default_factory=dict)
    metrics: bool = False
    body: bytes | None = None


class FalClient:
    """One keep-alive connection pool to fal, shared by all threads of a run, with one limiter.

    It has as many connections as FALETL_PARALLEL says: a thread takes one of the `turns` before it asks
    for the pages of a window.

    Raises from every request: KeyRefusedError (401, 403), AccountLockedError, NotFoundError (404),
    ContractError (any other refusal, a redirect, an answer that is not what was asked),
    ApiUnavailableError (network, 5xx, after `TRIES` tries, or those of a `patience` of one's own),
    CircuitOpenError (fal answers nothing any more, or asks for too long a wait).
    """

    clock_skew_seconds: float | None = None
    """How far this machine's clock and fal's are apart, once that was too far."""

    is_sandbox = False
    """Whether the newest answer, or refusal, had the mark of a sandbox."""

    _has_told_label = False

    def __init__(self, settings: Settings, patience: Patience | None = None) -> None:
        self._settings = settings
        self._patience = patience or Patience(
            TRIES, DEADLINE_SECONDS, RETRY_AFTER_SECONDS, GIVE_UP_SECONDS, BACKOFF_SECONDS
        )
        self._limiter = Limiter(settings.rate, self._patience)
        self.turns = threading.BoundedSemaphore(settings.parallel)
        self._stop = threading.Event()
        self._wake = threading.Event()  # set when no thread has a reason to sleep any more
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
        """End every request under way, from another thread, now; none can begin any more."""
        self._stop.set()
        self._wake.set()
        self._backend.shut_down()

    def require_open(self) -> None:
        """Raises StoppedError, or CircuitOpenError, where nothing may be asked any more."""
        if self._stop.is_set():
            raise StoppedError
        if circuit := self._limiter.circuit:
            raise CircuitOpenError(circuit.message, **circuit.facts)  # each thread adds its own place

    def get(
        self, path: str, params: Params, read: Callable[[bytes], T], *, metrics: bool = False
    ) -> tuple[Answer, T]:
        """Ask until fal answers with a body that `read` accepts; return both.

        `read` raises MalformedBodyError for a body worth asking for again, ContractError for one
        that would not get better.
        """
        return self._ask(_Question("GET", path, params, metrics), read)

    def post(self, path: str, body: bytes, read: Callable[[bytes], T]) -> tuple[Answer, T]:
        """The same for a question in a JSON body: one that changes nothing, as it may be asked again."""
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
        """Ask once, when it is our turn, and report to the limiter what came of it."""
        request = self._request(question)
        while wait := self._limiter.turn():
            self._sleep(wait)
        self.require_open()
        sent_at = self._limiter.now()
        try:
            with passed_on():
                found = self._send(question, request, read)
        except (ApiUnavailableError, MalformedAnswerError) as error:
            tries.is_first_failure = self._limiter.failed(sent_at, error)
            if self._limiter.circuit:
                self._wake.set()
                self.require_open()
            raise
        except FaletlError:  # a refusal is an answer, too
            self._limiter.answered(sent_at)
            raise
        self._limiter.answered(sent_at)
        return found

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
                f"a question to {question.path} is too long for a URL: the cursor or the endpoint ids "
                "that fal gave cannot be right"
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
            forget_frames(error)  # they hold the request as it was sent
            raise ApiUnavailableError(
                f"fal could not be reached ({reason})",
                request_id=request_id,
                cause=_cause(error),
            ) from None
        finally:
            current_deadline.reset(deadline)
        date = _http_date(response.headers.get("date"))
        self._watch_clock(date)
        self.is_sandbox = invented.HEADER in response.headers
        if response.status_code != httpx.codes.OK:
            raise self._refusal(question, response, body).at(request_id=request_id)
        try:
            found = read(body)
        except MalformedBodyError as error:
            kind = WebPageError if _is_html(body) else MalformedAnswerError
            raise kind(f"{error}; fal sent {self._quote(body, SHOWN_CHARACTERS)}").at(
                status=200, request_id=request_id
            ) from None
        except ContractError as error:
            raise error.at(request_id=request_id) from None
        self._watch_label(question.path, response.headers.get("content-type", ""))
        return Answer(body, request_id, date), found

    def _headers(self, question: _Question) -> dict[str, str]:
        """Made where they are sent: a variable with the key would show in tracebacks with locals."""
        key = self._settings.key_for(metrics=question.metrics)
        headers = {"authorization": f"Key {key}"} if key else {}
        if question.body is not None:
            headers["content-type"] = "application/json"
        return headers

    def _body(self, response: httpx.Response) -> bytes:
        """The decoded body; its size is capped while it is read, a cut gzip stream is an error.

        Of a refusal it is the beginning: only a sentence of it is ever shown.
        """
        cap = int(self._settings.max_body)
        kept = cap if response.status_code == httpx.codes.OK else KEPT_OF_REFUSAL
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("identity", "", "gzip", "x-gzip"):
            raise ContractError("fal answered in an encoding that was not asked for")
        gunzip = zlib.decompressobj(wbits=31) if "gzip" in coding else None
        body = BytesIO()  # one buffer: pieces of it would stay behind in the heap of each thread
        size, is_empty = 0, True
        for received in response.iter_raw():
            is_empty = False
            for part in _unpacked(gunzip, received) if gunzip else (received,):
                size += len(part)
                if size > cap:
                    raise ContractError(
                        f"the answer is larger than {cap:,} bytes; if so meant, raise FALETL_MAX_BODY"
                    )
                if size - len(part) < kept:
                    extend_deadline(take_turn(min(size, kept)))
                    body.write(part[: kept - size + len(part)])
        if gunzip and not is_empty and not gunzip.eof:
            raise MalformedAnswerError("the gzip body is not whole")
        return body.getvalue()

    def _refusal(self, question: _Question, response: httpx.Response, body: bytes) -> FaletlError:
        """The error that an answer other than 200 means (docs/fal-api.md, "Errors")."""
        path, status = question.path, response.status_code
        said = self._quote(body)
        facts: dict[str, Fact] = {"status": status, "path": path}
        is_gateway = status == 403 and _is_html(body)
        if status == TOO_MANY_REQUESTS or status >= 500 or is_gateway:
            wait = _retry_after(response.headers)
            told = f"; it asks to come back in {wait} s" if wait else ""
            return ApiUnavailableError(
                f"fal answered {status} to {path}: {said}{told}", retry_after=wait, **facts
            )
        if status == 402 or (status in (401, 403) and said.startswith(LOCKED)):
            return AccountLockedError(
                f"fal has locked the account, not the key ({status}: {said})", **facts
            )
        if status in (401, 403):
            return KeyRefusedError(f"fal refused the key for {path} ({status}: {said})", **facts)
        if 300 <= status < 400:
            return ContractError(
                f"fal answered {status}, a redirect, to {path}; faletl never follows one", **facts
            )
        if status == httpx.codes.NOT_FOUND:
            return NotFoundError(f"fal answered 404 to {path}: {said}", **facts)
        if status == httpx.codes.BAD_REQUEST and "cursor" in question.params:
            return CursorRefusedError(f"fal refused its own cursor (400: {said})", **facts)
        if 200 <= status < 300:
            return MalformedAnswerError(f"fal answered {status} without data to {path}", **facts)
        return ContractError(f"fal answered {status} to {path}: {said}", **facts)

    def _quote(self, body: bytes, most: int = QUOTED_CHARACTERS) -> str:
        """What fal said, short, on one line, printable, without the key."""
        text = body[:10_000].decode("utf-8", "replace")
        try:
            told = json.loads(text)
            text = str(told["error"]["message"] if "error" in told else told["detail"])
        except (ValueError, KeyError, TypeError, RecursionError):
            text = re.sub(r"<[^>]*>|\s+", " ", text)
        text = self._settings.redact(text).strip()[:most]
        return ascii(text)[1:-1] if text else "nothing"

    def _request_id(self, response: httpx.Response) -> str | None:
        headers = response.headers
        found = headers.get("x-fal-request-id") or headers.get("x-request-id")
        return ascii(self._settings.redact(found))[1:-1][:100] if found else None

    def _hide(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._settings.redact(record.getMessage()), ()
        return True

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._wake.wait(seconds)
        self.require_open()

    def _report_retry(self, path: str, tries: _Tries, state: tenacity.RetryCallState) -> None:
        """Warn of the first failure in a row; what follows it is the same for all threads."""
        error = state.outcome.exception() if state.outcome else None
        which = f"try {tries.made} of {tries.most}" if tries.made else "more slowly"
        log.log(
            logging.WARNING if tries.is_first_failure else logging.DEBUG,
            "%s: %s; trying again in %.1f s (%s)",
            path, error, max(state.upcoming_sleep, self._limiter.held()), which,
        )  # fmt: skip

    def _watch_label(self, path: str, said: str) -> None:
        if said and "json" not in said.lower() and not self._has_told_label:
            self._has_told_label = True
            log.warning("fal calls its answer to %s %s, but it is JSON and taken", path,
                        ascii(said[:SHOWN_CHARACTERS]))  # fmt: skip

    def _watch_clock(self, at: datetime | None) -> None:
        if at is None or self.clock_skew_seconds is not None:
            return
        skew = abs((datetime.now(UTC) - at).total_seconds())
        if skew > CLOCK_SKEW_SECONDS:
            self.clock_skew_seconds = skew
            log.warning("this machine's clock and fal's are %.0f s apart; which is right?", skew)


class _Tries:
    """The tries of one request. A 429 is none of them: it ends by itself, or with the whole run."""

    def __init__(self, patience: Patience) -> None:
        self.most = patience.tries
        self.made = 0
        self.is_first_failure = False
        self._refused = 0
        self._longest_pause = patience.pause_seconds

    def are_over(self, state: tenacity.RetryCallState) -> bool:
        """Count the try that has just failed; whether it was the last."""
        error = state.outcome.exception() if state.outcome else None
        is_refused = isinstance(error, FaletlError) and error.facts.get("status") == TOO_MANY_REQUESTS
        self._refused += is_refused
        self.made += not is_refused
        return self.made >= self.most or self._refused >= MAX_FAILURES

    def pause(self, _: tenacity.RetryCallState) -> float:
        """Exponential back-off with full jitter; what fal asks for, the limiter waits for."""
        if not self.made:
            return 0
        longest = min(self._longest_pause, 0.5 * 2**self.made)
        return random.uniform(longest / 4, longest)  # noqa: S311  # spreading load, not secrecy


def _is_worth_a_retry(error: BaseException) -> bool:
    is_passing = isinstance(error, (ApiUnavailableError, MalformedAnswerError))
    return is_passing and not isinstance(error, CircuitOpenError)


# What is at the bottom of a transport error, most telling first; all others are a broken connection.
_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "dns"),
    (ssl.SSLCertVerificationError, "certificate"),
    (ConnectionRefusedError, "refused"),
    (httpx.ProxyError, "proxy"),
    (httpx.TimeoutException, "timeout"),
    (TimeoutError, "timeout"),
)


def _cause(error: BaseException) -> str:
    """One word for why fal could not be reached: those above, or `connection`."""
    found = chain(error)
    for kind, word in _CAUSES:
        if any(isinstance(one, kind) for one in found):
            return word
    return "connection"


def _forget_location(response: httpx.Response) -> None:
    """A redirect is refused; httpx would look at where it leads even if it is not to be followed."""
    response.headers.pop("location", None)


def _unpacked(gunzip: zlib._Decompress, received: bytes) -> Iterator[bytes]:
    """What came, unpacked in pieces: a byte may unpack to a thousand, so never all of it at once."""
    more = True
    while more:
        try:
            part = gunzip.decompress(received, PIECE)
        except zlib.error as error:
            raise MalformedAnswerError(f"the gzip body is damaged: {error}") from None
        if gunzip.unused_data:  # zlib would collect it, whatever its size
            raise MalformedAnswerError("the gzip body has something behind it")
        yield part
        received = gunzip.unconsumed_tail
        more = bool(received) or len(part) == PIECE


_HTML = re.compile(rb"\s*+<")


def _is_html(body: bytes) -> bool:
    return _HTML.match(body) is not None


def _retry_after(headers: httpx.Headers) -> int | None:
    """Whole seconds to wait, rounded up, never negative; None when the header means nothing.

    The header is a number of seconds or an HTTP date in any of its three forms (RFC 9110, 10.2.3). A
    date is one of fal's clock, which may not agree with ours: it counts from that of the answer.
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
