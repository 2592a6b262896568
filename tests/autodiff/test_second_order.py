"""Derivatives of derivatives where PyTorch has no formula: by central differences of the first."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lamina
from lamina import grad, jvp, vjp, vmap
from lamina.autodiff.rules.batch_norm import cudnn_batch_norm_backward
from tests.autodiff.slopes import double, draw, near, slope

aten = torch.ops.aten


def holds_twice(f, x):
    """The pullback is PyTorch's own; the pushforward and second derivatives are its slopes.

    All of it again under `vmap`, against the results for each example.
    """
    t, u, v = draw(*x.shape, seed=1), draw(*f(x).shape, seed=2), draw(*x.shape, seed=3)

    def pull(x):
        return vjp(f, x)[1](u)[0]

    leaf = x.clone().requires_grad_()
    near(pull(x), torch.autograd.grad(f(leaf), leaf, u)[0])
    near(jvp(f, (x,), (t,))[1], slope(f, x, t))
    second = slope(pull, x, t)
    near(jvp(pull, (x,), (t,))[1], second)
    near(vjp(pull, x)[1](t)[0], second)
    near(vjp(lambda x: jvp(f, (x,), (t,))[1], x)[1](u)[0], second)
    batch = torch.stack([x, x + 0.1 * v])
    near(
        vmap(lambda x: jvp(pull, (x,), (t,))[1])(batch),
        torch.stack([slope(pull, x, t) for x in batch]),
    )


# ---------------------------------------------------------------------------------------------
# Distances
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_cdist(p):
    def f(both):
        x, y = both[:, :3], both[:, 3:]
        return torch.cdist(x, y, p, compute_mode="donot_use_mm_for_euclid_dist")

    holds_twice(f, draw(2, 7, 4))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, float("inf")])
@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (2, 1, 3, 4)], ids=str)
def test_cdist_of_stacks_that_broadcast(p, shape):
    y = draw(2, 5, 4, seed=4)
    holds_twice(lambda x: torch.cdist(x, y, p, "donot_use_mm_for_euclid_dist"), draw(*shape))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
def test_pdist(p):
    holds_twice(lambda x: F.pdist(x, p), draw(4, 3))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_distance_zero_has_finite_derivatives(p):
    x = draw(3, 2)
    f = lambda y: torch.cdist(x, y, p, compute_mode="donot_use_mm_for_euclid_dist").sum()
    for order in (grad(f)(x), lamina.hessian(f)(x)):
        assert order.isfinite().all()


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------

REDUCTIONS = ["none", "sum", "mean"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_multi_margin_loss(p, reduction, weighted):
    y, weight = torch.tensor([1, 0, 3]), draw(4).abs() if weighted else None
    f = lambda x: F.multi_margin_loss(x, y, p, 0.7, weight, reduction=reduction)
    holds_twice(f, draw(3, 4))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_multilabel_margin_loss(reduction):
    y = torch.tensor([[3, 0, -1, 1], [-1, 0, 1, 2], [0, 1, 2, 3]])
    holds_twice(lambda x: F.multilabel_margin_loss(x, y, reduction=reduction), draw(3, 4))


@pytest.mark.parametrize("loss", [F.multi_margin_loss, F.multilabel_margin_loss])
def test_margin_losses_of_one_example(loss):
    y = torch.tensor(2) if loss is F.multi_margin_loss else torch.tensor([2, 0, -1, 3])
    holds_twice(lambda x: loss(x, y), draw(4))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("given", ["lists", "tensors", "concatenated"])
def test_ctc_loss(reduction, given):
    targets = torch.tensor([[1, 1, 2], [3, 0, 0], [2, 1, 2]])
    steps, lengths = (7, 3, 6), (3, 1, 2)
    if given == "concatenated":
        targets = torch.cat([row[:n] for row, n in zip(targets, lengths, strict=True)])
    if given == "tensors":
        steps, lengths = torch.tensor(steps), torch.tensor(lengths)

    def f(x):
        # Blank is the last class; 0 is one like others.
        return F.ctc_loss(x.log_softmax(-1), targets, steps, lengths, 4, reduction)

    holds_twice(f, draw(7, 3, 5))


def test_ctc_loss_of_one_example():
    target, steps, length = torch.tensor([1, 2, 2]), torch.tensor(6), torch.tensor(3)
    holds_twice(lambda x: F.ctc_loss(x.log_softmax(-1), target, steps, length), draw(6, 4))


def test_ctc_loss_of_an_empty_target_and_of_an_impossible_one():
    targets, steps, lengths = torch.tensor([[0, 0, 0], [1, 1, 1]]), (4, 4), (0, 3)
    loss = lambda zero: (
        lambda x: F.ctc_loss(
            x.log_softmax(-1), targets, steps, lengths, 0, "none", zero_infinity=zero
        )
    )
    x = draw(4, 2, 3)
    pull = lambda zero: lambda x: vjp(loss(zero), x)[1](torch.ones(2, dtype=double))[0]
    found = jvp(pull(True), (x,), (x.cos(),))[1]
    near(found, slope(pull(True), x, x.cos()))
    assert (found[:, 1] == 0).all()
    assert jvp(pull(False), (x,), (x.cos(),))[1][:, 1].isnan().all()


# ---------------------------------------------------------------------------------------------
# Bags and segments
# ---------------------------------------------------------------------------------------------

INDICES, OFFSETS = torch.tensor([1, 2, 2, 5, 4, 0, 2]), torch.tensor([0, 3, 3, 5])


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode, padding):
    def f(table):
        return F.embedding_bag(INDICES, table.sin(), OFFSETS, mode=mode, padding_idx=padding)

    holds_twice(f, draw(6, 3))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_embedding_bag_that_scales_its_gradient_by_frequency(mode):
    """The fused backward scales by the counts of other indices; this is the documented meaning."""
    table, u = draw(6, 3), draw(4, 3, seed=1)
    bags = lambda scale: (
        lambda w: F.embedding_bag(INDICES, w, OFFSETS, mode=mode, scale_grad_by_freq=scale)
    )
    (plain,), (scaled,) = vjp(bags(False), table)[1](u), vjp(bags(True), table)[1](u)
    counts = torch.bincount(INDICES, minlength=6).clamp(min=1).unsqueeze(1)
    near(scaled, plain / counts)


def test_embedding_bag_with_weights_and_a_last_offset():
    ends = torch.tensor([0, 3, 3, 5, 7])

    def f(both):
        table, weights = both[:18].reshape(6, 3), both[18:]
        return F.embedding_bag(
            INDICES, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
        ).sin()

    holds_twice(f, draw(25))


@pytest.mark.parametrize("initial", [None, 0.5])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("given", ["lengths", "offsets"])
def test_segment_reduce(reduce, initial, given):
    if given == "lengths":
        how = {"lengths": torch.tensor([[2, 1, 2], [1, 3, 1]])}
    else:
        how = {"offsets": torch.tensor([[0, 2, 3, 5], [0, 1, 4, 5]])}
    f = lambda x: torch.segment_reduce(x.sin(), reduce, axis=1, initial=initial, **how)
    holds_twice(f, draw(2, 5, 3))


def test_a_product_of_segments_with_zeros():
    x = torch.tensor([2.0, 0, 3, 0, 0, 4], dtype=double)
    f = lambda x: torch.segment_reduce(x, "prod", lengths=torch.tensor([3, 3]), initial=2)
    near(grad(lambda x: f(x).sum())(x), slope_of_each(lambda x: f(x).sum(), x))
    near(
        jvp(grad(lambda x: f(x).sum()), (x,), (x + 1,))[1],
        slope(grad(lambda x: f(x).sum()), x, x + 1),
    )


def slope_of_each(f, x):
    return torch.stack([slope(f, x, e) for e in torch.eye(len(x), dtype=x.dtype)])


# ---------------------------------------------------------------------------------------------
# Formulas that are PyTorch's, but right only for some tangents or at first order
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upper", [False, True])
def test_cholesky_inverse_of_a_matrix_with_two_triangles(upper):
    eye = 3 * torch.eye(3, dtype=double)
    f = lambda x: torch.cholesky_inverse(x + eye, upper=upper)
    x, t, u = draw(3, 3), draw(3, 3, seed=1), draw(3, 3, seed=2)
    pull = lambda x: vjp(f, x)[1](u)[0]
    near((pull(x) * t).sum(), (slope(f, x, t) * u).sum())
    near(jvp(f, (x,), (t,))[1], slope(f, x, t))
    near(jvp(pull, (x,), (t,))[1], slope(pull, x, t))
    near(vjp(lambda x: jvp(f, (x,), (t,))[1], x)[1](u)[0], slope(pull, x, t))


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_triangular_solve(upper, transpose, unit):
    eye = 3 * torch.eye(3, dtype=double)

    def f(both):
        out = torch.triangular_solve(both[:, 3:], both[:, :3] + eye, upper, transpose, unit)
        return torch.cat([out.solution, out.cloned_coefficient], -1)

    x, t = draw(3, 5), draw(3, 5, seed=1)
    kept = torch.triangular_solve(x[:, 3:], x[:, :3] + eye, upper, transpose, unit)
    near(vjp(f, x)[0], torch.cat(list(kept), -1))
    holds_twice(f, x)
    near(jvp(f, (x,), (t,))[1], slope(f, x, t))


def test_sinc_has_right_derivatives_at_zero():
    x = torch.tensor(0.0, dtype=double)
    orders, f = [], torch.sinc
    for _ in range(4):
        f = grad(f)
        orders.append(f(x))
    # sinc(x) = 1 - (pi x)^2 / 6 + (pi x)^4 / 120 - ...
    expected = [0.0, -(torch.pi**2) / 3, 0.0, torch.pi**4 / 5]
    near(torch.stack(orders), torch.tensor(expected, dtype=double))


def test_logaddexp_of_values_that_are_masked_or_far_apart():
    x = torch.tensor([-torch.inf, -torch.inf, 800.0, 0.0], dtype=double)
    y = torch.tensor([-torch.inf, 1.0, -800.0, 800.0], dtype=double)
    for f in (torch.logaddexp, torch.logaddexp2):
        pull = lambda x, f=f: vjp(f, x, y)[1](torch.ones_like(x))[0]
        near(pull(x), torch.tensor([0.5, 0, 1, 0], dtype=double))
        near(jvp(pull, (x,), (torch.ones_like(x),))[1], torch.zeros_like(x))


def test_safe_softmax_of_a_masked_row():
    mask = torch.tensor([[True, False, True], [False, False, False]])

    def f(x):
        return torch._safe_softmax(x.masked_fill(mask.logical_not(), -torch.inf), -1)

    x, t, u = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    pull = lambda x: vjp(f, x)[1](u)[0]
    near(jvp(f, (x,), (t,))[1], slope(f, x, t))
    near(vjp(lambda x: jvp(f, (x,), (t,))[1], x)[1](u)[0], slope(pull, x, t))


def test_eigenvectors_in_forward_mode_at_second_order():
    a, t = draw(4, 4), draw(4, 4, seed=1)
    absolute = lambda a: torch.linalg.eig(a).eigenvectors.abs()
    u = draw(4, 4, seed=2)
    pull = lambda a: vjp(absolute, a)[1](u)[0]
    near(jvp(absolute, (a,), (t,))[1], slope(absolute, a, t))
    near(vjp(lambda a: jvp(absolute, (a,), (t,))[1], a)[1](u)[0], slope(pull, a, t))


@pytest.mark.parametrize("op", [aten._batch_norm_with_update_functional.default])
def test_batch_norm_of_the_statistics_of_the_batch(op):
    weight, bias, mean, var = draw(4), draw(4, seed=1), torch.zeros(4), torch.ones(4)
    f = lambda x: op(x, weight, bias, mean.to(double), var.to(double), 0.1, 1e-5)[0]
    holds_twice(f, draw(3, 4, 2))


def test_the_parts_of_the_backward_of_batch_norm_on_a_gpu():
    """The op itself runs on no CPU; what stands for it does."""
    x, u, weight = (p.requires_grad_() for p in (draw(3, 4, 2), draw(3, 4, 2, seed=1), draw(4)))
    out = F.batch_norm(x, None, None, weight, training=True, eps=1e-3)
    expected = torch.autograd.grad(out, (x, weight), u, create_graph=True)
    found = cudnn_batch_norm_backward(x, u, weight, None, None, None, None, 1e-3, None)
    near(found[:2], expected)
    near(found[2], u.sum((0, 2)))
    for pair in zip(found[:2], expected, strict=True):
        one, other = (
            torch.autograd.grad(
                out.sin().sum(),
                (x, u, weight),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for out in pair
        )
        near(one, other)


@pytest.mark.parametrize("dim", [0, -1])
def test_weight_norm(dim):
    g = draw(*([4, 1] if dim == 0 else [1, 3]), seed=5).abs()
    f = lambda v: torch._weight_norm(v, g, dim)
    holds_twice(f, draw(4, 3))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}], ids=str)
def test_the_fused_lstm_layer(options):
    """Only float32 is fused; the float64 layer is run in ordinary ops, and is the reference."""
    layer = torch.nn.LSTM(3, 2, num_layers=2, **options)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = draw(4, 2, 3)

    def f(values, x):
        out, (state, cell) = torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (x,)
        )
        return torch.cat([out.flatten(), state.flatten(), cell.flatten()])

    def pull(values, x):
        out, pullback = vjp(f, values, x)
        return pullback(out)

    def found(dtype):
        primals = tuple(v.detach().to(dtype) for v in values), x.to(dtype)
        tangents = tuple(v.cos() for v in primals[0]), primals[1].cos()
        with torch.no_grad():
            cts = pull(*primals)
        return (
            cts,
            jvp(f, primals, tangents)[1],
            jvp(pull, primals, tangents)[1],
            vjp(pull, *primals)[1](cts),
        )

    torch.testing.assert_close(
        found(torch.float32), found(double), rtol=1e-3, atol=1e-4, check_dtype=False
    )


# ---------------------------------------------------------------------------------------------
# A borrowed formula in a pass that watches for the user's own parameters
# ---------------------------------------------------------------------------------------------


def test_a_borrowed_formula_in_a_mapped_gradient_with_a_captured_parameter():
    weight, batch = draw(3).requires_grad_(), draw(4, 3)

    def f(x):
        return torch.special.i1(F.soft_margin_loss(x * weight, x.detach(), reduction="none")).sum()

    found = vmap(grad(f))(batch)
    rows = [x.clone().requires_grad_() for x in batch]
    expected = torch.stack([torch.autograd.grad(f(x), x, create_graph=True)[0] for x in rows])
    near(found, expected)
    ones = torch.ones_like(found)
    near(
        torch.autograd.grad(found, weight, ones)[0], torch.autograd.grad(expected, weight, ones)[0]
    )


# ---------------------------------------------------------------------------------------------
# Learned fake quantisation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_learned_fake_quantisation(kind):
    """Its cotangents are not those of what it computes: tangents are held to be dual to them."""
    x, count = 2 * draw(3, 4).float(), 1 if kind == "tensor" else 4
    primals = (x, draw(count).abs().float() + 0.1, draw(count, seed=1).float())

    def f(x, scale, zero):
        if kind == "tensor":
            op = torch._fake_quantize_learnable_per_tensor_affine
            return op(x, scale, zero, -4, 3, 0.5)
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 1, -4, 3, 0.5)

    u = draw(3, 4, seed=2).float()
    pull = lambda *primals: vjp(f, *primals)[1](u)
    leaves = [p.clone().requires_grad_() for p in primals]
    expected = torch.autograd.grad(f(*leaves), leaves, u)
    torch.testing.assert_close(pull(*primals), expected)
    tangents = tuple(p.cos() for p in primals)
    dot = sum((ct * t).sum() for ct, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close((jvp(f, primals, tangents)[1] * u).sum(), dot)
    step = 1e-3
    hi, lo = (
        pull(*[p + sign * step * t for p, t in zip(primals, tangents, strict=True)])
        for sign in (1, -1)
    )
    slopes = tuple((a - b) / (2 * step) for a, b in zip(hi, lo, strict=True))
    torch.testing.assert_close(jvp(pull, primals, tangents)[1], slopes, rtol=1e-2, atol=1e-2)
