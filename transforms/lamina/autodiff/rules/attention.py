"""Derivatives of scaled dot-product attention.

The forward run is a fused kernel. On a CPU so is its pullback, where the kernel takes the call; the
derivatives of that pullback are those of the same in ordinary ops. Elsewhere the pullback is made
of ordinary ops itself, and recomputes the probabilities from query and key. With dropout the op is
decomposed instead: the draw is then an op of its own, which every level sees.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import decomposition, jvp_rule, unbroadcast, vjp_rule
from lamina.autodiff.shapes import in_dtype
from lamina_core.half import widened
from lamina_core.overloads import aten


class _Heads:
    """Query, key, value and mask, with the query heads that share a key head in a dim of their own.

    Half precision is widened, as PyTorch does outside of its fused kernels: the scores are
    exponents.

    Attributes:
        scale: The factor of the scores.
        q, k, v: [*B, G, H, L, E], [*B, G, 1, S, E], [*B, G, 1, S, F] with shared heads; as they
            came without.
    """

    def __init__(self, q: Any, k: Any, v: Any, mask: Any, options: Any) -> None:
        self.causal, scale, shared = options
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.groups = k.shape[-3] if shared else None
        q, k, v = map(widened, (q, k, v))
        self.q, self.mask = self.split(q), mask
        self.k, self.v = (k.unsqueeze(-3), v.unsqueeze(-3)) if shared else (k, v)

    def split(self, x: Any) -> Any:
        """[*B, heads, ...] -> [*B, G, H, ...] where heads are shared; in float32 at least."""
        x = widened(x)
        if self.groups is None or x is None:
            return x
        return x.unflatten(-3, (self.groups, -1))

    def join(self, x: Any) -> Any:
        """The inverse of `split`."""
        return x if self.groups is None else x.flatten(-4, -3)

    def split_mask(self, mask: Any) -> Any:
        """A mask is broadcast: it may have one head, or no dim of heads."""
        if self.groups is None or mask.dim() < 3:
            return mask
        return mask.unsqueeze(-3) if mask.shape[-3] == 1 else self.split(mask)

    def probabilities(self) -> Any:
        """[..., L, S]; a row that is masked throughout is zero."""
        scores = (self.q * self.scale).matmul(self.k.transpose(-2, -1))
        if self.causal:
            allowed = torch.ones_like(scores, dtype=torch.bool).tril()
            return scores.masked_fill(allowed.logical_not(), -torch.inf).softmax(-1)
        if self.mask is None:
            return scores.softmax(-1)
        mask = self.split_mask(self.mask)
        if mask.dtype is torch.bool:
            scores = scores.masked_fill(mask.logical_not(), -torch.inf)
        else:
            scores = scores + mask
        return torch._safe_softmax(scores, -1)


def _attend(q: Any, k: Any, v: Any, mask: Any, options: Any) -> Any:
    causal, scale, shared = options
    return aten.scaled_dot_product_attention.default(
        q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=shared
    )


@vjp_rule(aten.scaled_dot_product_attention.default)
def attention_rule(
    needs: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """[*B, L, E], [*B, S, E], [*B, S, F], mask [*B, L, S] -> [*B, L, F]."""
    if dropout_p > 0:
        return NotImplemented
    if not query.numel():
        return _attend(query, key, value, attn_mask, (is_causal, scale, enable_gqa)), (), None
    if _fits_the_cpu_kernel(needs, query, key, value, attn_mask, enable_gqa):
        mask = _as_scores(attn_mask, query)
        (out, _), residuals, pullback = flash_rule(
            needs, query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, residuals, pullback
    options = (is_causal, scale, enable_gqa)
    out = _attend(query, key, value, attn_mask, options)
    return out, (query, key, value, attn_mask, options), attention_pullback


def attention_pullback(residuals: Any, needs: Any, ct: Any, lse_ct: Any = None) -> Any:
    """The cotangents of query, key, value and mask, in ordinary ops."""
    query, key, value, mask, _ = residuals
    heads = _Heads(*residuals)
    p = heads.probabilities()
    ct = heads.split(ct)
    cts: list[Any] = [None] * 4
    if needs[0] or needs[1] or needs[3]:
        scores_ct: Any = None if lse_ct is None else p * heads.split(lse_ct.unsqueeze(-1))
        if ct is not None:
            weighted = p * ct.matmul(heads.v.transpose(-2, -1))
            term = weighted - p * weighted.sum(-1, keepdim=True)
            scores_ct = term if scores_ct is None else scores_ct + term
        if needs[0]:
            q_ct = scores_ct.matmul(heads.k) * heads.scale
            cts[0] = unbroadcast(heads.join(unbroadcast(q_ct, heads.q.shape)), query.shape)
        if needs[1]:
            k_ct = scores_ct.transpose(-2, -1).matmul(heads.q) * heads.scale
            cts[1] = unbroadcast(k_ct, heads.k.shape).reshape(key.shape)
        if needs[3]:
            shape = heads.split_mask(mask).shape
            cts[3] = unbroadcast(scores_ct, shape).reshape(mask.shape)
    if needs[2] and ct is not None:
        v_ct = p.transpose(-2, -1).matmul(ct)
        cts[2] = unbroadcast(v_ct, heads.v.shape).reshape(value.shape)
    return [
        None if x_ct is None else in_dtype(x_ct, x.dtype)
        for x_ct, x in zip(cts, (query, key, value, mask), strict=True)
    ]


@jvp_rule(aten.scaled_dot_product_attention.default)
def attention_jvp(
    tangents: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """[*B, L, E], [*B, S, E], [*B, S, F], mask [*B, L, S] -> [*B, L, F]."""
    if dropout_p > 0:
        return NotImplemented
    options = (is_causal, scale, enable_gqa)
    out = _attend(query, key, value, attn_mask, options)
    if not query.numel():
        return out, None
    return out, attention_pushed(tangents, query, key, value, attn_mask, options)[0]


def attention_pushed(
    tangents: Any, query: Any, key: Any, value: Any, mask: Any, options: Any
) -> Any:
    """The tangents of the output and of the logarithms of the sums of exponentials."""
    q_t, k_t, v_t, mask_t = tangents
    shared = options[2]
    heads = _Heads(query, key, value, mask, options)
    p = heads.probabilities()
    scores_t = out_t = lse_t = None
    if q_t is not None:
        scores_t = heads.split(q_t).matmul(heads.k.transpose(-2, -1)) * heads.scale
    if k_t is not None:
        k_t = widened(k_t.unsqueeze(-3) if shared else k_t)
        term = heads.q.matmul(k_t.transpose(-2, -1)) * heads.scale
        scores_t = term if scores_t is None else scores_t + term
    if mask_t is not None:
        term = heads.split_mask(mask_t)
        scores_t = term if scores_t is None else scores_t + term
    if scores_t is not None:
        weighted = p * scores_t
        mean = weighted.sum(-1, keepdim=True)
        out_t = (weighted - p * mean).matmul(heads.v)
        lse_t = heads.join(mean).squeeze(-1)
    if v_t is not None:
        term = p.matmul(widened(v_t.unsqueeze(-3) if shared else v_t))
        out_t = term if out_t is None else out_t + term
    return heads.join(out_t), lse_t


# -- the kernel for CPUs ---------------------------------------------------------------------------


def _fits_the_cpu_kernel(needs: Any, q: Any, k: Any, v: Any, mask: Any, shared: bool) -> bool:
    """Whether the kernel takes a call: it broadcasts nothing and gives no cotangent of a mask.

    The switch is the one that `torch.nn.attention.sdpa_kernel` sets, for all devices.
    """
    return (
        q.device.type == "cpu"
        and torch.backends.cuda.flash_sdp_enabled()
        and not shared
        and q.dim() == k.dim() == v.dim() == 4
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and q.shape[3] == k.shape[3] == v.shape[3]
        and q.numel() > 0
        and k.numel() > 0
        and (mask is None or (not needs[3] and mask.dim() in (2, 4)))
    )


def _as_scores(mask: Any, q: Any) -> Any:
    """A mask of bools as what is added to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask.logical_not(), -torch.inf)


