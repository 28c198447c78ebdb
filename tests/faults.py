"""Ways in which one answer of fal can be broken, drawn by a seed: for long stories and chaos.

Each kind takes what fal would have answered and gives a `Fault` that the sandbox sends instead, over
real HTTP. A kind that no reader could notice by looking at the answer is `silent`: it is only drawn for
feeds that have a control total.
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import msgspec

from faletl.sandbox import Fault, Request, Sandbox
from faletl.sandbox.server import Refusal, answer

PROVEN = ("/models/usage", "/models/billing-events")
BY_IDS = ("/models/pricing", "/models/analytics")
HTML = b"<html><body><h1>Back soon</h1></body></html>"
JSON = {"content-type": "application/json"}

Make = Callable[[Request, bytes, Random], Fault | None]


@dataclass(frozen=True)
class Kind:
    """One way to break an answer; None from `make` where it has nothing to break."""

    name: str
    make: Make
    is_silent: bool = False


def _status(status: int, body: bytes | None = None, **headers: str) -> Make:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _request, _body, _chance: Fault(status=status, body=body, headers=named)


def _where(is_meant: Callable[[Request], bool], make: Make) -> Make:
    return lambda request, body, chance: make(request, body, chance) if is_meant(request) else None


def _cut(_request: Request, body: bytes, chance: Random) -> Fault:
    return Fault(body=body, truncate_to=chance.randrange(len(body)))


def _cut_without_length(_request: Request, body: bytes, chance: Random) -> Fault:
    return Fault(body=body[: chance.randrange(len(body))], headers={"content-length": ""})


def _cut_chunks(_request: Request, body: bytes, chance: Random) -> Fault:
    part = body[: chance.randrange(1, 1 + len(body))]
    chunk = b"%x\r\n%s\r\n" % (len(part), part)
    return Fault(body=chunk, headers={"content-length": "", "transfer-encoding": "chunked"})


def _gzipped(change: Callable[[bytes], bytes]) -> Make:
    return lambda _request, body, _chance: Fault(
        body=change(gzip.compress(body, compresslevel=1)), headers={"content-encoding": "gzip"}
    )


def _mislabelled(_request: Request, body: bytes, _chance: Random) -> Fault:
    return Fault(body=body, headers={"content-encoding": "gzip"})


def _edited(edit: Callable[[bytes, Random], bytes]) -> Make:
    return lambda _request, body, chance: Fault(body=edit(body, chance))


def _envelope(**fields: object) -> Make:
    def make(request: Request, body: bytes, _chance: Random) -> Fault | None:
        envelope = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if "next_cursor" not in envelope:
            return None
        asked = request.query.get("cursor", [None])[0]
        if fields.get("next_cursor") == "asked" and asked is None:
            return None
        told = {k: asked if v == "asked" else v for k, v in fields.items()}
        return Fault(body=msgspec.json.encode({**envelope, **told}))

    return make


def _rows(edit: Callable[[list[msgspec.Raw], Random], list[msgspec.Raw]]) -> Make:
    """Change which records the answer holds, byte for byte as they were."""

    def make(_request: Request, body: bytes, chance: Random) -> Fault | None:
        envelope = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        for name, value in envelope.items():
            if bytes(value)[:1] == b"[":
                rows = msgspec.json.decode(value, type=list[msgspec.Raw])
                if not rows:
                    return None
                changed = msgspec.json.encode(edit(rows, chance))
                return Fault(body=msgspec.json.encode({**envelope, name: msgspec.Raw(changed)}))
        return None

    return make


def _one_less(rows: list[msgspec.Raw], chance: Random) -> list[msgspec.Raw]:
    return rows[: chance.randrange(len(rows))]


def _one_twice(rows: list[msgspec.Raw], chance: Random) -> list[msgspec.Raw]:
    return [*rows, chance.choice(rows)]


KINDS = (
    Kind("500", _status(500)),
    Kind("502 with a web page", _status(502, HTML)),
    Kind("503", _status(503)),
    Kind("504", _status(504)),
    Kind("429 with a time", _status(429, retry_after="0")),
    Kind("429 without one", _status(429)),
    Kind("403 of a gateway", _status(403, HTML)),
    Kind("hung up", lambda _request, _body, _chance: Fault(drop=True)),
    Kind("late", lambda _request, _body, _chance: Fault(delay_seconds=0.3)),
    Kind("cut short", _cut),
    Kind("cut short without a length", _cut_without_length),
    Kind("cut chunks", _cut_chunks),
    Kind("cut gzip", _gzipped(lambda packed: packed[: len(packed) // 2])),
    Kind("gzip without its end", _gzipped(lambda packed: packed[:-8])),
    Kind("gzip of another sum", _gzipped(lambda packed: packed[:-8] + bytes(8))),
    Kind("not gzip", _mislabelled),
    Kind("a zlib stream as gzip", _edited(lambda body, _chance: zlib.compress(body, 1))),
    Kind("a web page", _edited(lambda _body, _chance: HTML)),
    Kind("nothing", _edited(lambda _body, _chance: b"")),
    Kind("204", _status(204, b"")),
    Kind("an error with status 200", _edited(lambda _body, _chance: b'{"error":{"message":"oops"}}')),
    Kind("two documents", _edited(lambda body, _chance: body + body)),
    Kind("bad UTF-8", _edited(lambda body, _chance: body.replace(b'":', b'\xff":', 1))),
    Kind("nested deeply", _edited(lambda _body, _chance: b"[" * 100_000)),
    Kind("another encoding", _status(200, b"?", content_encoding="br")),
    Kind("a redirect", _status(302, b"", location="http://127.0.0.1:9/v1")),
    Kind("402", _status(402)),
    # For a batch of ids it would mean that fal does not know one of them.
    Kind("404", _where(lambda request: request.path not in BY_IDS, _status(404))),
    Kind("410", _status(410)),
    Kind("422", _status(422)),
    # Of a first page it would mean that fal does not know the question.
    Kind("400 for a cursor", _where(lambda request: "cursor" in request.query, _status(400))),
    Kind("more without a cursor", _envelope(has_more=True, next_cursor=None)),
    Kind("a cursor without more", _envelope(has_more=False, next_cursor="x")),
    Kind("the cursor that was asked", _envelope(has_more=True, next_cursor="asked")),
    Kind("rows are missing", _rows(_one_less), is_silent=True),
    Kind("a row comes twice", _rows(_one_twice), is_silent=True),
    Kind("no rows, the same cursor", _rows(lambda _rows, _chance: []), is_silent=True),
)


class Faults:
    """Breaks a `share` of the answers, for as long as it `is_on`; counts what it did by kind."""

    def __init__(self, seed: int, share: float = 0.1) -> None:
        self.share = share
        self.is_on = True
        self.done: Counter[str] = Counter()
        self._chance = Random(seed)  # noqa: S311  # a repeatable test, not secrecy
        self._lock = threading.Lock()

    def __call__(self, request: Request, answer: Callable[[], bytes]) -> Fault | None:
        """How to break this answer; None for most."""
        with self._lock:
            if not self.is_on or self._chance.random() >= self.share:
                return None
            kind = self._chance.choice(KINDS)
            chance = Random(self._chance.random())  # noqa: S311
        if kind.is_silent and request.path not in PROVEN:
            return None
        fault = kind.make(request, answer(), chance)
        if fault is not None:
            with self._lock:
                self.done[kind.name] += 1
        return fault


def break_answers(sandbox: Sandbox, faults: Faults) -> None:
    """Let the sandbox break what it answers; not what it refuses."""

    def fault(request: Request) -> Fault | None:
        try:
            return faults(request, lambda: answer(sandbox, request))
        except Refusal:
            return None

    sandbox.fault = fault
