"""The cotangent of a convolution's weight where each example has its own.

Every form is held to PyTorch's own convolution_backward of one example at a time, in float64.
"""

import math

import pytest
import torch
from torch.nn import functional as F

import lamina
from lamina.batching.rules import conv, conv_weights
from lamina.batching.rules.conv_weights import by_rows, by_windows, cheapest, correlation, run

B = 3
BACKWARD = torch.ops.aten.convolution_backward
FORMS = {"windows": by_windows, "rows": by_rows}


def problem(rank, images, groups, transposed, stride, padding, dilation, *, batch=B, channels=2):
    """Cotangents, inputs, the shape of a weight and the settings behind it."""
    torch.manual_seed(0)
    kernel = (3, 2, 1)[:rank]
    space = (9, 7, 6)[:rank]
    into, out = channels * groups, 3 * groups
    x = torch.randn(batch, images, into, *space, dtype=torch.float64)
    shape = (into, out // groups, *kernel) if transposed else (out, into // groups, *kernel)
    extra = [min(1, max(stride, dilation) - 1)] * rank if transposed else [0] * rank
    rest = ([stride] * rank, [padding] * rank, [dilation] * rank, transposed, extra)
    bare = torch.ops.aten.convolution(x[0], x.new_zeros(shape), None, *rest, groups)
    return torch.randn(batch, *bare.shape, dtype=torch.float64), x, shape, rest, groups


def by_loop(ct, x, shape, rest, groups):
    """The cotangent of each example's weight, computed for one example after the other."""
    weight, mask = x.new_zeros(shape), [False, True, False]
    parts = zip(ct, x, strict=True)
    return torch.stack([BACKWARD(*one, weight, None, *rest, groups, mask)[1] for one in parts])


def operands(ct, x, rest):
    return (x, ct) if rest[3] else (ct, x)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_forms(rank, images, groups, transposed, form):
    for stride in (1, 2, 3):
        for padding in (0, 1):
            for dilation in (1, 2):
                ct, x, shape, rest, _ = case = problem(
                    rank, images, groups, transposed, stride, padding, dilation
                )
                still, moving = operands(ct, x, rest)
                sizes = correlation(still, moving, shape, rest, groups)
                torch.testing.assert_close(form(sizes, still, moving), by_loop(*case))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_windows_in_the_padding_alone(form):
    x, ct = torch.randn(B, 1, 2, 2, dtype=torch.float64), torch.randn(B, 1, 3, 1).double()
    rest = ([9], [3], [1], False, [0])
    actual = form(correlation(ct, x, (3, 2, 1), rest, 1), ct, x)
    torch.testing.assert_close(actual, by_loop(ct, x, (3, 2, 1), rest, 1))


@pytest.mark.parametrize(("limit", "counts"), [(1, {1}), (1500, {2, 5}), (3000, {5, 10})])
@pytest.mark.parametrize("groups", [1, 2])
def test_chunks(groups, limit, counts, monkeypatch):
    """Seven examples one at a time, in chunks with a rest, and all at once."""
    monkeypatch.setattr(conv_weights, "_CHUNK", limit)
    ct, x, shape, rest, _ = case = problem(2, 1, groups, False, 1, 1, 1, batch=7)
    sizes = correlation(ct, x, shape, rest, groups)
    plan = cheapest(sizes, ct, 7)
    assert plan.count in counts
    torch.testing.assert_close(run(plan, sizes, ct, x), by_loop(*case))


# One layer a row; the form that is meant to be chosen, in float32.
LAYERS = [
    ("windows", (64, 14, 14), (128, 64, 1, 1), {}),
    ("rows", (1, 28, 28), (6, 1, 5, 5), {}),
    ("windows", (3, 16, 16), (64, 3, 3, 3), {}),
    ("rows", (4, 12, 12, 12), (8, 4, 3, 3, 3), {"padding": 1}),
    ("rows", (3, 20), (4, 3, 5), {"padding": "same"}),
    ("grouped", (16, 32, 32), (32, 16, 3, 3), {"padding": 1}),
    ("grouped", (16, 32, 32), (16, 16, 3, 3), {"padding": "same", "dilation": 2}),
    ("grouped", (32, 32, 32), (32, 1, 3, 3), {"groups": 32}),
    ("rows", (6, 28, 28), (6, 1, 7, 7), {"groups": 6}),
    ("windows", (128, 4, 4), (128, 128, 3, 3), {"padding": 1}),
]


def layer_of(space, weight, options):
    rank = len(weight) - 2
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]

    def loss(w, x):
        return (conv(x, w, **options).sin() / math.sqrt(math.prod(weight))).sum()

    return loss, torch.randn(weight), torch.randn(B, *space)


@pytest.mark.parametrize(("expected", "space", "weight", "options"), LAYERS)
def test_choice(expected, space, weight, options, monkeypatch):
    """The form is the one that was meant, and the gradient that of a loop in float64."""
    chosen = []

    def spy(sizes, like, size):
        plan = cheapest(sizes, like, size)
        chosen.append(None if plan is None else plan.form)
        return plan

    monkeypatch.setattr(conv, "cheapest", spy)
    loss, w, x = layer_of(space, weight, options)
    actual = lamina.vmap(lamina.grad(loss), (None, 0))(w, x)
    assert chosen == [FORMS.get(expected)]
    exact = w.double().requires_grad_()
    for row, one in zip(actual, x.double(), strict=True):
        (wanted,) = torch.autograd.grad(loss(exact, one), exact)
        torch.testing.assert_close(row.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_with_a_weight_for_each(bias, groups, stride, where):
    """Outputs and all gradients, of 1 by 1 kernels: products, unless there is a stride."""
    torch.manual_seed(0)
    x = torch.randn(B, 2, 4, 5, 6, dtype=torch.float64)
    weight = torch.randn(B, 6, 4 // groups, 1, 1, dtype=torch.float64)
    args = [x, weight] + ([torch.randn(B, 6, dtype=torch.float64)] if bias else [])

    def loss(x, weight, b=None):
        out = F.conv2d(x, weight, b, stride=stride, groups=groups)
        return out.sin().sum(), out

    argnums = tuple(range(len(args)))
    moved = [a.movedim(0, where) for a in args]
    grads, out = lamina.vmap(lamina.grad(loss, argnums, has_aux=True), where)(*moved)
    for i in range(B):
        leaves = [a[i].clone().requires_grad_() for a in args]
        total, expected = loss(*leaves)
        torch.testing.assert_close(out[i], expected.detach())
        for mine, theirs in zip(grads, torch.autograd.grad(total, leaves), strict=True):
            torch.testing.assert_close(mine[i], theirs)
