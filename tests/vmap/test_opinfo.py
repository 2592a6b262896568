"""The laws of `vmap`, over PyTorch's table of operators (see `tests/samples.py`)."""

from __future__ import annotations

import pytest

from tests.laws import hold
from tests.samples import CURATED, INPLACE, NOT_DIFFERENTIABLE, curated, database, others


def pytest_generate_tests(metafunc):
    """Reads the whole table only for the tests that ask for it, and only if they are to run."""
    if "other" in metafunc.fixturenames:
        law = metafunc.function.__name__.removeprefix("test_").removesuffix("_of_the_rest")
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        metafunc.parametrize("other", others(law) if wanted else ["left out by -m"])


@pytest.mark.parametrize("name", curated("vmap"))
def test_vmap(name):
    hold(name, "vmap", strict=True)


@pytest.mark.parametrize("name", curated("inplace"))
def test_inplace(name):
    hold(name, "inplace", strict=True)


@pytest.mark.parametrize("name", curated("random"))
def test_random(name):
    hold(name, "random", strict=True)


@pytest.mark.exhaustive
def test_vmap_of_the_rest(other):
    hold(other, "vmap", strict=False)


@pytest.mark.exhaustive
def test_inplace_of_the_rest(other):
    hold(other, "inplace", strict=False)


@pytest.mark.exhaustive
def test_random_of_the_rest(other):
    hold(other, "random", strict=False)


def test_the_curated_lists_state_facts():
    for name in [name for family in CURATED.values() for name in family.split()]:
        op = database()[name]
        assert op.supports_autograd == (name not in NOT_DIFFERENTIABLE), name
        assert name not in INPLACE or op.inplace_variant is not None, name
