"""An untested version of torch: Lamina imports, and says once that it is one."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lamina_core.versions import TESTED, minor_version

ROOT = Path(__file__).parents[2]

_IMPORT = """
import warnings
import torch

torch.__version__ = {version!r}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lamina
    import lamina_core.versions
for warning in caught:
    if warning.category.__module__.startswith("lamina"):
        print(f"{{warning.category.__name__}}: {{warning.message}}")
x = torch.ones(3)
assert torch.equal(lamina.grad(lambda x: (x**2).sum())(x), 2 * x)
"""


def said_on(version: str) -> str:
    """What an import of Lamina warns of where torch says that it is of that version."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT.format(version=version)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0.dev20261101+cu132", "3.0.0", "2.10.1"])
def test_an_untested_version_is_said_to_be_one(version):
    assert said_on(version) == (
        f"UntestedTorchWarning: Lamina has not been tested with torch {version}\n"
        "  tested: 2.11 to 2.15\n"
        "  what it needs of torch has been found; a rule may still be wrong there\n"
        "  to fix: run `python -m lamina.doctor`, which tries it, or use a tested version\n"
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.15.3+cpu"])
def test_nothing_is_said_on_a_tested_version(version):
    assert said_on(version) == ""


def test_the_running_version_is_tested():
    assert TESTED[0] <= minor_version(torch.__version__) <= TESTED[1]


def test_the_oldest_tested_version_is_what_pip_asks_for():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch>={'.'.join(map(str, TESTED[0]))}" in required
