"""What follows from a catalogue entry, for every resource alike; a new one is picked up by itself."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import faletl.sandbox
from faletl.config import Settings
from faletl.errors import DataRefusedError
from faletl.fal.pages import Page, read_envelope
from faletl.findings import Findings
from faletl.landing import extracts
from faletl.landing.extracts import Call, Manifest, SealedExtract
from faletl.models.catalogue import column_comments, models
from faletl.resources import RESOURCES, Column, Kind, Resource
from faletl.staging.window import Staged, stage_window
from faletl.warehouse.tables import RAW
from faletl.windows import Window
from tests import truth

FIXTURES = Path(__file__).parent.parent / "fixtures"

every_resource = pytest.mark.parametrize("resource", RESOURCES.values(), ids=lambda r: r.name)


def first(resource: Resource) -> Any:
    """The recorded answer."""
    return json.loads((FIXTURES / resource.name / "first.json").read_text())


def stage(resource: Resource, body: bytes, folder: Path) -> Staged:
    """Land the body as the only page of a read and stage it; its control total is left out."""
    settings = Settings.isolated(landing=str(folder / "landing"))
    window = Window.of_day(truth.day(22)) if resource.window == "day" else Window.snapshot(truth.NOW)
    attempt = extracts.begin(settings, "acme", resource.name, window, now=truth.NOW)
    rows, cursor = read_envelope(body, resource.rows_path)
    page = attempt.land("rows", {}, Page(1, body, "req-1", rows, cursor))
    again = attempt.land("again", {}, Page(1, body, "req-2", rows, cursor))  # two equal walks
    query = {name: [v] for name, v in resource.params[0].items() if isinstance(v, str)}
    manifest = Manifest(
        load_id=attempt.load_id,
        run_id="run",
        account="acme",
        resource=resource.name,
        window_start=window.start,
        window_end=window.end,
        started_at=truth.NOW,
        finished_at=truth.NOW,
        planned_from=window.day,
        fencing_token=0,
        calls=[Call("rows", resource.path, query, [page]), Call("again", resource.path, query, [again])],
    )
    return stage_window(settings, attempt.seal(manifest), folder)


def staged_rows(staged: Staged) -> list[dict[str, Any]]:
    """The staged rows by column name."""
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        found = connection.execute(f"from {staged.source} order by _page, _row")
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def records(document: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a recorded answer."""
    if not path:
        yield document
        return
    for item in document[path[0]]:
        yield from records(item, path[1:]) if path[1:] else [item]


@every_resource
def test_a_recorded_answer_is_staged_field_by_field(resource: Resource, tmp_path: Path) -> None:
    body = (FIXTURES / resource.name / "first.json").read_bytes()
    rows = staged_rows(stage(resource, body, tmp_path))
    exact = json.loads(body, parse_float=Decimal, parse_int=Decimal)
    held = list(records(exact, resource.rows_path))

    assert len(rows) == len(held) > 0
    for row, record in zip(rows, held, strict=True):
        for column in resource.columns:
            if column.is_outer:
                continue
            if column.is_asked:
                assert row[column.name] == resource.params[0][column.name]
                continue
            value: Any = record
            for step in column.steps:
                value = (value or {}).get(step)
            if value is None and column.fallback:
                value = record.get(column.fallback)
            if column.kind in (Kind.AMOUNT, Kind.SECONDS) and value is not None:
                value = value.quantize(Decimal("1e-12"))
            if column.kind is Kind.INSTANT:
                value = datetime.fromisoformat(value)
            if column.kind is Kind.LIST and value is not None:
                value = json.dumps(value)
            assert row[column.name] == value, column.name


@every_resource
def test_staged_rows_have_the_columns_and_types_of_the_raw_table(
    resource: Resource, tmp_path: Path
) -> None:
    staged = stage(resource, (FIXTURES / resource.name / "first.json").read_bytes(), tmp_path)
    with duckdb.connect() as connection:
        described = connection.execute(f"describe from {staged.source}").fetchall()
    held = {column.name for column in RAW[resource.name].columns}
    assert {name for name, *_ in described} == held
    for name, kind, *_ in described:
        column = next((c for c in resource.columns if c.name == name), None)
        if column is not None and column.kind in (Kind.AMOUNT, Kind.SECONDS):
            assert kind == "DECIMAL(38,12)", name
        if column is not None and column.kind is Kind.WHOLE:
            assert kind == "BIGINT", name
        assert "DOUBLE" not in kind
        assert "FLOAT" not in kind


WRONG: dict[Kind, list[Any]] = {
    Kind.TEXT: [5, {}, []],
    Kind.AMOUNT: ["0.1", {}, True, -1],
    Kind.WHOLE: ["1", {}, True, -1, 0.5, 10**19],
    Kind.SECONDS: ["soon", {}, True, -1],
    Kind.INSTANT: [1763802000, "2026-11-22T07:00:00", "2026-02-29T00:00:00Z", "yesterday"],
    Kind.LIST: ["new", {}],
}


