"""A draw of every kind, and a seed for both generators they may use."""

from __future__ import annotations

import torch
from torch.nn import functional as F

aten = torch.ops.aten
BATCH = 5
P = torch.linspace(0.05, 0.95, BATCH * 21).reshape(BATCH, 3, 7)
GENERATOR = torch.Generator()

# Draws of an example from its size, and (under "different") of a batch of them.
FACTORIES = {
    "normal.float_float": lambda size, g: torch.normal(2.0, 3.0, size, generator=g),
    "rand": lambda size, g: torch.rand(size, dtype=torch.float64, generator=g),
    "randint": lambda size, g: torch.randint(9, size, generator=g),
    "randint.low": lambda size, g: torch.randint(-4, 9, size, generator=g),
    "randn": lambda size, g: torch.randn(size, generator=g),
}
# Draws that look at the elements of their argument one by one.
ELEMENTWISE = {
    "bernoulli": lambda p, g: torch.bernoulli(p, generator=g),
    "bernoulli.Tensor": lambda p, g: aten.bernoulli.Tensor(p, 1 - p, generator=g),
    "bernoulli.p": lambda p, g: torch.bernoulli(p, 0.3, generator=g),
    "bernoulli_": lambda p, g: p.clone().bernoulli_(0.3, generator=g),
    "bernoulli_.Tensor": lambda p, g: p.clone().bernoulli_(p, generator=g),
    "binomial": lambda p, g: torch.binomial((p * 9).round(), p, generator=g),
    "cauchy": lambda p, g: p.clone().cauchy_(1.0, 2.0, generator=g),
    "exponential": lambda p, g: p.clone().exponential_(0.7, generator=g),
    "gamma": lambda p, g: torch._standard_gamma(p, generator=g),
    "geometric": lambda p, g: p.clone().geometric_(0.4, generator=g),
    "log_normal": lambda p, g: p.clone().log_normal_(0.5, 0.6, generator=g),
    "normal.Tensor_Tensor": lambda p, g: torch.normal(p, 1 - p, generator=g),
    "normal.Tensor_float": lambda p, g: torch.normal(p, 0.5, generator=g),
    "normal.float_Tensor": lambda p, g: torch.normal(1.0, p, generator=g),
    "normal_": lambda p, g: p.clone().normal_(1.0, 2.0, generator=g),
    "poisson": lambda p, g: torch.poisson(p * 9, generator=g),
    "random": lambda p, g: p.clone().random_(generator=g),
    "random.from": lambda p, g: p.clone().random_(3, 90, generator=g),
    "random.to": lambda p, g: p.clone().random_(90, generator=g),
    "rand_like": lambda p, g: torch.rand_like(p, dtype=torch.float64, generator=g),
    "randint_like": lambda p, g: torch.randint_like(p, 9, generator=g),
    "randint_like.low": lambda p, g: torch.randint_like(p, 2, 9, generator=g),
    "randn_like": lambda p, g: torch.randn_like(p, generator=g),
    "uniform": lambda p, g: p.clone().uniform_(-1, 3, generator=g),
}
# Draws without a generator of their own (or that is rarely given), elementwise as well.
DROPOUTS = {
    "alpha_dropout": lambda p: F.alpha_dropout(p, 0.4, True),
    "dropout": lambda p: F.dropout(p, 0.4, True),
    "dropout_": lambda p: F.dropout(p.clone(), 0.4, True, inplace=True),
    "native_dropout": lambda p: torch.native_dropout(p, 0.4, True)[0],
}
# Draws for each example in turn.
IN_TURN = {
    "dirichlet": lambda p, g: torch._sample_dirichlet(p, generator=g),
    "multinomial": lambda p, g: torch.multinomial(p, 4, generator=g),
    "multinomial.replacement": lambda p, g: torch.multinomial(p, 9, True, generator=g),
    "randperm": lambda p, g: torch.randperm(11, generator=g),
}


def seeded(f, seed=0):
    """The result of `f` with the given seed of the default generator and of `GENERATOR`."""
    torch.manual_seed(seed)
    GENERATOR.manual_seed(seed + 100)
    return f()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
