"""The first things anyone tries."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, hessian, jacfwd, jacrev, jvp, value_and_grad, vjp, vmap


def test_batched_dot():
    x, y = torch.randn(2, 3, 5)
    torch.testing.assert_close(vmap(torch.dot)(x, y), (x * y).sum(1))


def test_nested_maps_make_an_outer_product():
    x, y = torch.randn(3), torch.randn(4)
    outer = vmap(vmap(torch.mul, (None, 0)), (0, None))
    torch.testing.assert_close(outer(x, y), x[:, None] * y)


def test_matrix_product_from_dot():
    a, b = torch.randn(3, 5), torch.randn(5, 4)
    product = vmap(vmap(torch.dot, (None, 1)), (0, None))
    torch.testing.assert_close(product(a, b), a @ b)


def test_backward_reaches_a_captured_weight():
    weight = torch.randn(5, requires_grad=True)
    examples = torch.randn(3, 5)
    out = vmap(lambda x: x.dot(weight).relu())(examples)
    assert out.requires_grad
    out.sum().backward()
    expected = torch.autograd.grad((examples @ weight).relu().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_backward_reaches_mapped_and_captured_tensors():
    weight = torch.randn(4, 5, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    examples = torch.randn(3, 5, requires_grad=True)
    out = vmap(lambda x: torch.tanh(weight @ x + bias))(examples)
    actual = torch.autograd.grad(out.square().sum(), (weight, bias, examples))
    plain = torch.tanh(examples @ weight.T + bias).square().sum()
    expected = torch.autograd.grad(plain, (weight, bias, examples))
    torch.testing.assert_close(actual, expected)


def test_backward_through_a_gradient_reaches_a_captured_weight():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, dtype=torch.float64)
    penalty = grad(lambda x: (x * weight).sin().sum())(x).square().sum()
    actual = torch.autograd.grad(penalty, weight)[0]
    plain = ((x * weight).cos() * weight).square().sum()
    torch.testing.assert_close(actual, torch.autograd.grad(plain, weight)[0])


def test_backward_through_per_sample_gradients():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(3, 5, dtype=torch.float64)
    per_sample = vmap(grad(lambda w, x: (x @ w).tanh()), (None, 0))(weight, xs)
    actual = torch.autograd.grad(per_sample.norm(dim=1).sum(), weight)[0]
    plain = (xs * (1 - (xs @ weight).tanh() ** 2)[:, None]).norm(dim=1).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(plain, weight)[0])


def test_jacobian_by_mapping_autograd_over_cotangents():
    x = torch.randn(5, requires_grad=True)
    y = x.sin() * x.sum()

    def rows(v):
        return torch.autograd.grad(y, x, v, retain_graph=True)[0]

    jacobian = vmap(rows)(torch.eye(5))
    expected = torch.stack([rows(v) for v in torch.eye(5)])
    torch.testing.assert_close(jacobian, expected)


def test_jacobian_by_mapping_a_pullback():
    x = torch.randn(5, dtype=torch.float64)
    out, pullback = vjp(lambda x: x.sin() * x.sum(), x)
    (jacobian,) = vmap(pullback)(torch.eye(5, dtype=torch.float64))
    expected = torch.autograd.functional.jacobian(lambda x: x.sin() * x.sum(), x)
    torch.testing.assert_close(jacobian, expected)
    torch.testing.assert_close(out, x.sin() * x.sum())


def test_jacobian_by_mapping_a_pushforward():
    x = torch.randn(4, dtype=torch.float64)

    def f(x):
        return torch.stack([x.prod(), (x * x).sum(), x[0] * x[3].exp()])

    columns = vmap(lambda v: jvp(f, (x,), (v,))[1], out_dims=1)(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(columns, torch.autograd.functional.jacobian(f, x))


@pytest.mark.parametrize(
    "second_order",
    [
        hessian,
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(grad(f)),
        lambda f: jacfwd(grad(f)),
    ],
    ids=["hessian", "fwd-rev", "rev-fwd", "fwd-fwd", "rev-rev", "rev-grad", "fwd-grad"],
)
def test_hessian_by_any_route(second_order):
    x = torch.randn(4, dtype=torch.float64)

    def f(x):
        return (x.sin() * x.cumsum(0)).prod() + (x @ x).exp().log1p()

    torch.testing.assert_close(second_order(f)(x), torch.autograd.functional.hessian(f, x))


def test_batch_of_hessians():
    xs = torch.randn(3, 4, dtype=torch.float64)

    def f(x):
        return x.tanh().prod()

    expected = torch.stack([torch.autograd.functional.hessian(f, x) for x in xs])
    torch.testing.assert_close(vmap(hessian(f))(xs), expected)


def test_perturbations_of_two_levels_are_not_confused():
    def f(x):
        return x * grad(lambda y: x + y)(x.new_tensor(1.0))

    assert grad(f)(torch.tensor(2.0)).item() == 1.0

    def g(x):
        return x * jvp(lambda y: x * y, (x.new_tensor(1.0),), (x.new_tensor(1.0),))[1]

    assert jvp(g, (torch.tensor(3.0),), (torch.tensor(1.0),))[1].item() == 6.0
    assert grad(g)(torch.tensor(3.0)).item() == 6.0


def test_derivatives_of_high_order():
    f = torch.sin
    x = torch.tensor(0.7, dtype=torch.float64)
    expected = [x.cos(), -x.sin(), -x.cos(), x.sin(), x.cos(), -x.sin()]
    for value in expected:
        f = grad(f)
        torch.testing.assert_close(f(x), value)


def test_value_and_grad_gives_the_value_first():
    # Two spellings exist in the field; the tuple's order is what tells them apart.
    x = torch.randn(3, dtype=torch.float64)
    first, second = value_and_grad(lambda x: x.square().sum())(x)
    by_shape = {tuple(t.shape): t for t in (first, second)}
    torch.testing.assert_close(by_shape[(3,)], 2 * x)
    torch.testing.assert_close(by_shape[()], x.square().sum())


def test_gradient_of_a_python_loop_and_branch():
    def power(x, n):
        out = torch.ones_like(x)
        for _ in range(n):
            out = out * x
        return out if n % 2 else -out

    x = torch.tensor(1.3, dtype=torch.float64)
    torch.testing.assert_close(grad(power)(x, 5), 5 * x**4)
    torch.testing.assert_close(grad(power)(x, 4), -4 * x**3)


def test_detach_and_no_grad_stop_gradients():
    x = torch.tensor(1.3, dtype=torch.float64)
    torch.testing.assert_close(grad(lambda x: x * x.detach())(x), x)

    def held(x):
        with torch.no_grad():
            y = x * x
        return x * y

    torch.testing.assert_close(grad(held)(x), x * x)
    # As in plain PyTorch, what no_grad computes is a constant at every level.
    torch.testing.assert_close(grad(grad(held))(x), torch.zeros_like(x))


def test_pytrees_in_and_out():
    def f(tree):
        return {"sum": tree["a"][0] + tree["b"], "product": (tree["a"][1] * tree["b"],)}

    tree = {"a": [torch.randn(3, 2), torch.randn(3, 2)], "b": torch.randn(3, 2)}
    out = vmap(f)(tree)
    torch.testing.assert_close(out["sum"], tree["a"][0] + tree["b"])
    torch.testing.assert_close(out["product"][0], tree["a"][1] * tree["b"])
    grads = grad(lambda t: (f(t)["sum"] * f(t)["product"][0]).sum())(tree)
    assert [g.shape for g in (*grads["a"], grads["b"])] == [(3, 2)] * 3


def test_has_aux():
    x = torch.randn(3, dtype=torch.float64)
    y, aux = grad(lambda x: (x.sum(), {"twice": 2 * x}), has_aux=True)(x)
    torch.testing.assert_close(y, torch.ones_like(x))
    torch.testing.assert_close(aux["twice"], 2 * x)
    jacobian, aux = jacfwd(lambda x: (x.sin(), x.cos()), has_aux=True)(x)
    torch.testing.assert_close(jacobian, x.cos().diag())
    torch.testing.assert_close(aux, x.cos())


def test_empty_batches_and_empty_tensors():
    assert vmap(lambda x: x.sum())(torch.zeros(0, 3)).shape == (0,)
    assert vmap(lambda x: x @ torch.ones(3, 4))(torch.zeros(0, 2, 3)).shape == (0, 2, 4)
    assert grad(lambda x: x.sum())(torch.zeros(0)).shape == (0,)
    assert jacrev(lambda x: x.sin())(torch.zeros(0)).shape == (0, 0)
