"""Derivatives of derivatives and their compositions with `vmap`, over PyTorch's table of operators.

See `tests/derivative_laws.py`. The operators below run by default, all others when asked for.
"""

from __future__ import annotations

import pytest

from tests.derivative_laws import hold, pairs

CURATED = """
    cdist cumprod linalg.eigh matmul nn.functional.batch_norm nn.functional.cosine_similarity
    nn.functional.cross_entropy sinc softmax
""".split()


def pytest_generate_tests(metafunc):
    """Reads the whole table only if all of it is to run."""
    if "other" in metafunc.fixturenames:
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        found = [pair for pair in pairs() if pair[0] not in CURATED] if wanted else []
        metafunc.parametrize(
            ("other", "law"), found or [("left out by -m", "")], ids=lambda value: value
        )
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize(("name", "law"), pairs(CURATED), ids=lambda value: value)


def test_composition(name, law):
    hold(name, law)


@pytest.mark.exhaustive
def test_composition_of_the_rest(other, law):
    hold(other, law)
