"""`python -m tests.matrix 2.11 newest`: makes environments, runs the tests in them, sums up.

The exit status is 0 if all tests passed everywhere, 1 if some failed, 2 if an environment could not
be made and nothing failed in the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.matrix.environments import Environment, InstallError, default_folder, interpreter, pinned
from tests.matrix.selections import SELECTIONS, Outcome, run, table

_OLDEST, _NEWEST = "oldest", "newest"


def main(arguments: Sequence[str]) -> int:
    """Runs the command with its arguments; those after `--` are pytest's."""
    own, more = [*arguments], []
    if "--" in own:
        at = own.index("--")
        own, more = own[:at], own[at + 1 :]
    parser = _parser()
    options = parser.parse_args(own)
    for version in options.versions:
        if version not in (*pinned(), *pinned().values(), _OLDEST, _NEWEST):
            parser.error(f"no torch {version} in tests/matrix/requirements")
    outcomes = [
        _tried(version, python, options, more)
        for python in options.python or [None]
        for version in options.versions or pinned()
    ]
    print(f"\n{table(outcomes)}", flush=True)
    if any(outcome.status for outcome in outcomes):
        return 1
    return 0 if all(outcome.ran for outcome in outcomes) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.matrix",
        description=f"Runs the tests on versions of torch: {', '.join(pinned())} (all of these by "
        "default).",
        epilog="Arguments after -- are handed on to pytest: -- -x -k gather.",
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="2.13, oldest or newest")
    parser.add_argument(
        "--python",
        action="append",
        metavar="VERSION",
        help="3.12, or the path of a Python; may be given more than once (default: this one)",
    )
    what = parser.add_mutually_exclusive_group()
    for name, text in {
        "quick": "all tests that take no more than about a second (the default)",
        "laws": "the quick tests, and the slow ones of what differs between versions",
        "all": "all tests but the exhaustive ones",
        "exhaustive": "the exhaustive ones",
    }.items():
        what.add_argument(
            f"--{name}", dest="selection", action="store_const", const=name, help=text
        )
    parser.set_defaults(selection=next(iter(SELECTIONS)))
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_folder(),
        help="where the environments are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--discard",
        action="store_true",
        help="remove each environment after its run, and leave pip's cache alone",
    )
    parser.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="how long an environment may take to install (default: as long as it takes)",
    )
    return parser


def _tried(
    version: str, python: str | None, options: argparse.Namespace, more: Sequence[str]
) -> Outcome:
    """Runs the tests on one version, or on the newest one that pip can install."""
    notes: list[str] = []
    for torch in _candidates(version):
        environment = None
        try:
            environment = Environment(torch, interpreter(python), options.folder)
            _say(f"torch {pinned()[torch]}, Python {environment.python_version}: installing")
            made_in = environment.make(
                keep_downloads=not options.discard, patience=options.patience
            )
            _say(f"torch {environment.torch_version()}: the {options.selection} tests")
            outcome = run(environment, options.selection, more)
            outcome.made_in, outcome.notes = made_in, notes
            return outcome
        except InstallError as error:
            notes.append(f"torch {torch} was not installed: {error}")
            _say(notes[-1])
        finally:
            if environment is not None and options.discard:
                environment.discard()
    return Outcome(version, python or "", notes=notes, ran=False)


def _candidates(version: str) -> list[str]:
    """Versions as in `pinned`, the one to try first in front."""
    newest_first = [*pinned()][::-1]
    if version == _NEWEST:
        return newest_first
    if version == _OLDEST:
        return newest_first[-1:]
    return [minor for minor, patch in pinned().items() if version in (minor, patch)]


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
