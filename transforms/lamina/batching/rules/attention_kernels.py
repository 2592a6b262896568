"""Batching rules of the fused kernels of attention, called by their own names.

All of them have N in front of their tensors, whatever order heads and rows stand in, so that the
batch dim joins it and one call of the kernel does for all examples. The tensors are told from one
another by the names that the schemas share.
"""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from lamina.batching.dims import fold, logical_shape, pad_rank, unfold
from lamina.batching.table import batching_rule
from lamina_core.errors import MissingRuleError, RandomnessError
from lamina_core.overloads import aten

__all__: list[str] = []

_BIASES = ("attn_bias", "bias")
_FOLDED = ("grad_out", "grad_out_", "key", "logsumexp", "out", "query", "value")
_LENGTHS = (
    *("block_table", "cu_seqlens_k", "cu_seqlens_q", "cum_seq_k", "cum_seq_q", "seqlen_k"),
    "seqused_k",
)
_ALIGNED = 16  # elements: kernels read rows of a bias in pieces of up to this many


def _register(forward: Any, backward: Any) -> None:
    @batching_rule(forward)
    def attention(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, N, ...] three times -> [B, N, ...], the logarithms, and what no example owns."""
        args, kwargs, *_ = _joined(forward, info, in_dims, args, kwargs)
        out, logsumexp, *others = forward(*args, **kwargs)
        outs = [unfold(x, 0, info.batch_size) for x in (out, logsumexp)]
        return (*outs, *others), (0, 0, *[None] * len(others))

    @batching_rule(backward)
    def attention_backward(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, N, ...] for each -> the cotangents of query, key, value and perhaps the bias."""
        args, kwargs, shape = _joined(backward, info, in_dims, args, kwargs)
        cts = list(backward(*args, **kwargs))
        for i, ct in enumerate(cts):
            cts[i] = None if ct is None else unfold(ct, 0, info.batch_size)
        if len(cts) > 3:  # of a bias that all of N share, the sum
            cts[3] = None if shape is None else cts[3].sum_to_size(info.batch_size, *shape)
        return tuple(cts), 0


def _joined(op: Any, info: Any, in_dims: Any, args: Any, kwargs: Any) -> Any:
    """The arguments with the examples in N, and the shape of a bias whose cotangent is wanted."""
    names = [a.name for a in op._schema.arguments if not a.kwarg_only]
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = dict(zip(names, in_dims, strict=False)) | info.kwarg_dims
    if given.get("dropout_p", 0.0) > 0:
        raise _no_dropout(info, op)
    mapped = any(dims.get(name) is not None for name in _LENGTHS)
    if mapped or any(_is_ragged(given.get(name)) for name in _LENGTHS):
        raise _no_lengths(info, op)
    wanted = given.get("grad_input_mask", (False,) * 4)[3] or given.get("bias_requires_grad", False)
    n = logical_shape(given["query"], dims["query"])[0]
    shape = None
    for name, x in given.items():
        if x is None:
            continue
        if name in _FOLDED:
            given[name] = _even(fold(x, dims.get(name), 0, info.batch_size), name)
        elif name in _BIASES:
            shape = logical_shape(x, dims.get(name)) if wanted else None
            given[name] = _bias(x, dims.get(name), n, info.batch_size, wanted)
    keyword = {name: x for name, x in given.items() if name not in names}
    return [given[name] for name in names if name in given], keyword, shape


def _is_ragged(x: Any) -> bool:
    """Whether sequences of several lengths stand one behind the other; an empty tensor says no."""
    return x is not None and x.numel() > 0


def _even(x: Any, name: str) -> Any:
    """The kernels read rows of elements that lie side by side, and do not check."""
    return x if x.stride(-1) == 1 and name != "logsumexp" else x.contiguous()


def _bias(bias: Any, bdim: Any, n: int, size: int, wanted: bool) -> Any:
    """[B, N, heads, L, S] -> [B * N, heads, L, S]; with 1s where the kernel may broadcast."""
    if not wanted and bdim is None and (bias.dim() < 4 or bias.shape[0] == 1):
        return bias
    bias = pad_rank(bias.unsqueeze(0) if bdim is None else bias, bdim or 0, 4)
    bias = bias.expand(size, n, *bias.shape[2:]).flatten(0, 1)
    spare = -bias.shape[-1] % _ALIGNED
    return F.pad(bias, (0, spare))[..., : bias.shape[-1]] if spare else bias


def _no_dropout(info: Any, op: Any) -> Exception:
    return info.interpreter.error(
        RandomnessError,
        f"{op} draws its dropout inside the kernel, where no example can have its own",
        "to fix: call torch.nn.functional.scaled_dot_product_attention",
    )


def _no_lengths(info: Any, op: Any) -> Exception:
    return info.interpreter.error(
        MissingRuleError,
        f"{op} of sequences of several lengths has no batched form",
        "to fix: pad the sequences, and mask what is behind their ends with a bias",
    )


_register(aten._cudnn_attention_forward.default, aten._cudnn_attention_backward.default)
_register(aten._efficient_attention_forward.default, aten._efficient_attention_backward.default)
_register(aten._flash_attention_forward.default, aten._flash_attention_backward.default)
_register(
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
)
_register(
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
)
_register(
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_backward.default,
)
_register(
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_fused_attention_overrideable_backward.default,
)
