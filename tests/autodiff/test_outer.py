"""The user's own autograd through transforms, over PyTorch's table of operators.

See `tests/outer.py`. The operators below run by default, all others when asked for.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lamina
from lamina import grad, hessian, jvp, linearize, vjp, vmap
from tests.collecting import curated_and_rest
from tests.outer import hold, pairs

DOUBLE = torch.float64
CURATED = """
    as_strided_scatter frexp linalg.cross matrix_exp linalg.qr linalg.slogdet matmul
    native_layer_norm nn.functional.batch_norm scatter_reduce.prod
""".split()


def pytest_generate_tests(metafunc):
    """Reads the whole table only if all of it is to run."""
    curated_and_rest(metafunc, pairs, CURATED)


def test_autograd_follows(name, law):
    hold(name, law)


@pytest.mark.exhaustive
def test_autograd_follows_the_rest(other, law):
    hold(other, law)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def slope(f, w, step=1e-4):
    """The derivative of a function of w, entry by entry, by differences of two steps."""
    found = torch.zeros_like(w)
    for i in range(w.numel()):
        unit = torch.zeros_like(w)
        unit.view(-1)[i] = 1
        near, far = ((f(w + h * unit) - f(w - h * unit)) / (2 * h) for h in (step, 2 * step))
        found.view(-1)[i] = (4 * near - far) / 3
    return found


def follows(f):
    """`torch.autograd` gives the slope of f in a parameter that the transforms have not seen."""
    w = draw(3, 3, seed=7)
    leaf = w.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(found, slope(f, w), rtol=1e-6, atol=1e-6)


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (3,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "group_norm": lambda x: F.group_norm(x[None], 1),
    "statistics of a layer norm": lambda x: torch.cat(
        torch.native_layer_norm(x, (3,), None, None, 0.1), -1
    ),
    "statistics of a batch norm": lambda x: torch.cat(
        [o.flatten() for o in torch.native_batch_norm(x, None, None, None, None, True, 0.1, 0.1)]
    ),
}
ORDERS = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "grad": lambda f, x, v: (grad(f)(x) * v).sum(),
    "jvp(grad)": lambda f, x, v: (jvp(grad(f), (x,), (v,))[1] * v.cos()).sum(),
    "grad(grad)": lambda f, x, v: (grad(lambda x: (grad(f)(x) * v).sum())(x) * v.cos()).sum(),
    "hessian": lambda f, x, v: (hessian(f)(x) * draw(3, 3, 3, 3)).sum(),
    "vmap(grad)": lambda f, x, v: (vmap(grad(f))(torch.stack([x, v])) * draw(2, 3, 3)).sum(),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", NORMS)
def test_what_norms_hand_out_is_no_constant(norm, order):
    x, v = draw(3, 3, seed=1), draw(3, 3, seed=2)
    follows(lambda w: ORDERS[order](lambda x: (NORMS[norm](x @ w) ** 3).sum(), x, v))


@pytest.mark.parametrize("training", [False, True])
def test_the_weight_of_a_batch_norm(training):
    m = nn.BatchNorm1d(3, dtype=DOUBLE).train(training)
    x, v = draw(4, 3), draw(4, 3, seed=1)

    def value(weight):
        f = lambda x: (lamina.functional_call(m, {"weight": weight}, (x,)) ** 3).sum()
        return (jvp(grad(f), (x,), (v,))[1] * v.exp()).sum()

    weight = draw(3, seed=2)
    leaf = weight.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(found, slope(value, weight), rtol=1e-6, atol=1e-6)


def test_a_second_backward_through_an_op_that_has_our_rule():
    x, v = draw(3, 3, seed=1), draw(3, 3, seed=2)

    def value(w):
        return jvp(lambda x: F.layer_norm(x @ w, (3,)), (x,), (v,))[1].pow(2).mul(v).sum()

    def first(w):
        w = w if w.requires_grad else w.clone().requires_grad_()
        return (torch.autograd.grad(value(w), w, create_graph=True)[0] * v).sum()

    w = draw(3, 3, seed=7)
    leaf = w.clone().requires_grad_()
    (found,) = torch.autograd.grad(first(leaf), leaf)
    expected = slope(lambda w: first(w).detach(), w)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_lazy_conjugate_among_cotangents_that_are_mapped():
    w = torch.complex(draw(3, 3), draw(3, 3, seed=1)).requires_grad_()
    x = torch.complex(draw(3, 3, seed=2), draw(3, 3, seed=3))
    cts = torch.complex(draw(2, 3, 3, seed=4), draw(2, 3, 3, seed=5))
    f = lambda x: torch.linalg.matrix_exp(x * w)
    rows = vmap(vjp(f, x)[1])(cts)[0]
    leaf = x.clone().requires_grad_()
    expected = torch.stack(
        [torch.autograd.grad(f(leaf), leaf, ct, create_graph=True)[0] for ct in cts]
    )
    one, two = (
        torch.autograd.grad(out.abs().square().sum(), w, retain_graph=True)[0]
        for out in (rows, expected)
    )
    torch.testing.assert_close(one, two)


def test_what_linearize_hands_out_beside_tangents():
    x, w = draw(3), draw(3, seed=1).requires_grad_()
    out, push, aux = linearize(lambda x: (torch.sign(x * w), x * w), x, has_aux=True)
    assert type(out) is type(aux) is torch.Tensor
    assert torch.equal(push(x), torch.zeros(3, dtype=DOUBLE))
    torch.testing.assert_close(torch.autograd.grad(aux.sum(), w)[0], x)
