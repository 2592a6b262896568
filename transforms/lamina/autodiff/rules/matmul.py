"""Derivatives of matrix products, at the level at which users call them.

Each op is linear in each factor: the transpose in one factor is a product with the adjoint of the
other, so one statement serves vjp and jvp. Only the other factor is kept. `einsum`, `tensordot`,
`inner` and `kron` decompose to these.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import jvp_rule, multilinear, unbroadcast, vjp_rule
from lamina_core.overloads import aten

linear = torch.nn.functional.linear  # as `aten.linear`, which takes 1 us longer to call


def adjoint(x: Any) -> Any:
    """[*B, n, m] -> [*B, m, n], conjugated."""
    x = x.transpose(-2, -1)
    return x.conj() if x.is_complex() else x


def conj(x: Any) -> Any:
    """The conjugate; a real tensor is its own and costs no op."""
    return x.conj() if x.is_complex() else x


def _outer(x: Any, y: Any) -> Any:
    # A broadcast product: a third of the time of `mm` on two thin matrices, under vmap as well.
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _rows(x: Any) -> Any:
    """[*B, n] -> [prod(B), n]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _matmul_x(ct: Any, y: Any, x_shape: Any) -> Any:
    """[*B, n, m] with y [*B, k, m] -> [*B, n, k], for every rank that `matmul` takes."""
    if y.dim() == 1:
        return ct * conj(y) if len(x_shape) == 1 else _outer(ct, conj(y))
    if len(x_shape) == 1:
        if y.dim() == 2:
            return conj(y).mv(ct)
        return unbroadcast(conj(y).matmul(ct.unsqueeze(-1)).squeeze(-1), x_shape)
    return unbroadcast(ct.matmul(adjoint(y)), x_shape)


def _matmul_y(ct: Any, x: Any, y_shape: Any) -> Any:
    """[*B, n, m] with x [*B, n, k] -> [*B, k, m]; a matrix y under a batched x sums in one mm."""
    if x.dim() == 1:
        return ct * conj(x) if len(y_shape) == 1 else _outer(conj(x), ct)
    if len(y_shape) == 1:
        return adjoint(_rows(x)).mv(ct.flatten())
    if len(y_shape) == 2:
        return adjoint(_rows(x)).mm(_rows(ct))
    return unbroadcast(adjoint(x).matmul(ct), y_shape)


multilinear(
    aten.bmm.default,
    lambda ct, y: ct.bmm(adjoint(y)),
    lambda ct, x: adjoint(x).bmm(ct),
)
multilinear(aten.dot.default, lambda ct, y: ct * conj(y), lambda ct, x: ct * conj(x))
multilinear(aten.matmul.default, _matmul_x, _matmul_y)
multilinear(
    aten.mm.default,
    lambda ct, y: ct.mm(adjoint(y)),
    lambda ct, x: adjoint(x).mm(ct),
)
multilinear(
    aten.mv.default,
    lambda ct, y: _outer(ct, conj(y)),
    lambda ct, x: adjoint(x).mv(ct),
)
multilinear(
    aten.outer.default,
    lambda ct, y: ct.mv(conj(y)),
    lambda ct, x: ct.t().mv(conj(x)),
)
multilinear(aten.vdot.default, lambda ct, y: conj(ct) * y, lambda ct, x: ct * x)  # antilinear in x


# -- linear ----------------------------------------------------------------------------------------


