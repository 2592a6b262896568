"""`torch.distributions` with its default validation: parameters and values differ between examples.

What is valid for every example is valid for the batch. One that is not raises PyTorch's ValueError.
"""

from __future__ import annotations

import pytest
import torch
from torch import distributions as dist
from torch.distributions import transforms

from lamina import grad, jvp, vmap
from lamina_core.errors import DataDependentError

B = 4
DOUBLE = torch.float64
_draws = torch.Generator().manual_seed(3)


def real(*shape):
    return torch.randn(B, *shape, dtype=DOUBLE, generator=_draws)


def positive(*shape):
    return torch.rand(B, *shape, dtype=DOUBLE, generator=_draws) + 0.5


def shares(*shape):
    return torch.rand(B, *shape, dtype=DOUBLE, generator=_draws) * 0.8 + 0.1


def definite(n):
    a = real(n, n)
    return a @ a.mT + n * torch.eye(n, dtype=DOUBLE)


def full(*entries):
    return torch.tensor(entries, dtype=DOUBLE)


SOFT = full(0.7)[0]
POINT = full(0.2, 0.3, 0.5)
CORNER = full(0.0, 1.0, 0.0)
COUNTS = full(2.0, 0.0, 1.0)
ABOVE = full(7.0, 8.0, 9.0)

# The distribution of mapped parameters, these, and a value in its support.
DISTRIBUTIONS = {
    "Bernoulli": (dist.Bernoulli, (shares(3),), CORNER),
    "Bernoulli of logits": (lambda x: dist.Bernoulli(logits=x), (real(3),), CORNER),
    "Beta": (dist.Beta, (positive(3), positive(3)), POINT),
    "Binomial": (lambda p: dist.Binomial(5, p), (shares(3),), COUNTS),
    "Categorical": (dist.Categorical, (shares(3),), torch.tensor(1)),
    "Categorical of logits": (lambda x: dist.Categorical(logits=x), (real(3),), torch.tensor(1)),
    "Cauchy": (dist.Cauchy, (real(3), positive(3)), POINT),
    "Chi2": (dist.Chi2, (positive(3),), POINT),
    "ContinuousBernoulli": (dist.ContinuousBernoulli, (shares(3),), POINT),
    "Dirichlet": (dist.Dirichlet, (positive(3),), POINT),
    "Exponential": (dist.Exponential, (positive(3),), POINT),
    "FisherSnedecor": (dist.FisherSnedecor, (positive(3), positive(3)), POINT),
    "Gamma": (dist.Gamma, (positive(3), positive(3)), POINT),
    "Geometric": (dist.Geometric, (shares(3),), COUNTS),
    "Gumbel": (dist.Gumbel, (real(3), positive(3)), POINT),
    "HalfCauchy": (dist.HalfCauchy, (positive(3),), POINT),
    "HalfNormal": (dist.HalfNormal, (positive(3),), POINT),
    "Independent": (
        lambda m, s: dist.Independent(dist.Normal(m, s), 1),
        (real(3), positive(3)),
        POINT,
    ),
    "InverseGamma": (dist.InverseGamma, (positive(3), positive(3)), POINT),
    "Kumaraswamy": (dist.Kumaraswamy, (positive(3), positive(3)), POINT),
    "LKJCholesky": (lambda c: dist.LKJCholesky(3, c), (positive(),), torch.eye(3, dtype=DOUBLE)),
    "Laplace": (dist.Laplace, (real(3), positive(3)), POINT),
    "LogNormal": (dist.LogNormal, (real(3), positive(3)), POINT),
    "LogisticNormal": (dist.LogisticNormal, (real(2), positive(2)), POINT),
    "LowRankMultivariateNormal": (
        dist.LowRankMultivariateNormal,
        (real(3), real(3, 2), positive(3)),
        POINT,
    ),
    "MixtureSameFamily": (
        lambda p, m, s: dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(m, s)),
        (shares(3), real(3), positive(3)),
        SOFT,
    ),
    "Multinomial": (lambda p: dist.Multinomial(3, p), (shares(3),), COUNTS),
    "MultivariateNormal": (dist.MultivariateNormal, (real(3), definite(3)), POINT),
    "MultivariateNormal of a precision": (
        lambda m, p: dist.MultivariateNormal(m, precision_matrix=p),
        (real(3), definite(3)),
        POINT,
    ),
    "NegativeBinomial": (lambda p: dist.NegativeBinomial(3, p), (shares(3),), COUNTS),
    "Normal": (dist.Normal, (real(3), positive(3)), POINT),
    "Normal of a number": (lambda m: dist.Normal(m, 1.0), (real(),), SOFT),
    "OneHotCategorical": (dist.OneHotCategorical, (shares(3),), CORNER),
    "OneHotCategoricalStraightThrough": (
        dist.OneHotCategoricalStraightThrough,
        (shares(3),),
        CORNER,
    ),
    "Pareto": (dist.Pareto, (positive(3), positive(3)), ABOVE),
    "Poisson": (dist.Poisson, (positive(3),), COUNTS),
    "RelaxedBernoulli": (lambda p: dist.RelaxedBernoulli(SOFT, p), (shares(3),), POINT),
    "RelaxedOneHotCategorical": (
        lambda p: dist.RelaxedOneHotCategorical(SOFT, p),
        (shares(3),),
        POINT,
    ),
    "StudentT": (dist.StudentT, (positive(3), real(3), positive(3)), POINT),
    "TransformedDistribution": (
        lambda m, s: dist.TransformedDistribution(
            dist.Normal(m, s), [transforms.TanhTransform(), transforms.AffineTransform(1.0, 2.0)]
        ),
        (real(3), positive(3)),
        POINT,
    ),
    "stick breaking": (
        lambda m, s: dist.TransformedDistribution(
            dist.Normal(m, s), [transforms.StickBreakingTransform()]
        ),
        (real(2), positive(2)),
        POINT,
    ),
    "Uniform": (lambda a, b: dist.Uniform(a - 3, a + b + 3), (real(3), positive(3)), POINT),
    "VonMises": (dist.VonMises, (real(3), positive(3)), POINT),
    "Weibull": (dist.Weibull, (positive(3), positive(3)), POINT),
    "Wishart": (lambda c: dist.Wishart(full(5.0)[0], c), (definite(3),), definite(3)[0]),
}
if hasattr(dist, "GeneralizedPareto"):
    DISTRIBUTIONS["GeneralizedPareto"] = (  # compares with a float32 zero of its own
        lambda m, s: dist.GeneralizedPareto(m, s, torch.tensor(0.3)),
        (real(3).float(), positive(3).float()),
        ABOVE.float(),
    )

