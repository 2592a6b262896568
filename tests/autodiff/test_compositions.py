"""Derivatives of derivatives and their compositions with `vmap`, over PyTorch's table of operators.

See `tests/derivative_laws.py`. The operators below run by default, all others when asked for.
"""

from __future__ import annotations

import pytest

from tests.collecting import curated_and_rest
from tests.derivative_laws import hold, pairs

CURATED = """
    cdist cumprod linalg.eigh matmul nn.functional.batch_norm nn.functional.cosine_similarity
    nn.functional.cross_entropy sinc softmax
""".split()


def pytest_generate_tests(metafunc):
    """Reads the whole table only if all of it is to run."""
    curated_and_rest(metafunc, pairs, CURATED)


def test_composition(name, law):
    hold(name, law)


@pytest.mark.exhaustive
def test_composition_of_the_rest(other, law):
    hold(other, law)
