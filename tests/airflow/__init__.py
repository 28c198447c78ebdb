"""Real Airflow: its DAGs run against the sandbox and DuckDB, with a metadata database of their own."""
