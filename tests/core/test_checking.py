"""What `LAMINA_DEBUG=1` finds: rules that give another shape, dtype or batch than the op."""

from __future__ import annotations

import pytest
import torch

from lamina import config, grad, jvp, vjp, vmap
from lamina.autodiff.declare import FORWARD, REVERSE
from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.batching.interpreter import VmapInterpreter
from lamina.batching.table import RULES
from lamina_core import logical
from lamina_core.errors import RuleError
from lamina_core.logical import Signature, ask, try_on
from lamina_core.rules import RuleTable

aten = torch.ops.aten
X = torch.arange(24.0).reshape(2, 3, 4)


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    monkeypatch.setattr(config, "debug", 1)


@pytest.fixture
def only(monkeypatch):
    """Makes a rule the only one of a transform."""

    def install(table, interpreter, op, rule):
        fresh = RuleTable(table.transform)
        fresh.register(op, rule)
        monkeypatch.setattr(table, "_rules", fresh._rules)
        monkeypatch.setattr(interpreter, "handlers", {})

    return install


# -- vmap ------------------------------------------------------------------------------------------


def wrong_dim(info, in_dims, x):
    return x, 1


def wrong_number(info, in_dims, x):
    return (x, x), (0,)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (wrong_dim, "output of shape [2, 3, 4] with batch dim 1, but the batch size is 2"),
        (wrong_number, "2 outputs and 1 out_dims"),
    ],
)
def test_the_batch_of_an_answer(answer, complaint, only):
    only(RULES, VmapInterpreter, aten.trace.default, answer)
    with pytest.raises(RuleError) as caught:
        vmap(torch.trace)(torch.ones(2, 3, 4))
    assert str(caught.value).splitlines() == [
        f"a wrong answer of the batching rule {answer.__module__}.{answer.__name__}",
        "  while interpreting at level 1: vmap(batch_size=2, randomness='error')",
        f"  {complaint}",
    ]


def wrong_shape(info, in_dims, x):
    return x[..., 0], 0


def wrong_dtype(info, in_dims, x):
    return x[..., 0, 0].double(), 0


@pytest.mark.parametrize(
    ("answer", "given"), [(wrong_shape, "f32[3]"), (wrong_dtype, "f64[]")], ids=["shape", "dtype"]
)
def test_the_look_of_an_answer(answer, given, only):
    only(RULES, VmapInterpreter, aten.trace.default, answer)
    with pytest.raises(RuleError) as caught:
        vmap(torch.trace)(X)
    assert str(caught.value).splitlines() == [
        "a wrong answer for aten.trace.default",
        "  while interpreting at level 1: vmap(batch_size=2, randomness='error')",
        f"  gave {given}, and the op alone gives f32[]",
        f"  answered by: rule ({answer.__module__}.{answer.__name__})",
    ]


def answers_everything(info, in_dims, x):
    return x.transpose(-1, -2), 0


def test_an_answer_where_the_op_refuses(only):
    only(RULES, VmapInterpreter, aten.t.default, answers_everything)
    assert vmap(torch.t)(X).shape == (2, 4, 3)
    with pytest.raises(RuleError, match=r"the op alone refuses: t\(\) expects a tensor with <= 2"):
        vmap(torch.t)(X[None])


def test_levels_below_are_checked_too(only):
    only(RULES, VmapInterpreter, aten.sum.default, wrong_dtype)
    with pytest.raises(RuleError, match="while interpreting at level 1: vmap"):
        vmap(grad(torch.sum))(X)


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda x_ct: x_ct.sum(0), "f32[3, 4] on cpu, and the primal f32[2, 3, 4] on cpu"),
        (lambda x_ct: x_ct.double(), "f64[2, 3, 4] on cpu, and the primal f32[2, 3, 4] on cpu"),
        (lambda x_ct: x_ct.to("meta"), "f32[2, 3, 4] on meta, and the primal f32[2, 3, 4] on cpu"),
    ],
    ids=["shape", "dtype", "device"],
)
@pytest.mark.parametrize("place", ["an input", "an intermediate value"])
def test_the_look_of_a_cotangent(answer, fault, place, only):
    def rule(needs, x):
        return x.sin(), (x.cos(),), pullback

    def pullback(residuals, needs, ct):
        return (answer(ct * residuals[0]),)

    only(REVERSE, ReverseInterpreter, aten.sin.default, rule)
    f = torch.sin if place == "an input" else lambda x: torch.sin(torch.sin(x))
    _, vjp_fn = vjp(f, X)
    with pytest.raises(RuleError) as caught:
        vjp_fn(torch.ones(2, 3, 4))
    assert str(caught.value).splitlines() == [
        "a wrong answer of the pullback of aten.sin.default",
        f"  the cotangent of operand 0 is {fault}",
    ]


