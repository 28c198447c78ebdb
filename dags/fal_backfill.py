"""### Fetch days again, by hand

Trigger it and fill in the form: the first day, the day after the last, the resources. A dry run fetches
nothing; the log of each `plan` shows the windows and the number of calls.

Updates the assets of the raw tables, so that `fal_spend` builds the changed days.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, backfill_params, connections, dag_id, load_resource
from faletl.resources import RESOURCES

for connection in connections():
    with DAG(
        dag_id("fal_backfill", connection),
        schedule=None,
        params=backfill_params(),
        doc_md=__doc__,
        **DAG_ARGS,
    ):
        alone = [name for name in RESOURCES if RESOURCES[name].ids_per_call is None]
        loaded = [load_resource(name, connection) for name in alone]
        for name in sorted(RESOURCES.keys() - set(alone)):  # their ids come from the others
            load_resource(name, connection, after=loaded)
