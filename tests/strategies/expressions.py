"""The expressions that programs are made of: smooth almost everywhere, and tame."""

from __future__ import annotations

UNARY = (
    "torch.sin({a})",
    "torch.cos({a})",
    "torch.tanh({a})",
    "torch.sigmoid({a})",
    "torch.atan({a})",
    "torch.erf({a})",
    "torch.asinh({a})",
    "torch.exp(-{a} * {a})",
    "torch.exp({a} * 0.5)",
    "torch.log1p({a} * {a})",
    "torch.log({a}.square() + 0.5)",
    "torch.sqrt({a} * {a} + 1.0)",
    "torch.rsqrt({a}.square() + 1)",
    "torch.reciprocal({a} * {a} + 1.5)",
    "torch.expm1({a}.tanh())",
    "F.softplus({a})",
    "F.gelu({a})",
    "F.gelu({a}, approximate='tanh')",
    "F.silu({a})",
    "F.logsigmoid({a})",
    "F.mish({a})",
    "torch.clamp({a}, -0.713, 0.831)",
    "torch.clamp_min({a}, 0.217)",
    "F.leaky_relu({a} + 0.1037, 0.3)",
    "-{a}",
    "{a}.square()",
    "{a} ** 3",
    "{a} * 0.7",
    "{a} + 1",
    "1.3 - {a}",
    "2 / ({a} * {a} + 1.5)",
    "0.6 ** {a}",
)

BINARY = (
    "{a} + {b}",
    "{a} - {b}",
    "{a} * {b}",
    "torch.add({a}, {b}, alpha=0.3)",
    "{a} / ({b} * {b} + 1.5)",
    "torch.atan2({a}, {b} * {b} + 1.0)",
    "torch.logaddexp({a}, {b})",
    "torch.lerp({a}, {b}, 0.3)",
    "torch.addcmul({a}, {a}, {b}, value=0.4)",
    "torch.pow({a} * {a} + 0.5, {b}.tanh())",
    "torch.where({a} > 0.1371, {a}, {b})",
    "torch.where({b} < 0.0713, {a} * {b}, {a}.sin())",
    "torch.hypot({a}, {b} * {b} + 1.0)",
)

ALONG = (  # shape-keeping functions along a dim
    "torch.softmax({a}, {dim})",
    "torch.log_softmax({a}, {dim})",
    "torch.cumsum({a}, {dim})",
    "torch.flip({a}, ({dim},))",
    "torch.roll({a}, 1, {dim})",
)

REDUCTIONS = (
    "{a}.sum({dim}, keepdim={keepdim})",
    "{a}.mean({dim}, keepdim={keepdim})",
    "torch.logsumexp({a}, {dim}, keepdim={keepdim})",
    "torch.var({a}, {dim}, correction=0, keepdim={keepdim})",
    "torch.prod({a}.cos() + 1.5, {dim}, keepdim={keepdim})",
    "torch.linalg.vector_norm({a} * {a} + 0.5, dim={dim}, keepdim={keepdim})",
)
