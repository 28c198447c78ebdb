"""docs/reliability.md names a test for each fault; the tests are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = re.compile(r"^\| *(\d+) *\|(.*)\|$", re.MULTILINE)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_fault_has_a_test_that_exists() -> None:
    rows = ROWS.findall((ROOT / "docs" / "reliability.md").read_text("utf-8"))
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, row in rows:
        named = NAMED.findall(row)
        assert named or "not injected" in row, number
        for path, name in named:
            assert name in functions_of(path), (number, path, name)


@cache
def functions_of(path: str) -> frozenset[str]:
    """The functions and classes that a file defines."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))
