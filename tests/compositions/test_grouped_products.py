"""Grouped matrix products under every transform; the samples of PyTorch's table need a GPU."""

from __future__ import annotations

import itertools

import optree
import pytest
import torch

from lamina import grad, jvp, vmap

BATCH, GROUPS, RAGGED, INNER, OUTER = 3, 4, 12, 8, 4
ENDS = torch.tensor([[2, 2, 5, 12], [0, 4, 4, 12], [1, 3, 9, 12]], dtype=torch.int32)
FORMS = {
    "ragged rows": ((RAGGED, INNER), (GROUPS, INNER, OUTER)),
    "ragged columns": ((GROUPS, OUTER, INNER), (INNER, RAGGED)),
    "ragged sums": ((INNER, RAGGED), (RAGGED, OUTER)),
    "nothing ragged": ((GROUPS, OUTER, INNER), (GROUPS, INNER, OUTER)),
}


def by_groups(form, ends):
    """The same in plain products."""
    pieces = list(itertools.pairwise([0, *ends.tolist()]))

    def product(x, y):
        match form:
            case "ragged rows":
                return torch.cat([x[a:b] @ y[i] for i, (a, b) in enumerate(pieces)])
            case "ragged columns":
                return torch.cat([x[i] @ y[:, a:b] for i, (a, b) in enumerate(pieces)], 1)
            case "ragged sums":
                return torch.stack([x[:, a:b] @ y[a:b] for a, b in pieces])
        return x @ y

    return product


def grouped(form, ends):
    return lambda x, y: torch._grouped_mm(x, y, offs=None if form == "nothing ragged" else ends)


@pytest.mark.parametrize("batched", [b for b in itertools.product([0, 1], repeat=3) if any(b)])
@pytest.mark.parametrize("form", FORMS)
def test_vmap(form, batched):
    torch.manual_seed(0)
    sizes = [[BATCH] * b for b in batched]
    x, y = (torch.randn(*size, *shape) for size, shape in zip(sizes, FORMS[form], strict=False))
    ends = ENDS if batched[2] else ENDS[0]
    out = vmap(lambda *args: grouped(form, args[2])(*args[:2]), [0 if b else None for b in batched])
    for i, actual in enumerate(out(x, y, ends)):
        args = [arg[i] if b else arg for arg, b in zip((x, y, ends), batched, strict=True)]
        expected = by_groups(form, args[2])(*args[:2])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["ragged rows", "ragged sums"])
def test_rows_behind_the_last_group_do_not_count(form):
    ends = ENDS.clone()
    ends[:, -1] = 10
    x, y = (torch.randn(BATCH, *shape) for shape in FORMS[form])
    out = vmap(lambda x, y, ends: grouped(form, ends)(x, y))(x, y, ends)
    for i, actual in enumerate(out):
        expected = by_groups(form, ends[i])(x[i], y[i])
        actual = actual[:10] if form == "ragged rows" else actual
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form):
    torch.manual_seed(1)
    x, y = (torch.randn(shape) for shape in FORMS[form])
    tangents = (x.sin(), y.cos())

    def answers(product):
        def loss(x, y):
            return product(x, y).sin().sum()

        gradient = grad(loss, (0, 1))
        flat = grad(lambda x, y: product(x, y).sum(), (0, 1))(x, y)  # a cotangent without strides
        return gradient(x, y), flat, jvp(product, (x, y), tangents), jvp(gradient, (x, y), tangents)

    actual = optree.tree_leaves(answers(grouped(form, ENDS[0])))
    expected = optree.tree_leaves(answers(by_groups(form, ENDS[0])))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_of_grad(form):
    torch.manual_seed(2)
    x, y = (torch.randn(BATCH, *shape) for shape in FORMS[form])
    gradient = grad(lambda x, y, ends: grouped(form, ends)(x, y).sin().sum(), (0, 1))
    actual = vmap(gradient)(x, y, ENDS)
    for i in range(BATCH):
        leaves = [t[i].clone().requires_grad_() for t in (x, y)]
        loss = by_groups(form, ENDS[i])(*leaves).sin().sum()
        for a, e in zip(actual, torch.autograd.grad(loss, leaves), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-5, atol=1e-5)


def test_an_assertion_holds_for_every_example():
    def f(x):
        torch._assert_async(x.sum() > 0, "the sum is positive")
        return x * 2

    x = torch.ones(BATCH, 2)
    assert torch.equal(vmap(f)(x), x * 2)
    x[1] = -1
    with pytest.raises(RuntimeError, match="the sum is positive"):
        vmap(f)(x)


@pytest.mark.parametrize("size", [0, BATCH])
def test_an_assertion_on_the_form_of_an_example(size):
    """As exported graphs make them."""
    check = torch.ops.aten._assert_tensor_metadata

    def f(x, dtype):
        check(x, [2], None, dtype)
        return x * 2

    x = torch.ones(2, size)
    assert torch.equal(vmap(lambda x: f(x, torch.float32), 1)(x), x.T * 2)
    if size:
        with pytest.raises(RuntimeError, match="dtype mismatch"):
            vmap(lambda x: f(x, torch.float64), 1)(x)
