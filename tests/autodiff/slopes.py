"""Inputs in double precision, and derivatives by central differences."""

from __future__ import annotations

import torch

double = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=double, generator=torch.Generator().manual_seed(seed))


def slope(f, x, t, step=1e-6):
    """The directional derivative of `f` at `x` along `t`, by a central difference."""
    return (f(x + step * t) - f(x - step * t)) / (2 * step)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
