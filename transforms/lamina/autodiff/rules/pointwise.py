"""Derivatives of elementwise ops: per operand, `t` times the partial derivative.

The parameters of a product name what is kept for it: see the NOTE in `lamina.autodiff.declare`.
"""

from __future__ import annotations

import torch

from lamina.autodiff.declare import pointwise

aten = torch.ops.aten

pointwise(aten.add.Tensor, lambda t: t, lambda t, alpha: t if alpha == 1 else t * alpha)
pointwise(aten.cos.default, lambda t, x: -(t * x.sin()))
pointwise(aten.exp.default, lambda t, out: t * out)
pointwise(aten.mul.Tensor, lambda t, y: t * y, lambda t, x: t * x)
pointwise(aten.neg.default, lambda t: -t)
pointwise(aten.sin.default, lambda t, x: t * x.cos())
pointwise(aten.sub.Tensor, lambda t: t, lambda t, alpha: t * -alpha)