ASKED = {
    "log_prob": lambda d, value: d.log_prob(value),
    "cdf": lambda d, value: d.cdf(value),
    "entropy": lambda d, value: d.entropy(),
    "expand": lambda d, value: d.expand((2, *d.batch_shape)).log_prob(value),
    "icdf": lambda d, value: d.icdf(torch.full(d.batch_shape + d.event_shape, 0.4, dtype=DOUBLE)),
    "kl": lambda d, value: dist.kl_divergence(d, d),
    "mean": lambda d, value: d.mean,
    "mode": lambda d, value: d.mode,
    "support": lambda d, value: d.support.check(value),
    "variance": lambda d, value: d.variance,
}
# They choose by values that differ between examples, by masks or by `torch.autograd.grad`.
REFUSED = {("Beta", "mode"), ("Dirichlet", "mode"), ("StudentT", "variance"), ("Wishart", "kl")}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_what_a_distribution_says_of_each_example(name):
    make, parameters, value = DISTRIBUTIONS[name]
    said = 0
    for asked, ask in ASKED.items():

        def function(*parameters, ask=ask):
            return ask(make(*parameters), value)

        try:
            want = torch.stack([function(*[p[b] for p in parameters]) for b in range(B)])
        except (NotImplementedError, RuntimeError):
            continue
        said += 1
        if (name, asked) in REFUSED:
            with pytest.raises((DataDependentError, TypeError)):
                vmap(function)(*parameters)
            continue
        got = vmap(function)(*parameters)
        torch.testing.assert_close(got, want, equal_nan=True)
        pairs = [torch.stack([p, p.flip(0)]) for p in parameters]
        torch.testing.assert_close(
            vmap(vmap(function))(*pairs), torch.stack([want, want.flip(0)]), equal_nan=True
        )
    assert said > 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_derivatives_of_log_prob(name):
    make, parameters, value = DISTRIBUTIONS[name]
    places = tuple(range(len(parameters)))

    def function(*parameters):
        return make(*parameters).log_prob(value).sum()

    got = vmap(grad(function, argnums=places))(*parameters)
    tangents = [p.cos() for p in parameters]
    pushed = vmap(lambda *pairs: jvp(function, pairs[::2], pairs[1::2])[1])(
        *[tensor for pair in zip(parameters, tangents, strict=True) for tensor in pair]
    )
    total = torch.zeros_like(pushed)
    for b in range(B):
        leaves = [p[b].clone().requires_grad_() for p in parameters]
        found = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
        for mine, theirs, tangent in zip(got, found, tangents, strict=True):
            want = torch.zeros_like(mine[b]) if theirs is None else theirs
            torch.testing.assert_close(mine[b], want)
            total[b] += (want * tangent[b]).sum()
    torch.testing.assert_close(pushed, total)


