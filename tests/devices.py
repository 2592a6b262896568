"""The device that the tests run on: `pytest --device cuda`.

Tests write `torch.randn(3)` and mean the device of the run. PyTorch's own way to say so,
`torch.set_default_device`, will not do: it would also reach factories called by Lamina, and hide a
rule that forgets the device of its operands; and it is a function mode, around which Lamina takes
no shortcuts. So the factories of `torch` are replaced while such a run lasts, by ones that
look who calls them.

Numbers from a generator of the CPU are drawn there and moved, and so are the same on all devices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils import _device

__all__ = ["TOY", "current", "random_state", "seed", "use"]

TOY = "toy"
"""The name of the device of `toy_device.py`."""

_CPU = torch.device("cpu")
_current = _CPU


def current() -> torch.device:
    """The device of this run."""
    return _current


def use(name: str) -> None:
    """Makes a device that of this run; for a whole process, before tests are imported.

    Args:
        name: As `torch.device` takes it, or `toy`, which needs no hardware.

    Raises:
        ValueError: There is no such device here.
    """
    global _current
    device = _found(name)
    if device == _current:
        return
    _current = device
    if device.type == "cuda":
        # The laws compare digits that TF32 does not have.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    for home in (torch, torch.fft):
        for key in dir(home):
            factory = getattr(home, key)
            if callable(factory) and factory in _device._device_constructors():
                _replace(home, key, factory)


def seed(number: int) -> None:
    """Seeds what plain draws of this run come from.

    `torch.manual_seed` would also note a traceback for each kind of device that is absent.
    """
    torch.default_generator.manual_seed(number)
    if _current.type == "cuda":
        torch.cuda.manual_seed(number)


def random_state() -> tuple[torch.Tensor, ...]:
    """The states of all generators that plain draws of this run come from."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state()) if _current.type == "cuda" else states


def _found(name: str) -> torch.device:
    if name == TOY:
        from tests.toy_device import DEVICE  # noqa: PLC0415  (its import takes PrivateUse1 away)

        return DEVICE
    try:
        device = torch.device(name)
        if device.type != "cpu":
            device = torch.zeros((), device=device).device  # with the index
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {name}: {reason}") from error
    if device.type == "meta":
        raise ValueError("--device meta: its tensors have no values to compare")
    return device


def _replace(home: ModuleType, key: str, factory: Callable[..., Any]) -> None:
    @functools.wraps(factory)
    def on_this_device(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None or _keeps_out(sys._getframe(1)):
            return factory(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device == _CPU:
            return factory(*args, **kwargs).to(_current)
        return factory(*args, **{**kwargs, "device": _current})

    setattr(home, key, on_this_device)


def _keeps_out(caller: Any) -> bool:
    """Whether a caller means what it says, or stands under a default device of its own."""
    if _device.CURRENT_DEVICE is not None:
        return True
    return caller.f_globals.get("__name__", "").partition(".")[0] in ("lamina", "lamina_core")
