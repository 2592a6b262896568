"""The error family: every class is also the builtin error that callers would expect to catch.

A message says what happened, where (op, level, transform as the user wrote it), with which values
and what to do instead, one per line. `message` joins the lines.
"""

from __future__ import annotations

__all__ = [
    "BatchSizeError",
    "CapturedTensorError",
    "DataDependentError",
    "EscapedTensorError",
    "FallbackWarning",
    "LaminaError",
    "MissingRuleError",
    "MutationError",
    "NonScalarLossError",
    "NotDifferentiableError",
    "RandomnessError",
    "RuleError",
    "StructureError",
    "TangentError",
    "message",
]


class LaminaError(Exception):
    """Base class of all errors that Lamina raises itself; catch it to catch them all."""


class StructureError(LaminaError, ValueError):
    """An `in_dims`, `out_dims` or `argnums` does not fit the pytree it describes."""


class BatchSizeError(LaminaError, ValueError):
    """The mapped arguments of `vmap` disagree on the batch size, or none is mapped."""


class NonScalarLossError(LaminaError, RuntimeError):
    """The function given to `grad` did not return a single tensor of shape ()."""


class NotDifferentiableError(LaminaError, TypeError):
    """There is nothing to differentiate, or an op has no derivative."""


class TangentError(LaminaError, ValueError):
    """Tangents or cotangents do not match the values they belong to."""


class MissingRuleError(LaminaError, NotImplementedError):
    """An op has no rule at a transform, and no generic route serves it."""


class RuleError(LaminaError, RuntimeError):
    """A rule is registered wrongly or gave an answer that breaks its contract."""


class EscapedTensorError(LaminaError, RuntimeError):
    """A batched tensor was used after the `vmap` that made it had returned."""


class CapturedTensorError(LaminaError, RuntimeError):
    """A `torch.autograd.Function` used a tensor of an active transform that it was not given."""


class DataDependentError(LaminaError, RuntimeError):
    """A batched value was needed as one Python value, or would give a ragged shape."""


class RandomnessError(LaminaError, RuntimeError):
    """A random op ran under `vmap(randomness="error")`."""


class MutationError(LaminaError, RuntimeError):
    """An in-place op whose meaning under the active transforms is not clear."""


class FallbackWarning(UserWarning):
    """An op under `vmap` runs example by example, which is slow."""


def message(what: str, *lines: str) -> str:
    """Join the first line of an error and its indented details, leaving out empty ones."""
    return "\n  ".join([what, *(line for line in lines if line)])
