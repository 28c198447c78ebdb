"""### Yesterday is modelled by 06:00 UTC

One run a day, which ends when readers see the whole day before. If it is still running at 06:00 UTC,
people get an alert: see the connection `fal_notify`.
"""

from datetime import timedelta

from airflow.sdk import DAG, AsyncCallback, DeadlineAlert, DeadlineReference

from faletl.airflow.notifier import FalNotifier
from faletl.airflow.tasks import DAG_ARGS, DAILY, connections, is_modelled

# The logical date is the start of the day that the run waits for.
BY_SIX = DeadlineAlert(
    reference=DeadlineReference.DAGRUN_LOGICAL_DATE,
    interval=timedelta(days=1, hours=6),
    callback=AsyncCallback(
        FalNotifier, {"message": "fal_deadline: yesterday's spend is not modelled by 06:00 UTC"}
    ),
)

with DAG("fal_deadline", schedule=DAILY, deadline=BY_SIX, doc_md=__doc__, **DAG_ARGS):
    is_modelled(connections()[0])
