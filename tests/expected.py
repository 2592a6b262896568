"""The one list of expected failures.

An entry is (operator, variant, law) and the reason. It is strict: an entry whose law holds fails
the run. A wrong answer does not belong here; a missing one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PYTHON_VALUE = "the result is a Python value, and examples have different ones"

_ONE_STATISTIC = "one running statistic cannot take the updates of several examples"

EXPECTED: dict[tuple[str, str, str], str] = {
    ("item", "", "vmap"): _PYTHON_VALUE,
    ("nn.functional.batch_norm", "", "vmap"): _ONE_STATISTIC,
}


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
    except Exception:  # any failure is the expected one
        return
    raise AssertionError(
        f"{op} {variant} now passes the law {law!r}: remove its entry in tests/expected.py"
    )
