"""Fuzz for long: see the package. Prints each kind of finding with the shortest bytes that showed it."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import Target, targets

LONGEST_SECONDS = 20
"""What a reader may take for a few kilobytes on a busy machine before it counts as hanging."""


@dataclass
class Finding:
    """What went wrong, how often, and the shortest bytes that showed it."""

    target: str
    body: bytes
    told: str
    count: int = 0

    def __str__(self) -> str:
        body = f"{self.body[:900]!r}" + f" … {self.body[-900:]!r}" * (len(self.body) > 900)
        return f"\n{self.target}, {self.count} times:\n{self.told}{body}"


def fuzz(target: Target, executions: int, seed: int) -> list[Finding]:
    """Spend that many executions on the target; returns one finding of each kind."""
    findings: dict[tuple[object, ...], Finding] = {}
    random, started, taken = Random(f"{seed} {target.name}"), time.monotonic(), 0  # noqa: S311
    for _ in range(executions):
        body = mutated(random, target.seeds)
        signal.alarm(LONGEST_SECONDS)
        try:
            taken += target.check(body)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a finding
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            told = "".join(traceback.format_exception(error)[-8:])
            found = findings.setdefault((type(error), line), Finding(target.name, body, told))
            found.count += 1
            if len(body) < len(found.body):
                found.body, found.told = body, told
    signal.alarm(0)
    print(
        f"{target.name:28} {executions:>9,} executions {taken / executions:>6.1%} taken "
        f"{time.monotonic() - started:>7.1f} s",
        flush=True,
    )
    return list(findings.values())


def hangs(*_: object) -> None:
    """Raises TimeoutError, in the middle of whatever takes too long."""
    raise TimeoutError(f"not done within {LONGEST_SECONDS} s")


def main() -> int:
    """Run as the command line says; 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="targets whose name has this in it")
    given = parser.parse_args()
    logging.disable()
    signal.signal(signal.SIGALRM, hangs)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [target for target in targets(Path(folder)) if given.only in target.name]
        whole = sum(target.share for target in chosen)
        findings = [
            finding
            for target in chosen
            for finding in fuzz(
                target, max(1, round(given.executions * target.share / whole)), given.seed
            )
        ]
    print(*findings, sep="\n")
    print(f"{len(findings)} kinds of findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
