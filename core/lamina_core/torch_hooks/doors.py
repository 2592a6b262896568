"""`door`: a private part of torch, found or clearly missed; `proof`: a use of it, tried.

A name that torch no longer has is an error at import, and so is a door that is there but leads
nowhere: the proofs run when `lamina` is imported, and again in `python -m lamina.doctor`. Two kinds
wait for their first use, as torch takes more than a second to get ready for them: nested transforms
(it imports `torch.distributed.tensor` for the first op on a wrapper that no mode sees) and
checkpoints (it imports its compiler).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lamina_core.errors import TorchHookError, message
from lamina_core.torch_hooks.threads import in_own_thread

__all__ = ["DOORS", "UNPROVED", "Proof", "doctor_runs", "door", "proof", "prove", "require_proofs"]

# The doors that have been opened: dotted name -> what for.
DOORS: dict[str, str] = {}


def door(path: str, reason: str) -> Any:
    """What torch has under a dotted name.

    Args:
        path: The name, from `torch` on.
        reason: What Lamina needs it for.

    Raises:
        TorchHookError: If torch has nothing of that name.

    Example:
        >>> door("torch._C._len_torch_dispatch_stack", "an example")()
        0
    """
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
        if found is None:
            raise TorchHookError(_missing(path, reason))
    DOORS[path] = reason
    return found


def _missing(path: str, reason: str) -> str:
    return message(
        f"torch {torch.__version__} has no {path}, on which Lamina stands",
        f"it is needed for: {reason}",
        _WAY_OUT,
    )


_WAY_OUT = (
    "to fix: install a version of torch that Lamina has been tested with (its README has the table)"
)


def doctor_runs() -> bool:
    """Whether this process is `python -m lamina.doctor`, which reports what stops an import."""
    return "lamina.doctor" in sys.orig_argv


class Proof(NamedTuple):
    """What came of trying a door.

    Attributes:
        name: What was tried.
        reason: What Lamina needs it for.
        ok: Whether it did what it has to.
        detail: What went wrong; empty if nothing did.
    """

    name: str
    reason: str
    ok: bool
    detail: str


class _Check(NamedTuple):
    name: str
    reason: str
    check: Callable[[], None]
    when: str


_CHECKS: list[_Check] = []
# What has not been proved so far; whoever is about to rely on it calls `require_proofs`.
UNPROVED = {"import", "nesting", "checkpoint"}


def proof(
    name: str, reason: str, *, when: str = "import"
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that uses a door and raises unless it leads where it has to.

    Args:
        name: What is tried.
        reason: What Lamina needs it for.
        when: One of `UNPROVED`: before the end of the import, the first nested transform, or the
            first checkpoint inside a transform.
    """

    def register(check: Callable[[], None]) -> Callable[[], None]:
        _CHECKS.append(_Check(name, reason, check, when))
        return check

    return register


def prove(when: str | None = None) -> list[Proof]:
    """Try every door: a few milliseconds, in a thread that nothing of the caller's reaches.

    Modes, guards and defaults belong to a thread, and an import may be met inside any of them.

    Args:
        when: Which proofs; all if it is None.
    """
    checks = [check for check in _CHECKS if when in (None, check.when)]

    def run() -> list[Proof]:
        found: list[Proof] = []
        for name, reason, check, _ in checks:
            try:
                check()
            except Exception as error:  # whatever it is, the door does not lead where it has to
                found.append(Proof(name, reason, False, f"{type(error).__name__}: {error}"))
            else:
                found.append(Proof(name, reason, True, ""))
        return found

    return in_own_thread(run)


def require_proofs(when: str) -> None:
    """Raise for the first door that leads nowhere.

    Args:
        when: Which proofs: one of `UNPROVED`, of which it is taken if all is well.

    Raises:
        TorchHookError: If there is one.
    """
    UNPROVED.discard(when)  # the proofs rely on it
    if when == "import" and doctor_runs():
        return
    for name, reason, ok, detail in prove(when):
        if not ok:
            UNPROVED.add(when)
            raise TorchHookError(
                message(
                    f"torch {torch.__version__} is not hooked: {name}",
                    f"it is needed for: {reason}",
                    f"found: {detail}",
                    f"{_WAY_OUT}; `python -m lamina.doctor` tries the others too",
                )
            )