@pytest.mark.parametrize("name", [n for n in DISTRIBUTIONS if n not in ("VonMises", "Wishart")])
def test_each_example_draws_its_own(name):
    make, parameters, _ = DISTRIBUTIONS[name]
    alike = [p[:1].expand_as(p) for p in parameters]
    for function in (lambda *p: make(*p).sample((64,)), lambda *p: make(*p).rsample((64,))):
        try:
            function(*[p[0] for p in parameters])
        except NotImplementedError:
            continue
        draws = vmap(function, randomness="different")(*alike)
        assert draws.shape == (B, *function(*[p[0] for p in parameters]).shape)
        if name != "OneHotCategoricalStraightThrough":  # whose p - p leaves a rounding
            assert bool(make(*[p[0] for p in parameters]).support.check(draws).all())
        assert not torch.equal(draws[0], draws[1])
        same = vmap(function, randomness="same")(*alike)
        assert torch.equal(same, same[:1].expand_as(same))


BAD = {
    "a scale": (dist.Normal, (real(), -real().abs())),
    "a scale of one example": (dist.Normal, (real(), full(1.0, 2.0, -1.0, 0.5))),
    "a share": (dist.Bernoulli, (full(0.1, 0.2, 1.5, 0.3),)),
    "a share of one event": (
        dist.Categorical,
        (torch.stack([POINT, POINT, full(0.5, -0.5, 1.0), POINT]),),
    ),
    "a simplex": (lambda p: dist.Dirichlet(p), (torch.stack([POINT, POINT, -POINT, POINT]),)),
    "a covariance": (
        dist.MultivariateNormal,
        (real(3), torch.cat([definite(3)[:3], -torch.eye(3, dtype=DOUBLE)[None]])),
    ),
    "an interval": (dist.Uniform, (real(), real() - 9)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_parameter_is_a_value_error(name):
    make, parameters = BAD[name]
    with pytest.raises(ValueError, match=r"Expected|Uniform"):
        vmap(lambda *p: make(*p).sample(), randomness="different")(*parameters)
    with pytest.raises(ValueError, match=r"Expected|Uniform"):
        vmap(vmap(lambda *p: make(*p).sample(), randomness="different"), randomness="different")(
            *[p[None] for p in parameters]
        )


def test_a_bad_value_is_a_value_error():
    values = full(0.5, -1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="support"):
        vmap(lambda rate, x: dist.Exponential(rate).log_prob(x))(positive(), values)
    with pytest.raises(ValueError, match="support"):
        vmap(grad(lambda rate, x: dist.Exponential(rate).log_prob(x)))(positive(), values)


def test_code_of_ones_own_gets_no_answer_that_examples_share():
    """What `torch.distributions` is told, other code that branches is not."""
    with pytest.raises(DataDependentError):
        vmap(lambda x: 1.0 if (x > -99).all() else x)(real(3))


@pytest.mark.parametrize("by_hand", [False, True])
def test_validation_switched_off(by_hand):
    make = lambda m, s: dist.Normal(m, s, validate_args=by_hand)
    m, s = real(), positive()
    got = vmap(lambda m, s: make(m, s).log_prob(full(0.3)[0]))(m, s)
    torch.testing.assert_close(got, make(m, s).log_prob(full(0.3)[0]))