def test_the_number_of_cotangents(only):
    only(REVERSE, ReverseInterpreter, aten.sin.default, lambda needs, x: (x, (), lambda *_: ()))
    _, vjp_fn = vjp(torch.sin, X)
    with pytest.raises(RuleError, match=r"aten.sin.default gave 0 cotangents for 1 operands"):
        vjp_fn(X)


def test_the_shape_of_a_tangent(only):
    def rule(tangents, x):
        return x.sin(), (tangents[0] * x.cos())[0]

    only(FORWARD, ForwardInterpreter, aten.sin.default, rule)
    with pytest.raises(RuleError) as caught:
        jvp(torch.sin, (X,), (X,))
    assert str(caught.value).splitlines()[:3] == [
        "a wrong answer for aten.sin.default",
        "  while interpreting at level 1: jvp",
        "  the tangent of an output is f32[3, 4] on cpu, and the primal f32[2, 3, 4] on cpu",
    ]


def test_the_dtype_of_a_tangent_is_that_of_its_primal(only):
    """Whatever a rule gives: of operands of several dtypes it is what they were promoted to."""

    def rule(tangents, x):
        return x.sin(), tangents[0].double() * x.cos()

    only(FORWARD, ForwardInterpreter, aten.sin.default, rule)
    assert jvp(torch.sin, (X,), (X,))[1].dtype is torch.float32


def test_nothing_is_checked_by_default(only, monkeypatch):
    monkeypatch.setattr(config, "debug", 0)
    only(RULES, VmapInterpreter, aten.trace.default, wrong_shape)
    assert vmap(torch.trace)(X).shape == (2, 3)


# -- what an op gives alone ------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(logical, "_OUTCOMES", {})
    return logical._OUTCOMES


def test_an_op_is_asked_once_for_a_signature(fresh, monkeypatch):
    asked = []
    monkeypatch.setattr(Signature, "on_meta", counting(Signature.on_meta, asked))
    for scale in (1.0, 2.0):
        outcome = ask(Signature(aten.sum.dim_IntList, (X * scale, [0]), {}))
        assert str(outcome) == "f32[3, 4]"
    assert asked == [aten.sum.dim_IntList]
    ask(Signature(aten.sum.dim_IntList, (X, [1]), {}))
    ask(Signature(aten.sum.dim_IntList, (X.double(), [1]), {}))
    ask(Signature(aten.sum.dim_IntList, (X.mT, [1]), {}))
    assert len(asked) == len(fresh) == 4


def counting(method, seen):
    def counted(signature):
        seen.append(signature.op)
        return method(signature)

    return counted


def test_what_an_op_gives_is_told_by_shape_and_dtype(fresh):
    outcome = ask(Signature(aten.topk.default, (X, 2), {}))
    assert str(outcome) == "f32[2, 3, 2], i64[2, 3, 2]"
    assert not outcome.certain
    refused = ask(Signature(aten.mm.default, (X[0], X[0]), {}))
    assert "a and b must have same reduction dim" in str(refused)
    assert refused.outs is None


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.nonzero.default, (X,)),
        (aten.bernoulli.default, (X,)),
        (aten._local_scalar_dense.default, (X[0, 0, 0],)),
        (aten.sin.default, (X.to_sparse(),)),
    ],
)
def test_some_ops_cannot_be_asked(op, args, fresh):
    signature = Signature(op, args, {})
    assert signature.key is None
    assert str(ask(signature)) == "nothing"


def test_what_the_kernel_says_takes_the_place_of_what_meta_says(fresh):
    signature = Signature(aten.sin.default, (X,), {})
    assert not ask(signature).certain
    assert try_on(signature, (X,), {}).certain
    assert ask(signature).certain


def test_asking_writes_nothing_and_draws_nothing(fresh):
    x = torch.ones(3)
    signature = Signature(aten.mul_.Scalar, (x, 2.0), {})
    state = torch.get_rng_state()
    assert str(ask(signature)) == str(try_on(signature, (x, 2.0), {})) == "f32[3]"
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(state, torch.get_rng_state())


def test_asking_is_seen_by_no_mode(fresh):
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with Seen(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert str(ask(Signature(aten.mm.default, (X[0], X[1].mT), {}))) == "f32[3, 3]"
        assert str(try_on(Signature(aten.mm.default, (X[0], X[1].mT), {}), (X[0], X[1].mT), {}))
    assert aten.mm.default not in seen
