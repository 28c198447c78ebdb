"""Run faletl's command line and die by SIGKILL at a chosen call: `killed_run FUNCTION WHEN NTH ARGS…`.

FUNCTION is dotted (`faletl.load._insert`), WHEN is `before` or `after`, NTH counts its calls from 1.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from typing import Any

import time_machine

from faletl import cli
from tests.truth import NOW


def main() -> None:
    """Arm the trap and run."""
    function, when, nth, *args = sys.argv[1:]
    owner_name, _, name = function.rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, _, attribute = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), attribute)
    original = getattr(owner, name)
    numbers = itertools.count(1)

    def trapped(*given: Any, **named: Any) -> Any:
        is_chosen = next(numbers) == int(nth)
        if when == "before" and is_chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*given, **named)
        if when == "after" and is_chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, trapped)
    sys.argv = ["faletl", *args]
    with time_machine.travel(NOW, tick=True):
        cli.main()


if __name__ == "__main__":
    main()
