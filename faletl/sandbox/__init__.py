"""A fal Platform API on loopback with invented data: for demos, tests and your own DAGs.

Example:
    with Sandbox(invented_world()) as sandbox:
        httpx.get(f"{sandbox.url}/models/usage", headers={"Authorization": f"Key {FULL_KEY}"})
"""

from faletl.invented import BILLING_KEY, FULL_KEY, READONLY_KEY
from faletl.invented import KEYS as DEFAULT_KEYS
from faletl.sandbox.server import Conduct, Fault, Request, Sandbox
from faletl.sandbox.world import BillingEvent, Calls, Credential, UsageLine, World, invented_world

__all__ = [
    "BILLING_KEY",
    "DEFAULT_KEYS",
    "FULL_KEY",
    "READONLY_KEY",
    "BillingEvent",
    "Calls",
    "Conduct",
    "Credential",
    "Fault",
    "Request",
    "Sandbox",
    "UsageLine",
    "World",
    "invented_world",
]
