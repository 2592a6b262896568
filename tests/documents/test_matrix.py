"""`python -m tests.matrix`, with environments and runs that are made up."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.matrix import __main__ as command
from tests.matrix import environments, selections
from tests.matrix.environments import Environment, InstallError, pinned
from tests.matrix.selections import Outcome, table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(monkeypatch):
    """Makes no environment and runs nothing; holds what would have been done."""
    done = []

    def make(self, *, keep_downloads, patience):
        done.append(("make", self.torch, keep_downloads))
        return 12.0

    def run(environment, selection, more):
        done.append(("run", environment.torch, selection, more))
        return Outcome(pinned()[environment.torch], "3.11.7", passed=7, seconds=3.2, gigabytes=1.25)

    monkeypatch.setattr(Environment, "make", make)
    monkeypatch.setattr(Environment, "torch_version", lambda self: pinned()[self.torch])
    monkeypatch.setattr(Environment, "discard", lambda self: done.append(("discard", self.torch)))
    monkeypatch.setattr(command, "run", run)
    return done


def test_the_pinned_versions_are_those_that_the_project_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (d for d in project["dependencies"] if d.startswith("torch"))
    lowest = re.fullmatch(r"torch>=(\d+\.\d+)", torch)[1]
    assert next(iter(pinned())) == lowest
    assert all(patch.startswith(f"{minor}.") for minor, patch in pinned().items())


def test_the_selections_use_marks_that_exist():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    marks = {mark.partition(":")[0] for mark in options["ini_options"]["markers"]}
    words = set(re.findall(r"\w+", " ".join(selections.SELECTIONS.values())))
    assert words - {"not", "and", "or"} == marks


def test_versions_and_arguments(made, capsys):
    assert command.main(["2.13", "2.15.0", "--laws", "--discard", "--", "-k", "gather"]) == 0
    assert made == [
        *(("make", "2.13", False), ("run", "2.13", "laws", ["-k", "gather"]), ("discard", "2.13")),
        *(("make", "2.15", False), ("run", "2.15", "laws", ["-k", "gather"]), ("discard", "2.15")),
    ]
    assert capsys.readouterr().out.count("| 7 ") == 2


def test_all_versions_are_the_default(made):
    assert command.main([]) == 0
    assert [step[1:] for step in made if step[0] == "make"] == [(m, True) for m in pinned()]
    assert {step[2] for step in made if step[0] == "run"} == {"quick"}


def test_the_newest_that_pip_installs(made, monkeypatch, capsys):
    make = Environment.make

    def capped(self, **options):
        if self.torch == [*pinned()][-1]:
            raise InstallError("pip: exit status 1")
        return make(self, **options)

    monkeypatch.setattr(Environment, "make", capped)
    newest, before = [*pinned()][:-3:-1]
    assert command.main(["newest"]) == 0
    assert [step[1] for step in made if step[0] == "run"] == [before]
    assert capsys.readouterr().out.endswith(
        f"torch {newest} was not installed: pip: exit status 1\n"
    )
    assert command.main([newest]) == 2


def test_failures_are_told_to_ci(made, monkeypatch):
    monkeypatch.setattr(command, "run", lambda *_: Outcome("2.13.0", "3.11.7", status=1, failed=2))
    assert command.main(["2.13"]) == 1


def test_a_version_that_is_not_pinned(capsys):
    with pytest.raises(SystemExit):
        command.main(["2.3"])
    assert "no torch 2.3 in tests/matrix/requirements" in capsys.readouterr().err


def test_a_python_that_is_not_there(tmp_path, capsys):
    assert command.main(["2.13", "--python", "4.1", "--folder", str(tmp_path)]) == 2
    assert "no Python 4.1 here" in capsys.readouterr().out


def test_an_environment_that_takes_too_long(tmp_path):
    environment = Environment("2.13", environments.interpreter(None), tmp_path)
    with pytest.raises(InstallError, match="took more than 0 s"):
        environment._do(environment.base, "-c", "import time; time.sleep(9)", patience=0.1)


def test_an_environment_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "_ROOM", 10**6)
    environment = Environment("2.13", environments.interpreter(None), tmp_path)
    with pytest.raises(InstallError, match="1000000 are needed"):
        environment.make(keep_downloads=False)


def test_counts_are_read_from_a_run(tmp_path, monkeypatch):
    """The report of a run of three tests, of which one fails and one is skipped."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_is_skipped(): pytest.skip('for a reason')\n"
    )
    monkeypatch.setattr(selections, "ROOT", tmp_path)
    environment = Environment("2.13", environments.interpreter(None), tmp_path / "environments")
    monkeypatch.setattr(Environment, "python", property(lambda self: Path(self.base)))
    real = subprocess.run

    def plain(words, **options):  # the tests made up here have no marks and need no other process
        return real([w for w in words if w not in ("-n", "2")], **options)

    monkeypatch.setattr(selections.subprocess, "run", plain)
    outcome = selections.run(environment, "quick", ["-p", "no:randomly"])
    assert (outcome.status, outcome.passed, outcome.failed, outcome.others) == (1, 1, 1, 1)


def test_the_table():
    rows = [
        Outcome("2.13.0+cpu", "3.11.7", 0, 7705, 0, 3, 150.4, 130.2, 1.62),
        Outcome("2.16", "3.12", notes=["torch 2.16 was not installed: no"], ran=False),
    ]
    assert table(rows).splitlines() == [
        "| torch      | Python | passed | failed | skipped | seconds | made in | GB   |",
        "| ---        | ---    | ---:   | ---:   | ---:    | ---:    | ---:    | ---: |",
        "| 2.13.0+cpu | 3.11.7 | 7705   | 0      | 3       | 150     | 130     | 1.6  |",
        "| 2.16       | 3.12   | -      | -      | -       | -       | -       | -    |",
        "",
        "torch 2.16 was not installed: no",
    ]
