"""Derivatives at ties, bounds, zeros, infinities and NaN are those of the running torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import lamina
from lamina.autodiff.conventions import CHOICES, asked, share
from tests.exempt import EXEMPT
from tests.kinks import LAWS, POOLS, hold, operators
from tests.samples import database

NAN = math.nan

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", operators())
def test_kinks(name, law):
    hold(name, law)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", operators())
def test_more_kinks(name, law, seed):
    hold(name, law, seed)


def test_the_exempt_are_what_there_is():
    for row in EXEMPT:
        untried = set(row.operators.split()) - set(operators())
        assert not untried & set(database()), row  # others are in the table of other versions
        assert {f"kink_{law}" for law in row.laws.split()} <= set(LAWS), row
        assert set(row.pools) <= set(POOLS), row


def _ignored(x):
    return x


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "fake tensors": FakeTensorMode,
    "a default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
    "saved-tensor hooks": lambda: saved_tensors_hooks(lambda x: 1 / 0, _ignored),
    "anomaly mode": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_answers_alike_whatever_is_switched_on(surrounding):
    with SURROUNDINGS[surrounding]():
        assert asked() == CHOICES


def test_torch_answers_alike_within_transforms():
    def f(x):
        assert asked() == CHOICES
        return x * x

    x = torch.arange(3.0)
    assert torch.equal(lamina.vmap(lamina.grad(f))(x), 2 * x)
    assert torch.equal(lamina.jvp(f, (x,), (torch.ones(3),))[1], 2 * x)


@pytest.mark.parametrize("name", CHOICES)
def test_weights_are_none_half_or_all(name):
    def leaves(tree):
        return [tree] if isinstance(tree, float) else leaves(tree[1]) + leaves(tree[2])

    for tree in (*CHOICES[name].reverse, *CHOICES[name].forward):
        assert set(leaves(tree)) <= {0.0, 0.5, 1.0}


def test_a_bound_that_is_a_number_answers_like_a_tensor():
    tree = (("nan", 1, 1), 0.5, (("<", 0, 1), 1.0, 0.0))
    for x, y in itertools.product((0.0, 1.0, NAN), repeat=2):
        t, at = torch.tensor(3.0), torch.tensor(x)
        assert torch.equal(share(tree, t, (at, y)), share(tree, t, (at, torch.tensor(y))))
