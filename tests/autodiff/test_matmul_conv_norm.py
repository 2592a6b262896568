"""Traps in the derivatives of matrix products, convolutions, norms, losses and attention.

That the rules are right to first order is held by the laws; here are second order, what is kept and
computed, running statistics, masks and random draws.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lamina
from lamina_core.errors import NotDifferentiableError
from tests.expected import grids_differentiate_twice

torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


INDICES = torch.tensor([2, 0, 4, 2])
CASES = {
    "addmm": (lambda x, y, z: torch.addmm(x, y, z, beta=0.5, alpha=2), (3,), (2, 5), (5, 3)),
    "attention": (F.scaled_dot_product_attention, (2, 3, 4), (2, 5, 4), (2, 5, 6)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2).pow(2), (2, 3, 4, 6)),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (4, 3, 2),
        (3,),
        (3,),
    ),
    "causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (2, 3, 4),
        (2, 5, 4),
        (2, 5, 6),
    ),
    "cholesky": (lambda x: torch.linalg.cholesky(x @ x.mT + 3 * torch.eye(3)), (3, 3)),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, dilation=2, groups=2),
        (2, 4, 7, 6),
        (6, 2, 3, 2),
        (6,),
    ),
    "conv_transpose1d": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2, output_padding=1),
        (2, 3, 5),
        (3, 4, 3),
    ),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, INDICES, ignore_index=0, label_smoothing=0.1),
        (4, 5),
    ),
    "det": (torch.linalg.det, (3, 3)),
    "eigh": (lambda x: torch.linalg.eigvalsh(x + x.mT), (3, 3)),
    "embedding": (lambda w: F.embedding(INDICES, w, padding_idx=2).pow(2), (5, 3)),
    "grid_sample": (
        lambda x, grid: F.grid_sample(x, grid.sin(), align_corners=False),
        (2, 3, 4, 6),
        (2, 3, 2, 2),
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (3, 4, 5), (4,), (4,)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), (3, 5), (5,), (5,)),
    "linear": (F.linear, (2, 4, 3), (5, 3), (5,)),
    "linear of vectors": (F.linear, (3,), (3,)),
    "linear, one row of weights": (F.linear, (2, 4, 3), (3,)),
    "linear, one vector": (F.linear, (3,), (5, 3), (5,)),
    "matmul broadcast": (torch.matmul, (2, 1, 3, 4), (5, 4, 2)),
    "matmul matrix by vector": (torch.matmul, (2, 3, 4), (4,)),
    "matmul vector by matrices": (torch.matmul, (3,), (2, 3, 4)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2).pow(2), (2, 3, 4, 6)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (5,), w), (3, 5), (5,)),
    "solve": (lambda a, b: torch.linalg.solve(a + 4 * torch.eye(3), b), (2, 3, 3), (2, 3, 4)),
}


def _scalar(f):
    """A scalar function with a curved dependence on every output."""
    return lambda *args: torch.sin(f(*args)).sum()


@pytest.mark.parametrize("name", CASES)
def test_second_order_by_three_routes(name):
    function, *shapes = CASES[name]
    f, args = _scalar(function), tuple(randn(*shape) for shape in shapes)
    directions = tuple(torch.randn_like(arg) for arg in args)
    every = tuple(range(len(args)))
    if name == "grid_sample" and not grids_differentiate_twice():
        with pytest.raises(NotDifferentiableError, match="grid_sampler_2d_backward"):
            lamina.jvp(lamina.grad(f, every), args, directions)
        return

    leaves = [arg.clone().requires_grad_() for arg in args]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(first, directions, strict=True))
    expected = torch.autograd.grad(along, leaves)

    def gradient(*args):
        return lamina.grad(f, every)(*args)

    def reverse_over_reverse(*args):
        return sum((g * t).sum() for g, t in zip(gradient(*args), directions, strict=True))

    torch.testing.assert_close(gradient(*args), tuple(g.detach() for g in first))
    torch.testing.assert_close(lamina.grad(reverse_over_reverse, every)(*args), expected)
    torch.testing.assert_close(lamina.jvp(gradient, args, directions)[1], expected)
    forward = lamina.grad(lambda *args: lamina.jvp(f, args, directions)[1], every)
    torch.testing.assert_close(forward(*args), expected)


def test_third_order_through_the_statistics_of_a_layer_norm():
    """They are differentiated too, which PyTorch's formula of second order leaves out."""
    x, t = randn(2, 5), randn(2, 5)

    def by_hand(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def third(f):
        for _ in range(3):
            f = _along(f, t)
        return f(x)

    actual = third(_scalar(lambda x: F.layer_norm(x, (5,))))
    torch.testing.assert_close(actual, third(_scalar(by_hand)))


def _along(f, t):
    """The directional derivative of a scalar function, by reverse mode."""
    return lambda x: (lamina.grad(f)(x) * t).sum()


@pytest.mark.parametrize("transform", ["grad", "jvp", "grad of grad"])
def test_running_statistics_are_updated_once_and_seen_by_the_caller(transform):
    x = randn(4, 3, 2)
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    expected_mean, expected_var = mean.clone(), var.clone()
    F.batch_norm(x, expected_mean, expected_var, training=True)

    def f(x):
        return F.batch_norm(x, mean, var, training=True).pow(3).sum()

    if transform == "grad":
        lamina.grad(f)(x)
    elif transform == "jvp":
        lamina.jvp(f, (x,), (x,))
    else:
        lamina.grad(lambda x: lamina.grad(f)(x).pow(2).sum())(x)
    torch.testing.assert_close((mean, var), (expected_mean, expected_var))


def test_batch_norm_in_evaluation_reads_the_running_statistics():
    x, w, mean, var = randn(4, 3), randn(3), randn(3), randn(3).exp()
    f = lambda x, w: F.batch_norm(x, mean, var, w).pow(3).sum()
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(f(*leaves), leaves)
    torch.testing.assert_close(lamina.grad(f, (0, 1))(x, w), expected)


def test_frozen_factors_are_neither_kept_nor_differentiated():
    """A weight without cotangent costs no product, and x is not kept for it."""
    weight, x = randn(5, 3), randn(2, 3)
    _, pullback = lamina.vjp(lambda x: F.linear(x, weight), x)
    ct = randn(2, 5)
    torch.testing.assert_close(pullback(ct), (ct @ weight,))

    kernel, image = randn(4, 3, 2, 2), randn(2, 3, 5, 4)
    leaf = image.clone().requires_grad_()
    out = F.conv2d(leaf, kernel)
    expected = torch.autograd.grad(out, leaf, torch.ones_like(out))
    _, pullback = lamina.vjp(lambda x: F.conv2d(x, kernel), image)
    torch.testing.assert_close(pullback(torch.ones_like(out)), expected)


class Operands(TorchDispatchMode):
    """What each `convolution_backward` is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.convolution_backward.default:
            self.seen += args[1:3]
        return op(*args, **(kwargs or {}))


def test_the_frozen_operand_of_a_convolution_is_not_copied():
    """PyTorch makes a contiguous copy of what it is given for it, though nobody reads it."""
    kernel, images, kernels = randn(4, 3, 2, 2), randn(5, 2, 3, 5, 4), randn(5, 4, 3, 2, 2)

    def f(x, w):
        return F.conv2d(x, w, stride=(2, 1)).pow(2).sum()

    def both(x, w):
        return lamina.vmap(lamina.grad(f))(x, w), lamina.vmap(lamina.grad(f, 1))(x, w)

    with Operands() as operands:
        of_x = lamina.grad(f)(images[0], kernel)
        second = lamina.jvp(lamina.grad(f), (images[0], kernel), (images[1], 0 * kernel))[1]
        rows = lamina.vmap(lambda x: lamina.grad(f)(x, kernel))(images)
        own, weights = both(images, kernels)
    assert operands.seen
    assert all(operand.is_contiguous() for operand in operands.seen)

    def expected(x, w):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        return torch.autograd.grad(f(x, w), (x, w))

    torch.testing.assert_close(of_x, expected(images[0], kernel)[0])
    torch.testing.assert_close(rows, torch.stack([expected(x, kernel)[0] for x in images]))
    pairs = [expected(x, w) for x, w in zip(images, kernels, strict=True)]
    torch.testing.assert_close(own, torch.stack([pair[0] for pair in pairs]))
    torch.testing.assert_close(weights, torch.stack([pair[1] for pair in pairs]))
    reference = torch.autograd.functional.hvp(lambda x: f(x, kernel), images[0], images[1])[1]
    torch.testing.assert_close(second, reference)


@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 3, 5), (2, 4, 3, 5), "bool"])
def test_attention_with_shared_heads_and_masks(shape):
    q, k, v = randn(2, 4, 3, 6), randn(2, 2, 5, 6), randn(2, 2, 5, 6)
    mask = randn(2, 4, 3, 5) > -0.5 if shape == "bool" else randn(*shape)

    def f(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        return out.pow(2).sum()

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(f(*leaves), leaves)
    torch.testing.assert_close(lamina.grad(f, (0, 1, 2))(q, k, v), expected)
    directions = tuple(torch.randn_like(t) for t in (q, k, v))
    along = sum((g * t).sum() for g, t in zip(expected, directions, strict=True))
    torch.testing.assert_close(lamina.jvp(f, (q, k, v), directions)[1], along)


def test_attention_row_that_is_masked_throughout_has_zero_gradient():
    q, mask = randn(1, 3, 4), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    f = lambda q: F.scaled_dot_product_attention(q, q, q, mask).pow(2).sum()
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(lamina.grad(f)(q), expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
    ids=["dropout", "attention"],
)
def test_draws_inside_grad_are_seen_by_a_vmap_outside(draw):
    x, scales = randn(2, 6, 4), torch.ones(2, dtype=torch.float64)

    def f(scale):
        return lamina.grad(lambda x: (draw(x) * scale).sum())(x)

    first, second = lamina.vmap(f, randomness="different")(scales)
    assert not torch.equal(first, second)
    first, second = lamina.vmap(f, randomness="same")(scales)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError):
        lamina.vmap(f)(scales)


def test_write_under_no_grad_leaves_the_derivative_in_reverse_and_no_tangent():
    """As in PyTorch, whose forward mode does not ask whether gradients are enabled."""

    def f(x):
        y = x * 2
        with torch.no_grad():
            y.mul_(10)
        return (y * y).sum()

    x = randn(3)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(lamina.grad(f)(x), expected)
    torch.testing.assert_close(lamina.jvp(f, (x,), (x,))[1], 800 * (x * x).sum())


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(kind):
    model = kind(3, 4, batch_first=True).double()
    params = {k: v.detach() for k, v in model.named_parameters()}
    x = randn(2, 5, 3)

    def f(params, x):
        return lamina.functional_call(model, params, (x,))[0].pow(2).sum()

    leaves = list(model.parameters())
    expected = torch.autograd.grad(model(x)[0].pow(2).sum(), leaves)
    found = lamina.grad(f)(params, x)
    torch.testing.assert_close(tuple(found.values()), expected)
    along = sum((found[k] * v).sum() for k, v in params.items())
    torch.testing.assert_close(lamina.jvp(lambda p: f(p, x), (params,), (params,))[1], along)


def test_conv_tbc_in_both_modes():
    torch.manual_seed(0)
    args = [torch.randn(shape, dtype=torch.float64) for shape in [(5, 2, 3), (2, 3, 4), (4,)]]
    tangents = [torch.randn_like(arg) for arg in args]

    def f(x, weight, bias):
        return torch.conv_tbc(x, weight, bias, 1)

    out, pull = lamina.vjp(f, *args)
    ct = torch.randn_like(out)
    leaves = [arg.clone().requires_grad_() for arg in args]
    expected = torch.autograd.grad(f(*leaves), leaves, ct)
    torch.testing.assert_close(pull(ct), expected)
    out_t = lamina.jvp(f, tuple(args), tuple(tangents))[1]
    pairs = zip(expected, tangents, strict=True)
    torch.testing.assert_close((out_t * ct).sum(), sum((x_ct * t).sum() for x_ct, t in pairs))
