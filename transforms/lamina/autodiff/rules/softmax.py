"""Derivatives of softmax and log_softmax, at the composite level, and of their backward ops.

The Jacobian of softmax is symmetric, so one op, `_softmax_backward_data`, is both pushforward and
pullback.
"""

from __future__ import annotations

from lamina.autodiff.declare import jvp_rule, vjp_rule
from lamina.autodiff.shapes import in_dtype
from lamina_core.overloads import aten

softmax_backward = aten._softmax_backward_data.default
log_softmax_backward = aten._log_softmax_backward_data.default


def _softmax_pull(ct, out, dim):
    return softmax_backward(ct, out, dim, out.dtype)


def _log_softmax_pull(ct, out, dim):
    return log_softmax_backward(ct, out, dim, out.dtype)


def _log_softmax_push(t, out, dim):
    return t - (out.exp() * t).sum(dim, keepdim=True)


def _declare(op, pull, push):
    """[*S] -> [*S]; the result is all that is kept. `how` is a dtype, or `half_to_float`."""

    def softmax_pullback(residuals, needs, ct):
        out, dim, dtype = residuals
        return (None if ct is None else in_dtype(pull(ct, out, dim), dtype),)

    @vjp_rule(op)
    def softmax_vjp(needs, x, dim, *how, **named):
        out = op(x, dim, *how, **named)
        return out, (out, dim, x.dtype), softmax_pullback

    @jvp_rule(op)
    def softmax_jvp(tangents, x, dim, *how, **named):
        out = op(x, dim, *how, **named)
        return out, push(tangents[0].to(out.dtype), out, dim)


_declare(aten._log_softmax.default, _log_softmax_pull, _log_softmax_push)
_declare(aten._safe_softmax.default, _softmax_pull, _softmax_pull)  # a row of -inf gives zeros
_declare(aten._softmax.default, _softmax_pull, _softmax_pull)
_declare(aten.log_softmax.int, _log_softmax_pull, _log_softmax_push)
_declare(aten.softmax.int, _softmax_pull, _softmax_pull)


# -- the backward ops ------------------------------------------------------------------------------


def _softmax_by_output(ct, grad, output, dim):
    """The transpose of the derivative of y (g - sum(g y)) in y."""
    inner = (grad * output).sum(dim, keepdim=True)
    return ct * (grad - inner) - grad * (ct * output).sum(dim, keepdim=True)


@vjp_rule(softmax_backward)
def softmax_backward_vjp(needs, grad, output, dim, input_dtype):
    """[*S], [*S] -> [*S]"""
    out = softmax_backward(grad, output, dim, input_dtype)
    kept = grad if needs[1] else None
    return out, (kept, output, dim, grad.dtype), _softmax_backward_pullback


def _softmax_backward_pullback(residuals, needs, ct):
    grad, output, dim, dtype = residuals
    if ct is None:
        return None, None
    ct = ct.to(output.dtype)
    return (
        in_dtype(_softmax_pull(ct, output, dim), dtype) if needs[0] else None,
        _softmax_by_output(ct, grad, output, dim).to(output.dtype) if needs[1] else None,
    )


@jvp_rule(softmax_backward)
def softmax_backward_jvp(tangents, grad, output, dim, input_dtype):
    """[*S], [*S] -> [*S]"""
    out = softmax_backward(grad, output, dim, input_dtype)
    grad_t, output_t = tangents
    out_t = None if grad_t is None else softmax_backward(grad_t, output, dim, input_dtype)
    if output_t is not None:
        inner = (grad * output).sum(dim, keepdim=True)
        term = output_t * (grad - inner) - output * (grad * output_t).sum(dim, keepdim=True)
        term = term.to(out.dtype)
        out_t = term if out_t is None else out_t + term
    return out, out_t


@vjp_rule(log_softmax_backward)
def log_softmax_backward_vjp(needs, grad, output, dim, input_dtype):
    """[*S], [*S] -> [*S]"""
    out = log_softmax_backward(grad, output, dim, input_dtype)
    kept = grad if needs[1] else None
    return out, (kept, output, dim, grad.dtype), _log_softmax_backward_pullback


def _log_softmax_backward_pullback(residuals, needs, ct):
    grad, output, dim, dtype = residuals
    if ct is None:
        return None, None
    weighted = ct.to(output.dtype) * output.exp()
    grad_ct = output_ct = None
    if needs[0]:
        grad_ct = in_dtype(ct - weighted.sum(dim, keepdim=True), dtype)
    if needs[1]:
        output_ct = (-weighted * grad.sum(dim, keepdim=True)).to(output.dtype)
    return grad_ct, output_ct


@jvp_rule(log_softmax_backward)
def log_softmax_backward_jvp(tangents, grad, output, dim, input_dtype):
    """[*S], [*S] -> [*S]"""
    out = log_softmax_backward(grad, output, dim, input_dtype)
    grad_t, output_t = tangents
    out_t = None if grad_t is None else log_softmax_backward(grad_t, output, dim, input_dtype)
    if output_t is not None:
        term = -(output.exp() * output_t) * grad.sum(dim, keepdim=True)
        term = term.to(out.dtype)
        out_t = term if out_t is None else out_t + term
    return out, out_t
