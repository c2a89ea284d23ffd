"""Makes the virtual environment in which the Makefile runs everything, and keeps it current.

    python3 scripts/make_venv.py .venv

Needs a Python with the standard library and nothing else: no pip, no ensurepip, no activated environment.
Does nothing when the environment is complete and was made from the same pyproject.toml, setup.py and
constraints.txt. One that was left half-made is made anew.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("pyproject.toml", "setup.py", "constraints.txt")
MINIMUM = (3, 10)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP_JSON = "https://pypi.org/pypi/pip/json"
STAMP = "fxopt-is-installed"


def main() -> int:
    if sys.version_info < MINIMUM:
        found = ".".join(map(str, sys.version_info[:3]))
        say(f"fxopt needs Python 3.10 or newer, and {sys.executable} is {found}.")
        say("Name another with: make PYTHON=/path/to/python3.12 ...")
        return 1
    folder = Path(sys.argv[1]).absolute()
    python = folder / "bin" / "python"
    stamp = folder / STAMP
    wanted = fingerprint(folder)
    usable = stamp.exists() and succeeds([python, "-m", "pip", "--version"])
    if usable and stamp.read_text() == wanted:
        return 0
    if not usable and not create(folder, python):
        return 1
    stamp.unlink(missing_ok=True)
    if not install(python):
        say("The installation failed; pip's message above says why. Running make again starts afresh.")
        return 1
    stamp.write_text(wanted)
    return 0


def fingerprint(folder: Path) -> str:
    """The path counts too: an environment that was moved or copied has scripts that point elsewhere."""
    digest = hashlib.sha256(str(folder).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def create(folder: Path, python: Path) -> bool:
    say(f"Making {folder} with {sys.executable}")
    for arguments, add_pip in (([], None), (["--without-pip"], fetch_pip)):
        remove(folder)
        if not succeeds([sys.executable, "-m", "venv", *arguments, folder]):
            continue
        if add_pip is not None and not add_pip(python):
            continue
        if succeeds([python, "-m", "pip", "--version"]):
            return True
    say("This Python can make no virtual environment with pip in it. On Debian: apt install python3-venv")
    return False


def remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def fetch_pip(python: Path) -> bool:
    """Install pip from PyPI where Python comes without ensurepip, as Debian's does."""
    say("No ensurepip here: fetching pip from PyPI")
    try:
        with urlopen(PIP_JSON, timeout=30) as answer:
            files = json.load(answer)["urls"]
        wheel = next(file for file in files if file["packagetype"] == "bdist_wheel")
        with urlopen(urljoin(PIP_JSON, wheel["url"]), timeout=60) as answer:
            content = answer.read()
    except (OSError, ValueError, KeyError, StopIteration) as error:
        say(f"pip could not be fetched: {error}")
        return False
    if hashlib.sha256(content).hexdigest() != wheel["digests"]["sha256"]:
        say("pip could not be fetched: its checksum is wrong")
        return False
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / wheel["filename"]
        path.write_bytes(content)
        # A wheel is a zip archive, and Python can run a package that lies in one.
        return succeeds([python, path / "pip", "install", "--no-index", path])


def install(python: Path) -> bool:
    command = [python, "-m", "pip", "install", "--no-input", "-c", "constraints.txt", "-e", ".[dev]"]
    for index in torch_indexes():
        if subprocess.run([*command, *index], cwd=ROOT, env=pip_environment(), check=False).returncode == 0:
            return True
    return False


def torch_indexes() -> list:
    """Extra arguments for pip, to be tried in order.

    PyPI's torch for Linux brings gigabytes of CUDA, that of the CPU index does not. A version with `+cpu`
    satisfies the pin and ranks above the same version without it, so pip takes it.
    """
    if succeeds(["nvidia-smi", "-L"]):
        return [[]]
    if is_reachable(f"{CPU_INDEX}/torch/"):
        return [["--extra-index-url", CPU_INDEX], []]
    say(f"No GPU here, and {CPU_INDEX} does not answer: pip takes the torch that its own index offers.")
    return [[]]


def is_reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether the page can be read in time; in a thread, since a name lookup has no timeout of its own."""
    answers = []

    def ask() -> None:
        try:
            with urlopen(url, timeout=seconds) as answer:
                answers.append(answer.status)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [200]


def pip_environment() -> dict:
    settings = {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    return {**os.environ, **settings}


def succeeds(command: list) -> bool:
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return done.returncode == 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
