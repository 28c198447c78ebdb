"""What fuzzing found (tests/fuzz): bytes over which a reader stumbled, one test for each kind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from faletl.errors import ContractError, TamperedError
from faletl.fal.questions import first_endpoint
from faletl.findings import QuarantinedRow
from faletl.landing import extracts
from faletl.line.accounts import read_username
from faletl.line.distributed import read_plan
from faletl.operations.estimate import _read as read_estimate
from faletl.resources import CREDITS, RESOURCES, USAGE, Resource
from faletl.wire import MalformedBodyError, as_json
from tests.fuzz.targets import check_landed, in_memory, landed_page
from tests.unit.test_catalogue import stage

DEEP = b'{"a":' * 3000
DEEP_INSIDE = b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"


@pytest.mark.parametrize("token", [b"NaN", b"-Infinity"])
def test_a_text_that_never_ends_is_looked_through_once(token: bytes) -> None:
    body = b'{"a":' + token + b',"b":"' + b'\\"' * 30_000
    started = time.monotonic()
    assert as_json(body) == body.replace(token, b'"' + token + b'"')
    assert time.monotonic() - started < 30  # one look takes milliseconds, one from each mark minutes
    assert as_json(body[:-1] + b"\\") == body[:-1].replace(token, b'"' + token + b'"') + b"\\"


BAD_NAME = b'{"\xff": 1}'


@pytest.mark.parametrize(
    ("resource", "body"),
    [
        # Another record breaks its contract first, so that each is looked at by itself.
        (RESOURCES["models"], b'{"models":[{"endpoint_id":1},' + BAD_NAME + b'],"has_more":false}'),
        (
            RESOURCES["models"],
            b'{"models":[{"endpoint_id":1,"metadata":' + BAD_NAME + b'}],"has_more":false}',
        ),
        (CREDITS, b'{"username":1,"credits":' + BAD_NAME + b"}"),
    ],
)
def test_a_name_that_is_no_text_behind_another_breach_is_a_typed_error(
    resource: Resource, body: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ContractError):
        stage(resource, body, tmp_path)


def set_aside(resource: Resource, body: bytes, folder: Path) -> list[str]:
    """Why the rows of the page are set aside."""
    return [one.reason for one in stage(resource, body, folder).findings.quarantined]


def test_a_field_that_comes_twice_and_is_wrong_once_is_set_aside(tmp_path: Path) -> None:
    twice = "fal's answer has the key 'credits' twice in one object"
    no_object = "credits is a number where an object belongs"
    for last, why in {
        "null": twice,
        "{}": twice,
        "7": no_object,
        '{"current_balance":1}': twice,
    }.items():
        body = f'{{"username":"acme","credits":{{"current_balance":"x"}},"credits":{last}}}'.encode()
        assert set_aside(CREDITS, body, tmp_path) == [why]
    group = b'{"endpoint_id":"a","metadata":{"group":{"key":1}},"metadata":{}}'
    body = b'{"models":[' + group + b'],"has_more":false}'
    told = ["metadata.group.key is a number where text belongs"]
    assert set_aside(RESOURCES["models"], body, tmp_path) == told


def test_a_row_that_is_set_aside_may_have_no_readable_endpoint(tmp_path: Path) -> None:
    assert QuarantinedRow.of(1, 1, "why", b'{"endpoint_id":"\xff"}').endpoint_id is None
    body = b'{"endpoint_id":"\xff","username":1,"credits":{"current_balance":1}}'
    staged = stage(CREDITS, body, tmp_path)
    assert [one.endpoint_id for one in staged.findings.quarantined] == [None]


@pytest.mark.parametrize("body", [b"", DEEP, DEEP_INSIDE, b'{"models":[{"endpoint_id":"\xff"}]}'])
def test_a_catalogue_without_a_readable_endpoint_has_none(body: bytes) -> None:
    assert first_endpoint(body) == []


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (DEEP, MalformedBodyError),
        (DEEP_INSIDE, MalformedBodyError),
        (b'{"username":"\xff"}', MalformedBodyError),
        (b'{"username":"a\\u0000b"}', ContractError),
        (b'{"username":"\\u202e"}', ContractError),
        (b'{"username":" "}', ContractError),
        (b'{"username":7}', ContractError),
        (b"{}", ContractError),
    ],
)
def test_an_account_without_a_proper_name_is_a_typed_error(body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_username(body)


def test_a_byte_order_mark_before_an_account_is_taken() -> None:
    assert read_username(b'\xef\xbb\xbf{"username":"acme"}') == "acme"


@pytest.mark.parametrize("cost", [b'"\xff"', b'"1"', b"null", b"NaN", b"-1", b"[1]", b"1e999"])
def test_an_estimate_that_is_no_amount_is_a_typed_error(cost: bytes) -> None:
    body = b'{"estimate_type":"unit_price","total_cost":%s,"currency":"USD"}' % cost
    with pytest.raises(ContractError):
        read_estimate(body, "unit_price")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        DEEP,
        DEEP_INSIDE,
        b'{"fencing_token":3,"loaded_at":"2026-11-23T10:30:00Z","outcome":"\xff"}',
        b'{"fencing_token":3,"loaded_at":"2026-11-23T10:30:00","outcome":"loaded"}',  # in which zone?
    ],
)
def test_a_receipt_that_cannot_be_read_is_none(content: bytes) -> None:
    assert extracts.receipt_of(in_memory(content)) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"load_id": "'; drop table x; --"},
        {"load_id": "../../20261123T103000000000Z-5f2c1a"},
        {"started_at": "2026-11-23T10:30:00"},
        {"finished_at": "2026-11-23T10:30:00"},
        {"window_start": "2026-11-22T00:00:00"},
        {"window_end": "2026-11-21T00:00:00Z"},
        *(
            {"file": name}
            for name in ("", "..", "../x.json.zst", "a/b.json.zst", "x" * 300 + ".json.zst", "\0")
        ),
    ],
    ids=repr,
)
def test_a_manifest_that_faletl_would_not_write_was_tampered_with(changed: dict[str, Any]) -> None:
    manifest = msgspec.to_builtins(landed_page(USAGE, "rows", b"").manifest)
    assert extracts.open_read(in_memory(json.dumps(manifest).encode()))
    page = manifest["calls"][0]["pages"][0]
    for name, value in changed.items():
        (page if name in page else manifest)[name] = value
    with pytest.raises(TamperedError):
        extracts.open_read(in_memory(json.dumps(manifest).encode()))


@pytest.mark.parametrize("content", [b"", b"\xff", DEEP, DEEP_INSIDE, b'{"load_id":"\xff"}'])
def test_a_manifest_or_plan_that_is_no_json_was_tampered_with(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(TamperedError):
        extracts.open_read(in_memory(content))
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(TamperedError):
        read_plan(str(tmp_path / "plan.json"))


@pytest.mark.parametrize("claimed", [2**20, 2**32, 2**50, 2**63])
def test_a_landed_page_that_claims_to_be_huge_is_asked_for_again(claimed: int) -> None:
    header = b"\x28\xb5\x2f\xfd\xe4" + claimed.to_bytes(8, "little")
    assert not check_landed(header + b"\x01\x00\x00")
