"""What is said where a tensor inside is asked for an array, a list or a number to print."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina import grad, jvp, vmap
from lamina_core.errors import DataDependentError, LaminaError, NoLengthError

X = torch.tensor([0.5, 1.0, 2.0])

ASKED = {
    "numpy": lambda t: t.numpy(),
    "np.asarray": np.asarray,
    "np.sin": np.sin,
    "times an array": lambda t: t * np.ones(2),
    "tolist": lambda t: t.tolist(),
    "format": lambda t: f"{t:.2f}",
}


@pytest.mark.parametrize("name", ASKED)
def test_a_batched_tensor_says_what_to_do(name):
    for function in (ASKED[name], lambda t: grad(lambda t: (ASKED[name](t), t)[1])(t)):
        with pytest.raises(DataDependentError, match="to fix"):
            vmap(function)(X)
        with pytest.raises(DataDependentError, match="to fix"):
            vmap(vmap(function))(X[None])


@pytest.mark.parametrize("name", ["numpy", "np.asarray", "np.sin", "times an array"])
def test_no_derivative_is_lost(name):
    with pytest.raises(LaminaError, match="derivative"):
        grad(lambda t: (ASKED[name](t), t)[1])(X[0])
    with pytest.raises(LaminaError, match="derivative"):
        jvp(lambda t: (ASKED[name](t), t)[1], (X[0],), (X[0],))


def test_values_that_are_one_for_all():
    def function(x):
        made = torch.arange(3.0)
        assert made.numpy().tolist() == [0.0, 1.0, 2.0]
        assert np.asarray(made).shape == (3,)
        assert made.tolist() == [0.0, 1.0, 2.0]
        assert f"{made.sum():.2f}" == "3.00"
        made += 1
        assert made.tolist() == [1.0, 2.0, 3.0]
        assert len(made) == 3
        return x * 2

    assert torch.equal(vmap(function)(X), 2 * X)
    assert float(grad(function)(X[0])) == 2.0


def test_what_numpy_asks_for():
    def function(x):
        made = torch.arange(3.0)
        array = np.array(made)
        array += 1
        assert made.tolist() == [0.0, 1.0, 2.0]
        assert np.array(made, dtype="int32").dtype == np.int32
        assert np.asarray(made, dtype="float64").tolist() == made.tolist()
        assert made.__array__(copy=False).base is not None
        assert np.stack([made, made]).shape == np.array([made, made]).shape == (2, 3)
        with pytest.raises(ValueError, match="copy"):
            made.__array__(np.float64, copy=False)
        return x * 2

    assert torch.equal(vmap(function)(X), 2 * X)
    assert float(grad(function)(X[0])) == 2.0


def test_the_number_of_a_tensor_that_is_differentiated():
    def function(x):
        assert f"{x * x:.2f}" == "1.00"
        assert (x * x).tolist() == 1.0
        assert x.detach().numpy() == 1.0
        return x * x

    assert float(grad(function)(X[1])) == 2.0


def test_what_is_printed():
    seen = []
    vmap(lambda x: seen.append(f"{x} {x!s}") or x)(X)
    assert "BatchedTensor(level=1" in seen[0]


@pytest.mark.parametrize("build", [torch.tensor, torch.as_tensor, X.new_tensor])
def test_a_list_of_batched_numbers_is_for_stack(build):
    with pytest.raises(NoLengthError, match=r"torch\.stack"):
        vmap(lambda x: build([x, 2 * x]))(X)
    with pytest.raises(TypeError, match="0-d"):
        vmap(len)(X)
