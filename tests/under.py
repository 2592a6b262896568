"""Each transform as a function of `(f, xs)`: f maps a vector of 4 to a vector, xs is [3, 4]."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

DOUBLE = torch.float64


def inputs():
    return torch.linspace(-1.1, 1.3, 12, dtype=DOUBLE).reshape(3, 4) + 0.05


def _pulled(f, x):
    out, pullback = vjp(f, x)
    return pullback(out.cos())[0]


FIRST_ORDER = {
    "plain": lambda f, xs: f(xs[0]),
    "vmap": lambda f, xs: vmap(f)(xs),
    "vmap last": lambda f, xs: vmap(f, 1, 1)(xs.T.contiguous()),
    "vmap(vmap)": lambda f, xs: vmap(vmap(f))(torch.stack([xs, xs.sin()])),
    "grad": lambda f, xs: grad(lambda x: f(x).sin().sum())(xs[0]),
    "vjp": lambda f, xs: _pulled(f, xs[0]),
    "jacrev": lambda f, xs: jacrev(f)(xs[0]),
    "vmap(grad)": lambda f, xs: vmap(grad(lambda x: f(x).sin().sum()))(xs),
    "vmap(grad) last": lambda f, xs: vmap(grad(lambda x: f(x).sin().sum()), 1)(xs.T.contiguous()),
    "vmap(jacrev)": lambda f, xs: vmap(jacrev(f))(xs),
    "grad(vmap)": lambda f, xs: grad(lambda xs: vmap(f)(xs).sin().sum())(xs),
    "vmap(grad(vmap))": lambda f, xs: vmap(grad(lambda xs: vmap(f)(xs).sin().sum()))(
        torch.stack([xs, xs.cos()])
    ),
}
FORWARD = {
    "jvp": lambda f, xs: torch.stack(jvp(f, (xs[0],), (xs[1],))),
    "jacfwd": lambda f, xs: jacfwd(f)(xs[0]),
    "jvp(vmap)": lambda f, xs: jvp(vmap(f), (xs,), (xs.sin(),))[1],
    "vmap(jvp)": lambda f, xs: vmap(lambda x: jvp(f, (x,), (x.cos(),))[1])(xs),
}
SECOND_ORDER = {
    "hessian": lambda f, xs: hessian(lambda x: f(x).sin().sum())(xs[0]),
    "jvp(grad)": lambda f, xs: jvp(grad(lambda x: f(x).sin().sum()), (xs[0],), (xs[1],))[1],
    "jvp(jvp)": lambda f, xs: jvp(lambda x: jvp(f, (x,), (x.sin(),))[1], (xs[0],), (xs[1],))[1],
    "grad(grad)": lambda f, xs: grad(lambda x: grad(lambda x: f(x).sin().sum())(x).sin().sum())(
        xs[0]
    ),
    "grad(jvp)": lambda f, xs: grad(lambda x: jvp(f, (x,), (x.cos(),))[1].sin().sum())(xs[0]),
    "vmap(hessian)": lambda f, xs: vmap(hessian(lambda x: f(x).sin().sum()))(xs),
    "grad(vmap(grad))": lambda f, xs: grad(
        lambda xs: vmap(grad(lambda x: f(x).sin().sum()))(xs).sin().sum()
    )(xs),
    "jacfwd(jacfwd(jacrev))": lambda f, xs: jacfwd(jacfwd(jacrev(f)))(xs[0]),
}
FIRST = {**FIRST_ORDER, **FORWARD}
ALL = {**FIRST, **SECOND_ORDER}
QUICK = ("plain", "vmap", "grad", "vmap(grad) last", "grad(vmap)", "jvp", "hessian", "grad(jvp)")


def each(*more):
    """The names of all, those that are neither quick nor named here for the exhaustive run."""
    quick = {*QUICK, *more}
    return [pytest.param(n, marks=() if n in quick else pytest.mark.exhaustive) for n in ALL]


def pair(plain, into):
    """Registers a function in a list of parameters, beside its twin in plain ops."""

    def register(function):
        into.append(pytest.param(function, plain, id=function.__name__))
        return function

    return register
