"""The retry policy of failed tasks: it follows the error, not the number of tries alone."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from airflow.sdk import RetryDecision, RetryPolicy

from faletl.errors import FaletlError, LeaseLostError

if TYPE_CHECKING:
    from airflow.sdk import Context

FAILED = 1
"""The exit code of errors that may be tried again (README, "Exit codes")."""

LONGEST = timedelta(days=1)
"""The longest wait before the next attempt, even if fal asks for a longer one."""


class FalRetryPolicy(RetryPolicy):
    """Refused keys, refused data and wrong settings fail at once; 429 waits as long as fal asks.

    A task that lost the warehouse to a newer run fails at once too: that run does the work.
    """

    def evaluate(
        self,
        exception: BaseException,
        try_number: int,
        max_tries: int,
        context: Context | None = None,
    ) -> RetryDecision:
        """See `RetryPolicy`; errors that are not faletl's are retried as the task is configured."""
        if not isinstance(exception, FaletlError):
            return RetryDecision.default()
        if exception.exit_code != FAILED or isinstance(exception, LeaseLostError):
            return RetryDecision.fail(str(exception))
        wait = exception.facts.get("retry_after")
        if isinstance(wait, int):
            longest = int(LONGEST.total_seconds())
            return RetryDecision.retry(timedelta(seconds=min(wait, longest)), str(exception))
        return RetryDecision.default()
