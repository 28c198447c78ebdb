"""Whatever stands in fal's texts stays text: byte for byte in the tables, and harmless elsewhere."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import time_machine

from faletl import pipeline
from faletl.cli.output import Format, print_query
from faletl.cli.runtime import JsonLines
from faletl.sandbox import Credential, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import ask, settings_for
from tests.truth import Account, charges, line

PROMPT = "a portrait of Ann Example, born 1 April 1980, 12 Private Road. " * 12

TEXTS = [
    # Twins that only look alike, and what turns or hides text.
    "x/é", "x/e\N{COMBINING ACUTE ACCENT}", "x/case", "x/CASE", "x/a", "x/a\N{ZERO WIDTH SPACE}", "x/а",
    "x/a ", " x/a", "x/\u202egpj.exe", "\N{FACE PALM}\u200d\N{FEMALE SIGN}", "x/\u2028y\u0085z",
    # What databases, templates and shells take for code.
    "'; DROP TABLE raw.usage;--", '"; drop schema marts cascade;--', "%s %(x)s {0} {batch}", ":p $1 ?",
    "{{ conn.fal.password }}", "${HOME} $(id) `id`", "\\", "\\'", "x' or '1'='1", "null", "NaN", "a,b;c",
    # What file systems take for a place.
    "../../../etc/cron.d/x", "/abs", "~root", "CON", "x/" + "n" * 298, "a\\..\\b", ".", "*",
    # What browsers, spreadsheets, terminals and logs take for more than text.
    "<script>alert(1)</script>", "=cmd|'/c calc'!A1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1",
    "\x1b[31mred", "x\n2026-11-22 ERROR all is lost", "x\r\nSet-Cookie: a=b", "\x07\x7f", PROMPT,
]  # fmt: skip


def test_any_text_is_kept_as_it_is_and_is_only_text(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG, logger="faletl")
    hour = datetime(2026, 11, 22, 7, tzinfo=truth.NOW.tzinfo)
    account = Account()
    for number, text in enumerate(TEXTS):
        who = Credential(text, api_key_id=text) if number % 2 else Credential(text, login_username=text)
        one = line(hour, text, str(number + 1), "0.5", unit=text, credential=who)
        account.lines += [one, replace(one, hour=hour + timedelta(hours=1))]
        account.catalogue.append({"endpoint_id": text, "metadata": {"display_name": text}})
        account.list_price(text, "0.5", text)
    account.lines.append(line(hour, TEXTS[-3], "99999", "0.5", unit=TEXTS[-3]))  # a runaway charge
    root = tmp_path / "a" / "b"
    with Sandbox(account) as server:
        settings = settings_for(server.url, root, gate=True)
        report = pipeline.run(settings, Asked(truth.day(22), truth.day(23)))
    assert report.exit_code == 0, report.failures

    # In the tables: each its own, byte for byte, with its own figures.
    spent: dict[tuple[str, str], Decimal] = {}
    for one in account.lines:
        key = (one.endpoint_id, one.unit)
        spent[key] = spent.get(key, Decimal(0)) + one.cost_total
    assert len(spent) == len(TEXTS)
    for table in ("raw.usage", "marts.fct_usage", "reports.rpt_spend_daily"):
        rows = ask(settings, f"select endpoint_id, unit, sum(cost_total) from {table} group by 1, 2")
        assert {row[:2]: row[2] for row in rows} == spent, table
    events = ask(settings, "select endpoint_id, request_id, cost_total from marts.fct_billing_event")
    assert Counter(events) == Counter(
        (one.endpoint_id, one.request_id, one.cost_total) for one in charges(account.lines)
    )
    for column in ("dim_endpoint.endpoint_id", "dim_unit.unit", "dim_price.endpoint_id"):
        told = f"{column} <> 'unknown'"  # the unit of charges that name none
        found = ask(settings, f"select {column} from marts.{column.split('.')[0]} where {told}")
        # In a question a comma parts two ids, so no price can be asked for one that has it.
        known = [text for text in TEXTS if "," not in text or "price" not in column]
        assert sorted(text for (text,) in found) == sorted(known), column
    assert ask(settings, "select count(distinct credential_id) from marts.dim_credential") == [
        (len(TEXTS) + 1,)
    ]

    # On the disk: names of ours alone, below the folder that was named.
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert all(re.fullmatch(r"\.?[A-Za-z0-9._-]{1,80}", path.name) for path in tmp_path.rglob("*"))

    # In logs and on paper: one line each, nothing that moves a cursor, and not much of a long one.
    assert "runaway charge: " in caplog.text
    for record in caplog.records:
        message = record.getMessage()
        assert message.isprintable(), ascii(message)
        assert PROMPT[:81] not in message
        formatted = JsonLines().format(record)
        assert formatted.isascii()
        assert formatted.splitlines() == [formatted]
        assert json.loads(formatted)["message"] == message
    query = "select endpoint_id from marts.dim_endpoint order by endpoint_id"
    shown = {}
    forms: tuple[Format, ...] = ("table", "csv", "json")
    for form in forms:
        capsys.readouterr()
        print_query(settings, query, form)
        shown[form] = capsys.readouterr().out
    assert shown["table"].replace("\n", "").isprintable()
    cells = [row[0] for row in csv.reader(io.StringIO(shown["csv"], newline=""))][1:]
    assert not any(cell[:1] in "=+-@\t\r" for cell in cells)
    shown_texts = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in TEXTS)
    assert sorted(cell.replace("'", "") for cell in cells) == sorted(
        text.replace("'", "") for text in shown_texts
    )
    assert sorted(row["endpoint_id"] for row in json.loads(shown["json"])) == sorted(TEXTS)
