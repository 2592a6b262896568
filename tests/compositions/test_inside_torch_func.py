"""Lamina inside transforms of `torch.func`, capturing their tensors: as torch.func alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lamina

PROGRAMS = {
    "mul": lambda y, w: y * w,
    "sub": lambda y, w: y - w,
    "linear": lambda y, w: F.linear(y, w[None]),
    "mv": lambda y, w: torch.mv(w[None], y),
    "dot": torch.dot,
    "mm": lambda y, w: w[None] @ y[:, None],
    "addcmul": lambda y, w: torch.addcmul(y, w, w),
    "lerp": lambda y, w: torch.lerp(y, w, 0.5),
    "an op on it alone": lambda y, w: y + w.sin(),
    "an element": lambda y, w: y * w[0],
    "a view": lambda y, w: y * w[None][0],
    "layer_norm": lambda y, w: F.layer_norm(y, (4,), w),
    "cat": lambda y, w: torch.cat([y, w]),
    "einsum": lambda y, w: torch.einsum("i,j->ij", y, w),
    "written to": lambda y, w: (y * w).mul_(w),
    "where": lambda y, w: torch.where(y > 0, y, w),
}


def inputs():
    torch.manual_seed(0)
    return torch.randn(3, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("name", PROGRAMS)
def test_captured(name):
    f = PROGRAMS[name]
    x, w = inputs()
    t = w.cos()

    def mapped(lib):
        return lambda w: lib.vmap(lambda y: f(y, w))(x).square().sum()

    def differentiated(lib):
        return lambda w: lib.grad(lambda y: f(y, w).sin().sum())(x[0]).sum()

    for of in (mapped, differentiated):
        ours, theirs = of(lamina), of(torch.func)
        for around in (
            lambda g: torch.func.grad(g)(w),
            lambda g: torch.func.jvp(g, (w,), (t,))[1],
            lambda g: torch.func.vmap(g)(torch.stack([w, t])),
            lambda g: torch.func.vmap(torch.func.grad(g))(torch.stack([w, t])),
        ):
            torch.testing.assert_close(around(ours), around(theirs))