def broken(resource: Resource) -> Iterator[tuple[str, Column, Any]]:
    """The recorded answer, broken in one field at a time, with what was done, and the field."""
    for column in resource.columns:
        if column.is_asked:
            continue  # fal does not send it
        wrong = WRONG[column.kind]
        if column.is_level:
            wrong = [value for value in wrong if value != -1]
        if column.may_be_text:
            wrong = ["much" if isinstance(value, str) else value for value in wrong]
        if column.required and not column.fallback:
            wrong = [*wrong, None, ...]  # left out
        for value in wrong:
            document = first(resource)
            level = document if column.is_outer else next(records(document, resource.rows_path))
            if column.is_outer:
                level = document[resource.rows_path[0]][0]
            for step in column.steps[:-1]:
                level = level[step]
            level[column.steps[-1]] = value
            if value is ...:
                del level[column.steps[-1]]
            yield f"{column.name}={value!r}", column, document


BROKEN = [
    pytest.param(resource, column, document, id=f"{resource.name}-{name}")
    for resource in RESOURCES.values()
    for name, column, document in broken(resource)
]


@pytest.mark.parametrize(("resource", "column", "document"), BROKEN)
def test_a_field_of_another_type_refuses_money_and_elsewhere_its_own_row_alone(
    resource: Resource, column: Column, document: Any, tmp_path: Path
) -> None:
    body = json.dumps(document).encode()
    if resource.proof is not None:
        with pytest.raises(DataRefusedError) as caught:
            stage(resource, body, tmp_path)
        assert str(caught.value).startswith(f"{resource.name}, window ")
        assert re.search(r"page 1|`\$", str(caught.value))
        return
    staged = stage(resource, body, tmp_path)
    held = list(records(document, resource.rows_path))
    is_of = held if not column.is_outer else document[resource.rows_path[0]][0][resource.rows_path[1]]
    broken_rows = {1} if not column.is_outer else set(range(1, len(is_of) + 1))
    if column.kind is Kind.SECONDS:  # only measured
        assert staged.findings.breaches == 0
        assert staged_rows(staged)[0][column.name] is None
        return
    assert {one.row for one in staged.findings.quarantined} == broken_rows
    kept = {row["_row"] for row in staged_rows(staged)}
    assert kept == set(range(1, len(held) + 1)) - broken_rows


@every_resource
def test_amounts_that_no_column_could_hold_are_refused_with_their_row(
    resource: Resource, tmp_path: Path
) -> None:
    body = (FIXTURES / resource.name / "first.json").read_text()
    amounts = [column.steps[-1] for column in resource.columns if column.kind is Kind.AMOUNT]
    tokens = ("1e999", "NaN", "-Infinity", "1e-400", "1e-13", "9" * 60, "1" * 5000, "1e15", "1E26")
    for number, name in enumerate(amounts):
        for token in tokens[number % 3 :: 3]:
            spoilt, count = re.subn(rf'("{name}": )[0-9.e-]+', rf"\g<1>{token}", body, count=1)
            if not count:  # the recorded answer does without
                continue
            folder = tmp_path / token[:9] / name
            if resource.proof is None:
                staged = stage(resource, spoilt.encode(), folder)
                assert [one.row for one in staged.findings.quarantined] == [1], token
                continue
            with pytest.raises(DataRefusedError):
                stage(resource, spoilt.encode(), folder)


@every_resource
def test_an_amount_of_any_notation_and_length_is_rounded_to_its_twelfth_decimal(
    resource: Resource, tmp_path: Path
) -> None:
    body = (FIXTURES / resource.name / "first.json").read_text()
    tokens = (
        "2.6006458333333335", "0.001736111111111111", "1.736111111111111E-05", "0.5000000000005",
        "12345678901234e-13", f"0.{'3' * 500}", f"0.{'0' * 300}5E+0300", "-0.0", "1E+02",
    )  # fmt: skip
    columns = [c for c in resource.columns if c.kind in (Kind.AMOUNT, Kind.SECONDS)]
    names = "|".join(column.steps[-1] for column in columns)
    for number, token in enumerate(tokens if columns else ()):
        with localcontext(prec=1000):
            amount = Decimal(token).quantize(Decimal("1e-12"), ROUND_HALF_EVEN)
        sent = re.sub(rf'("(?:{names})": )[0-9.e-]+', rf"\g<1>{token}", body)
        staged = stage(resource, sent.encode(), tmp_path / str(number))
        assert staged.findings.breaches == 0
        rows = staged_rows(staged)
        held = {row[column.name] for row in rows for column in columns if not column.fallback}
        assert held - {None} == {amount}, token
        is_rounded = Decimal(token) != amount
        assert staged.rounded_amounts == is_rounded * sent.count(token)


