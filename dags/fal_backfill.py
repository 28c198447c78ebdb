"""### Fetch days anew, by hand

Trigger it and fill in the form: the first day, the day after the last, which resources. A dry run tells
in the log of each `plan` which windows would be read in how many calls, and reads nothing.

Moves the raw tables' assets, so that `fal_spend` builds what changed.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, backfill_params, connections, dag_id, load_resource

for connection in connections():
    with DAG(
        dag_id("fal_backfill", connection),
        schedule=None,
        params=backfill_params(),
        doc_md=__doc__,
        **DAG_ARGS,
    ):
        usage, events, credits_, models, prices, analytics = (
            load_resource(name, connection)
            for name in ("usage", "billing_events", "credits", "models", "prices", "analytics")
        )
        [usage, models] >> prices
        [usage, models] >> analytics
