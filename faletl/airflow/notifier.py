"""Notify people of a failed task, refused data, a runaway charge, or a late day."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook, BaseNotifier, Connection
from airflow.sdk.exceptions import AirflowNotFoundException

from faletl.errors import LeaseLostError

if TYPE_CHECKING:
    from airflow.sdk import Context

log = logging.getLogger(__name__)

NOTIFY_CONNECTION = "fal_notify"


class FalNotifier(BaseNotifier):
    """Posts `{"text": message}` to a webhook, in the format of Slack, Mattermost and others.

    The URL is the password of a connection `fal_notify`, of any type. Without it, the message is only
    logged. The message is a template, so texts from fal go through `announce`, which renders nothing.
    """

    template_fields: Sequence[str] = ("message",)

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def notify(self, context: Context) -> None:
        """Send the message from a task; if a newer run took over the work, only log it."""
        if isinstance(context.get("exception"), LeaseLostError):
            log.warning("%s", self.message)
            return
        _send(self.message)

    async def async_notify(self, context: Context) -> None:
        """Send the message from the triggerer, for a missed deadline."""
        del context
        try:
            url = (await Connection.async_get(NOTIFY_CONNECTION)).password
        except AirflowNotFoundException:
            url = None
        await asyncio.to_thread(_post, url, self.message)


def announce(kind: str, detail: str) -> None:
    """Send an alert from a task: its kind and a sentence, which is not rendered as a template."""
    _send(f"{kind}: {detail}")


def _send(message: str) -> None:
    try:
        url = BaseHook.get_connection(NOTIFY_CONNECTION).password
    except AirflowNotFoundException:
        url = None
    _post(url, message)


def _post(url: str | None, message: str) -> None:
    log.warning("%s", message)
    if not url:
        return
    import httpx

    try:
        httpx.post(url, json={"text": message}, timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # The text and traceback of the error contain the URL, which is a secret.
        kind = type(error).__name__
        log.error("the webhook of %s did not accept the message: %s", NOTIFY_CONNECTION, kind)  # noqa: TRY400
