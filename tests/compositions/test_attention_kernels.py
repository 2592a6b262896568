"""The fused kernel of attention on a CPU, and the same in ordinary ops, under every transform."""

from __future__ import annotations

import optree
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lamina import grad, jvp, vmap
from lamina.debug import trace_log

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ALL = (0, 1, 2)
CASES = {
    "plain": (5, 5, None, False),
    "causal": (5, 5, None, True),
    "more keys": (3, 7, None, False),
    "more keys, causal": (3, 7, None, True),
    "added mask": (3, 7, "added", False),
    "mask of bools": (3, 7, "bools", False),
}


def problem(case):
    queries, keys, kind, causal = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(2, 3, queries, 4), draw(2, 3, keys, 4), draw(2, 3, keys, 4)
    mask = None
    if kind == "added":
        mask = draw(queries, keys)
    elif kind == "bools":
        mask = draw(2, 1, queries, keys) > -0.5
        mask[..., 0] = True
    return (q, k, v), mask, causal


def in_words(q, k, v, mask, causal):
    """Outputs and logarithms of the sums, by the definition."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = torch.where(allowed, scores, -torch.inf)
    if mask is not None:
        masked = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask.bool(), -torch.inf)
        scores = scores + (masked if mask.dtype is torch.bool else mask)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def functions(case, what):
    """What is tried, and its definition, both as functions of q, k, v."""
    _, mask, causal = problem(case)
    if what == "attention":
        return (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, is_causal=causal),
            lambda q, k, v: in_words(q, k, v, mask, causal)[0],
        )
    added = mask
    if mask is not None and mask.dtype is torch.bool:
        added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return (
        lambda q, k, v: KERNEL(q, k, v, 0.0, causal, attn_mask=added),
        lambda q, k, v: in_words(q, k, v, mask, causal),
    )


def loss_of(f):
    return lambda *args: sum((out.sin() * (i + 1)).sum() for i, out in enumerate(leaves(f(*args))))


def leaves(tree):
    return optree.tree_leaves(tree)


def agree(actual, expected):
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["attention", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_derivatives(case, what):
    args, *_ = problem(case)
    tangents = tuple(a.sin() for a in args)

    def answers(f):
        gradient = grad(loss_of(f), ALL)

        def along(*a):
            return sum((g * t).sum() for g, t in zip(gradient(*a), tangents, strict=True))

        return (
            gradient(*args),
            grad(lambda *a: leaves(f(*a))[0].sum(), ALL)(*args),  # a cotangent without strides
            jvp(f, args, tangents),
            jvp(gradient, args, tangents),
            grad(along, ALL)(*args),
        )

    ours, definition = functions(case, what)
    agree(answers(ours), answers(definition))


@pytest.mark.parametrize("bdim", range(5))
@pytest.mark.parametrize("what", ["attention", "kernel"])
@pytest.mark.parametrize("case", ["plain", "more keys, causal", "added mask"])
def test_vmap(case, what, bdim):
    """One sequence per example, so that a batch dim at the end stays there."""
    args, *_ = problem(case)
    batch = tuple(torch.stack([a[:1], 2 * a[:1], a[:1].sin()], bdim) for a in args)
    ours, definition = functions(case, what)

    def answers(f):
        return (
            vmap(f, bdim)(*batch),
            vmap(grad(loss_of(f), ALL), bdim)(*batch),
            grad(loss_of(vmap(f, bdim)), ALL)(*batch),
        )

    agree(answers(ours), answers(definition))


def test_first_order_runs_the_kernel_both_ways(capsys):
    args, *_ = problem("plain")
    gradient = grad(lambda *a: scaled_dot_product_attention(*a).sum(), ALL)
    with trace_log() as lines:
        vmap(gradient)(*(a.unsqueeze(0) for a in args))
    text = "\n".join(lines)
    assert "_for_cpu.default" in text
    assert "_for_cpu_backward.default" in text
    assert "softmax" not in text
    capsys.readouterr()


def test_the_choice_of_kernels_is_respected(capsys):
    args, *_ = problem("plain")
    gradient = grad(lambda *a: scaled_dot_product_attention(*a).sum(), ALL)
    with sdpa_kernel(SDPBackend.MATH), trace_log() as lines:
        vmap(gradient)(*(a.unsqueeze(0) for a in args))
    assert "_for_cpu_backward" not in "\n".join(lines)
    capsys.readouterr()
