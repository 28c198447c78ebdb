"""Which files and folders below a folder are touched: what a run looks at of all that has landed."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any


class Watch:
    """Notes what Python opens, lists, makes or deletes below a folder, between `start` and `stop`.

    Asking whether a file is there goes unnoticed: Python has no audit event for it.
    """

    EVENTS = frozenset(
        ["open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir"]
    )

    def __init__(self, folder: Path) -> None:
        self._start = f"{folder}/"
        self._touched: list[str] | None = None
        sys.addaudithook(self._seen)  # a hook stays as long as the process

    def _seen(self, event: str, given: tuple[Any, ...]) -> None:
        if self._touched is not None and event in self.EVENTS:
            path = str(given[0])
            if path.startswith(self._start):
                self._touched.append(path.removeprefix(self._start))

    def start(self) -> None:
        """Count from here on."""
        self._touched = []

    def stop(self) -> list[str]:
        """What was touched since, below the folder."""
        found, self._touched = self._touched or [], None
        return found


def is_of(path: str, windows: Collection[tuple[str, str]]) -> bool:
    """Whether a path of the landing (account, resource, day, …) is of one of the windows, or of all."""
    parts = path.split("/")
    return len(parts) < 3 or (parts[1], parts[2]) in windows
