"""Fused kernels as the ops they stand for; every transform may use these.

PyTorch picks an inference kernel when a module runs in eval mode and no tensor requires grad, which
is how the tensors of a transform look. It has neither a derivative nor a batched form of its own.
The chunked loss is told to compute the gradients of the tensors that require grad, so of none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from lamina.decompose.kernels import KERNELS
from lamina.decompose.lstm import LSTM
from lamina.decompose.optimisers import OPTIMISERS
from lamina.decompose.packed import PACKED
from lamina.decompose.resampling import RESAMPLED
from lamina_core.overloads import aten
from lamina_core.rules import RuleTable
from lamina_core.schema import facts
from lamina_core.schema_record import accepts
from lamina_core.torch_hooks.registry import decompositions

__all__ = ["DECOMPOSED", "decomposition_of", "made_of"]


def decomposition_of(op: Any) -> Callable[..., Any] | None:
    """The function that does what a fused op does, in ordinary ops; None if there is none."""
    rule = DECOMPOSED.lookup(op)
    if rule is not None:
        return rule.function
    late = _BY_NAME.get(op.name())
    return late if late is not None and accepts(op) else None


def made_of(op: Any) -> Callable[..., Any] | None:
    """The function that runs an op as others: ours, or PyTorch's into ops of ATen.

    PyTorch's decompositions into its primitives lead nowhere here.
    """
    ours = decomposition_of(op)
    if ours is not None:
        return ours
    if facts(op).is_composite:
        return op.decompose
    found = decompositions.get(op)
    return None if found is None or found.__module__.startswith("torch._refs") else found


def _heads(x: Any, num_heads: int) -> Any:
    """[B, L, H * D] -> [B, H, L, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def _attend(
    q: Any, k: Any, v: Any, num_heads: int, mask: Any, mask_type: int | None
) -> tuple[Any, Any]:
    """Softmax attention over heads: outputs [B, L, E] and weights [B, H, L, S].

    A mask is True where a score is left out; its type is 0 for [L, S], 1 for [B, S] (padding) and 2
    for [B, H, L, S].
    """
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        left_out = mask.to(torch.bool)
        if mask_type == 1:
            left_out = left_out[:, None, None, :]
        scores = scores.masked_fill(left_out, float("-inf"))
    weights = torch.softmax(scores, -1)
    return (weights @ v).transpose(-2, -3).flatten(-2), weights


def native_multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim: int,
    num_head: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    mask: Any = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Any, Any]:
    """`nn.MultiheadAttention` on [B, L, E], as its fast path computes it."""
    weights_in = qkv_weight.chunk(3)
    biases_in = qkv_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b)
        for x, w, b in zip((query, key, value), weights_in, biases_in, strict=True)
    )
    out, weights = _attend(q, k, v, num_head, mask, mask_type)
    out = F.linear(out, proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def transformer_encoder_layer(
    src: Any,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Any,
    norm_bias_1: Any,
    norm_weight_2: Any,
    norm_bias_2: Any,
    ffn_weight_1: Any,
    ffn_bias_1: Any,
    ffn_weight_2: Any,
    ffn_bias_2: Any,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    """`nn.TransformerEncoderLayer` on [B, L, E], as its fast path computes it."""

    def attend(x: Any) -> Any:
        q, k, v = F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        out, _ = _attend(q, k, v, num_heads, mask, mask_type)
        return F.linear(out, proj_weight, proj_bias)

    def feed_forward(x: Any) -> Any:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    def first_norm(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second_norm(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first_norm(src))
        return x + feed_forward(second_norm(x))
    x = first_norm(src + attend(src))
    return second_norm(x + feed_forward(x))


def broadcast_tensors(tensors: Any) -> list[Any]:
    """Tensors expanded to one shape; torch's own asks its tracer for a guard of every size."""
    shapes = [x.shape for x in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return list(tensors)
    shape = torch.broadcast_shapes(*shapes)
    return [x if x.shape == shape else x.expand(shape) for x in tensors]


def dropout(input: Any, p: float, train: bool) -> Any:
    """The input itself where nothing is dropped, as in eager mode; torch's own would copy it."""
    if p == 0 or not train:
        return input
    return aten.dropout.default.decompose(input, p, train)


def ctc_loss(
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Any:
    """[T, N, C], ... -> [] or [N]; in C++ the mean makes a tensor that no level would see."""
    loss, _ = aten._ctc_loss.default(
        log_probs, targets, input_lengths, target_lengths, blank, zero_infinity
    )
    if zero_infinity:
        loss = loss.masked_fill(loss.isinf(), 0)
    if reduction == 1:
        lengths = torch.tensor(list(target_lengths), dtype=loss.dtype, device=loss.device)
        return (loss / lengths.clamp_min(1)).mean()
    return loss.sum() if reduction == 2 else loss


def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """Broadcast, [*S] -> [*S without dim]. In C++ the norms are clamped in place under `no_grad`.

    That leaves tangents there without a derivative of their own. Here the norms take another value
    and keep their derivative, at every order.
    """
    dtype = torch.result_type(x1, x2)
    if not (dtype.is_floating_point or dtype.is_complex):
        return aten.cosine_similarity.default.decompose(x1, x2, dim, eps)  # which refuses it
    x1, x2 = torch.broadcast_tensors(x1.to(dtype), x2.to(dtype))
    parts = []
    for x in (x1, x2):
        norm = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
        parts.append(x / (norm + (norm.clamp_min(eps) - norm).detach()))
    return (parts[0] * parts[1]).sum(dim)


DECOMPOSED = RuleTable("decomposition")
_TABLE: dict[Any, Callable[..., Any]] = {
    aten._native_multi_head_attention.default: native_multi_head_attention,
    aten._transformer_encoder_layer_fwd.default: transformer_encoder_layer,
    aten.broadcast_tensors.default: broadcast_tensors,
    aten.cosine_similarity.default: cosine_similarity,
    aten.ctc_loss.IntList: ctc_loss,
    aten.dropout.default: dropout,
    # A view and a write: there is no form out of place to put in its stead.
    aten.fill_diagonal_.default: aten.fill_diagonal_.default.decompose,
    **KERNELS,
    **LSTM,
    **OPTIMISERS,
    **PACKED,
    **RESAMPLED,
}
for _op, _function in _TABLE.items():
    DECOMPOSED.register(_op, _function, state="decomposed")


def chunked_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    *how: Any,
) -> tuple[Any, Any, Any, Any]:
    """The loss of `F.linear_cross_entropy`, and in place of its gradients nothing."""
    logits = F.linear(input, linear_weight, linear_bias)
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    nothing = loss.detach().new_empty(0)
    return loss, nothing, nothing, nothing


def chunked_cross_entropy_each(
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    ignore_index: int,
    *how: Any,
) -> Any:
    """The losses of `F.linear_cross_entropy`, one per row: [N, D], [C, D], [N] -> [N]."""
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction="none")


# Registered from Python when they are first used.
_BY_NAME: dict[str, Callable[..., Any]] = {
    "torch_nn::_linear_cross_entropy_batch_chunked": chunked_cross_entropy,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": chunked_cross_entropy_each,
}
