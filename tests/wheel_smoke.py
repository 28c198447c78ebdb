"""Build the wheel, install it into a fresh environment, and run it there: no checkout in sight.

With an argument, that wheel is tried, as a release does with the one that it publishes. Dependencies
come from the environment that runs this script, so that nothing is resolved again.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

RUN = """
from faletl import pipeline
from faletl.cli.output import published
from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox, invented_world

with Sandbox(invented_world(7)) as server:
    settings = Settings.isolated(key=FULL_KEY, api_url=server.url, first_days=1, rate=0)
    report = pipeline.run(settings)
assert report.exit_code == 0, report.failures
with published(settings) as connection:
    spent = "select sum(cost_total) from reports.rpt_spend_daily"
    print(connection.exec_driver_sql(spent).scalar_one())
"""


def main() -> None:
    """Raise when the wheel lacks anything that the command needs."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        wheels = [Path(given) for given in sys.argv[1:]]
        if not wheels:
            build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)]
            subprocess.run(build, check=True)
            wheels = list(scratch.glob("faletl-*.whl"))
        (wheel,) = wheels
        venv.create(scratch / "fresh", with_pip=False)
        python = scratch / "fresh" / "bin" / "python"
        site = sysconfig.get_path("purelib", vars={"base": str(scratch / "fresh")})
        subprocess.run([*pip, "install", "--no-deps", "--target", site, str(wheel)], check=True)
        # The dependencies of this environment, without this environment's faletl.
        Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        where = [str(python), "-c", "import faletl; print(faletl.__file__)"]
        found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=folder).stdout
        assert found.startswith((str(scratch.resolve()), folder)), found
        done = subprocess.run(
            [str(python), "-c", RUN], check=True, capture_output=True, text=True, cwd=folder
        )
        assert float(done.stdout) > 0
        dags = "import faletl.airflow as a; print(*sorted(p.stem for p in a.dags_folder().glob('*.py')))"
        named = subprocess.run(
            [str(python), "-c", dags], check=True, capture_output=True, text=True, cwd=folder
        )
        assert named.stdout.split() == sorted(path.stem for path in (ROOT / "dags").glob("*.py"))
        print(f"{wheel.name}: a run from the installed wheel loads, builds and publishes")


if __name__ == "__main__":
    main()
