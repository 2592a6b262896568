"""The fused kernels of GPUs, under every transform.

Each kernel of attention gets one for CPUs here, which computes its definition; what the transforms
make of it is held to the transforms of the definition.
"""

from __future__ import annotations

import optree
import pytest
import torch

import lamina
from lamina import grad, jvp, vmap
from lamina.debug import trace_log
from tests.compositions.attention_definitions import KERNELS, N, registered

B = 3
DOUBLE = torch.float64
SLOW = pytest.mark.slow
ALL = (0, 1, 2)


@pytest.fixture(autouse=True)
def _no_loops(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")
    monkeypatch.setattr(lamina.config, "debug", 1)


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    with registered():
        yield


def operands(kernel, rows=5, keys=5, heads=4, key_heads=4):
    """Query, key and value in the kernel's own layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(length, count):
        shape = (N, count, length, 8)
        return kernel.swap(torch.randn(shape, generator=generator, dtype=DOUBLE)).contiguous()

    return draw(rows, heads), draw(keys, key_heads), draw(keys, key_heads)


CASES = {
    "plain": {},
    "more keys": {"rows": 3, "keys": 7},
    "causal": {"causal": True},
    "causal, more keys": {"rows": 3, "keys": 7, "causal": True},
    "bias": {"rows": 3, "keys": 7, "bias": (N, 4, 3, 7)},
    "bias of all": {"rows": 3, "keys": 7, "bias": (1, 1, 3, 7)},
    "bias, causal": {"bias": (N, 1, 5, 5), "causal": True},
    "shared heads": {"key_heads": 2},
}


def pairs():
    """Each kernel with the cases that it takes."""
    return [
        pytest.param(kernel, case, id=f"{name}-{case}")
        for name, kernel in KERNELS.items()
        for case, facts in CASES.items()
        if kernel.biased or "bias" not in facts
    ]


def problem(kernel, case):
    """Arguments, the kernel and its definition, as functions of these."""
    facts = dict(CASES[case])
    causal, shape = facts.pop("causal", False), facts.pop("bias", None)
    args = operands(kernel, **facts)
    if shape is not None:
        args = (*args, torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=DOUBLE).view(shape))

    def of(function):
        return lambda q, k, v, bias=None: function(q, k, v, bias, causal)

    return args, of(kernel.run), of(kernel.defined)


def loss_of(f):
    return lambda *args: sum((out.sin() * (i + 1)).sum() for i, out in enumerate(f(*args)))


def agree(actual, expected):
    for a, e in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel", "case"), pairs())
def test_derivatives(kernel, case):
    args, ours, definition = problem(kernel, case)
    tangents, wrt = tuple(a.sin() for a in args), tuple(range(len(args)))

    def answers(f):
        gradient = grad(loss_of(f), wrt)
        of_output = grad(lambda *a: f(*a)[0].sin().sum(), wrt)

        def along(*a):
            return sum((g * t).sum() for g, t in zip(of_output(*a), tangents, strict=True))

        return (
            of_output(*args),
            gradient(*args),  # of the logarithms too, which no kernel does
            grad(lambda *a: f(*a)[0].sum(), wrt)(*args),  # a cotangent without strides
            grad(lambda *a: f(*a)[0].sin().sum(), wrt[-1])(*args),
            jvp(f, args, tangents),
            jvp(of_output, args, tangents),
            grad(along, wrt)(*args),
        )

    agree(answers(ours), answers(definition))


@pytest.mark.parametrize("bdim", [pytest.param(0, marks=SLOW), pytest.param(2, marks=SLOW), -1])
@pytest.mark.parametrize(("kernel", "case"), pairs())
def test_vmap(kernel, case, bdim):
    args, ours, definition = problem(kernel, case)
    wrt, batch = tuple(range(len(args))), tuple(torch.stack([a, 2 * a, a.sin()]) for a in args)

    def answers(f):
        def mapped(g, *places):
            dims = [bdim if i in places else None for i in wrt]
            given = [
                b.movedim(0, bdim) if i in places else a
                for i, (a, b) in enumerate(zip(args, batch, strict=True))
            ]
            return vmap(g, tuple(dims))(*given), grad(loss_of(vmap(g, tuple(dims))), wrt)(*given)

        gradient = grad(lambda *a: f(*a)[0].sin().sum(), wrt)
        everything = tuple(b.movedim(0, bdim) for b in batch)
        return (
            mapped(f, *wrt),
            mapped(f, 0),
            mapped(f, len(wrt) - 1),
            vmap(gradient, bdim)(*everything),
            vmap(lambda *a: jvp(gradient, a, tuple(x.cos() for x in a)), bdim)(*everything),
        )

    agree(answers(ours), answers(definition))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_first_order_runs_the_kernel_both_ways(kernel):
    args = tuple(torch.stack([a, a.sin()]) for a in operands(kernel))
    with trace_log() as lines:
        vmap(grad(lambda *a: kernel.run(*a)[0].sum(), ALL))(*args)
    text = "\n".join(lines)
    assert f"aten.{kernel.forward}.default" in text
    assert f"aten.{kernel.name}_backward.default" in text
    assert "softmax" not in text
