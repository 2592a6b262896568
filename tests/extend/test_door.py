"""`lamina.extend`: what it hands out, and that it is said what for."""

from __future__ import annotations

import inspect
import subprocess
import sys

import lamina.extend


def test_every_name_is_there_and_is_documented():
    guide = lamina.extend.__doc__
    for name in lamina.extend.__all__:
        found = getattr(lamina.extend, name)
        assert inspect.ismodule(found) or inspect.getdoc(found) or callable(found), name
        assert name in guide, f"the guide does not speak of {name}"


def test_it_is_imported_by_itself():
    """First thing in a process, as a library would that builds on Lamina."""
    code = "import lamina.extend as e; print(e.RuleInterpreter.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "RuleInterpreter"
