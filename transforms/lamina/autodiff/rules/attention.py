"""Derivatives of scaled dot-product attention.

The forward run is the fused kernel. Its pullback recomputes the probabilities from query and key,
so that memory grows with the sequence and not with its square, and is written in ordinary ops, so
that it can be differentiated again. With dropout the op is decomposed instead: the draw is then an
op of its own, which every level sees.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff.declare import jvp_rule, unbroadcast, vjp_rule

aten = torch.ops.aten


class _Heads:
    """Query, key, value and mask, with the query heads that share a key head in a dim of their own.

    Attributes:
        scale: The factor of the scores.
        q, k, v: [*B, G, H, L, E], [*B, G, 1, S, E], [*B, G, 1, S, F] with shared heads; as they
            came without.
    """

    def __init__(self, q: Any, k: Any, v: Any, mask: Any, options: Any) -> None:
        self.causal, scale, shared = options
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.groups = k.shape[-3] if shared else None
        self.q, self.mask = self.split(q), mask
        self.k, self.v = (k.unsqueeze(-3), v.unsqueeze(-3)) if shared else (k, v)

    def split(self, x: Any) -> Any:
        """[*B, heads, ...] -> [*B, G, H, ...] where heads are shared."""
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
    options = (is_causal, scale, enable_gqa)
    out = _attend(query, key, value, attn_mask, options)
    return out, (query, key, value, attn_mask, options), _attention_pullback


def _attention_pullback(residuals: Any, needs: Any, ct: Any) -> Any:
    query, key, value, mask, _ = residuals
    heads = _Heads(*residuals)
    p = heads.probabilities()
    ct = heads.split(ct)
    cts: list[Any] = [None] * 4
    if needs[0] or needs[1] or needs[3]:
        p_ct = ct.matmul(heads.v.transpose(-2, -1))
        weighted = p * p_ct
        scores_ct = weighted - p * weighted.sum(-1, keepdim=True)
        if needs[0]:
            q_ct = scores_ct.matmul(heads.k) * heads.scale
            cts[0] = unbroadcast(heads.join(unbroadcast(q_ct, heads.q.shape)), query.shape)
        if needs[1]:
            k_ct = scores_ct.transpose(-2, -1).matmul(heads.q) * heads.scale
            cts[1] = unbroadcast(k_ct, heads.k.shape).reshape(key.shape)
        if needs[3]:
            shape = heads.split_mask(mask).shape
            cts[3] = unbroadcast(scores_ct, shape).reshape(mask.shape)
    if needs[2]:
        v_ct = p.transpose(-2, -1).matmul(ct)
        cts[2] = unbroadcast(v_ct, heads.v.shape).reshape(value.shape)
    return cts


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
    q_t, k_t, v_t, mask_t = tangents
    options = (is_causal, scale, enable_gqa)
    out = _attend(query, key, value, attn_mask, options)
    heads = _Heads(query, key, value, attn_mask, options)
    p = heads.probabilities()
    scores_t = out_t = None
    if q_t is not None:
        scores_t = heads.split(q_t).matmul(heads.k.transpose(-2, -1)) * heads.scale
    if k_t is not None:
        k_t = k_t.unsqueeze(-3) if enable_gqa else k_t
        term = heads.q.matmul(k_t.transpose(-2, -1)) * heads.scale
        scores_t = term if scores_t is None else scores_t + term
    if mask_t is not None:
        term = heads.split_mask(mask_t)
        scores_t = term if scores_t is None else scores_t + term
    if scores_t is not None:
        weighted = p * scores_t
        out_t = (weighted - p * weighted.sum(-1, keepdim=True)).matmul(heads.v)
    if v_t is not None:
        term = p.matmul(v_t.unsqueeze(-3) if enable_gqa else v_t)
        out_t = term if out_t is None else out_t + term
    return out, heads.join(out_t)
