"""The deployment as compose, Airflow and the linter of Dockerfiles read it. Nothing is started."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from faletl.config import Settings
from faletl.sandbox import FULL_KEY

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMPOSE, DOCKERFILE = (ROOT / "docker-compose.yml").read_text(), (ROOT / "Dockerfile").read_text()
EXAMPLE, DEMO, FILLED = ".env.example", ".env.demo", "the example, filled in"
COMMANDS = DOCKERFILE.replace("\\\n", "")

ONE_SHOT = {"airflow-init"}
DATABASES = {"postgres", "redis"}  # their entrypoints start as root, and stop being it
SECRETS = (
    "FAL_KEY",
    "POSTGRES_PASSWORD",
    "AIRFLOW__CORE__FERNET_KEY",
    "AIRFLOW__API__SECRET_KEY",
    "AIRFLOW__API_AUTH__JWT_SECRET",
)

# Parses commands without running them, and fails with the options that the configuration does not know.
PROBE = """
import json, sys
from airflow.cli.cli_parser import get_parser
from airflow.configuration import conf
from celery.app.utils import find_app

commands, options, celery_app = json.loads(sys.argv[1])
for command in commands:
    get_parser().parse_args(command)
known = conf.configuration_description
find_app(celery_app)
sys.exit(" ".join(option for section, option in options if option not in known[section]["options"]) or 0)
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A tool in the repository, without the environment of the person who runs the tests."""
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def compose(env_file: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What compose makes of the file; as packaged, its exit code is always 0, so look at stderr."""
    command = (BIN / "docker-compose", "--env-file", env_file, "config", *options)
    if env_file != FILLED:
        return run(*command)
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.write("".join(f"{name}={value}\n" for name, value in filled_in().items()))
        file.flush()
        return run(*(file.name if word == FILLED else word for word in command))


def filled_in() -> dict[str, str]:
    """The settings of the example with secrets that somebody put there."""
    return settings(EXAMPLE) | {name: f"mine-{number}" for number, name in enumerate(SECRETS)}


@cache
def services(env_file: str = DEMO) -> dict[str, dict[str, Any]]:
    """What compose would start with these settings, each by its name."""
    found: dict[str, dict[str, Any]] = json.loads(compose(env_file, "--format=json").stdout)["services"]
    return found


@cache
def variables() -> dict[str, dict[str, Any]]:
    """What the file takes from the settings, each by its name."""
    told = compose(FILLED, "--variables", "--format=json").stdout
    found: dict[str, dict[str, Any]] = json.loads(told)
    return found


@cache
def settings(env_file: str) -> dict[str, str]:
    lines = (ROOT / env_file).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def commands_of(program: str) -> list[list[str]]:
    """The arguments of every command and health check that is this program's."""
    commands = [service["command"] for service in services().values()]
    commands += [one["healthcheck"]["test"][1:] for one in services().values() if "healthcheck" in one]
    return [command[1:] for command in commands if command and command[0] == program]


def names_in_environments() -> set[str]:
    return {name for service in services().values() for name in service.get("environment") or ()}


# --- What the tools say ---------------------------------------------------------------------------


