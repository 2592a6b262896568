"""Derivatives of copies, also into another dtype or onto another device."""

from __future__ import annotations

from lamina.autodiff.declare import jvp_rule, linear, vjp_rule
from lamina.autodiff.shapes import in_dtype
from lamina_core.overloads import aten

linear(aten.clone.default, lambda ct: ct)
linear(aten.lift.default, lambda ct: ct)
linear(aten.lift_fresh.default, lambda ct: ct)


@vjp_rule(aten._to_copy.default)
def to_copy_vjp(needs, x, **kwargs):
    """[*S] -> [*S], in another dtype or on another device, where the cotangent comes back from."""
    return aten._to_copy.default(x, **kwargs), (x.dtype, x.device), _to_copy_pullback


def _to_copy_pullback(residuals, needs, ct):
    dtype, device = residuals
    if ct is None:
        return (None,)
    ct = in_dtype(ct, dtype)
    return (ct if ct.device == device else ct.to(device),)


@jvp_rule(aten._to_copy.default)
def to_copy_jvp(tangents, x, **kwargs):
    """[*S] -> [*S], the tangent copied likewise."""
    call = aten._to_copy.default
    return call(x, **kwargs), call(tangents[0], **kwargs)