def _even(x: Any) -> Any:
    """The kernel reads rows of elements that lie side by side, and does not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


@vjp_rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_rule(
    needs: Any,
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    """[N, heads, L, E], [N, heads, S, E] twice -> [N, heads, L, E], [N, heads, L]."""
    query, key, value = _even(query), _even(key), _even(value)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    residuals = (query, key, value, out, lse, attn_mask, (is_causal, scale, False))
    return (out, lse), residuals, _flash_pullback


def _flash_pullback(residuals: Any, needs: Any, ct: Any, lse_ct: Any = None) -> Any:
    query, key, value, out, lse, mask, options = residuals
    if lse_ct is not None or (len(needs) > 3 and needs[3]):
        needs = (*needs, False)[:4]
        return attention_pullback((query, key, value, mask, options), needs, ct, lse_ct)
    causal, scale, _ = options
    cts = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        _even(ct), query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return (*cts, None)


@jvp_rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_jvp(
    tangents: Any,
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    """[N, heads, L, E], [N, heads, S, E] twice -> [N, heads, L, E], [N, heads, L]."""
    query, key, value = _even(query), _even(key), _even(value)
    outs = aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    tangents = (*tangents, None)[:4]
    return outs, attention_pushed(tangents, query, key, value, attn_mask, (is_causal, scale, False))


@decomposition(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_backward(
    ct: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    """[N, heads, L, E] and its kind -> the cotangents of query, key and value.

    The kernel takes the output along to save work; the probabilities made again depend on query and
    key in the same way, so that nothing is lost by leaving it out.
    """
    residuals = (query, key, value, attn_mask, (is_causal, scale, False))
    return tuple(attention_pullback(residuals, (True, True, True, False), ct)[:3])
