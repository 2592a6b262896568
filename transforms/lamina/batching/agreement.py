"""Python values that examples share: an answer, or how long a result is. They must agree."""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import EmptyBatchError
from lamina_core.errors import DataDependentError

__all__ = ["common_answer", "common_number"]


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
