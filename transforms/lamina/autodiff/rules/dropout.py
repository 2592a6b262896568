"""Derivatives of dropout, given its mask.

`aten.dropout` decomposes to `native_dropout` on a GPU and to a Bernoulli draw and two products
elsewhere; the formula of `native_dropout` is borrowed, for the draw has to be handed to the levels
below. What is left is its pullback.
"""

from __future__ import annotations

from lamina.autodiff.declare import linear
from lamina_core.overloads import aten

linear(
    aten.native_dropout_backward.default,
    lambda ct, mask, scale: aten.native_dropout_backward.default(ct, mask, scale),
)
