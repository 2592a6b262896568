"""Python values that examples share: an answer, or how long a result is. They must agree."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lamina.batching.dims import EmptyBatchError
from lamina_core.errors import DataDependentError

__all__ = ["common_answer", "common_number", "validated"]

aten = torch.ops.aten


def common_answer(info: Any, answers: Any, name: str, instead: str) -> bool:
    """The one Python value of [B] answers, at every level.

    Raises:
        DataDependentError: If the examples disagree.
    """
    for answer in (True, False):
        if torch.equal(answers, torch.full_like(answers, answer)):
            return answer
    raise info.interpreter.error(
        DataDependentError,
        f"aten.{name}.default gives one Python value, and the {info.batch_size} examples disagree",
        f"to fix: use {instead}, which stays a tensor",
    )


def common_number(info: Any, numbers: Any, name: str, advice: str) -> int:
    """The one entry of [B] numbers that say how long the result of each example is.

    Raises:
        DataDependentError: If the examples disagree.
    """
    if not info.batch_size:
        raise EmptyBatchError
    if not torch.equal(numbers, numbers.amax().expand_as(numbers)):
        raise info.interpreter.error(
            DataDependentError,
            f"{name} would give each example an output of its own shape",
            advice,
        )
    return int(numbers.amax())


# They ask whether all of a tensor is valid, where one invalid example is an error for the batch.
_VALIDATE = frozenset(
    f"torch.distributions.{name}" for name in ("constraints", "continuous_bernoulli", "geometric")
)


def validated(answers: Any) -> bool | None:
    """The answer to a bool that `torch.distributions` asks of a batched tensor, if there is one.

    Its own code branches on `bool(tensor)` to validate parameters, and to take a path of its own
    for some; an answer that all examples share is right for each of them.

    Args:
        answers: The value of the tensor, of any shape.

    Returns:
        None if the examples disagree, or if it is other code that asks.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _module_of(frame).startswith(_BETWEEN):
        frame = frame.f_back
    module = _module_of(frame)
    if answers.dtype is not torch.bool or not module.startswith("torch.distributions."):
        return None
    if aten._is_all_true.default(answers):
        return True
    return False if module in _VALIDATE or not aten._is_any_true.default(answers) else None


# What lies between the code that asks and us.
_BETWEEN = ("lamina.", "lamina_core.", "torch._ops")


def _module_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))
