"""### List prices and the catalogue, daily

Fetches fal's catalogue of models, then the list price of every endpoint in it or in your usage, as of
now: one snapshot a day, and another only if something changed. A manual or backfill run always takes a
snapshot of now, because fal does not serve past prices.

Updates `faletl://warehouse/raw/models` and `.../raw/prices`.
"""

from airflow.sdk import DAG

from faletl.airflow.tasks import DAG_ARGS, DAILY, EVERY_DAY, connections, dag_id, load_resource

for connection in connections():
    with DAG(dag_id("fal_prices", connection), schedule=DAILY, doc_md=__doc__, **DAG_ARGS):
        loaded = []
        for resource in EVERY_DAY:
            loaded = [load_resource(resource, connection, after=loaded)]
