"""`make_fx` sees through every transform: it records a line of ATen ops on plain tensors."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lamina import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

WEIGHT = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def vector(x):
    return torch.tanh(torch.nn.functional.linear(x, WEIGHT)) * x.sum()


def scalar(x):
    return torch.logsumexp(vector(x), 0) + vector(x).square().sum()


def written(x):
    y = torch.zeros(4, dtype=x.dtype)
    for i in range(4):
        y[i] = x[i].sin()
    y[1:3].mul_(x[:2])
    return y.sum()


X = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
XS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

STACKS = {
    "vmap": (vmap(vector), (XS,)),
    "vmap with in_dims": (vmap(vector, 1, 1), (XS.T.contiguous(),)),
    "vmap(vmap)": (vmap(vmap(torch.dot, (None, 0)), (0, None)), (XS, XS)),
    "grad": (grad(scalar), (X,)),
    "grad(grad)": (grad(lambda x: grad(scalar)(x).sin().sum()), (X,)),
    "vjp": (lambda x, ct: vjp(vector, x)[1](ct)[0], (X, XS[0])),
    "jvp": (lambda x, x_t: jvp(vector, (x,), (x_t,)), (X, XS[0])),
    "jacrev": (jacrev(vector), (X,)),
    "jacfwd": (jacfwd(vector), (X,)),
    "hessian": (hessian(scalar), (X,)),
    "vmap(grad)": (vmap(grad(scalar)), (XS,)),
    "vmap(grad_and_value)": (vmap(grad_and_value(scalar)), (XS,)),
    "vmap(jacfwd)": (vmap(jacfwd(vector)), (XS,)),
    "vmap(jacfwd(jacrev))": (vmap(jacfwd(jacrev(vector))), (XS,)),
    "grad(vmap)": (grad(lambda xs: vmap(scalar)(xs).sum()), (XS,)),
    "jvp(grad)": (lambda x, x_t: jvp(grad(scalar), (x,), (x_t,))[1], (X, XS[0])),
    "vmap of writes": (vmap(written), (XS,)),
    "vmap(grad) of writes": (vmap(grad(written)), (XS,)),
}


def traced(f, mode, args):
    """The graph of f; fake mode leaves captured tensors as they are, and so does real mode."""
    return make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)


def call_targets(graph):
    """The functions that a graph calls, but for the unpacking of tuples."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return [target for target in targets if target is not operator.getitem]


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("stack", STACKS)
def test_the_graph_is_plain_aten(stack, mode):
    f, args = STACKS[stack]
    module = traced(f, mode, args)
    targets = call_targets(module.graph)
    assert targets
    strange = [t for t in targets if not isinstance(t, torch._ops.OpOverload)]
    assert strange == []
    assert {t.namespace for t in targets} <= {"aten", "prims"}
    torch.testing.assert_close(module(*args), f(*args))
    # Other values of the same shapes: nothing but captured constants is baked in.
    others = tuple(arg.flip(0) * 0.7 + 0.1 for arg in args)
    torch.testing.assert_close(module(*others), f(*others))


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_per_sample_gradients_of_a_model(mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(2, 4, 3), torch.nn.GELU(), torch.nn.Flatten(0), torch.nn.Linear(20, 3)
    ).double()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    xs = torch.randn(5, 2, 7, dtype=torch.float64)
    ys = torch.tensor([0, 1, 2, 1, 0])

    def loss(parameters, x, y):
        return torch.nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    f = vmap(grad(loss), (None, 0, 0))
    module = traced(f, mode, (parameters, xs, ys))
    assert all(isinstance(t, torch._ops.OpOverload) for t in call_targets(module.graph))
    torch.testing.assert_close(module(parameters, xs, ys), f(parameters, xs, ys))


def test_tracing_leaves_nothing_behind():
    make_fx(vmap(grad(scalar)))(XS)
    expected = torch.stack([torch.autograd.functional.jacobian(scalar, x) for x in XS])
    torch.testing.assert_close(vmap(grad(scalar))(XS), expected)


def in_a_buffer(x):
    y = torch.zeros(4, dtype=x.dtype)
    y[1:] = x[1:]
    return torch.relu_(y.mul_(x))


@pytest.mark.parametrize("how", ["export", "pre-dispatch", "plain"])
@pytest.mark.parametrize("f", [vmap(in_a_buffer), vmap(grad(lambda x: in_a_buffer(x).sum()))])
def test_writes_are_traced(f, how):
    if how == "export":

        class Mapped(torch.nn.Module):
            def forward(self, x):
                return f(x)

        traced = torch.export.export(Mapped(), (XS,)).module()
    else:
        traced = make_fx(f, pre_dispatch=how == "pre-dispatch")(XS)
    torch.testing.assert_close(traced(2 * XS), f(2 * XS))
