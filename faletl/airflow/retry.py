"""When Airflow is to run a failed task again: as the error says, not as often as it may."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from airflow.sdk import RetryDecision, RetryPolicy

from faletl.errors import FaletlError, LeaseLostError

if TYPE_CHECKING:
    from airflow.sdk import Context

FAILED = 1
"""The exit code of what may be tried again (README, "Exit codes")."""

LONGEST = timedelta(days=1)
"""The longest wait before fal is asked again, whatever it says."""


class FalRetryPolicy(RetryPolicy):
    """A refused key, refused data and wrong settings fail at once; 429 waits for as long as fal asks.

    Who lost the warehouse to a newer run fails at once, too: that run is at it.
    """

    def evaluate(
        self,
        exception: BaseException,
        try_number: int,
        max_tries: int,
        context: Context | None = None,
    ) -> RetryDecision:
        """See `RetryPolicy`; what is no error of ours is retried as the task says."""
        if not isinstance(exception, FaletlError):
            return RetryDecision.default()
        if exception.exit_code != FAILED or isinstance(exception, LeaseLostError):
            return RetryDecision.fail(str(exception))
        wait = exception.facts.get("retry_after")
        if isinstance(wait, int):
            longest = int(LONGEST.total_seconds())
            return RetryDecision.retry(timedelta(seconds=min(wait, longest)), str(exception))
        return RetryDecision.default()
