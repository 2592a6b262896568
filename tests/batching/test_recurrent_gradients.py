"""Per-sample gradients of recurrent networks, in the dtypes that have kernels of their own.

The oracle is PyTorch's autograd, one example after the other.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina import functional_call, grad, jvp, vjp, vmap

NETWORKS = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "LSTM, batch first": lambda: nn.LSTM(3, 4, batch_first=True),
    "LSTM, both ways, two layers": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "LSTM without biases": lambda: nn.LSTM(3, 4, bias=False),
    "LSTM, projected": lambda: nn.LSTM(3, 4, proj_size=2),
    "GRU": lambda: nn.GRU(3, 4),
    "GRU, both ways, two layers": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "RNN": lambda: nn.RNN(3, 4),
    "RNN of relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_each_example(name, dtype):
    torch.manual_seed(2)
    network = NETWORKS[name]().to(dtype)
    xs = torch.randn(5, 6, 2, 3, dtype=dtype)
    names = [n for n, _ in network.named_parameters()]
    params = {n: p.detach() for n, p in network.named_parameters()}

    def loss(params, x):
        return functional_call(network, params, (x,))[0].sin().sum()

    got = vmap(grad(loss), (None, 0))(params, xs)
    seen = vmap(grad(loss, argnums=1), (None, 0))(params, xs)
    for b, x in enumerate(xs):
        leaf = x.clone().requires_grad_()
        leaves = [*network.parameters(), leaf]
        *found, x_ct = torch.autograd.grad(network(leaf)[0].sin().sum(), leaves)
        for n, want in zip(names, found, strict=True):
            torch.testing.assert_close(got[n][b], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[b], x_ct, rtol=1e-4, atol=1e-5)


def test_weights_and_tangents_of_each_example():
    torch.manual_seed(3)
    network = nn.LSTM(3, 4)
    params = {n: p.detach() for n, p in network.named_parameters()}
    many = {n: torch.stack([p, 0.5 * p, -p]) for n, p in params.items()}
    xs = torch.randn(3, 6, 2, 3)

    def loss(params, x):
        return functional_call(network, params, (x,))[0].sin().sum()

    gradients = vmap(grad(loss))(many, xs)
    pushed = vmap(lambda params, x: jvp(lambda x: loss(params, x), (x,), (x.cos(),))[1])(many, xs)
    for b in range(3):
        one = {n: p[b] for n, p in many.items()}
        want = grad(loss)(one, xs[b])
        for n, p in want.items():
            torch.testing.assert_close(gradients[n][b], p, rtol=1e-4, atol=1e-5)
        slope = (grad(loss, argnums=1)(one, xs[b]) * xs[b].cos()).sum()
        torch.testing.assert_close(pushed[b], slope, rtol=1e-4, atol=1e-4)


STATES = {
    "jvp": lambda f, x: jvp(f, (x,), (x,))[0],
    "vjp": lambda f, x: vjp(f, x)[0],
    "grad": lambda f, x: grad(lambda x: (x.sum(), f(x)), has_aux=True)(x)[1],
}


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("transform", ["jvp", "vjp", "grad", "vmap(vjp)"])
def test_final_states_have_the_shapes_that_they_have_outside(make, transform):
    layer = make(4, 3, num_layers=2).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    if transform == "vmap(vjp)":
        found = vmap(lambda x: vjp(lambda x: layer(x)[1], x)[0])(x[None])
        torch.testing.assert_close(found, vmap(lambda x: layer(x)[1])(x[None]))
        return
    torch.testing.assert_close(STATES[transform](lambda x: layer(x)[1], x), layer(x)[1])
