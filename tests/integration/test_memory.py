"""Answers below FALETL_MAX_BODY take little memory, whatever is in them and on all threads at once."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from faletl.fal import bodies
from faletl.fal.bodies import LARGE_BODY, one_body, passed_on, take_turn
from faletl.redaction import REDACTED, without
from faletl.sandbox import Fault, Request, Sandbox
from faletl.wire import MalformedBodyError
from tests import truth
from tests.peak import DAYS

SIZE = 12 * 2**20
"""Bytes of an answer, decoded: large enough to need a turn, small enough for a test of seconds."""

MOST = 6 * SIZE
"""Bytes that a run may take above what a usual one took, for answers of that size on all threads."""

CHARGE = (
    b'{"request_id":"r","endpoint_id":"fal-ai/flux/dev","timestamp":"2026-11-20T05:00:00Z","quantity":1,'
    b'"unit":"images","unit_price":0.025,"percent_discount":null,"cost_subtotal":0.025,'
    b'"cost_discount":0,"cost_total":0.025,"cost_estimate_nano_usd":25000000%s}'
)
LINE = (
    b'{"endpoint_id":"fal-ai/flux/dev","unit":"images","quantity":1,"unit_price":0.025,"cost":0.025,'
    b'"percent_discount":null,"cost_subtotal":0.025,"cost_discount":0,"cost_total":0.025,'
    b'"currency":"USD","auth_method":"a"%s}'
)
END = b'"next_cursor":null,"has_more":false}'


def much(unit: bytes) -> bytes:
    return unit * (SIZE // len(unit))


def names() -> bytes:
    """Fields of an object, none of the same name."""
    return b"".join(b'"%d":0,' % number for number in range(SIZE // 11)) + b'"last":0'


def charges(*records: bytes) -> bytes:
    return b'{"billing_events":[' + b",".join(records) + b"]," + END


def usage(*records: bytes) -> bytes:
    return (
        b'{"time_series":[{"bucket":"2026-11-20T05:00:00Z","results":['
        + b",".join(records)
        + b"]}],"
        + END
    )


TOO_LARGE = "one is larger than 4,194,304 bytes"
AROUND = "more than 4,194,304 bytes around its records"
FIELDS = "more than 10,000 fields in one object"
RECORDS = "more than 100,000 records on one page"

SHAPES: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "numbers": ("billing_events", RECORDS, lambda: charges(much(b"0,") + b"0")),
    "a text": ("billing_events", TOO_LARGE, lambda: charges(CHARGE % (b',"odd":"%b"' % much(b"x")))),
    "percent signs": ("usage", TOO_LARGE, lambda: usage(LINE % (b',"odd":"%b"' % much(b"%41")))),
    "backslashes": (
        "billing_events", "NUL", lambda: charges(CHARGE % (b',"odd":"%b\\u0000"' % much(b"\\\\"))),
    ),
    "fields": ("billing_events", FIELDS, lambda: charges(CHARGE % (b',"odd":{%b}' % names()))),
    "fields around": (
        "billing_events", FIELDS, lambda: b"{" + names() + b"," + charges(CHARGE % b"")[1:],
    ),
    "a text around": (
        "usage", AROUND, lambda: b'{"odd":"%b",' % much(b"x") + usage(LINE % b"")[1:],
    ),
    "a cursor": (
        "billing_events", "a cursor of more than 16,384 bytes",
        lambda: b'{"billing_events":[],"next_cursor":"%b","has_more":true}' % much(b"c"),
    ),
    "digits": (
        "billing_events", TOO_LARGE,
        lambda: charges(CHARGE.replace(b":1,", b":%b," % much(b"7"), 1) % b""),
    ),
    "no numbers": (
        "billing_events", FIELDS,
        lambda: charges(CHARGE % (b',"odd":{%b"z":0}' % much(b'"a":NaN,'))),
    ),
    "credits": ("credits", TOO_LARGE, lambda: b'{"username":"acme","odd":"%b"}' % much(b"x")),
}  # fmt: skip


def legal() -> bytes:
    """As many charges as fal documents, each with a long field that is not known."""
    size = SIZE // 10_000
    return charges(
        *(
            CHARGE.replace(b'"r"', b'"r%d"' % n) % (b',"new":"%b"' % (b"x" * (size - 300)))
            for n in range(10_000)
        )
    )


def answering(resource: str, body: bytes) -> Callable[[Request], Fault | None]:
    """Every question for rows of the resource gets that body."""
    packed = gzip.compress(body, 1)
    paths = {"usage": "/models/usage", "billing_events": "/models/billing-events"}

    def fault(request: Request) -> Fault | None:
        asked = ",".join(request.query.get("expand", []))
        is_total = resource == "usage" and "time_series" not in asked
        is_account = resource == "credits" and "credits" not in asked
        if request.path != paths.get(resource, "/account/billing") or is_total or is_account:
            return None
        return Fault(body=packed, headers={"content-encoding": "gzip"})

    return fault


def peaks(served: list[tuple[str, bytes | None]], folder: Path) -> list[dict[str, Any]]:
    """What runs take that get these answers, one after the other in a process of its own."""
    runs = []
    with ExitStack() as stack:
        for number, (resource, body) in enumerate(served):
            fault = answering(resource, body) if body is not None else None
            sandbox = stack.enter_context(Sandbox(truth.two_days(), fault=fault))
            (folder / f"{number}").mkdir()
            runs.append((sandbox.url, f"{folder / str(number)}", resource))
        done = subprocess.run(
            [sys.executable, "-m", "tests.peak", json.dumps(runs)],
            check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_answers_of_any_shape_are_refused_in_little_memory_on_all_threads_at_once(
    tmp_path: Path,
) -> None:
    made = [(resource, make()) for resource, _, make in SHAPES.values()]
    usual, *found = peaks([("usage", None), *made], tmp_path)
    assert usual["exit_code"] == 0, usual["failures"]
    for (shape, (resource, said, _)), one in zip(SHAPES.items(), found, strict=True):
        assert one["exit_code"] == 3, (shape, one)
        assert len(one["failures"]) == (1 if resource == "credits" else DAYS), (shape, one)
        assert all(said in sentence for sentence in one["failures"]), (shape, one)
        assert one["peak"] < MOST, (shape, one["peak"] >> 20)


def test_a_large_page_of_legal_records_is_loaded_in_little_memory(tmp_path: Path) -> None:
    _, large = peaks([("billing_events", None), ("billing_events", legal())], tmp_path)
    assert (large["exit_code"], large["rows"]) == (0, 10_000), large["failures"]
    assert large["peak"] < 2 * MOST, large["peak"] >> 20


# --- Turns ----------------------------------------------------------------------------------------


class Other:
    """Another thread that holds a large body until it is let go."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with one_body():
            take_turn(LARGE_BODY + 1)
            self.has_begun.set()
            self.may_end.wait(30)

    def __enter__(self) -> Other:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_end.set()
        self._thread.join()


