"""Build the wheel, install it into a fresh environment, and run the demo there: no checkout in sight.

Dependencies come from the environment that runs this script, so that nothing is resolved again.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Raise when the wheel lacks anything that the command needs."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)], check=True
        )
        venv.create(scratch / "fresh", with_pip=False)
        python = scratch / "fresh" / "bin" / "python"
        site = sysconfig.get_path("purelib", vars={"base": str(scratch / "fresh")})
        (wheel,) = scratch.glob("faletl-*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", site, str(wheel)], check=True)
        # The dependencies of this environment, without this environment's faletl.
        Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        where = [str(python), "-c", "import faletl; print(faletl.__file__)"]
        found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=folder).stdout
        assert found.startswith((str(scratch.resolve()), folder)), found
        demo = [str(python), "-c", "from faletl.cli import main; main()", "demo"]
        done = subprocess.run(demo, check=True, capture_output=True, text=True, cwd=folder)
        assert "How long do the credits last?" in done.stdout
        dags = "import faletl.airflow as a; print(*sorted(p.stem for p in a.dags_folder().glob('*.py')))"
        named = subprocess.run(
            [str(python), "-c", dags], check=True, capture_output=True, text=True, cwd=folder
        )
        assert named.stdout.split() == sorted(path.stem for path in (ROOT / "dags").glob("*.py"))
        print(f"{wheel.name}: the demo runs from the installed wheel")


if __name__ == "__main__":
    main()
