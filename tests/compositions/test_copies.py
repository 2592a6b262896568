"""Copies of tensors and modules inside a transform: what they are outside."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lamina import grad, jvp, vmap
from lamina_core.errors import MissingRuleError, NotDifferentiableError

LAYER = nn.Linear(2, 2)

PROGRAMS = {
    "deepcopy": lambda x: copy.deepcopy(x) * x,
    "deepcopy of a constant": lambda x: copy.deepcopy(torch.ones(2)) * x,
    "deepcopy of detached": lambda x: copy.deepcopy((x * 2).detach()) * x,
    "deepcopy in a dict": lambda x: copy.deepcopy({"a": [x, 1]})["a"][0] * x,
    "copy": lambda x: copy.copy(x) * x,
    "copy of a computed value": lambda x: copy.copy(x * 2) * x,
    "a module from outside": lambda x: copy.deepcopy(LAYER)(x),
    "a frozen module made inside": lambda x: _same(nn.Linear(2, 2).requires_grad_(False))(x),
    "a module made inside": lambda x: copy.deepcopy(_same(nn.Linear(2, 2)))(x),
}


def _same(layer):
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.5)
    return layer


@pytest.mark.parametrize("name", PROGRAMS)
def test_derivatives(name):
    def f(x):
        return PROGRAMS[name](x).sum()

    xs = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    gradients = []
    for x in xs:
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(f(leaf), leaf)[0])
    torch.testing.assert_close(grad(f)(xs[0]), gradients[0])
    torch.testing.assert_close(jvp(f, (xs[0],), (xs[1],))[1], gradients[0] @ xs[1])
    mapped = vmap(f, randomness="same")(xs)
    torch.testing.assert_close(mapped, torch.stack([f(x) for x in xs]))
    torch.testing.assert_close(vmap(grad(f), randomness="same")(xs), torch.stack(gradients))


def test_a_copy_shares_memory_and_a_deep_one_does_not():
    def f(x):
        y = x * 1
        copy.deepcopy(x).zero_()
        with torch.no_grad():
            copy.copy(y).mul_(2)
        return y.sum()

    xs = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    torch.testing.assert_close(vmap(f)(xs), 2 * xs.sum(1))
    assert copy.copy(xs) is not xs


def test_what_a_copy_says_of_itself():
    def f(x):
        for other in (copy.copy(x), copy.deepcopy(x)):
            assert other.requires_grad
            assert other.is_leaf
            assert other.grad_fn is None
        assert not copy.deepcopy(torch.ones(2)).requires_grad
        return x.sum()

    grad(f)(torch.ones(2))


def test_a_deep_copy_of_a_computed_value_is_refused():
    with pytest.raises(RuntimeError, match="graph leaves"):  # PyTorch's own
        copy.deepcopy(torch.ones(2, requires_grad=True) * 2)
    with pytest.raises(NotDifferentiableError, match="deepcopy of TrackedTensor"):
        grad(lambda x: copy.deepcopy(x * 2).sum())(torch.ones(2))


def test_constants_are_written_as_the_plain_tensors_they_are():
    def f(x):
        y = torch.arange(3.0)
        saved.append(pickle.dumps({"y": y, "of": [y * 2]}))
        torch.save(y, file)
        return x.sum()

    for transform in (grad, vmap):
        saved, file = [], io.BytesIO()
        transform(f)(torch.ones(2) if transform is grad else torch.ones(2, 2))
        loaded = pickle.loads(saved[0])
        assert type(loaded["y"]) is torch.Tensor
        assert loaded["of"][0].tolist() == [0.0, 2.0, 4.0]
        file.seek(0)
        assert torch.load(file).tolist() == [0.0, 1.0, 2.0]
        with pytest.raises(MissingRuleError, match="has none of its own"):
            transform(lambda x: pickle.dumps(x) and x.sum())(torch.ones(2))
