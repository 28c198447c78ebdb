"""What distinguishes invented data from fal's: the header of a sandbox's answers, its keys, its account.

The sandbox marks each of its answers. So a warehouse of real accounts can refuse these answers, and a
warehouse of a sandbox can refuse fal's (faletl/line/accounts.py).
"""

from __future__ import annotations

from collections.abc import Mapping

HEADER = "x-faletl-sandbox"
"""The header of every answer of a sandbox; fal sends no header of this name."""

ACCOUNT = "sandbox"
"""The username of the invented account, unless a custom world is served."""

FULL_KEY = "sandbox-full:not-a-secret"
BILLING_KEY = "sandbox-billing:not-a-secret"
READONLY_KEY = "sandbox-readonly:not-a-secret"
KEYS: Mapping[str, str] = {FULL_KEY: "FULL", BILLING_KEY: "BILLING", READONLY_KEY: "READONLY"}
"""The sandbox's own keys, and the preset of each."""

DEMO_MARK = ".faletl-demo"
"""The file that marks a folder made by `faletl demo`."""
