"""`faletl landing scrub`: a page loses what it says of an account, and keeps what a contract sees."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from faletl import pipeline
from faletl.cli.commands import app
from faletl.cli.runtime import run_command
from faletl.operations.scrub import KEEPS_LENGTH, READABLE, public_texts, scrubbed
from faletl.resources import RESOURCES, Kind, Resource
from faletl.sandbox import Credential, Sandbox
from faletl.staging.contract import Contract
from tests import truth
from tests.conftest import settings_for

FIXTURES = Path(__file__).parents[1] / "fixtures"
OWNED = ("acme-corp/secret-project", "alice@acme.example", "acme-nightly")
"""An endpoint, a member and a label of a key that nobody else may read of."""

every_resource = pytest.mark.parametrize("resource", RESOURCES.values(), ids=lambda r: r.name)


@pytest.fixture
def scrub(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    """The command in this process: its exit code, stdout and stderr."""

    def run(*args: str | Path) -> tuple[int, bytes, str]:
        monkeypatch.setattr("sys.argv", ["faletl", "landing", "scrub", *map(str, args)])
        code = run_command(app)
        said = capfdbinary.readouterr()
        return code, said.out, said.err.decode()

    return run


@pytest.fixture(scope="module")
def landing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A landing folder of an account with names of its own, as a run leaves it."""
    endpoint, member, label = OWNED
    account = truth.two_days()
    account.account = "acme-corp"
    account.lines = [
        replace(
            line,
            endpoint_id=endpoint if line.endpoint_id == truth.VOICE else line.endpoint_id,
            credential=Credential(label, login_username=member),
        )
        for line in account.lines
    ]
    folder = tmp_path_factory.mktemp("scrub")
    with time_machine.travel(truth.NOW, tick=True), Sandbox(account) as server:
        pipeline.extract(settings_for(server.url, folder))
    return folder / "landing"


def values(document: Any, kind: type) -> Iterator[Any]:
    """All values of that type, without the names of fields."""
    if isinstance(document, dict | list):
        for inner in document.values() if isinstance(document, dict) else document:
            yield from values(inner, kind)
    elif type(document) is kind:
        yield document


def shape(document: Any, *, is_named: bool) -> Any:
    """The document with its types in place of its values."""
    if isinstance(document, list):
        return [shape(inner, is_named=is_named) for inner in document]
    if isinstance(document, dict):
        inners = [(name, shape(inner, is_named=is_named)) for name, inner in document.items()]
        return dict(inners) if is_named else [inner for _, inner in inners]
    return "" if document == "" else document if isinstance(document, bool) else type(document)


def is_known(text: str) -> bool:
    """Whether a text is one that anybody knows, or a time."""
    public = [*public_texts().values(), r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+\d\d:\d\d)"]
    return text == "" or any(re.fullmatch(pattern, text) for pattern in public)


# --- The command ----------------------------------------------------------------------------------


def test_scrub_of_every_landed_page_leaves_nothing_of_an_account(scrub: Any, landing: Path) -> None:
    pages = sorted(landing.rglob("*.json.zst"))
    assert {page.parts[-4] for page in pages} >= {"usage", "billing_events", "credits", "models"}
    before = b"".join(zstandard.ZstdDecompressor().decompress(page.read_bytes()) for page in pages)
    assert all(owned.encode() in before for owned in (*OWNED, "acme-corp"))
    for page in pages:
        body = zstandard.ZstdDecompressor().decompress(page.read_bytes())
        code, out, err = scrub(page)
        assert (code, err) == (0, f"faletl: {READABLE}: look at the page before you publish it\n")
        assert b"acme" not in out
        assert b"alice" not in out
        old, new = json.loads(body, parse_float=Decimal), json.loads(out, parse_float=Decimal)
        assert shape(old, is_named=True) == shape(new, is_named=True)
        assert all(is_known(text) for text in {*values(old, str)} & {*values(new, str)})


def test_scrub_gives_the_same_text_the_same_stand_in_and_others_another(scrub: Any) -> None:
    _, out, _ = scrub(FIXTURES / "billing_events" / "first.json")
    first, twin, *others = json.loads(out)["billing_events"]
    assert first == twin
    assert first["auth_method"] == first["auth_method_structured"]["detail"]
    assert len({row["request_id"] for row in (first, *others)}) == 1 + len(others)


def test_scrub_with_amounts_keeps_every_number_as_fal_wrote_it(scrub: Any) -> None:
    path = FIXTURES / "usage" / "first.json"
    code, out, err = scrub(path, "--keep-amounts")
    assert code == 0
    assert "all amounts, too" in err
    old, new = (json.loads(text, parse_float=str) for text in (path.read_bytes(), out))
    numbers = [
        [str(row[name]) for b in page["time_series"] for row in b["results"] for name in row
         if name.startswith(("cost", "quantity", "unit_price"))]
        for page in (old, new)
    ]  # fmt: skip
    assert numbers[0] == numbers[1]
    assert b"etl" not in out


def test_scrub_writes_a_new_file_and_never_over_one_that_is_there(scrub: Any, tmp_path: Path) -> None:
    page, out = FIXTURES / "credits" / "first.json", tmp_path / "page.json"
    assert scrub(page, "--out", out)[:2] == (0, b"")
    assert json.loads(out.read_bytes())["username"] == "text-1"
    code, _, err = scrub(page, "--out", out)
    assert (code, err) == (2, f"faletl: {out} exists; name a new file\n")


