"""A small chaos: what `make chaos` does to ten million charges, done to thirty thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import needs_root


@needs_root
@pytest.mark.parametrize(
    ("events", "kills", "more"),
    [
        (30_000, 10, "--takeovers 2 --fills 2 --share 0.3 --readers 2"),
        (20_000, 6, "--takeovers 2 --fills 1 --share 0.5 --readers 1 --postgres --server-kills 3"),
    ],
    ids=["on_file", "on_server"],
)
def test_chaos_loses_doubles_and_bends_nothing(events: int, kills: int, more: str) -> None:
    words = f"--events {events} --kills {kills} --pace 0.5 --seed 8 {more}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *words.split()],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[0])
    assert figures["events"] == events
    assert figures["kills"] >= kills
    assert not any(figures[name] for name in ("lost", "doubled", "wrong", "readers_who_saw_wrong"))
