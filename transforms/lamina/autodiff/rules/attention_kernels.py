"""Derivatives of the fused kernels of attention for GPUs, called by their own names.

The first pullback is the kernel's own; its derivatives, and the pushforward, are those of the same
in ordinary ops (see `attention.py`). With dropout the draw stays inside the kernel, so that there
is a first pullback and nothing else.

The kernels take the same things in orders of their own; they are told apart by the names in their
schemas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lamina.autodiff.declare import decomposition, jvp_rule, vjp_rule
from lamina.autodiff.rules.attention import attention_pullback, attention_pushed
from lamina_core.errors import NotDifferentiableError, message
from lamina_core.overloads import aten

__all__: list[str] = []

# What a kernel's own backward calls by another name than the forward.
_RENAMED = {
    "log_sumexp": "logsumexp",
    "max_seqlen_batch_k": "max_seqlen_k",
    "max_seqlen_batch_q": "max_seqlen_q",
    "output": "out",
    "softmax_logsumexp": "logsumexp",
}
# Of scaled_dot_product_flash_attention alone: its backward names the state of the draw as it was.
_STATE = {"rng_state": "philox_seed", "unused": "philox_offset"}
_NOT_IN_WORDS = (
    *("alibi_slopes", "block_table", "cu_seqlens_k", "cu_seqlens_q", "cum_seq_k", "cum_seq_q"),
    *("seqlen_k", "seqused_k", "window_size", "window_size_left", "window_size_right"),
)


class _Call:
    """One call of a kernel or of its backward.

    Attributes:
        given: The arguments by name, with the schema's defaults.
    """

    def __init__(self, op: Any, args: Any, kwargs: Any, rows_first: bool, last: bool) -> None:
        self.op, self.rows_first, self.last = op, rows_first, last
        arguments = op._schema.arguments
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        self.given = given | dict(zip([a.name for a in arguments], args, strict=False)) | kwargs

    def run(self) -> Any:
        """The kernel itself."""
        return _called(self.op, self.given)

    def bias(self) -> Any:
        return self.given.get("attn_bias", self.given.get("bias"))

    def heads_first(self, x: Any) -> Any:
        """[N, L, heads, E] -> [N, heads, L, E] where rows stand first; its own inverse."""
        return x if x is None or not self.rows_first else x.transpose(1, 2)

    def in_words(self) -> tuple[Any, ...]:
        """Query, key, value, mask and options as `attention.py` takes them.

        Raises:
            NotDifferentiableError: The call is none that ordinary ops are written for.
        """
        q, k, v = (self.heads_first(self.given[name]) for name in ("query", "key", "value"))
        odd = [name for name in _NOT_IN_WORDS if _is_set(self.given.get(name))]
        if self.given["dropout_p"] > 0:
            odd.append("dropout_p")
        if odd:
            raise NotDifferentiableError(
                message(
                    f"{self.op} with {odd[0]} has a first derivative in reverse mode, and no other",
                    "to fix: call torch.nn.functional.scaled_dot_product_attention",
                )
            )
        mask, causal, last = self.bias(), *self._triangle()
        square = q.shape[-2] == k.shape[-2]
        if causal and (mask is not None or (last and not square)):
            corner = k.shape[-2] - q.shape[-2] if last else 0
            places = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
            zero = places.new_zeros((), dtype=q.dtype) if mask is None else mask
            mask = torch.where(places.tril(corner), zero, -torch.inf)
            causal = False
        return q, k, v, mask, (causal, self.given["scale"], q.shape[1] != k.shape[1])

    def _triangle(self) -> tuple[bool, bool]:
        """Whether later keys are left out, and whether the last row and key are in line.

        It is the first ones that are otherwise.
        """
        if "custom_mask_type" in self.given:
            return self.given["custom_mask_type"] > 0, self.given["custom_mask_type"] == 2
        return self.given["is_causal"], self.last


def _is_set(x: Any) -> bool:
    return x is not None and not (isinstance(x, torch.Tensor) and x.numel() == 0)


def _called(op: Any, given: dict[str, Any]) -> Any:
    arguments = op._schema.arguments
    args = [given[a.name] for a in arguments if not a.kwarg_only]
    return op(*args, **{a.name: given[a.name] for a in arguments if a.kwarg_only})


def _register(forward: Any, backward: Any, *, rows_first: bool = False, last: bool = False) -> None:
    """Registers a kernel and its backward.

    Args:
        forward: The kernel.
        backward: Its backward.
        rows_first: Whether its tensors are [N, L, heads, E].
        last: Whether a causal mask of more keys than rows lets the last row see all keys.
    """

    @vjp_rule(forward)
    def rule(needs: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, heads, L, E], [N, heads, S, E] twice -> [N, heads, L, E], [N, heads, L], ..."""
        call = _Call(forward, args, kwargs, rows_first, last)
        asked = call.given.get("compute_log_sumexp", True)
        if not asked:  # but the pullback asks
            call.given["compute_log_sumexp"] = True
        outs = call.run()
        residuals = (*outs, *(call.given[a.name] for a in forward._schema.arguments))
        shown = outs if asked else (outs[0], outs[1][..., :0], *outs[2:])
        return tuple(shown), residuals, pullback

    def pullback(residuals: Any, needs: Any, ct: Any, lse_ct: Any = None, *others: Any) -> Any:
        names = [r.name for r in forward._schema.returns]
        outs, args = residuals[: len(names)], residuals[len(names) :]
        call = _Call(forward, args, {}, rows_first, last)
        biased = call.bias() is not None and needs[3]
        wanted = (*needs[:3], biased)
        rest = [None] * (len(needs) - 4)
        arguments = {a.name for a in backward._schema.arguments}
        gives_bias = bool(arguments & {"grad_input_mask", "bias_requires_grad"})
        if lse_ct is not None or (biased and not gives_bias):
            return (*_pulled_in_words(call, ct, lse_ct, wanted), *rest)[: len(needs)]
        given = {a.name: a.default_value for a in backward._schema.arguments}
        given |= {name: x for name, x in call.given.items() if name in arguments}
        for name, x in zip(names, outs, strict=True):
            name = _RENAMED.get(name, name)
            name = name if name in arguments else _STATE.get(name, name)
            if name in arguments:
                given[name] = x
        given["grad_out" if "grad_out" in arguments else "grad_out_"] = _even(ct)
        if "grad_input_mask" in arguments:
            given["grad_input_mask"] = [*wanted]
        if "bias_requires_grad" in arguments:
            given["bias_requires_grad"] = biased
        found = (*_called(backward, given), None)[:4]
        cts = [x if asked else None for x, asked in zip(found, wanted, strict=True)]
        return (*cts, *rest)[: len(needs)]

    @jvp_rule(forward)
    def pushforward(tangents: Any, *args: Any, **kwargs: Any) -> Any:
        """[N, heads, L, E], [N, heads, S, E] twice -> [N, heads, L, E], [N, heads, L], ..."""
        call = _Call(forward, args, kwargs, rows_first, last)
        q, k, v, mask, options = call.in_words()
        outs = call.run()
        q_t, k_t, v_t = (call.heads_first(t) for t in tangents[:3])
        bias_t = tangents[3] if call.bias() is not None else None
        out_t, lse_t = attention_pushed((q_t, k_t, v_t, bias_t), q, k, v, mask, options)
        if lse_t is not None:
            lse_t = _like_logarithms(lse_t, outs[1])
        return outs, (call.heads_first(out_t), lse_t, *[None] * (len(outs) - 2))

    @decomposition(backward)
    def backward_in_words(*args: Any, **kwargs: Any) -> Any:
        """[N, heads, L, E] and its kind -> the cotangents of query, key, value and perhaps bias.

        What the kernel takes along to save work depends on query and key, as what is made again
        here does, so that nothing is lost by leaving it out.
        """
        call = _Call(backward, args, kwargs, rows_first, last)
        given = call.given
        needs = given.get("grad_input_mask", (*[True] * 3, given.get("bias_requires_grad", False)))
        ct = given["grad_out"] if "grad_out" in given else given["grad_out_"]
        biased = needs[3] and call.bias() is not None
        cts = _pulled_in_words(call, ct, None, (*needs[:3], biased))
        return tuple(cts[: len(backward._schema.returns)])


