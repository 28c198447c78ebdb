"""The sandbox against its own document: schemathesis makes up requests and judges the answers.

Exemptions from the document, and why (all others would be a finding):

- Only documented methods are sent. To others the sandbox answers 405; the document is silent on them.
- That a request fits the document does not mean that it is served, so what is judged is the answer:
  a bound before the other, an unknown zone or cursor, tagged sources are refused as documented (400).
- Half of the requests draw their values from `SENT`. The document calls ids, zones, cursors and the
  parts to expand just text (the parts stand in x-values), and of any text nearly all is refused.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from faletl.sandbox import FULL_KEY, Sandbox, invented_world
from faletl.sandbox.server import ANSWERS, NOT_OFFERED
from faletl.sandbox.world import FOUNDED

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SENT = {
    "endpoint_id": ["fal-ai/flux/dev", "fal-ai/veo3.1", "fal-ai/fast-svd-lcm", "fal-ai/any-llm"],
    "start": ["2025-01-01", "2025-01-01T06:30:00.5+05:45"],
    "end": ["2025-01-02", "2025-01-03T00:00:00Z"],
    "timezone": ["UTC", "Asia/Kolkata", "America/New_York"],
    "api_key_id": ["sandbox-key-1"],
    "login_username": ["alice"],
    "q": ["image"],
    "category": ["text-to-image"],
}
NOT_SENT = NOT_OFFERED | {(path, name) for path in ANSWERS for name in ("cursor", "source")}


@pytest.fixture(scope="module", params=[None, date(2026, 3, 18), date(2026, 7, 25)], ids=str)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """The API as it is and as it was, of a team so young that no range holds more than two days."""
    world = invented_world(now=lambda: FOUNDED + timedelta(days=2), late=True)
    with Sandbox(world, page_size=100, as_of=request.param) as running:
        yield running


@pytest.mark.parametrize("path", ANSWERS)
def test_every_answer_conforms_to_the_document(sandbox: Sandbox, path: str) -> None:
    document = httpx.get(f"{sandbox.url}/openapi.json", trust_env=False).json()
    method = "post" if "post" in document["paths"][path] else "get"
    narrow = narrowed if method == "get" else narrowed_body
    cases = [
        schemathesis.openapi.from_dict(known)[path][method.upper()].as_strategy()
        for known in (document, narrow(document, path))
    ]
    statuses: Counter[int] = Counter()
    session = requests.Session()
    session.trust_env = False
    headers = {"Authorization": f"Key {FULL_KEY}"}

    @settings(
        max_examples=80,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(cases))
    def judge(case: schemathesis.Case[Any]) -> None:
        response = case.call(base_url=sandbox.url, headers=headers, session=session)
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1

    with session:
        judge()
    assert statuses[200] >= 5, statuses
    assert statuses[400] + statuses[404] >= 1, statuses


def narrowed(document: Any, path: str) -> Any:
    """The document with the values of parameters that can be answered well."""
    narrow = copy.deepcopy(document)
    operation = narrow["paths"][path]["get"]
    shared = narrow["components"]["parameters"]
    given = [shared[p["$ref"].rsplit("/", 1)[1]] if "$ref" in p else p for p in operation["parameters"]]
    operation["parameters"] = [narrowed_parameter(p) for p in given if (path, p["name"]) not in NOT_SENT]
    return narrow


def narrowed_body(document: Any, path: str) -> Any:
    """The document with endpoints in the body that can be answered for."""
    narrow = copy.deepcopy(document)
    content = narrow["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[1]
    for choice in narrow["components"]["schemas"][name]["oneOf"]:
        choice["properties"]["endpoints"] |= {
            "propertyNames": {"enum": SENT["endpoint_id"]}, "minProperties": 1,
        }  # fmt: skip
    return narrow


def narrowed_parameter(parameter: Any) -> Any:
    kept = {name: value for name, value in parameter.items() if name != "example"}
    values = parameter.get("x-values") or SENT.get(parameter["name"])
    if values is None:
        return kept
    value = {"type": "string", "enum": values}
    is_list = any(choice.get("type") == "array" for choice in parameter["schema"].get("anyOf", []))
    some = {"type": "array", "items": value, "minItems": 1, "maxItems": 4}
    return {**kept, "schema": some if is_list else value}
