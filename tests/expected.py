"""The one list of expected failures.

An entry is (operator, variant, law) and the reason. It is strict: an entry whose law holds fails
the run, and so does one that fails in another way than by an error of Lamina's own. A wrong answer
does not belong here; a missing one does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lamina_core.errors import LaminaError

# The laws that compare values of `vmap`, in place of its derivatives.
VMAP_LAWS = ("vmap", "vmap_vmap", "vmap_empty")

_OWN_SHAPES = "the shape of the result depends on values, and examples have different ones"
_POSITIONS = "mapped positions or counts give each example pieces of its own sizes"
_NEW_SHAPE = "a write through the batch cannot change the shape of an example"
_CHECKED = "checks `if var < 0` in Python, which a mapped variance cannot answer"

_LENGTH = "the largest value says how long the result is, which one level cannot ask of another"

# These fail under all laws of values under `vmap`.
_NOT_MAPPED = {
    "argwhere": _OWN_SHAPES,
    "masked_select": _OWN_SHAPES,
    "nn.functional.gaussian_nll_loss": _CHECKED,
    "nonzero": _OWN_SHAPES,
    "repeat_interleave": _POSITIONS,
    "resize_": _NEW_SHAPE,
    "tensor_split": _POSITIONS,
    "unique": _OWN_SHAPES,
    "unique_consecutive": _OWN_SHAPES,
}

EXPECTED: dict[tuple[str, str, str], str] = {
    **{(op, "", law): _NOT_MAPPED[op] for op in _NOT_MAPPED for law in VMAP_LAWS},
    **{(op, "", "coincidences_values"): _NOT_MAPPED[op] for op in _NOT_MAPPED},
    ("bincount", "", "vmap_vmap"): _LENGTH,
    ("nn.functional.gaussian_nll_loss", "", "coincidences_pullbacks"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "coincidences_pushforwards"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "jvp_vmap"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "kink_vmap"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "kink_vmap_vjp"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vjp_vmap"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vmap_jvp"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vmap_jvp_vjp"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vmap_vjp"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vmap_vjp_jvp"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vmap_vjp_vjp"): _CHECKED,
    ("nn.functional.one_hot", "", "vmap_vmap"): _LENGTH,
    ("resize_", "", "inplace"): _NEW_SHAPE,
}


@functools.cache
def grids_differentiate_twice() -> bool:
    """Whether this torch has the second derivative of `grid_sample`, which is borrowed from it."""
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    grid = torch.zeros(1, 1, 1, 2, requires_grad=True)
    out = torch.nn.functional.grid_sample(x, grid, align_corners=False).sum()
    (first,) = torch.autograd.grad(out, grid, create_graph=True)
    try:
        torch.autograd.grad(first.sum(), x, allow_unused=True)
    except RuntimeError:
        return False
    return True


class BrokenLawError(AssertionError):
    """A law does not hold; `kinds` are the classes of the errors that say so."""

    def __init__(self, text: str, kinds: set[type]) -> None:
        super().__init__(text)
        self.kinds = kinds


@contextmanager
def judged(op: str, variant: str, law: str) -> Iterator[None]:
    """Runs a law on an operator; where a failure is expected, one must come.

    Args:
        op: name of the operator.
        variant: its variant in the table of samples, or an empty string.
        law: name of the law.

    Yields:
        Nothing; the body of the `with` tries the law.

    Raises:
        AssertionError: the law holds although the list says that it does not.
    """
    reason = EXPECTED.get((op, variant, law))
    if reason is None:
        yield
        return
    try:
        yield
    except BrokenLawError as error:
        if all(issubclass(k, LaminaError) for k in error.kinds):
            return
        raise
    raise AssertionError(
        f"{op} {variant} now passes the law {law!r}: remove its entry in tests/expected.py"
    )