@pytest.mark.parametrize("env_file", [FILLED, DEMO])
def test_compose_takes_the_file(env_file: str) -> None:
    done = compose(env_file, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_file_conforms_to_the_specification_of_compose() -> None:
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    assert done.returncode == 0, done.stdout


def test_the_linter_has_nothing_to_say_about_the_dockerfile() -> None:
    done = run(BIN / "hadolint", "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_airflow_knows_the_commands_and_options_that_it_is_given(tmp_path: Path) -> None:
    commands = commands_of("airflow")
    assert len(commands) == 8  # six services, two of which are watched by a command
    names = [name.lower() for name in names_in_environments() if name.startswith("AIRFLOW__")]
    [celery_app] = re.findall(r"celery --app (\S+)", COMPOSE)
    given = json.dumps([commands, [name.split("__")[1:] for name in names], celery_app])
    done = run(sys.executable, "-c", PROBE, given, AIRFLOW_HOME=str(tmp_path), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_faletl_knows_the_commands_and_variables_that_it_is_given() -> None:
    [command] = commands_of("faletl")
    done = run(sys.executable, "-m", "faletl", *command, "--help")
    assert done.returncode == 0, done.stderr
    known = {field.validation_alias for field in Settings.model_fields.values()}
    given = {name for name in names_in_environments() if name.startswith("FAL")}
    assert given - known == {"FALETL_CONNECTIONS"}  # which the DAGs read


# --- What is started ------------------------------------------------------------------------------


def test_every_service_that_stays_is_watched_and_comes_back() -> None:
    for name, service in services().items():
        stays = name not in ONE_SHOT
        assert ("healthcheck" in service, service["restart"] == "unless-stopped") == (stays, stays), name


def test_every_image_is_pinned_and_ours_is_called_by_the_airflow_in_it() -> None:
    [base] = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    for image in (base, *(service["image"] for service in services().values())):
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+[\w.-]*", image), image
    lock = (ROOT / "requirements.lock").read_text()
    [version] = re.findall(r"^apache-airflow==(\S+)", lock, re.MULTILINE)
    assert base.startswith(f"apache/airflow:{version}-python3.")
    ours = {service["image"] for service in services().values() if "build" in service}
    assert ours == {f"faletl-airflow:{version}"}


def test_only_databases_start_as_root() -> None:
    users = {name: service.get("user", "0").split(":")[0] for name, service in services().items()}
    assert {name for name, user in users.items() if user in ("0", "root")} == DATABASES
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == users["worker"]


def test_only_airflow_can_be_reached_and_only_from_this_machine() -> None:
    ports = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert list(ports) == ["api-server"]
    assert {port["host_ip"] for port in ports["api-server"]} == {"127.0.0.1"}


def test_a_crash_leaves_no_memory_in_a_file() -> None:
    for name, service in services().items():
        if name not in DATABASES:
            assert service["ulimits"] == {"core": {}}, name  # zeros are left out of what is printed
    assert "ulimits: { core: 0 }" in COMPOSE


def test_only_the_worker_has_the_key() -> None:
    assert {name for name in services() if FULL_KEY in json.dumps(services()[name])} == {"worker"}


def test_the_connection_is_empty_where_nothing_is_set() -> None:
    connection = services(FILLED)["worker"]["environment"]["AIRFLOW_CONN_FAL_DEFAULT"]
    assert json.loads(connection) == {
        "conn_type": "fal",
        "password": filled_in()["FAL_KEY"],
        "host": "",
        "extra": {"metrics_api_key": "", "account": "", "rate": ""},
    }


def test_the_demonstration_asks_a_sandbox_which_is_not_there_otherwise() -> None:
    assert services().keys() - services(FILLED).keys() == {"sandbox"}
    [command] = commands_of("faletl")
    url = settings(DEMO)["FALETL_API_URL"]
    assert url == f"http://sandbox:{command[command.index('--port') + 1]}/v1"
    Settings.isolated(api_url=url, allow_http=settings(DEMO)["FALETL_ALLOW_HTTP"])


# --- What it is told ------------------------------------------------------------------------------


def test_every_setting_is_used_and_explained() -> None:
    assert variables().keys() == settings(EXAMPLE).keys()
    assert settings(DEMO).keys() - variables().keys() == {"COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}
    lines = (ROOT / EXAMPLE).read_text().splitlines()
    for before, line in pairwise(lines):
        if line and not line.startswith("#"):
            assert before.startswith("# "), line


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_that_is_missing_is_asked_for_by_name(secret: str, tmp_path: Path) -> None:
    others = [f"{name}={value}\n" for name, value in filled_in().items() if name != secret]
    for missing in ("", f"{secret}=\n"):
        (tmp_path / "settings").write_text("".join([*others, missing]))
        told = compose(tmp_path / "settings", "--quiet").stderr
        assert f"required variable {secret} is missing a value" in told


def test_the_example_as_it_stands_starts_nothing() -> None:
    """It shows no value that somebody could leave there: compose asks for the first that is missing."""
    told = compose(EXAMPLE, "--quiet").stderr
    assert re.search(r"required variable \w+ is missing a value: (make|put) ", told)
    assert compose(EXAMPLE).stdout == ""


def test_the_image_installs_by_hash_and_its_lock_is_at_hand() -> None:
    """All but faletl itself, which needs no index then: what builds it is locked, too."""
    [commands] = re.findall(r"^RUN --mount=type=bind,target=/src +(.*)$", COMMANDS, re.MULTILINE)
    locked, own, check = (one.split() for one in commands.split(" && "))
    assert "--require-hashes" in locked
    assert locked[-2:] == ["--requirement", "/src/requirements-image.lock"]
    assert {"--no-index", "--no-deps", "--no-build-isolation", "/src"} <= set(own)
    assert check == ["pip", "check"]
    assert "!requirements-image.lock" in (ROOT / ".dockerignore").read_text().splitlines()


def test_no_secret_has_a_value_in_the_file() -> None:
    secret = re.compile(r"(PASSWORD|SECRET|KEY)$")
    defaults = {name: variable["DefaultValue"] for name, variable in variables().items()}
    assert [name for name, default in defaults.items() if default and secret.search(name)] == []
    for name, value in re.findall(r"^ +([A-Z_]+): *(.*)$", COMPOSE, re.MULTILINE):
        if secret.search(name):
            assert value.startswith(f"${{{name}:?"), name


def test_what_is_filled_in_stays_out_of_git_and_of_the_image() -> None:
    assert not any(settings(EXAMPLE)[name] for name in SECRETS)
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert [line for line in ignored if line.startswith(("!.", "!*"))] == []