def _even(ct: Any) -> Any:
    """The kernels read rows of elements that lie side by side, and do not check."""
    return ct if ct.stride(-1) == 1 else ct.contiguous()


def _pulled_in_words(call: _Call, ct: Any, lse_ct: Any, needs: Any) -> list[Any]:
    q, k, v, mask, options = call.in_words()
    if lse_ct is not None:
        lse_ct = lse_ct.reshape(*lse_ct.shape[:2], -1)[..., : q.shape[-2]].to(q.dtype)
    cts = attention_pullback((q, k, v, mask, options), needs, call.heads_first(ct), lse_ct)
    bias, bias_ct = call.bias(), cts[3]
    if bias_ct is not None and bias_ct.shape != bias.shape:
        bias_ct = bias_ct.sum_to_size(bias.shape)
    return [*(call.heads_first(x) for x in cts[:3]), bias_ct]


def _like_logarithms(lse_t: Any, lse: Any) -> Any:
    """[N, heads, L] -> as the kernel gives it: with a dim of 1 behind, or with rows to spare."""
    lse_t = lse_t.to(lse.dtype)
    if lse.dim() > lse_t.dim():
        return lse_t.unsqueeze(-1)
    spare = lse.shape[-1] - lse_t.shape[-1]
    return lse_t[..., : lse.shape[-1]] if spare <= 0 else F.pad(lse_t, (0, spare))


_register(aten._cudnn_attention_forward.default, aten._cudnn_attention_backward.default)
_register(
    aten._efficient_attention_forward.default,
    aten._efficient_attention_backward.default,
    rows_first=True,
)
_register(
    aten._flash_attention_forward.default,
    aten._flash_attention_backward.default,
    rows_first=True,
    last=True,
)
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
    last=True,
)
_register(
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_fused_attention_overrideable_backward.default,
)
