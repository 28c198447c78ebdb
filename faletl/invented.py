"""What tells invented data from fal's: the mark on a sandbox's answers, its keys, its account.

The sandbox marks each of its answers. So a warehouse that holds real accounts can refuse them, and one
of a sandbox can refuse fal's (faletl/line/accounts.py).
"""

from __future__ import annotations

from collections.abc import Mapping

HEADER = "x-faletl-sandbox"
"""The header that each answer of a sandbox has, whatever it answers; fal has none of that name."""

ACCOUNT = "sandbox"
"""The username of the invented account, unless somebody serves a world of their own."""

FULL_KEY = "sandbox-full:not-a-secret"
BILLING_KEY = "sandbox-billing:not-a-secret"
READONLY_KEY = "sandbox-readonly:not-a-secret"
KEYS: Mapping[str, str] = {FULL_KEY: "FULL", BILLING_KEY: "BILLING", READONLY_KEY: "READONLY"}
"""The sandbox's own keys, and the preset of each."""

DEMO_MARK = ".faletl-demo"
"""The file that says that a folder was made by `faletl demo`."""