def test_a_large_body_waits_until_another_thread_holds_none() -> None:
    with one_body():
        take_turn(LARGE_BODY + 1)
        with Other() as other:
            assert not other.has_begun.wait(0.2)
            bodies._end_turn()
            assert other.has_begun.wait(30)


def test_a_small_body_waits_for_nobody() -> None:
    with Other() as other:
        assert other.has_begun.wait(30)
        with one_body():
            assert take_turn(LARGE_BODY) == 0
        assert take_turn(LARGE_BODY + 1) == 0  # outside: held for a moment


def test_a_turn_lasts_until_the_outermost_span_ends() -> None:
    with one_body():
        with one_body():
            take_turn(LARGE_BODY + 1)
        assert take_turn(LARGE_BODY + 1) == 0  # it is ours already
        with Other() as other:
            assert not other.has_begun.wait(0.2)
            bodies._end_turn()
    with Other() as other:
        assert other.has_begun.wait(30)


def refuse_a_large_body() -> None:
    with passed_on():
        take_turn(LARGE_BODY + 1)
        raise MalformedBodyError


def test_a_body_that_cannot_be_used_gives_its_turn_back_at_once() -> None:
    with one_body():
        with pytest.raises(MalformedBodyError):
            refuse_a_large_body()
        with Other() as other:
            assert other.has_begun.wait(30)


# --- Redaction in pieces --------------------------------------------------------------------------


@pytest.mark.parametrize("shift", range(-70, 10))
@pytest.mark.parametrize("form", ["plain", "escaped", "percent"])
def test_a_key_is_found_wherever_a_large_body_is_cut_for_the_search(form: str, shift: int) -> None:
    secret = "0123456789abcdef0123456789ABCDEF"  # noqa: S105  # of nobody
    shown = {
        "plain": secret,
        "escaped": "".join(f"\\\\u{ord(one):04x}" for one in secret),
        "percent": "".join(f"%{ord(one):02X}" for one in secret),
    }[form].encode()
    lead = b"x" * (2**17 + shift * (3 if form == "escaped" else 1))
    assert without(lead + shown + b"y" * 99, [secret]) == lead + REDACTED.encode() + b"y" * 99
