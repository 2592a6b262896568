"""The one list of expected failures.

An entry is (operator, variant, law) and the reason. It is strict: an entry whose law holds fails
the run, and so does one that fails in another way than by an error of Lamina's own. A wrong answer
does not belong here; a missing one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lamina_core.errors import LaminaError

_PYTHON_VALUE = "the result is a Python value, and examples have different ones"
_OWN_SHAPES = "the shape of the result depends on values, and examples have different ones"
_POSITIONS = "mapped positions or counts give each example pieces of its own sizes"
_NEW_SHAPE = "a write through the batch cannot change the shape of an example"
_CHECKED = "checks `if var < 0` in Python, which a mapped variance cannot answer"

_NO_SECOND = "no rule yet, and PyTorch has no formula for forward mode or the pullback"

_WRONG_REFERENCE = "PyTorch's own gradient disagrees with central differences, and ours does not"

EXPECTED: dict[tuple[str, str, str], str] = {
    ("_segment_reduce", "lengths", "jvp"): _NO_SECOND,
    ("_segment_reduce", "offsets", "jvp"): _NO_SECOND,
    ("argwhere", "", "vmap"): _OWN_SHAPES,
    ("as_strided_scatter", "", "jvp"): _WRONG_REFERENCE,
    ("as_strided_scatter", "", "vjp"): _WRONG_REFERENCE,
    ("as_strided_scatter", "", "vmap_vjp"): _WRONG_REFERENCE,
    ("bincount", "", "vmap"): _OWN_SHAPES,
    ("cdist", "", "jvp"): _NO_SECOND,
    ("item", "", "vmap"): _PYTHON_VALUE,
    ("masked_select", "", "vmap"): _OWN_SHAPES,
    ("nn.functional.ctc_loss", "", "jvp"): _NO_SECOND,
    ("nn.functional.embedding_bag", "", "jvp"): _NO_SECOND,
    ("nn.functional.gaussian_nll_loss", "", "vmap"): _CHECKED,
    ("nn.functional.gaussian_nll_loss", "", "vmap_vjp"): _CHECKED,
    ("nn.functional.multi_margin_loss", "", "jvp"): _NO_SECOND,
    ("nn.functional.multilabel_margin_loss", "", "jvp"): _NO_SECOND,
    ("nn.functional.pdist", "", "jvp"): _NO_SECOND,
    ("nonzero", "", "vmap"): _OWN_SHAPES,
    ("repeat_interleave", "", "vmap"): _POSITIONS,
    ("resize_", "", "inplace"): _NEW_SHAPE,
    ("resize_", "", "vmap"): _NEW_SHAPE,
    ("tensor_split", "", "vmap"): _POSITIONS,
    ("unique", "", "vmap"): _OWN_SHAPES,
    ("unique_consecutive", "", "vmap"): _OWN_SHAPES,
}


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
        if reason is _WRONG_REFERENCE or all(issubclass(k, LaminaError) for k in error.kinds):
            return
        raise
    raise AssertionError(
        f"{op} {variant} now passes the law {law!r}: remove its entry in tests/expected.py"
    )