@vjp_rule(aten.linear.default)
def linear_rule(needs: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """[*B, n], [m, n], [m] -> [*B, m]; a weight [n] gives [*B]."""
    if x.dim() > 2 and weight.dim() == 2 and not x.is_contiguous():
        # `linear` would make a product per matrix of x, where autograd, which it asks, makes one.
        rows = linear(_rows(x), weight, bias)
        out = rows.view(*x.shape[:-1], weight.shape[0])
    else:
        out = linear(x, weight, bias)
    residuals = (
        weight if needs[0] else None,
        x if needs[1] else None,
        bias.shape if needs[2] else None,
        weight.dim(),
    )
    return out, residuals, _linear_pullback


def _linear_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    weight, x, bias_shape, rank = residuals
    x_ct = weight_ct = bias_ct = None
    lead = ct.shape[:-1]
    if rank == 2 and ct.dim() > 2:
        # One matrix for all three: `matmul` is slow on a cotangent whose rows are not in order.
        ct = _rows(ct)
    if needs[0]:
        if rank == 1:
            x_ct = ct.unsqueeze(-1) * conj(weight)  # of one vector, ct has no dims
        elif ct.dim() == 1:
            x_ct = ct.matmul(conj(weight))
        else:
            x_ct = ct.mm(conj(weight))
            x_ct = x_ct.view(*lead, weight.shape[1]) if len(lead) > 1 else x_ct
    if needs[1]:
        if x.dim() == 1:
            weight_ct = _outer(ct, conj(x)) if rank == 2 else ct * conj(x)
        elif rank == 1:
            weight_ct = _rows(conj(x)).t().mv(ct.flatten())
        else:
            weight_ct = _rows(ct).t().mm(_rows(conj(x)))
    if needs[2]:
        bias_ct = unbroadcast(ct, bias_shape)
    return x_ct, weight_ct, bias_ct


@jvp_rule(aten.linear.default)
def linear_jvp(tangents: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """[*B, n], [m, n], [m] -> [*B, m]; the bias tangent rides on one of the two products."""
    x_t, weight_t, bias_t = tangents
    out = linear(x, weight, bias)
    total = None
    if x_t is not None:
        total = linear(x_t, weight, bias_t)
    if weight_t is not None:
        term = linear(x, weight_t, bias_t if x_t is None else None)
        total = term if total is None else total + term
    if total is None:
        total = bias_t.expand(out.shape)
    return out, total


# -- beta * input + alpha * (x @ y) ----------------------------------------------------------------


def _scaled(value: Any, factor: Any) -> Any:
    return value if factor == 1 else value * factor


def _add_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    """Of `beta * input + alpha * product(x, y)`, by the transposes of the product."""
    shape, x, y, beta, alpha, transposes = residuals
    input_ct = x_ct = y_ct = None
    if needs[0]:
        input_ct = _scaled(unbroadcast(ct, shape), beta.conjugate())
    if needs[1] or needs[2]:
        ct = _scaled(ct, alpha.conjugate())
    if needs[1]:
        x_ct = transposes[0](ct, y)
    if needs[2]:
        y_ct = transposes[1](ct, x)
    return input_ct, x_ct, y_ct


def _sum_of_products(op: Any, product: Any, x_transpose: Any, y_transpose: Any) -> None:
    """Register both rules of an op `(input, x, y, *, beta, alpha)`."""
    transposes = (x_transpose, y_transpose)

    @vjp_rule(op)
    def rule(needs: Any, input: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        out = op(input, x, y, beta=beta, alpha=alpha)
        residuals = (
            input.shape,
            x if needs[2] else None,
            y if needs[1] else None,
            beta,
            alpha,
            transposes,
        )
        return out, residuals, _add_pullback

    @jvp_rule(op)
    def pushforward(
        tangents: Any, input: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1
    ) -> Any:
        input_t, x_t, y_t = tangents
        out = op(input, x, y, beta=beta, alpha=alpha)
        total = None
        for left, right in ((x_t, y), (x, y_t)):
            if left is not None and right is not None:
                term = product(left, right)
                total = term if total is None else total + term
        if total is not None:
            total = _scaled(total, alpha)
        if input_t is not None:
            term = _scaled(input_t, beta)
            total = term.expand(out.shape) if total is None else total + term
        return out, total


_sum_of_products(
    aten.addbmm.default,  # the products are summed over the batch
    lambda x, y: x.bmm(y).sum(0),
    lambda ct, y: ct.matmul(adjoint(y)),
    lambda ct, x: adjoint(x).matmul(ct),
)
_sum_of_products(
    aten.addmm.default,
    lambda x, y: x.mm(y),
    lambda ct, y: ct.mm(adjoint(y)),
    lambda ct, x: adjoint(x).mm(ct),
)
_sum_of_products(
    aten.addmv.default,
    lambda x, y: x.mv(y),
    lambda ct, y: _outer(ct, conj(y)),
    lambda ct, x: adjoint(x).mv(ct),
)
_sum_of_products(
    aten.addr.default,
    _outer,
    lambda ct, y: ct.mv(conj(y)),
    lambda ct, x: ct.t().mv(conj(x)),
)
_sum_of_products(
    aten.baddbmm.default,
    lambda x, y: x.bmm(y),
    lambda ct, y: ct.bmm(adjoint(y)),
    lambda ct, x: adjoint(x).bmm(ct),
)
