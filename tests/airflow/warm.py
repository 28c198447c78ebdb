"""Airflow, imported once and forked for whatever tests run in it: `python -m tests.airflow.warm`.

Importing Airflow and making its execution API costs 13 s of CPU, a fork of it none. Reads JSON lines:
{"code", "argv", "env", "home", "output"} starts a fork and is answered with its pid, {"wait": pid} with
its exit code. Each fork has a metadata database of its own, a new environment, and says what it says to
`output`; five minutes are too long for any. Ends with stdin.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

SECONDS = 300


def main() -> None:
    """Import, then fork."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever Airflow says while it is imported is no reply
    _warm_up()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            replies.write(f"{os.waitstatus_to_exitcode(status)}\n")
            continue
        pid = os.fork()
        if not pid:
            _run(asked)
        replies.write(f"{pid}\n")
    os._exit(0)  # what was imported need not be taken apart


def _warm_up() -> None:
    """Import what tasks import, but open nothing and start no thread."""
    import httpx
    from airflow import settings
    from airflow.sdk.execution_time.supervisor import in_process_api_server

    from tests.forks import parse_all_sql

    async def ask() -> None:
        transport = httpx.ASGITransport(in_process_api_server().app)
        async with httpx.AsyncClient(transport=transport) as client:
            await client.get("http://in-process.invalid/health")  # the first request makes its routes

    asyncio.run(ask())
    parse_all_sql("duckdb")
    settings.dispose_orm()


def _run(asked: Mapping[str, Any]) -> None:
    """In the fork: run the code as a program of its own would, and end."""
    code = 1
    try:
        signal.alarm(SECONDS)
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["home"])
        sys.argv = ["warm", *asked["argv"]]
        _connect()
        exec(compile(asked["code"], "<test>", "exec"), {"__name__": "__main__"})  # noqa: S102
        _disconnect()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code)
    except BaseException:  # noqa: BLE001  # whatever it is, it is told and ends the fork
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _connect() -> None:
    """Let Airflow use the metadata database that the environment names."""
    from airflow import settings

    settings.configure_vars()  # type: ignore[no-untyped-call]
    settings.configure_orm()  # type: ignore[no-untyped-call]


def _disconnect() -> None:
    """Let SQLite write what is still in its log into the database, as the end of a process does."""
    from airflow import settings

    settings.dispose_orm()


if __name__ == "__main__":
    main()
