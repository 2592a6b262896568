"""The versions of torch that the tests have run on, and what is said on a newer one."""

from __future__ import annotations

import re
import warnings

import torch

from lamina_core.errors import UntestedTorchWarning, message

__all__ = ["TESTED", "is_tested", "minor_version", "warn_if_untested"]

# The oldest and the newest minor version on which the whole suite has passed.
TESTED = ((2, 11), (2, 15))


def minor_version(version: str) -> tuple[int, int]:
    """The first two numbers of a version.

    Example:
        >>> minor_version("2.16.0a0+git1234567")
        (2, 16)
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_tested() -> bool:
    """Whether the running torch is neither older nor newer than all that were tested."""
    oldest, newest = TESTED
    return oldest <= minor_version(torch.__version__) <= newest


def warn_if_untested() -> None:
    """Say so if the running torch is older or newer than all that were tested."""
    if not is_tested():
        tested = " to ".join(".".join(map(str, version)) for version in TESTED)
        warnings.warn(
            message(
                f"Lamina has not been tested with torch {torch.__version__}",
                f"tested: {tested}",
                "what it needs of torch has been found; a rule may still be wrong there",
                "to fix: run `python -m lamina.doctor`, which tries it, or use a tested version",
            ),
            UntestedTorchWarning,
            stacklevel=3,
        )
