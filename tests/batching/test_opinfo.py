"""The laws of `vmap`, over PyTorch's table of operators (see `tests/samples.py`).

None of them may loop over the examples.
"""

from __future__ import annotations

import pytest

from tests.laws import hold
from tests.samples import (
    CURATED,
    FIRST,
    INPLACE,
    NOT_DIFFERENTIABLE,
    curated,
    database,
    other_dtypes,
    others,
)


def pytest_generate_tests(metafunc):
    """Reads the whole table only for the tests that ask for it, and only if they are to run."""
    law = metafunc.function.__name__.removeprefix("test_").partition("_of_")[0]
    wanted = "not exhaustive" not in metafunc.config.option.markexpr
    if "other" in metafunc.fixturenames:
        metafunc.parametrize("other", others(law) if wanted else ["left out by -m"])
    if "dtype" in metafunc.fixturenames:
        names = [*curated(law), *others(law)] if wanted else []
        pairs = [(name, dtype) for name in names for dtype in other_dtypes(database()[name])]
        pairs = pairs or [("left out by -m", None)]
        metafunc.parametrize(("name", "dtype"), pairs, ids=_pair_id)


def _pair_id(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("name", curated("vmap"))
def test_vmap(name):
    hold(name, "vmap")


@pytest.mark.parametrize("name", curated("vmap_vmap"))
def test_vmap_vmap(name):
    hold(name, "vmap_vmap", count=3)


@pytest.mark.parametrize("name", curated("vmap_empty"))
def test_vmap_empty(name):
    hold(name, "vmap_empty", count=3)


@pytest.mark.parametrize("name", curated("inplace"))
def test_inplace(name):
    hold(name, "inplace")


@pytest.mark.parametrize("name", curated("random"))
def test_random(name):
    hold(name, "random")


@pytest.mark.exhaustive
def test_vmap_of_the_rest(other):
    hold(other, "vmap", count=FIRST)


@pytest.mark.exhaustive
def test_vmap_vmap_of_the_rest(other):
    hold(other, "vmap_vmap", count=12)


@pytest.mark.exhaustive
def test_vmap_empty_of_the_rest(other):
    hold(other, "vmap_empty", count=FIRST)


@pytest.mark.exhaustive
def test_inplace_of_the_rest(other):
    hold(other, "inplace", count=FIRST)


@pytest.mark.exhaustive
def test_random_of_the_rest(other):
    hold(other, "random")


@pytest.mark.exhaustive
def test_vmap_of_other_dtypes(name, dtype):
    hold(name, "vmap", count=2, dtypes=[dtype])


@pytest.mark.exhaustive
def test_inplace_of_other_dtypes(name, dtype):
    hold(name, "inplace", count=2, dtypes=[dtype])


def test_the_curated_lists_state_facts():
    for name in [name for family in CURATED.values() for name in family.split()]:
        op = database()[name]
        assert op.supports_autograd == (name not in NOT_DIFFERENTIABLE), name
        assert name not in INPLACE or op.inplace_variant is not None, name
