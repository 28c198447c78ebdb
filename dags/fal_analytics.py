"""### Requests, errors and durations, hourly

Reads analytics of every endpoint that was used in the 90 days before, and weekly of fal's whole
catalogue: requests that only fail leave no usage. Left out, with a sentence in the log, where the key
may not read it. Runs by hand and backfills fetch the days that their interval touches, a day once a
backfill.

Moves `faletl://warehouse/raw/analytics`.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, HOURLY, connections, dag_id, load_resource

for connection in connections():
    with DAG(dag_id("fal_analytics", connection), schedule=HOURLY, doc_md=__doc__, **DAG_ARGS):
        load_resource("analytics", connection)
