"""On import, all SQL is parsed: for the process from which tests/forked.py forks its children."""

from tests.forks import parse_all_sql

parse_all_sql("duckdb")
