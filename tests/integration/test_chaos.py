"""A small chaos: what `make chaos` does to ten million charges, done to a hundred thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import needs_root


@needs_root
def test_chaos_loses_doubles_and_bends_nothing() -> None:
    words = (
        "--events 100000 --kills 30 --takeovers 4 --fills 3 --share 0.3 --pace 0.5 --readers 2 --seed 8"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *words.split()],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[0])
    assert figures["events"] == 100_000
    assert figures["kills"] >= 30
    assert not any(figures[name] for name in ("lost", "doubled", "wrong", "readers_who_saw_wrong"))
