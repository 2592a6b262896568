"""Second derivatives at kinks, and derivatives at kinks of functions under `vmap`.

What the first derivative is at a kink is PyTorch's own affair. The second is the derivative of the
formula of the first, as in PyTorch's double backward, and it is not NaN.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from lamina import grad, hessian, jacfwd, jacrev, jvp, vmap
from tests.autodiff.edges.oracle import MODES, elementwise

double = torch.float64
special = torch.special
PLACES = torch.tensor([-6.0, -3, -1, -0.5, 0, 0.5, 1, 3, 6, 20], dtype=double)
ZERO = torch.zeros(1, dtype=double)

KINKED = {
    "abs": torch.abs,
    "celu": F.celu,
    "elu": F.elu,
    "frac": torch.frac,
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "huber_loss": lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"),
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "maximum": lambda x: torch.maximum(x, torch.ones_like(x)),
    "mish": F.mish,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.25], dtype=double)),
    "relu": F.relu,
    "relu6": F.relu6,
    "rrelu": F.rrelu,
    "selu": F.selu,
    "sign": torch.sign,
    "silu": F.silu,
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
    "softplus": lambda x: F.softplus(x, threshold=15),
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 1.0, 2.0),
}
NO_SECOND_FORMULA = ("hardsigmoid",)  # in PyTorch


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def of_autograd(f, x):
    """The first and second derivative of an elementwise function in PyTorch; None is 0."""
    leaf = x.clone().requires_grad_()
    found, orders = f(leaf), []
    for _ in range(2):
        if found.requires_grad:
            (found,) = torch.autograd.grad(
                found.sum(), leaf, create_graph=True, allow_unused=True, materialize_grads=True
            )
        else:
            found = torch.zeros_like(x)
        orders.append(found.detach())
    return orders


def pushed_by_torch(f, x, otherwise):
    """PyTorch's forward mode, which differs from its reverse mode at some kinks."""
    with forward_ad.dual_level():
        try:
            out = f(forward_ad.make_dual(x, torch.ones_like(x)))
        except NotImplementedError:  # it has no formula
            return otherwise
        found = forward_ad.unpack_dual(out).tangent
        return torch.zeros_like(x) if found is None else found.clone()


@pytest.mark.parametrize("name", KINKED)
def test_every_way_to_a_derivative_at_a_kink(name):
    f = KINKED[name]
    first, second = of_autograd(f, PLACES) if name not in NO_SECOND_FORMULA else (None, ZERO)
    if first is None:
        first = torch.autograd.functional.jacobian(f, PLACES).diagonal()
    ways = [(first, "r"), (pushed_by_torch(f, PLACES, first), "f")]
    ways += [(second.expand_as(PLACES), modes) for modes in MODES[2]]
    for expected, modes in ways:
        near(elementwise(f, modes)(PLACES), expected)
        near(elementwise(vmap(f), modes)(PLACES), expected)
        near(vmap(elementwise(f, modes))(PLACES), expected)


@pytest.mark.parametrize("p", [0.5, 1.5, 2.0, 3.0, float("inf")])
def test_norms_at_0(p):
    zero = torch.zeros(3, dtype=double)
    f = lambda x: torch.linalg.vector_norm(x, p)
    near(grad(f)(zero), zero)
    for first in (jacrev, jacfwd):
        for second in (jacrev, jacfwd):
            near(second(first(f))(zero), torch.zeros(3, 3, dtype=double))


@pytest.mark.parametrize("f", [torch.std, lambda x: torch.std_mean(x)[0]], ids=["std", "std_mean"])
def test_the_deviation_of_equal_values(f):
    x = torch.full((3,), 2.0, dtype=double)
    near(grad(f)(x), torch.zeros_like(x))
    for first in (jacrev, jacfwd):
        for second in (jacrev, jacfwd):
            near(second(first(f))(x), torch.zeros(3, 3, dtype=double))


def test_functions_of_two_operands_where_one_of_them_is_0():
    """What is masked is masked before it is infinite, so that the next derivative is not NaN."""
    zero, one, two = (torch.tensor(v, dtype=double) for v in (0.0, 1.0, 2.0))
    for f, x, y, argnums in (
        (torch.pow, zero, two, (0, 1)),
        (torch.xlogy, zero, zero, (0,)),  # in y it is the quotient 0 / 0
        (torch.xlogy, zero, two, (0, 1)),
        (special.xlog1py, zero, -one, (0,)),
        (torch.copysign, zero, one, (0, 1)),
    ):
        for argnum in argnums:
            second = grad(grad(f, argnums=argnum), argnums=argnum)(x, y)
            pushed = jvp(grad(f, argnums=argnum), (x, y), (one, one))[1]
            assert second.isfinite(), (f, argnum)
            assert pushed.isfinite() or f is torch.xlogy, (f, argnum)


def test_mixed_derivatives_of_pow_where_the_exponent_is_0():
    """Those of x**y in both at y = 0 are 1 / x, though the slope in x is 0 there."""
    x, zero = torch.tensor(2.5, dtype=double), torch.tensor(0.0, dtype=double)
    near(grad(grad(torch.pow), argnums=1)(x, zero), 1 / x)
    near(grad(grad(torch.pow, argnums=1))(x, zero), 1 / x)
    near(jacfwd(jacfwd(torch.pow), argnums=1)(x, zero), 1 / x)


def test_high_orders_of_a_power_at_0():
    zero, two = torch.tensor(0.0, dtype=double), torch.tensor(2.0, dtype=double)
    f = lambda x: torch.exp(-(x**two))
    for modes in ("rrrr", "ffff", "rfrf"):
        near(elementwise(f, modes)(zero), torch.tensor(12.0, dtype=double))


def test_the_second_derivative_of_logsigmoid_and_hardswish_under_vmap():
    """Taken apart they have kinks at 0 and 3, where the functions are smooth or flat."""
    near(hessian(lambda x: vmap(F.logsigmoid)(x).sum())(ZERO), torch.tensor([[-0.25]]).double())
    three = torch.full((1,), 3.0, dtype=double)
    near(grad(lambda x: vmap(F.hardswish)(x).sum())(three), torch.ones(1, dtype=double))
