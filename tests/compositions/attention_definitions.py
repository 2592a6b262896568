"""Fused kernels of attention by their definitions, registered for CPUs while tests run.

A kernel's results are made of ordinary ops, and so are those of its backward: what Lamina's rules
call as a kernel shares no code with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten
N = 2


def attend(q, k, v, bias=None, causal=False, scale=None, last=False):
    """[N, heads, L, E] and its kind -> [N, heads, L, E], and the logarithms of the sums."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        corner = k.shape[2] - q.shape[2] if last else 0
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(corner)
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@dataclass(frozen=True)
class Kernel:
    """One kernel of attention.

    Attributes:
        name: Without the ending of its forward, which `forward` has.
        forward: The name of the kernel.
        call: `(op, q, k, v, bias, causal)` -> its outputs.
        rows_first: Whether its tensors are [N, L, heads, E].
        biased: Whether it takes a bias.
        last: Whether a causal mask puts the last row and key in line.
        logarithms: From [N, heads, L] to the shape in which it gives them.
    """

    name: str
    forward: str
    call: Callable[..., Any]
    rows_first: bool = False
    biased: bool = True
    last: bool = False
    logarithms: Callable[[torch.Tensor], torch.Tensor] = lambda lse: lse

    @property
    def op(self):
        return getattr(aten, self.forward).default

    @property
    def backward(self):
        return getattr(aten, f"{self.name}_backward").default

    def swap(self, x):
        """From heads first to the kernel's layout, and back."""
        return x.transpose(1, 2) if self.rows_first else x

    def run(self, q, k, v, bias=None, causal=False):
        """Output and logarithms by the kernel."""
        return tuple(self.call(self.op, q, k, v, bias, causal)[:2])

    def defined(self, q, k, v, bias=None, causal=False):
        """Output and logarithms by the definition."""
        heads = [self.swap(x) for x in (q, k, v)]
        out, lse = attend(*heads, bias, causal, last=self.last)
        return self.swap(out), self.logarithms(lse)


def _padded(lse):
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))


KERNELS = {
    kernel.forward: kernel
    for kernel in (
        Kernel(
            "_cudnn_attention",
            "_cudnn_attention_forward",
            lambda op, q, k, v, bias, causal: op(
                q, k, v, bias, None, None, q.shape[2], k.shape[2], True, 0.0, causal
            ),
            logarithms=lambda lse: lse.unsqueeze(-1),
        ),
        Kernel(
            "_efficient_attention",
            "_efficient_attention_forward",
            lambda op, q, k, v, bias, causal: op(
                q, k, v, bias, None, None, None, None, 0.0, int(causal), True
            ),
            rows_first=True,
            logarithms=_padded,
        ),
        Kernel(
            "_flash_attention",
            "_flash_attention_forward",
            lambda op, q, k, v, bias, causal: op(
                q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False
            ),
            rows_first=True,
            biased=False,
            last=True,
        ),
        Kernel(
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_cudnn_attention",
            lambda op, q, k, v, bias, causal: op(q, k, v, bias, True, 0.0, causal),
            logarithms=lambda lse: lse.unsqueeze(-1),
        ),
        Kernel(
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_efficient_attention",
            lambda op, q, k, v, bias, causal: op(q, k, v, bias, True, 0.0, causal),
            logarithms=_padded,
        ),
        Kernel(
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention",
            lambda op, q, k, v, bias, causal: op(q, k, v, 0.0, causal),
            biased=False,
            last=True,
        ),
        Kernel(
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_fused_attention_overrideable",
            lambda op, q, k, v, bias, causal: op(q, k, v, bias, 0.0, causal),
        ),
    )
}


def _by_name(op, args, kwargs):
    arguments = op._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return given | dict(zip([a.name for a in arguments], args, strict=False)) | kwargs


def _settings(kernel, given):
    bias = given.get("attn_bias", given.get("bias"))
    causal = bool(given.get("custom_mask_type", given.get("is_causal")))
    return bias, {"causal": causal, "scale": given["scale"], "last": kernel.last}


def _forward(kernel):
    def forward(*args, **kwargs):
        given = _by_name(kernel.op, args, kwargs)
        bias, settings = _settings(kernel, given)
        heads = [kernel.swap(given[name]) for name in ("query", "key", "value")]
        out, lse = attend(*heads, bias, **settings)
        lse = kernel.logarithms(lse)
        if not given.get("compute_log_sumexp", True):
            lse = lse[..., :0].contiguous()
        outs = [kernel.swap(out).contiguous(), lse]
        for r in kernel.op._schema.returns[2:]:
            whole = str(r.type) in ("int", "SymInt")
            outs.append(0 if whole else out.new_empty(0, dtype=torch.int64))
        return tuple(outs)

    return forward


def _pulled(q, k, v, bias, ct, causal, scale, last):
    """The cotangents of query, key, value and, where there is one, the bias."""
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    _, lse = attend(q, k, v, bias, causal, scale, last)
    probabilities = (q @ keys.mT * scale + (0 if bias is None else bias) - lse.unsqueeze(-1)).exp()
    if causal:
        probabilities = probabilities.tril(k.shape[2] - q.shape[2] if last else 0)
    of_p = ct @ values.mT
    of_scores = probabilities * (of_p - (probabilities * of_p).sum(-1, keepdim=True))
    shared = [
        x.unflatten(1, (-1, groups)).sum(2) for x in (of_scores.mT @ q, probabilities.mT @ ct)
    ]
    cts = [of_scores @ keys * scale, shared[0] * scale, shared[1]]
    return cts if bias is None else [*cts, of_scores.sum_to_size(bias.shape)]


def _backward(kernel):
    def backward(*args, **kwargs):
        given = _by_name(kernel.backward, args, kwargs)
        bias, settings = _settings(kernel, given)
        ct = given.get("grad_out", given.get("grad_out_"))
        q, k, v, ct = (kernel.swap(x) for x in (given["query"], given["key"], given["value"], ct))
        cts = [kernel.swap(x).contiguous() for x in _pulled(q, k, v, bias, ct, **settings)[:3]]
        cts += _pulled(q, k, v, bias, ct, **settings)[3:]
        count = len(kernel.backward._schema.returns)
        return tuple([*cts, *[ct.new_empty(0)] * (count - len(cts))][:count])

    return backward


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Registers the definitions as kernels for CPUs."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for kernel in KERNELS.values():
            library.impl(kernel.forward, _forward(kernel), "CPU", allow_override=True)
            library.impl(f"{kernel.name}_backward", _backward(kernel), "CPU", allow_override=True)
        yield
