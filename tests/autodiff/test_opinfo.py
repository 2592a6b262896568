"""The laws of `vjp` and `jvp`, over PyTorch's table of operators (see `tests/samples.py`)."""

from __future__ import annotations

import pytest

from tests.laws import hold
from tests.samples import curated, others


def pytest_generate_tests(metafunc):
    """Reads the whole table only for the tests that ask for it, and only if they are to run."""
    if "other" in metafunc.fixturenames:
        law = metafunc.function.__name__.removeprefix("test_").removesuffix("_of_the_rest")
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        metafunc.parametrize("other", others(law) if wanted else ["left out by -m"])


@pytest.mark.parametrize("name", curated("vjp"))
def test_vjp(name):
    hold(name, "vjp")


@pytest.mark.parametrize("name", curated("jvp"))
def test_jvp(name):
    hold(name, "jvp")


@pytest.mark.parametrize("name", curated("vmap_vjp"))
def test_vmap_vjp(name):
    hold(name, "vmap_vjp")


@pytest.mark.exhaustive
def test_vjp_of_the_rest(other):
    hold(other, "vjp")


@pytest.mark.exhaustive
def test_jvp_of_the_rest(other):
    hold(other, "jvp")


@pytest.mark.exhaustive
def test_vmap_vjp_of_the_rest(other):
    hold(other, "vmap_vjp")
