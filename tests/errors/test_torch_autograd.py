"""What `torch.autograd.grad` and `.backward()` say inside a transform, and what they still do."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch.autograd import backward

from lamina import grad, jvp, vmap
from lamina_core.errors import NotDifferentiableError
from tests.errors.saying import said

X = torch.arange(3.0)


def by_grad(x):
    return torch.autograd.grad(x.sin().sum(), x)[0]


def by_backward(x):
    x.sin().sum().backward()
    return x


def test_grad_of_a_tracked_tensor():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: grad(by_grad)(X)),
        """\
torch.autograd has no graph of a tensor of a transform
  outputs[0]: TrackedTensor(level=1, by=aten.sum.default, f32[])
  it belongs to level 1: grad
  to fix: use lamina.grad or lamina.vjp in place of torch.autograd.grad and .backward()""",
    )


def test_backward_of_a_batched_tensor():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: vmap(by_backward)(X[None])),
        """\
torch.autograd has no graph of a tensor of a transform
  outputs[0]: BatchedTensor(level=1, bdim=0, size=1, f32[])
  it belongs to level 1: vmap(batch_size=1, randomness='error')
  to fix: use lamina.grad or lamina.vjp in place of torch.autograd.grad and .backward()""",
    )


@pytest.mark.parametrize("f", [by_grad, by_backward])
def test_dual_tensors(f):
    with pytest.raises(NotDifferentiableError, match="it belongs to level 1: jvp"):
        jvp(f, (X,), (X,))


def test_a_tensor_of_a_transform_as_input():
    w = torch.ones(3, requires_grad=True)
    y = w.sin().sum()
    with pytest.raises(NotDifferentiableError, match=r"inputs\[0\]: TrackedTensor"):
        grad(lambda x: torch.autograd.grad(y, x)[0].sum())(X)


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_is_made_inside_of_captured_tensors_alone(create_graph):
    w = torch.tensor([1.0, 2.0], requires_grad=True)

    def f(x):
        (found,) = torch.autograd.grad((w**3).sum(), w, create_graph=create_graph)
        return found * x

    out = vmap(f)(X)
    torch.testing.assert_close(out, 3 * w.detach() ** 2 * X[:, None], check_stride=False)
    assert out.requires_grad == create_graph
    if create_graph:
        (second,) = torch.autograd.grad(out.sum(), w)
        torch.testing.assert_close(second, 6 * w.detach() * X.sum())


def test_a_mapped_direction_for_what_is_made_inside():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    jacobian = vmap(lambda v: torch.autograd.grad(w**3, w, v)[0])(torch.eye(2))
    torch.testing.assert_close(jacobian, torch.diag(3 * w.detach() ** 2))


@pytest.mark.parametrize("name", ["jacobian", "hessian", "vjp", "jvp", "hvp", "vhp"])
@pytest.mark.parametrize("transform", [vmap, grad])
def test_torch_autograd_functional_is_refused(transform, name):
    def f(x):
        direction = () if name in ("jacobian", "hessian", "vjp") else (x,)
        return getattr(torch.autograd.functional, name)(lambda x: (x**2).sum(), x, *direction)

    def run(x):
        return f(x)[1].sum() if isinstance(f(x), tuple) else f(x).sum()

    with pytest.raises(NotDifferentiableError, match="lamina"):
        transform(run)(X[None] if transform is vmap else X)


def test_requires_grad_is_no_way_around():
    with pytest.raises(NotDifferentiableError, match=r"torch\.autograd has no graph"):
        grad(lambda x: by_grad(x.requires_grad_()).sum())(X)


def test_a_tensor_that_outlived_its_transform():
    kept = []
    grad(lambda x: kept.append(x * 2) or x.sum())(X)
    with pytest.raises(NotDifferentiableError, match="level 1: grad, which has returned"):
        kept[0].backward(X)


def test_an_imported_name_leads_to_the_same_error():
    with pytest.raises(NotDifferentiableError, match=r"torch\.autograd has no graph"):
        vmap(lambda x: backward(x.sum()))(X[None])


def test_what_lies_outside_works_from_inside():
    x = torch.ones(3, requires_grad=True)
    y = x.sin() * x
    rows = vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(torch.eye(3))
    torch.testing.assert_close(rows, torch.diag((x.sin() + x * x.cos()).detach()))


def test_errors_of_plain_tensors_are_those_of_torch():
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(X.sum(), X)
    with pytest.raises(RuntimeError, match="does not require grad"):
        vmap(lambda v: torch.autograd.grad(X, X, v))(torch.eye(3))
