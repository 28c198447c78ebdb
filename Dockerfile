FROM apache/airflow:3.3.2-python3.12

# A new named volume gets the owner and mode of the folder it is mounted on, so no container has to start as root.
USER 0
RUN install --directory --owner=50000 --group=0 --mode=0770 \
    /data/landing /data/warehouse "${AIRFLOW_HOME}/auth"
USER 50000

# Only what requirements-image.lock names is installed, by hash, and faletl itself, without an index. Airflow comes from
# the base image; at the end pip checks that all versions fit together.
RUN --mount=type=bind,target=/src \
    pip install --no-cache-dir --no-deps --require-hashes --requirement /src/requirements-image.lock \
    && pip install --no-cache-dir --no-deps --no-index --no-build-isolation /src \
    && pip check

COPY dags ${AIRFLOW_HOME}/dags
