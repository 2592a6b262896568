"""What a seed reproduces: NOTE [Seeds] in `lamina/batching/randomness.py`.

The oracle is plain PyTorch with the same seed: one call with the batch dim in front where the op
draws each element on its own, and a loop over the examples elsewhere.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from lamina import grad, jacrev, vmap
from lamina_core.errors import RandomnessError
from lamina_core.schema import facts
from tests.batching.draws import (
    BATCH,
    DROPOUTS,
    ELEMENTWISE,
    FACTORIES,
    GENERATOR,
    IN_TURN,
    P,
    aten,
    same,
    seeded,
)


@pytest.fixture(params=[None, GENERATOR], ids=["default generator", "generator"])
def generator(request):
    return request.param


# -- different -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_draws_the_batch_at_once(name, generator):
    draw = FACTORIES[name]
    x = torch.zeros(BATCH)
    found = seeded(lambda: vmap(lambda x: draw((3, 7), generator), randomness="different")(x))
    same(found, seeded(lambda: draw((BATCH, 3, 7), generator)))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dim", [0, 2])
def test_an_elementwise_draw_takes_the_batch_at_once(name, dim, generator):
    draw = functools.partial(ELEMENTWISE[name], g=generator)
    x = P.movedim(0, dim).contiguous()
    found = seeded(lambda: vmap(draw, in_dims=dim, randomness="different")(x))
    # PyTorch draws in the order of memory, so the oracle has the same strides. In place it would go
    # on with them, where the batched form is made of the op out of place.
    plain = ELEMENTWISE["bernoulli.p" if name == "bernoulli_" else name]
    same(found, seeded(lambda: plain(x.movedim(dim, 0), generator)))


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_takes_the_batch_at_once(name):
    draw = DROPOUTS[name]
    same(seeded(lambda: vmap(draw, randomness="different")(P)), seeded(lambda: draw(P)))


@pytest.mark.parametrize("name", IN_TURN)
def test_other_draws_are_made_in_turn(name, generator):
    draw = functools.partial(IN_TURN[name], g=generator)
    found = seeded(lambda: vmap(draw, randomness="different")(P))
    same(found, seeded(lambda: torch.stack([draw(p) for p in P])))


@pytest.mark.parametrize("name", ["feature_dropout", "feature_alpha_dropout"])
def test_feature_dropout_drops_whole_features_of_each_example(name):
    drop = {"feature_dropout": F.dropout1d, "feature_alpha_dropout": F.feature_alpha_dropout}[name]
    x = torch.ones(64, 1, 3, 4)
    found = seeded(lambda: vmap(lambda x: drop(x, 0.5, True), randomness="different")(x))
    assert (found == found[..., :1]).all()
    patterns = {tuple(row.tolist()) for row in found[:, 0, :, 0]}
    assert len(patterns) == 8


def test_rrelu_draws_a_slope_for_each_negative_element():
    x = -torch.ones(BATCH, 3, 7)

    def f(x):
        return F.rrelu(x, 0.1, 0.3, True)

    for randomness in ("same", "different"):
        found = seeded(lambda r=randomness: vmap(f, randomness=r)(x))
        assert ((found >= -0.3) & (found <= -0.1)).all()
        assert found.unique().numel() == found.numel() // (BATCH if randomness == "same" else 1)
        same(seeded(lambda r=randomness: vmap(f, randomness=r)(x)), found)
        same(vmap(f, randomness=randomness)(-x), -x)


def test_an_unmapped_operand_is_drawn_for_each_example(generator):
    p = P[0]
    found = seeded(
        lambda: vmap(lambda x: torch.bernoulli(p, generator=generator), randomness="different")(P)
    )
    expanded = p.expand(BATCH, 3, 7)
    same(found, seeded(lambda: torch.bernoulli(expanded, generator=generator)))


@pytest.mark.parametrize("name", ["randn", "randint"])
def test_nested_levels_put_their_dims_in_front_outermost_first(name, generator):
    draw = FACTORIES[name]
    x = torch.zeros(2, BATCH)
    inner = vmap(lambda x: draw((3, 7), generator), randomness="different")
    found = seeded(lambda: vmap(inner, randomness="different")(x))
    same(found, seeded(lambda: draw((2, BATCH, 3, 7), generator)))


@pytest.mark.parametrize("name", ["bernoulli", "normal.Tensor_Tensor", "poisson", "uniform"])
def test_elementwise_draws_of_nested_levels(name, generator):
    draw = functools.partial(ELEMENTWISE[name], g=generator)
    inner = vmap(draw, randomness="different")
    same(seeded(lambda: vmap(inner, randomness="different")(P)), seeded(lambda: draw(P)))


def test_levels_may_differ():
    x = torch.zeros(2, BATCH)

    def draws(outer, inner):
        f = vmap(vmap(lambda x: torch.randn(7), randomness=inner), randomness=outer)
        return seeded(lambda: f(x))

    one = seeded(lambda: torch.randn(7))
    of_two = seeded(lambda: torch.randn(2, 7))
    of_five = seeded(lambda: torch.randn(BATCH, 7))
    same(draws("same", "same"), one.expand(2, BATCH, 7))
    same(draws("different", "same"), of_two[:, None].expand(2, BATCH, 7))
    same(draws("same", "different"), of_five.expand(2, BATCH, 7))


def test_per_sample_gradients_use_the_mask_of_the_batch():
    w = torch.linspace(-1, 1, 7)

    def loss(w, x):
        return (F.dropout(x * w, 0.4) + 0.1 * torch.randn(7)).square().sum()

    found = seeded(lambda: vmap(grad(loss), in_dims=(None, 0), randomness="different")(w, P[:, 0]))

    def plainly():
        ws = w.expand(BATCH, 7).clone().requires_grad_()
        dropped = F.dropout(P[:, 0] * ws, 0.4) + 0.1 * torch.randn(BATCH, 7)
        return torch.autograd.grad(dropped.square().sum(), ws)[0]

    torch.testing.assert_close(found, seeded(plainly))


def test_gradients_around_a_batch_use_the_mask_of_the_batch():
    dropped = vmap(lambda x: F.dropout(x, 0.4).square().sum(), randomness="different")
    found = seeded(lambda: grad(lambda x: dropped(x).sum())(P))
    leaf = P.clone().requires_grad_()
    out = seeded(lambda: F.dropout(leaf, 0.4))
    torch.testing.assert_close(found, torch.autograd.grad(out.square().sum(), leaf)[0])


# -- same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_all_examples_share_the_draw_of_a_factory(name, generator):
    draw = FACTORIES[name]
    found = seeded(
        lambda: vmap(lambda x: draw((3, 7), generator), randomness="same")(torch.zeros(BATCH))
    )
    same(found, seeded(lambda: draw((3, 7), generator)).expand(BATCH, 3, 7))


# The only draws of mapped parameters whose numbers are PyTorch's for the example alone: the others
# transform one draw of uniform numbers, or take a seed from the generator.
OWN_NUMBERS = [
    name
    for name in (*ELEMENTWISE, *IN_TURN)
    if name.partition(".")[0] not in ("binomial", "dirichlet", "gamma", "poisson")
    and name not in ("bernoulli", "bernoulli.Tensor", "bernoulli_.Tensor")
    and name != "multinomial.replacement"
]


@pytest.mark.parametrize("name", OWN_NUMBERS)
def test_an_example_draws_what_it_would_draw_alone_under_same(name, generator):
    draw = functools.partial({**ELEMENTWISE, **IN_TURN}[name], g=generator)
    found = seeded(lambda: vmap(draw, randomness="same")(P))
    expected = torch.stack([seeded(lambda p=p: draw(p)) for p in P])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *IN_TURN])
def test_equal_parameters_give_equal_draws_under_same(name, generator):
    draw = functools.partial({**ELEMENTWISE, **IN_TURN}[name], g=generator)
    equal = P[:1].expand_as(P)
    found = seeded(lambda: vmap(draw, randomness="same")(equal))
    same(found, found[:1].expand_as(found))
    again = seeded(lambda: vmap(draw, randomness="same")(equal), seed=1)
    assert not torch.equal(found, again)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("binomial", lambda p: (p * 9).round() * p),
        ("dirichlet", lambda p: p / p.sum(-1, keepdim=True)),
        ("gamma", lambda p: p),
        ("poisson", lambda p: p * 9),
    ],
)
def test_mapped_parameters_keep_their_distribution_under_same(name, mean):
    draw = functools.partial({**ELEMENTWISE, **IN_TURN}[name], g=None)
    many = P.expand(4000, *P.shape).movedim(1, 0)
    found = seeded(lambda: vmap(draw, randomness="same")(many)).double()
    error = found.std(1) / 4000**0.5
    assert ((found.mean(1) - mean(P)).abs() < 5 * error + 1e-3).all()


def test_bernoulli_of_mapped_parameters_is_monotone_in_them():
    p = torch.linspace(0, 1, 11)[:, None].expand(11, 50)
    found = seeded(lambda: vmap(torch.bernoulli, randomness="same")(p))
    assert (found.diff(dim=0) >= 0).all()
    assert not found[0].any()
    assert found[-1].all()


@pytest.mark.parametrize("name", ["binomial", "gamma", "poisson"])
def test_the_generator_goes_on_after_a_draw_of_mapped_parameters(name, generator):
    draw = functools.partial(ELEMENTWISE[name], g=generator)

    def twice(p):
        return draw(p), draw(p)

    first, second = seeded(lambda: vmap(twice, randomness="same")(P))
    assert not torch.equal(first, second)


# -- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ELEMENTWISE, *IN_TURN])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_chunks_share_the_draw_under_same(name, chunk_size, generator):
    draw = functools.partial({**ELEMENTWISE, **IN_TURN}[name], g=generator)

    def f(p):
        return draw(p) + torch.randn(()), draw(p)

    whole = seeded(lambda: vmap(f, randomness="same")(P))
    parts = seeded(lambda: vmap(f, randomness="same", chunk_size=chunk_size)(P))
    same(parts, whole)


BY_REJECTION = ("binomial", "dirichlet", "gamma", "poisson")


@pytest.mark.parametrize("name", [*ELEMENTWISE, *IN_TURN])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_chunks_draw_what_the_whole_draws_under_different(name, chunk_size, generator):
    draw = functools.partial({**ELEMENTWISE, **IN_TURN}[name], g=generator)
    # What is drawn by rejection agrees as long as the parameters do.
    given = P[:1].expand_as(P).contiguous() if name in BY_REJECTION else P

    def f(p):
        return draw(p) + torch.randn(()), F.dropout(draw(p) * 1.0, 0.3), torch.randperm(9)

    whole = seeded(lambda: vmap(f, randomness="different")(given))
    after = torch.randn(3)
    parts = seeded(lambda: vmap(f, randomness="different", chunk_size=chunk_size)(given))
    same(parts, whole)
    assert torch.equal(torch.randn(3), after)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("name", [*FACTORIES, *DROPOUTS])
def test_factories_and_dropouts_in_chunks(name, chunk_size, generator):
    def f(p):
        if name in FACTORIES:
            return p + FACTORIES[name]((3, 7), generator)
        return DROPOUTS[name](p)

    whole = seeded(lambda: vmap(f, randomness="different")(P))
    same(seeded(lambda: vmap(f, randomness="different", chunk_size=chunk_size)(P)), whole)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_chunks_around_and_inside_other_transforms(chunk_size):
    def loss(p):
        return (F.dropout(p, 0.4) * torch.rand_like(p)).sum()

    def inner(p):
        return vmap(lambda row: F.dropout(row, 0.4) + torch.randn(()), randomness="different")(p)

    for f in (grad(loss), inner):
        whole = seeded(lambda f=f: vmap(f, randomness="different")(P))
        parts = seeded(lambda f=f: vmap(f, randomness="different", chunk_size=chunk_size)(P))
        same(parts, whole)


def test_chunks_of_a_jacobian_share_the_forward_run():
    def f(x):
        return F.dropout(x.sin(), 0.4)

    whole = seeded(lambda: jacrev(f)(P[0, 0]))
    same(seeded(lambda: jacrev(f, chunk_size=2)(P[0, 0])), whole)


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ELEMENTWISE, *IN_TURN])
def test_nothing_is_drawn_unless_vmap_is_told_how(name, generator):
    draw = functools.partial({**ELEMENTWISE, **IN_TURN}[name], g=generator)
    torch.manual_seed(0)
    GENERATOR.manual_seed(0)
    before = torch.get_rng_state(), GENERATOR.get_state()
    with pytest.raises(RandomnessError, match='pass randomness="different"'):
        vmap(draw)(P)
    same((torch.get_rng_state(), GENERATOR.get_state()), before)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *DROPOUTS, *IN_TURN])
def test_a_batch_of_no_examples(name):
    table = {**ELEMENTWISE, **IN_TURN}
    draw = functools.partial(table[name], g=None) if name in table else DROPOUTS[name]
    expected = draw(P[0])
    for randomness in ("same", "different"):
        found = vmap(draw, randomness=randomness)(P[:0])
        assert found.shape == (0, *expected.shape)
        assert found.dtype == expected.dtype


# Random for PyTorch's tags, but not drawn here: kernels of other devices, and layers and attention
# that are made of dropout, or take the seed as an argument.
ELSEWHERE = """
    _cudnn _efficient_attention _fill_mem_eff _flash_attention _fused_dropout _fused_sdp_choice
    _lstm_mps _nested_tensor _scaled_dot_product _triton gru lstm miopen rnn_ scaled_dot_product
""".split()


def test_every_random_op_is_tried_here():
    tried = {name.partition(".")[0].rstrip("_") for name in [*FACTORIES, *ELEMENTWISE, *IN_TURN]}
    tried |= {name.rstrip("_") for name in DROPOUTS}
    tried |= {"_sample_dirichlet", "_standard_gamma", "normal_functional", "rrelu_with_noise"}
    tried |= {"feature_dropout", "feature_alpha_dropout", "rrelu", "rrelu_with_noise_functional"}
    found = set()
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        if namespace == "aten":
            base, _, overload = name.partition(".")
            op = getattr(getattr(aten, base), overload or "default")
            if facts(op).is_random or torch.Tag.nondeterministic_seeded in op.tags:
                found.add(base.rstrip("_"))
    left = {n for n in found - tried if not n.startswith(tuple(ELSEWHERE))}
    assert left == set()
