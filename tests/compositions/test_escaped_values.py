"""Wrappers that outlived their transform, used inside one that has not ended: they are values."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, hessian, jacrev, jvp, vjp, vmap

DOUBLE = torch.float64
close = torch.testing.assert_close
XS = torch.linspace(-1, 1.2, 12, dtype=DOUBLE).reshape(3, 4)


def kept(transform, x):
    """x.cos(), as a wrapper of a transform that has returned."""
    store = []

    def f(x):
        store.append(x.cos())
        return x.sin().sum()

    transform(f, x)
    return store[0]


INNER = {
    "grad": lambda f, x: grad(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "vjp": lambda f, x: vjp(f, x),
    "grad(grad)": lambda f, x: grad(lambda x: grad(f)(x).sum())(x),
}
USES = {
    "returned": lambda c, x: c,
    "second": lambda c, x: x * c,
    "first": lambda c, x: c * x,
    "twice": lambda c, x: torch.addcmul(c, c, x),
    "in a list": lambda c, x: torch.stack([x, c]).prod(0),
    "reduced": lambda c, x: torch.linalg.vector_norm(c) * x,
    "in a composite op": lambda c, x: torch.nn.functional.linear(c, x.expand(4, 4)),
    "written": lambda c, x: (x * 1).mul_(c),
}
OUTER = {
    "grad": lambda f: grad(lambda x: f(x).sin().sum())(XS[0]),
    "jvp": lambda f: jvp(f, (XS[0],), (XS[1],)),
    "jacrev": lambda f: jacrev(f)(XS[0]),
    "hessian": lambda f: hessian(lambda x: f(x).sin().sum())(XS[0]),
    "vmap": lambda f: vmap(f)(XS),
    "vmap last": lambda f: vmap(f, 1, 1)(XS.T.contiguous()),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x).sin().sum()))(XS),
}


def quick(names, chosen):
    """All of them, most only on purpose."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.exhaustive) for name in names
    ]


@pytest.mark.parametrize("outer", quick(OUTER, ["grad", "jvp", "vmap"]))
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("inner", quick(INNER, ["grad", "jvp"]))
def test_a_wrapper_of_a_transform_that_has_returned_is_its_value(inner, use, outer):
    found = OUTER[outer](lambda x: USES[use](kept(INNER[inner], x), x))
    expected = OUTER[outer](lambda x: USES[use](x.cos(), x))
    close(found, expected)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap(grad)"])
def test_no_grad_around_a_transform_that_captures_a_parameter(transform):
    """It concerns the parameter and not the transform."""
    w = torch.linspace(1, 2, 4, dtype=DOUBLE, requires_grad=True)
    f = lambda w: lambda x: (w * x * w).sum() + torch.nn.functional.linear(x, w)
    runs = {
        "grad": lambda f: grad(f)(XS[0]),
        "jvp": lambda f: jvp(f, (XS[0],), (XS[1],)),
        "vmap(grad)": lambda f: vmap(grad(f))(XS),
    }
    with torch.no_grad():
        found = runs[transform](f(w))
    close(found, runs[transform](f(w.detach())))
    assert not any(t.requires_grad for t in (found if isinstance(found, tuple) else [found]))
