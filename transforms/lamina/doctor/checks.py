"""Small named checks of Lamina against plain PyTorch and closed forms, and the running of them.

A check is a function of a `Kit`, which makes its tensors and compares its answers. It says nothing
if all is well. `quick` ones run when Lamina is imported with a torch that its tests have not run
on; all of them in `python -m lamina.doctor`.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lamina_core.config import config
from lamina_core.torch_hooks.threads import in_own_thread

__all__ = ["CHECKS", "Check", "Kit", "Result", "WrongAnswerError", "check", "run"]

Tensor = torch.Tensor


class WrongAnswerError(AssertionError):
    """What a check has found: an answer that is not the right one."""


class Kit:
    """What a check works with: tensors on one device, and comparisons.

    Args:
        device: Where the tensors of the checks are.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self.device = torch.device(device)
        # The one device of PyTorch that has no double precision.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64

    def numbers(self, *shape: int, seed: float = 0.0) -> Tensor:
        """Numbers between -1 and 1, no two of them equal; the same on every device and version."""
        count = torch.Size(shape).numel()
        flat = torch.arange(count, dtype=torch.float64) * 0.7071 + 0.31 + seed
        return flat.sin().reshape(shape).to(self.device, self.dtype)

    def integers(self, *shape: int, high: int, seed: int = 0) -> Tensor:
        """Integers in [0, high)."""
        count = torch.Size(shape).numel()
        return ((torch.arange(count) * 7 + seed) % high).reshape(shape).to(self.device)

    def close(self, actual: Any, expected: Any, what: str) -> None:
        """Compare tensors, or equally nested lists, tuples and dicts of them.

        Args:
            actual: The answer.
            expected: The right answer.
            what: What it is the answer to.

        Raises:
            WrongAnswerError: If they differ.
        """
        if isinstance(expected, dict):
            actual, expected = list(actual.values()), list(expected.values())
        if isinstance(expected, (tuple, list)):
            if len(actual) != len(expected):
                raise WrongAnswerError(f"{what}: {len(actual)} results, {len(expected)} are right")
            for one, right in zip(actual, expected, strict=True):
                self.close(one, right, what)
            return
        if not isinstance(expected, Tensor):
            expected = torch.tensor(expected, dtype=self.dtype, device=self.device)
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            raise WrongAnswerError(
                f"{what}: {actual.dtype} of shape {list(actual.shape)}, "
                f"{expected.dtype} of shape {list(expected.shape)} is right"
            )
        narrow = torch.float32 if expected.dtype.itemsize < 4 else expected.dtype
        actual, expected = actual.to(narrow), expected.to(narrow)
        tolerance = _TOLERANCES.get(self.dtype if narrow is not torch.float32 else narrow, 0.0)
        if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            worst = (actual - expected).abs().flatten().argmax()
            raise WrongAnswerError(
                f"{what}: {actual.flatten()[worst].item():.6g} where "
                f"{expected.flatten()[worst].item():.6g} is right"
            )

    def raises(self, kind: type[Exception], call: Callable[[], Any], what: str) -> None:
        """Expect an error.

        Args:
            kind: Of this kind.
            call: What has to raise it.
            what: What that is.

        Raises:
            WrongAnswerError: If it does not.
        """
        try:
            call()
        except kind:
            return
        raise WrongAnswerError(f"{what}: no {kind.__name__}")


_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4}


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What is checked, in a few words.
        run: A function of a `Kit`, which raises if it finds something.
        quick: Whether it runs at import too, on a torch that has not been tested.
    """

    name: str
    run: Callable[[Kit], None]
    quick: bool


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Attributes:
        name: The check.
        device: Where it ran.
        ok: Whether nothing was found.
        detail: What was found.
        where: The last lines of Lamina and of the check that an error went through, if it was one.
        seconds: How long it took.
    """

    name: str
    device: str
    ok: bool
    detail: str
    where: str
    seconds: float


CHECKS: list[Check] = []


def check(name: str, *, quick: bool = False) -> Callable[[Callable[[Kit], None]], Any]:
    """Register the decorated function as a check.

    Args:
        name: What is checked, in a few words.
        quick: Whether it runs at import too, on a torch that has not been tested.
    """

    def register(function: Callable[[Kit], None]) -> Callable[[Kit], None]:
        CHECKS.append(Check(name, function, quick))
        return function

    return register


def run(
    checks: Sequence[Check],
    device: Any = "cpu",
    tell: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run checks, in a thread whose modes, defaults and guards are those of a new process.

    Args:
        checks: Which.
        device: On which device.
        tell: Called with each result when it is there.

    Example:
        >>> from lamina.doctor.checks import CHECKS, run
        >>> quick = [check for check in CHECKS if check.quick]
        >>> {result.ok for result in run(quick)}
        {True}
    """

    def work() -> list[Result]:
        results: list[Result] = []
        kit = Kit(device)
        for one in checks:
            with _undisturbed(kit.device):
                result = _result(one, kit)
            results.append(result)
            if tell is not None:
                tell(result)
        return results

    return in_own_thread(work)


def _result(one: Check, kit: Kit) -> Result:
    start = time.perf_counter()
    detail = where = ""
    try:
        one.run(kit)
    except WrongAnswerError as error:
        detail = str(error)
    except Exception as error:  # whatever it is, the check has found something
        detail = f"{type(error).__name__}: {error}"
        where = _where(error)
    seconds = time.perf_counter() - start
    return Result(one.name, str(kit.device), not detail, detail, where, seconds)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{_HOME}" in frame.filename]
    return ", ".join(f"{frame.filename.rpartition(_HOME)[2]}:{frame.lineno}" for frame in own[-2:])


_HOME = "lamina"


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Neither be moved by the settings of the process nor move them; a loop is an error here."""
    before, dtype = config.fallback, torch.get_default_dtype()
    config.fallback = "error"
    torch.set_default_dtype(torch.float32)
    devices = [device] if device.type not in ("cpu", "mps") else []
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        config.fallback = before
        torch.set_default_dtype(dtype)
