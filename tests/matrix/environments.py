"""A virtual environment for each version of torch and of Python, made once and used again."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Environment", "InstallError", "default_folder", "interpreter", "pinned"]

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
_EXTRAS = "test,models,tutorials"
_ROOM = 10  # GB: the largest environment takes 6, and pip as much again for a moment
_DONE = "installed.txt"  # tells what is in the environment; written last


class InstallError(Exception):
    """An environment cannot be made."""


def pinned() -> dict[str, str]:
    """The versions of torch that the tests are run on, oldest first: "2.13" to "2.13.0"."""
    found = {}
    for path in REQUIREMENTS.glob("torch-*.txt"):
        patch = path.read_text().strip().partition("==")[2]
        found[path.stem.removeprefix("torch-")] = patch
    return dict(sorted(found.items(), key=lambda item: [*map(int, item[0].split("."))]))


def default_folder() -> Path:
    """Where environments are kept: a folder for what can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lamina-matrix"


def interpreter(wanted: str | None) -> str:
    """The Python to make an environment with.

    Args:
        wanted: "3.12", a path, or None for the one that runs this.

    Raises:
        InstallError: There is none.
    """
    if wanted is None:
        return sys.executable
    names = [wanted, f"python{wanted}"]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    names += [str(folder / "bin" / "python") for folder in sorted(pyenv.glob(f"{wanted}.*"))]
    for name in names:
        path = shutil.which(name)
        if path is not None and _runs(path):
            return path
    raise InstallError(f"no Python {wanted} here; looked for {', '.join(names)}")


def _runs(path: str) -> bool:
    # A manager of versions leaves names on the path that run nothing.
    return subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0


def _answer(python: str | Path, code: str) -> str:
    command = [str(python), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass
class Environment:
    """One version of torch under one Python.

    Attributes:
        torch: As in `pinned`: "2.13".
        base: The Python to make it with.
        folder: Where environments are kept.
    """

    torch: str
    base: str
    folder: Path
    python_version: str = field(init=False)

    def __post_init__(self) -> None:
        code = "import platform; print(platform.python_version())"
        self.python_version = _answer(self.base, code)

    @property
    def requirements(self) -> Path:
        """The file that pins torch, for pip."""
        return REQUIREMENTS / f"torch-{self.torch}.txt"

    @property
    def place(self) -> Path:
        """Its folder."""
        return self.folder / f"torch-{pinned()[self.torch]}-python-{self.python_version}"

    @property
    def python(self) -> Path:
        """The Python in it."""
        return self.place / "bin" / "python"

    def is_ready(self) -> bool:
        """Whether it holds what the project asks for now."""
        done = self.place / _DONE
        return done.exists() and done.read_text() == self._contents()

    def make(self, *, keep_downloads: bool, patience: float | None = None) -> float:
        """Makes it, or brings it up to date; returns the seconds that this took.

        Args:
            keep_downloads: Whether pip may fill its cache: a wheel of torch and those that it
                needs take gigabytes.
            patience: After how many seconds to give up.

        Raises:
            InstallError: pip says no, takes too long, or would have too little room on the disk.
        """
        if self.is_ready():
            return 0.0
        start = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free / 2**30
        if free < _ROOM:
            raise InstallError(f"{free:.0f} GB are free in {self.folder}, {_ROOM} are needed")
        if not self.python.exists():
            self._do(self.base, "-m", "venv", self.place)
        options = [] if keep_downloads else ["--no-cache-dir"]
        self._do(
            *(self.python, "-m", "pip", "install", "--quiet", *options),
            *("--requirement", self.requirements, "--editable", f"{ROOT}[{_EXTRAS}]"),
            patience=patience,
        )
        (self.place / _DONE).write_text(self._contents())
        return time.perf_counter() - start

    def torch_version(self) -> str:
        """What is installed, with the name of its build: "2.13.0+cpu"."""
        code = "from importlib import metadata; print(metadata.version('torch'))"
        return _answer(self.python, code)

    def gigabytes(self) -> float:
        """Its size on disk."""
        files = (path.lstat().st_size for path in self.place.rglob("*") if not path.is_dir())
        return sum(files) / 2**30

    def discard(self) -> None:
        """Removes it."""
        shutil.rmtree(self.place, ignore_errors=True)

    def _contents(self) -> str:
        project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
        return f"{ROOT}\n{self.requirements.read_text()}{project}\n"

    def _do(self, *command: object, patience: float | None = None) -> None:
        words: Sequence[str] = [*map(str, command)]
        try:
            result = subprocess.run(words, cwd=ROOT, check=False, timeout=patience)
        except subprocess.TimeoutExpired:
            raise InstallError(f"{' '.join(words)}: took more than {patience:.0f} s") from None
        if result.returncode != 0:
            raise InstallError(f"{' '.join(words)}: exit status {result.returncode}")
