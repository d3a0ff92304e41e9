"""What a stranger does: build and look over the wheel, install it where nothing is, run README, then the model.

In: the repository. Exits with an error at the first step that fails. Needs Python and the package registry alone.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: No wheel of the operator is larger, in bytes.
LIMIT = 2 * 2**20


def say(*command: object, cwd: Path = ROOT, expected: int = 0) -> str:
    """Run a command, which must end with this status; what it printed."""
    quick = os.environ | {"PIP_COMPILE": "0"}  # of what is installed little is imported
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=quick, capture_output=True, text=True, check=False
    )
    if done.returncode != expected:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def new_environment(place: Path) -> Path:
    """The folder of its commands."""
    venv.create(place, with_pip=True)
    return place / "bin"


def main() -> None:
    """Build, check, install, run."""
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tools, empty = new_environment(place / "tools"), new_environment(place / "empty")
        say(tools / "pip", "install", "-q", "build", "twine")
        say(tools / "python", "-m", "build", "-o", place / "dist", ROOT)
        (wheel,) = (place / "dist").glob("*.whl")
        say(tools / "twine", "check", "--strict", *sorted((place / "dist").iterdir()))
        names = zipfile.ZipFile(wheel).namelist()
        if wheel.stat().st_size > LIMIT or any(name.endswith(".safetensors") for name in names):
            raise SystemExit(f"{wheel.name} must hold no weights, got {wheel.stat().st_size:,} bytes")
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, twine check passed", flush=True)
        say(empty / "pip", "install", "-q", torch)
        say(empty / "pip", "install", "-q", wheel)
        say(empty / "pip", "check")
        examples = PYTHON.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        for code in examples:
            say(empty / "python", "-c", code, cwd=place)
        print(f"README: {len(examples)} example(s) ran in an empty environment", flush=True)
        refused = say(empty / "baatt", "generate", "--prompt", "The", cwd=place, expected=2)
        if "pip install ./model" not in refused or refused.count("\n") != 1:
            raise SystemExit(f"baatt must refuse in one line without the model, got:\n{refused}")
        say(empty / "baatt", "doctor", cwd=place)
        say(empty / "pip", "install", "-q", ROOT / "model")
        say(empty / "baatt", "generate", "--prompt", "The", "--json", cwd=place)
        say(empty / "python", "-c", "from baatt.assets import shipped_adapter as find; find().open('rb')", cwd=place)
        print("The models are refused without their package, and found with it", flush=True)


if __name__ == "__main__":
    sys.exit(main())