@pytest.mark.parametrize(
    ("content", "code", "sentence"),
    [
        (None, 2, "cannot read {}: No such file or directory; name a page of the landing folder"),
        (b'{"usage": ', 2, "{} is not JSON; name a page ….json.zst of the landing folder"),
        (b"\x28\xb5\x2f\xfd cut off", 4, "{} is damaged; run faletl verify"),
    ],
    ids=["nothing", "no JSON", "damaged"],
)
def test_scrub_says_in_one_sentence_why_it_cannot(
    content: bytes | None, code: int, sentence: str, scrub: Any, tmp_path: Path
) -> None:
    page = tmp_path / "page.json.zst"
    if content is not None:
        page.write_bytes(content)
    assert scrub(page) == (code, b"", f"faletl: {sentence.format(page)}\n")


# --- The law --------------------------------------------------------------------------------------

NAMES = sorted({step for resource in RESOURCES.values() for c in resource.columns for step in c.steps})
PRIVATE = st.text(min_size=1, max_size=30).filter(
    lambda text: not is_known(text) and "text-" not in text and not re.fullmatch(r"[\d.eE+-]+", text)
)
SCALARS = (
    PRIVATE
    | st.sampled_from(["", "fal-ai/flux/dev", "images", "USD", "2026-11-22T09:14:22Z", "12.50"])
    | st.integers()
    | st.decimals(allow_nan=False, allow_infinity=False, places=12).map(float)
    | st.booleans()
    | st.none()
)
FIELDS = st.sampled_from([*NAMES, "time_series", "results", "a_new_field"]) | PRIVATE
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(FIELDS, inner, max_size=6)
)


@given(document=DOCUMENTS, keep=st.booleans())
@example(document={"tags": {"acme": "x"}, "unit": {"acme": [5]}}, keep=True)
def test_scrub_leaves_no_text_of_any_document_that_is_not_known(document: Any, keep: bool) -> None:
    body = json.dumps(document).encode()
    clean = scrubbed(body, keep_amounts=keep)
    new = json.loads(clean)
    assert shape(document, is_named=False) == shape(new, is_named=False)
    left = {*values(document, str)} & {*values(new, str)}
    assert all(is_known(text) or (keep and text == "12.50") for text in left)
    assert re.sub(rb'"[^"]*"|[1-9]', b"", clean) == re.sub(
        rb'"(?:[^"\\]|\\.)*"|[1-9]', b"", body
    )  # white space, zeros, signs and exponents


@given(numbers=st.lists(st.floats(0, 1e6).map(repr) | st.integers(0, 10**17).map(str), max_size=40))
def test_scrub_keeps_numbers_that_differ_different_and_100_on_its_side(numbers: list[str]) -> None:
    rows = ",".join(f'{{"percent_discount": {number}}}' for number in numbers)
    text = re.compile(r": ([\d.e+-]+)")
    new = text.findall(scrubbed(f"[{rows}]".encode()).decode())
    assert len(set(zip(numbers, new, strict=True))) == len(set(new)) == len(set(numbers))
    for old, stand_in in zip(numbers, new, strict=True):
        if "e" not in old:
            assert (float(old) > 100) == (float(stand_in) > 100)


WRONG: list[Any] = [None, ..., "", "acme", 5, -1, {}, [], True, "x" * 2000, "NaN"]


def findings(resource: Resource, body: bytes) -> Any:
    """What the contract finds in a page: rows and reasons; fields that are new, retyped or missing."""
    contract = Contract(resource.rows_path, resource.columns)
    return contract.breaches(body), [*contract.new], [*contract.retyped], contract.missing


@every_resource
def test_the_contract_finds_in_a_scrubbed_page_what_it_finds_in_the_page(resource: Resource) -> None:
    path = FIXTURES / resource.name / "first.json"
    for column in (c for c in resource.columns if not c.is_asked and not c.is_outer):
        for wrong in WRONG:
            document = json.loads(path.read_bytes())
            level = document
            for step in resource.rows_path:
                level = level[step][0]
            level["a_new_field"] = wrong if wrong is not ... else 1
            for step in column.steps[:-1]:
                level = level.setdefault(step, {})
            level[column.steps[-1]] = wrong
            if wrong is ...:
                del level[column.steps[-1]]
            body = json.dumps(document).encode()
            assert findings(resource, body) == findings(resource, scrubbed(body)), (column.name, wrong)


def test_scrub_keeps_the_name_of_a_new_field_and_nothing_in_it_whatever_is_asked_for() -> None:
    body = b'{"a_new_field": {"acme": 23, "tags": {"acme": 45}}, "tags": {"eve": 6}, "quantity": 7}'
    assert scrubbed(body, keep_amounts=True) == (
        b'{"a_new_field": {"text-1": 11, "tags": {"text-1": 12}}, "tags": {"text-2": 1}, "quantity": 7}'
    )


def test_scrub_takes_a_number_that_fal_writes_as_a_text_for_a_number() -> None:
    body = b'{"username": "24.5", "credits": {"current_balance": "24.5"}}'
    assert scrubbed(body) == b'{"username": "text-1", "credits": {"current_balance": "11.1"}}'
    kept = scrubbed(body, keep_amounts=True)
    assert kept == b'{"username": "text-1", "credits": {"current_balance": "24.5"}}'


def test_scrub_keeps_the_length_of_a_text_that_is_too_long() -> None:
    body = json.dumps({"request_id": "é" * KEEPS_LENGTH}, ensure_ascii=False).encode()
    assert len(json.loads(scrubbed(body))["request_id"]) == 2 * KEEPS_LENGTH


def test_every_public_text_is_of_a_column_of_texts() -> None:
    kinds = {c.name: c.kind for resource in RESOURCES.values() for c in resource.columns}
    assert {kinds[name] for name in public_texts()} == {Kind.TEXT}
