"""Second derivatives of gamma and Dirichlet samples, and forward mode of both.

The oracle is the definition: distribution functions by Simpson's rule, differentiated by
`torch.autograd`.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Beta, Dirichlet

from lamina import grad, jacfwd, jacrev, jvp, vjp, vmap
from lamina.autodiff.rules import sampling

aten = torch.ops.aten
double = torch.float64

gamma_grad = aten._standard_gamma_grad.default
dirichlet_grad = aten._dirichlet_grad.default


def simpson(log_density, rate, upper, count=20001):
    """The integral of `exp(log_density(w))`, which grows like `exp(rate w)`, up to `upper`."""
    lower = upper - 5 - 40 / rate.detach()
    w = torch.lerp(lower, upper, torch.linspace(0, 1, count, dtype=double))
    weights = torch.ones(count, dtype=double)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return (weights * log_density(w).exp()).sum() * (upper - lower) / (3 * (count - 1))


def gamma_rate(a, z):
    """-F_a / p, of the substitution w = log t."""
    f = simpson(lambda w: a * w - w.exp() - torch.lgamma(a), a, z.detach().log())
    (f_a,) = torch.autograd.grad(f, a, create_graph=True)
    return -f_a / ((a - 1) * z.log() - z - torch.lgamma(a)).exp()


def beta_rate(x, a, total):
    """-F_a / p / (1 - x) for a fixed second parameter, of the substitution t = sigmoid(w)."""
    first, second = 1 * a, total - a

    def log_beta(first, second):
        return torch.lgamma(first) + torch.lgamma(second) - torch.lgamma(first + second)

    def f(first):
        return simpson(
            lambda w: (
                first * torch.nn.functional.logsigmoid(w)
                + second * torch.nn.functional.logsigmoid(-w)
                - log_beta(first, second)
            ),
            first,
            torch.logit(x.detach()),
        )

    (f_a,) = torch.autograd.grad(f(first), first, create_graph=True)
    log_p = (first - 1) * x.log() + second * (1 - x).log() - log_beta(first, second)
    return -f_a / log_p.exp()


def slopes(f, *args, step=1e-4):
    """Each partial derivative by a central difference of fourth order."""
    found = []
    for i, arg in enumerate(args):
        h = step * arg

        def at(k, i=i, h=h):
            moved = [v + k * h if j == i else v for j, v in enumerate(args)]
            return f(*[v.detach().requires_grad_() for v in moved]).detach()

        found.append((8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h))
    return torch.stack(found)


def scalars(*values):
    return tuple(torch.tensor(value, dtype=double) for value in values)


def partials(f, *args):
    return torch.stack(grad(f, tuple(range(len(args))))(*args))


GAMMA = [(0.3, 0.02), (0.3, 2.0), (1.0, 0.4), (1.0, 3.0), (2.5, 0.7), (2.5, 2.6), (20.0, 15.0)]
GAMMA += [(20.0, 31.0)]
BETA = [(0.2, 0.4, 1.0), (0.9, 0.4, 1.0), (0.1, 2.0, 5.0), (0.6, 2.0, 5.0), (0.8, 9.0, 11.5)]
BETA += [(0.05, 0.8, 30.0), (0.5, 1.0, 2.0)]


@pytest.mark.parametrize("point", GAMMA, ids=str)
def test_gamma_against_its_definition(point):
    a, z = scalars(*point)
    found = partials(gamma_grad, a, z)
    torch.testing.assert_close(found, slopes(gamma_rate, a, z), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("point", BETA, ids=str)
def test_dirichlet_against_its_definition(point):
    args = scalars(*point)
    found = partials(dirichlet_grad, *args)
    torch.testing.assert_close(found, slopes(beta_rate, *args), rtol=2e-6, atol=1e-8)


def points(kind):
    return [torch.tensor(column, dtype=double) for column in zip(*kind, strict=True)]


OPS = {"gamma": (gamma_grad, GAMMA), "dirichlet": (dirichlet_grad, BETA)}


@pytest.mark.parametrize("name", OPS)
def test_laws(name):
    op, kind = OPS[name]
    args = points(kind)
    tangents = [arg.cos() for arg in args]
    out, pull = vjp(op, *args)
    assert torch.equal(out, op(*args))
    pulled = pull(out.sin())
    pushed = jvp(op, tuple(args), tuple(tangents))[1]
    inner = sum((ct * t).sum() for ct, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close((pushed * out.sin()).sum(), inner)
    each = jvp(op, tuple(args), (tangents[0], *[torch.zeros_like(t) for t in tangents[1:]]))[1]
    torch.testing.assert_close(each, pull(torch.ones_like(out))[0] * tangents[0])

    single = vmap(lambda *args: partials(op, *args))(*args)
    torch.testing.assert_close(single, torch.stack(pull(torch.ones_like(out)), 1))
    torch.testing.assert_close(
        vmap(lambda *both: jvp(op, both[: len(args)], both[len(args) :])[1])(*args, *tangents),
        pushed,
    )
    third = vmap(jacfwd(lambda *args: partials(op, *args), tuple(range(len(args)))))(*args)
    again = vmap(jacrev(lambda *args: partials(op, *args), tuple(range(len(args)))))(*args)
    for i, (found, other) in enumerate(zip(third, again, strict=True)):
        torch.testing.assert_close(found, other)
        h = 1e-4 * args[i]
        moved = [[*args[:i], args[i] + k * h, *args[i + 1 :]] for k in (1, -1)]
        up, down = [vmap(lambda *args: partials(op, *args))(*side) for side in moved]
        scale = found.abs().max(1, keepdim=True).values
        difference = (up - down) / (2 * h).unsqueeze(1)
        torch.testing.assert_close(found / scale, difference / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_parts_of_the_sum_and_lower_precision(name, monkeypatch):
    op, kind = OPS[name]
    args = points(kind)
    whole = vjp(op, *args)[1](args[0])
    monkeypatch.setattr(sampling, "_HELD", 20)
    torch.testing.assert_close(vjp(op, *args)[1](args[0]), whole, rtol=1e-12, atol=1e-12)
    floats = [arg.float() for arg in args]
    found = vjp(op, *floats)[1](floats[0])
    assert {ct.dtype for ct in found} == {torch.float32}
    torch.testing.assert_close(found, tuple(ct.float() for ct in whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_broadcast_operands(name):
    op, kind = OPS[name]
    first, *rest = points(kind)
    first = first[:1] * torch.ones(2, 1, dtype=double)
    out, pull = vjp(op, first, *rest)
    assert out.shape == (2, len(kind))
    full = vjp(op, *[v.expand(out.shape) for v in (first, *rest)])[1](out)
    sums = (full[0].sum(1, keepdim=True), *[ct.sum(0) for ct in full[1:]])
    torch.testing.assert_close(pull(out), sums)
    tangents = [v.cos() for v in (first, *rest)]
    pushed = jvp(op, (first, *rest), tuple(tangents))[1]
    inner = sum((ct * t).sum() for ct, t in zip(sums, tangents, strict=True))
    torch.testing.assert_close((pushed * out).sum(), inner)


def test_ends_of_the_range_are_finite():
    a, z = scalars([0.5, 2.0, 3.0], [0.0, 1e-300, 1e8])
    assert all(ct.isfinite().all() for ct in vjp(gamma_grad, a, z)[1](torch.ones_like(a)))
    x, a, total = scalars([0.0, 1.0, 1.0], [0.5, 0.5, 2.0], [1.0, 1.5, 2.0])
    assert all(ct.isfinite().all() for ct in vjp(dirichlet_grad, x, a, total)[1](x.exp()))


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------

ALPHA = torch.tensor([[0.5, 2.0, 3.0], [1.5, 0.7, 4.0]], dtype=double)
WEIGHT = torch.tensor([1.0, -2.0, 0.5], dtype=double)


def seeded(f, *args):
    torch.manual_seed(0)
    return f(*args)


def dirichlet(alpha):
    return Dirichlet(alpha, validate_args=False).rsample()


SAMPLES = {
    "gamma": torch._standard_gamma,
    "dirichlet": dirichlet,
    "_sample_dirichlet": torch._sample_dirichlet,
}


def loss(draw):
    return lambda alpha: (draw(alpha) * WEIGHT).sum()


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_in_both_modes(name):
    draw, alpha = SAMPLES[name], ALPHA[0]
    rows = seeded(jacrev(draw), alpha)
    torch.testing.assert_close(seeded(jacfwd(draw, randomness="same"), alpha), rows)
    out, pushed = seeded(jvp, draw, (alpha,), (WEIGHT,))
    torch.testing.assert_close(pushed, rows @ WEIGHT)
    assert torch.equal(out, seeded(draw, alpha))
    if name != "gamma":
        leaf = alpha.clone().requires_grad_()
        (expected,) = torch.autograd.grad((seeded(dirichlet, leaf) * WEIGHT).sum(), leaf)
        torch.testing.assert_close(WEIGHT @ rows, expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_under_vmap(name, randomness):
    draw = SAMPLES[name]
    mapped = vmap(draw, randomness=randomness)
    rows = seeded(vmap(jacrev(draw), randomness=randomness), ALPHA)
    assert torch.equal(
        seeded(vmap(lambda a: vjp(draw, a)[0], randomness=randomness), ALPHA),
        seeded(mapped, ALPHA),
    )
    torch.testing.assert_close(
        seeded(vmap(grad(loss(draw)), randomness=randomness), ALPHA), WEIGHT @ rows
    )
    pushed = (rows @ WEIGHT.unsqueeze(-1)).squeeze(-1)
    push = vmap(lambda a: jvp(draw, (a,), (WEIGHT,))[1], randomness=randomness)
    torch.testing.assert_close(seeded(push, ALPHA), pushed)
    torch.testing.assert_close(seeded(jvp, mapped, (ALPHA,), (WEIGHT.expand(2, 3),))[1], pushed)
    torch.testing.assert_close(
        seeded(grad(lambda a: (mapped(a) * WEIGHT).sum()), ALPHA), WEIGHT @ rows
    )


def test_second_derivatives_of_gamma_samples():
    f = loss(torch._standard_gamma)
    z = seeded(torch._standard_gamma, ALPHA[0])
    in_a, in_z = vmap(lambda a, z: partials(gamma_grad, a, z))(ALPHA[0], z).T
    expected = torch.diag(WEIGHT * (in_a + in_z * gamma_grad(ALPHA[0], z)))
    orders = (
        jacrev(jacrev(f)),
        jacrev(jacfwd(f, randomness="same")),
        jacfwd(jacrev(f), randomness="same"),
        jacfwd(jacfwd(f, randomness="same"), randomness="same"),
    )
    for order in orders:
        torch.testing.assert_close(seeded(order, ALPHA[0]), expected)
    for randomness in ("same", "different"):
        found = seeded(vmap(jacrev(jacrev(f)), randomness=randomness), ALPHA)
        draws = seeded(vmap(torch._standard_gamma, randomness=randomness), ALPHA)
        in_a, in_z = vmap(vmap(lambda a, z: partials(gamma_grad, a, z)))(ALPHA, draws).unbind(-1)
        expected = torch.diag_embed(WEIGHT * (in_a + in_z * gamma_grad(ALPHA, draws)))
        torch.testing.assert_close(found, expected)


def test_second_derivatives_of_dirichlet_samples():
    def pulled(x, alpha):
        total = alpha.sum(-1, True).expand_as(alpha)
        return dirichlet_grad(x, alpha, total) * (WEIGHT - (x * WEIGHT).sum(-1, True))

    f, alpha = loss(torch._sample_dirichlet), ALPHA[0]
    x = seeded(torch._sample_dirichlet, alpha)
    in_x, in_alpha = jacrev(pulled, (0, 1))(x, alpha)
    expected = in_alpha + in_x @ seeded(jacrev(torch._sample_dirichlet), alpha)
    torch.testing.assert_close(seeded(jacrev(jacrev(f)), alpha), expected)
    torch.testing.assert_close(seeded(jacfwd(jacrev(f), randomness="same"), alpha), expected)
    # The rates of two parameters do not commute: forward mode inside differentiates in that order.
    torch.testing.assert_close(seeded(jacrev(jacfwd(f, randomness="same")), alpha), expected)


def test_one_part_is_constant():
    one = ALPHA[0, :1]
    for order in (jacrev(torch._sample_dirichlet), jacrev(jacrev(torch._sample_dirichlet))):
        assert (order(one) == 0).all()


def test_beta():
    def draw(both):
        return Beta(both[0], both[1], validate_args=False).rsample()

    both = ALPHA[1, :2]
    torch.testing.assert_close(
        seeded(jacfwd(draw, randomness="same"), both), seeded(jacrev(draw), both)
    )