@every_resource
def test_fields_that_fal_adds_are_survived(resource: Resource, tmp_path: Path) -> None:
    document = first(resource)
    document["new_envelope_field"] = {"x": [1]}
    for record in records(document, resource.rows_path):
        record["new_field"] = {"deep": [1.5, None]}
    before = stage(resource, (FIXTURES / resource.name / "first.json").read_bytes(), tmp_path / "a")
    after = stage(resource, json.dumps(document).encode(), tmp_path / "b")
    assert after.digest == before.digest


BROKEN_CHARGES = [document for _, _, document in broken(RESOURCES["billing_events"])]


@given(picks=st.lists(st.none() | st.sampled_from(BROKEN_CHARGES), min_size=1, max_size=12))
@settings(max_examples=40)
def test_exactly_the_rows_that_break_their_contract_are_set_aside(picks: list[Any]) -> None:
    document = first(RESOURCES["billing_events"])
    good = document["billing_events"][0]
    document["billing_events"] = [pick["billing_events"][0] if pick else good for pick in picks]
    body = json.dumps(document).encode()
    expected = [(1, row) for row, pick in enumerate(picks, start=1) if pick]
    with tempfile.TemporaryDirectory() as folder:
        if not expected:
            staged = stage(RESOURCES["billing_events"], body, Path(folder))
            assert [row["_row"] for row in staged_rows(staged)] == list(range(1, len(picks) + 1))
            return
        with pytest.raises(DataRefusedError) as caught:  # as no control total says otherwise
            stage(RESOURCES["billing_events"], body, Path(folder))
    findings = caught.value.findings
    assert isinstance(findings, Findings)
    assert [(one.page, one.row) for one in findings.quarantined] == expected
    assert findings.breaches == len(expected)
    assert [json.loads(one.raw_json) for one in findings.quarantined] == [
        pick["billing_events"][0] for pick in picks if pick
    ]


@every_resource
def test_the_catalogue_names_every_field_that_fal_documents(resource: Resource) -> None:
    fields = set(_fields(_answer(resource), resource.rows_path))
    kept = {".".join(c.steps) for c in resource.columns if not c.is_outer and not c.is_asked}
    assert fields - kept - set(resource.not_kept) == set()
    assert set(resource.not_kept) <= fields


DOCUMENT = json.loads((Path(faletl.sandbox.__file__).parent / "openapi.json").read_text("utf-8"))


def _answer(resource: Resource) -> Any:
    get = DOCUMENT["paths"][resource.path]["get"]
    return get["responses"]["200"]["content"]["application/json"]["schema"]


def _fields(schema: Any, rows_path: tuple[str, ...], place: str = "") -> Iterator[str]:
    """The fields of a record, as the document has them; of objects that we keep parts of, the parts."""
    while "$ref" in schema or "items" in schema:
        name = schema.get("$ref", "").rsplit("/", 1)[-1]
        schema = DOCUMENT["components"]["schemas"][name] if name else schema["items"]
    if rows_path:
        yield from _fields(schema["properties"][rows_path[0]], rows_path[1:])
        return
    kept_in_parts = {".".join(c.steps[:n]) for r in RESOURCES.values() for c in r.columns
                     for n in range(1, len(c.steps))}  # fmt: skip
    for name, inner in schema["properties"].items():
        if place + name in kept_in_parts:
            yield from _fields(inner, (), f"{place}{name}.")
        else:
            yield place + name


@every_resource
def test_every_resource_has_a_staging_model_of_its_own(resource: Resource) -> None:
    assert f"staging.stg_fal__{resource.name}" in {model.table for model in models()}
    assert f"staging.stg_fal__{resource.name}" in column_comments()


@every_resource
def test_every_column_is_commented_and_every_key_is_a_column(resource: Resource) -> None:
    names = [column.name for column in resource.columns]
    assert len(names) == len(set(names))
    assert set(resource.key) <= set(names)
    assert all(column.comment for column in RAW[resource.name].columns)
    if resource.proof:
        assert set(resource.proof.key) | set(resource.proof.sums) <= set(names)


def test_a_landed_manifest_survives_its_json(tmp_path: Path) -> None:
    staged = stage(RESOURCES["usage"], (FIXTURES / "usage" / "first.json").read_bytes(), tmp_path)
    reread = extracts.open_read(staged.landed.folder)
    assert isinstance(reread, SealedExtract)
    assert reread.manifest == staged.landed.manifest
    assert msgspec.json.decode(msgspec.json.encode(reread.manifest), type=Manifest) == reread.manifest


def test_the_diff_that_contributors_are_shown_is_the_real_one() -> None:
    root = Path(__file__).parents[2]
    diff = re.search(r"```diff\n(.*?)```", (root / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    assert diff
    parts = re.split(r"^--- .*\n\+\+\+ b/(.*)\n", diff[1], flags=re.MULTILINE)[1:]
    shown = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(shown) == {
        "faletl/resources.py",
        "sql/staging/stg_fal__billing_events.sql",
        "tests/fixtures/billing_events/first.json",
    }
    for name, part in shown.items():
        added = "".join(line.removeprefix("+") + "\n" for line in part.splitlines())
        assert added in (root / name).read_text("utf-8"), name
