"""What decides, at import, whether Lamina may be used with a torch that has not been tested."""

from __future__ import annotations

import torch

from lamina.doctor import interplay, transforms  # noqa: F401 - for the checks they register
from lamina.doctor.checks import CHECKS, run
from lamina_core.errors import TorchHookError, message

__all__ = ["decide"]


def decide() -> None:
    """Run the quick checks.

    Raises:
        TorchHookError: If one fails: a wrong answer must not go unnoticed.
    """
    failed = [result for result in run([c for c in CHECKS if c.quick]) if not result.ok]
    if failed:
        raise TorchHookError(
            message(
                f"Lamina gives wrong answers with torch {torch.__version__}, which is untested",
                *(f"{result.name}: {result.detail}" for result in failed),
                "to fix: install a version of torch that Lamina has been tested with (its README "
                "has the table); `python -m lamina.doctor` says more",
            )
        )
