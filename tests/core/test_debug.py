"""What the debug kit prints: the stack, the log, the state of an op, wrappers, and LAMINA_DEBUG."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline

import lamina
from lamina import config, grad, jvp, vjp, vmap
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.batching.interpreter import VmapInterpreter
from lamina.debug import explain, print_stack, stack_text, trace_log

aten = torch.ops.aten
X = torch.arange(6.0).reshape(2, 3)


def loss(x):
    return (x * x).sum()


# -- the stack -------------------------------------------------------------------------------------


def test_the_kit_is_public():
    assert lamina.debug.__all__ == ["explain", "print_stack", "stack_text", "trace_log"]


def test_stack_outside_all_transforms():
    assert_expected_inline(stack_text(), """level 0: plain PyTorch""")


def test_stack_inside_every_transform(capsys):
    def f(x):
        print_stack()
        return x.sum()

    def directional(x):
        return jvp(grad(f), (x,), (x,))[1]

    vmap(directional, randomness="same")(X)
    assert_expected_inline(
        capsys.readouterr().out,
        """\
level 0: plain PyTorch
level 1: vmap(batch_size=2, randomness='same')
level 2: jvp
level 3: grad
""",
    )


def test_print_stack_into_a_file():
    file = io.StringIO()
    vjp(lambda x: print_stack(file) or x, X)
    assert_expected_inline(
        file.getvalue(),
        """\
level 0: plain PyTorch
level 1: vjp
""",
    )


# -- the log ---------------------------------------------------------------------------------------


def log(call):
    sink = io.StringIO()
    with trace_log(sink) as lines:
        call()
    assert sink.getvalue() == "".join(line + "\n" for line in lines)
    return sink.getvalue()


def test_log_of_vmap():
    assert_expected_inline(
        log(lambda: vmap(lambda x, y: x @ y * 2)(X, X)),
        """\
L1 vmap  $3: f32[] = aten.matmul.default($1, $2)
L1 vmap  $4: f32[] = aten.mul.Tensor($3, 2)
""",
    )


def test_log_of_vmap_of_grad():
    assert_expected_inline(
        log(lambda: vmap(grad(loss))(X)),
        """\
L1 vmap  $3: f32[3] = aten.mul.Tensor($2, $2)
L2 vjp  $4: f32[3] = aten.mul.Tensor($1, $1)
L1 vmap  $5: f32[] = aten.sum.default($3)
L2 vjp  $6: f32[] = aten.sum.default($4)
L1 vmap  $8: f32[3] = aten.mul.Tensor($7, $2)
L1 vmap  $9: f32[3] = aten.mul.Tensor($7, $2)
L1 vmap  $10: f32[3] = aten.add.Tensor($8, $9)
""",
    )


def test_log_of_jvp():
    assert_expected_inline(
        log(lambda: jvp(loss, (X,), (X,))),
        """\
L1 jvp  $2: f32[2, 3] = aten.mul.Tensor($1, $1)
L1 jvp  $3: f32[] = aten.sum.default($2)
""",
    )


def test_log_of_lists_and_keywords():
    def f(x):
        first, second = torch.stack([x, x]).unbind()
        return torch.add(first, second, alpha=2)

    assert_expected_inline(
        log(lambda: vmap(f)(X)),
        """\
L1 vmap  $2: f32[2, 3] = aten.stack.default([$1, $1])
L1 vmap  ($3: f32[3], $4: f32[3]) = aten.unbind.int($2)
L1 vmap  $5: f32[3] = aten.add.Tensor($3, $4, alpha=2)
""",
    )


def test_the_log_ends_with_its_block_also_after_an_exception():
    before = VmapInterpreter.process, ReverseInterpreter.process
    with pytest.raises(ZeroDivisionError), trace_log(io.StringIO()) as lines:
        vmap(lambda x: x.sin() / (1 // 0))(X)
    assert (VmapInterpreter.process, ReverseInterpreter.process) == before
    assert len(lines) == 1


# -- explain ---------------------------------------------------------------------------------------


def explained(op):
    """`explain`, without the transforms that other tests have defined."""
    ours = ("vjp", "jvp", "vmap")
    lines = explain(op).splitlines()
    return "\n".join(line for line in lines if not line.startswith(" ") or line.split()[0] in ours)


def test_explain_one_overload():
    assert_expected_inline(
        explained(aten.dot.default),
        """\
aten.dot.default
  vjp    family (lamina.autodiff.rules.matmul.Multilinear(aten.dot.default))
  jvp    family (lamina.autodiff.rules.matmul.Multilinear(aten.dot.default))
  vmap   rule (lamina.batching.rules.matmul.matmul)""",
    )


def test_explain_by_name_with_all_overloads():
    assert_expected_inline(
        explained("aten.topk"),
        """\
aten.topk.default
  vjp    rule (lamina.autodiff.rules.overwriting._register_ordering.<locals>.ordering_vjp)
  jvp    rule (lamina.autodiff.rules.overwriting._register_ordering.<locals>.ordering_jvp)
  vmap   rule (lamina.batching.rules.sorting.topk)
aten.topk.values
  vjp    rule
  jvp    rule
  vmap   rule""",
    )


@pytest.mark.parametrize("op", [aten.median, aten.sum, aten.tanh], ids=str)
def test_explain_all_overloads_that_this_torch_has(op):
    each = [explained(getattr(op, name)) for name in op.overloads()]
    assert explained(op) == explained(str(op)) == "\n".join(each)


def test_explain_an_op_that_writes():
    assert_expected_inline(
        explained("aten.tanh_.default"),
        """\
aten.tanh_.default
  vjp    family
  jvp    family
  vmap   family""",
    )


# -- wrappers --------------------------------------------------------------------------------------


def reprs_in(transform, *args):
    seen = []

    def f(x):
        seen.extend([repr(x), repr(x.sum() + torch.ones(())), repr(torch.ones(2))])
        return x.sum()

    transform(f)(*args)
    return "\n".join(seen)


def test_repr_of_batched_tensors():
    assert_expected_inline(
        reprs_in(vmap, X),
        """\
BatchedTensor(level=1, bdim=0, size=2, f32[3])
BatchedTensor(level=1, bdim=0, size=2, f32[])
BatchedTensor(level=1, bdim=None, f32[2])""",
    )


def test_repr_of_tracked_tensors():
    assert_expected_inline(
        reprs_in(grad, X),
        """\
TrackedTensor(level=1, by=input, f32[2, 3])
TrackedTensor(level=1, by=aten.add.Tensor, f32[])
TrackedTensor(level=1, constant, f32[2])""",
    )


def test_repr_of_dual_tensors():
    assert_expected_inline(
        reprs_in(lambda f: lambda x: jvp(f, (x,), (x,)), X),
        """\
DualTensor(level=1, dual, f32[2, 3])
DualTensor(level=1, dual, f32[])
DualTensor(level=1, constant, f32[2])""",
    )


def test_repr_names_the_level():
    assert_expected_inline(
        reprs_in(lambda f: vmap(vmap(f, in_dims=1)), X.long()[..., None]),
        """\
BatchedTensor(level=2, bdim=1, size=1, i64[3])
BatchedTensor(level=2, bdim=0, size=1, f32[])
BatchedTensor(level=2, bdim=None, f32[2])""",
    )


def test_repr_of_a_dead_wrapper():
    kept = []
    vmap(kept.append)(X)
    assert_expected_inline(
        repr(kept[0]), """BatchedTensor(level=1, bdim=0, size=2, dead, f32[3])"""
    )


# -- LAMINA_DEBUG ----------------------------------------------------------------------------------


def test_level_0_prints_nothing(capsys, monkeypatch):
    monkeypatch.setattr(config, "debug", 0)
    vmap(grad(loss))(X)
    assert capsys.readouterr() == ("", "")


def test_level_2_prints_levels(capsys, monkeypatch):
    monkeypatch.setattr(config, "debug", 2)
    vmap(grad(loss))(X)
    out, err = capsys.readouterr()
    assert out == ""
    assert_expected_inline(
        err,
        """\
push level 1: vmap(batch_size=2, randomness='error')
push level 2: grad
pop level 2: grad
pop level 1: vmap(batch_size=2, randomness='error')
""",
    )


def test_level_2_prints_a_level_that_ends_in_an_exception(capsys, monkeypatch):
    monkeypatch.setattr(config, "debug", 2)
    with pytest.raises(ZeroDivisionError):
        grad(lambda x: x / (1 // 0))(X)
    assert_expected_inline(
        capsys.readouterr().err,
        """\
push level 1: grad
pop level 1: grad
""",
    )


def test_level_3_prints_ops_too(capsys, monkeypatch):
    monkeypatch.setattr(config, "debug", 3)
    vmap(grad(loss))(X)
    out, err = capsys.readouterr()
    assert out == ""
    assert_expected_inline(
        err,
        """\
push level 1: vmap(batch_size=2, randomness='error')
push level 2: grad
L1 vmap  $3: f32[3] = aten.mul.Tensor($2, $2)
L2 vjp  $4: f32[3] = aten.mul.Tensor($1, $1)
L1 vmap  $5: f32[] = aten.sum.default($3)
L2 vjp  $6: f32[] = aten.sum.default($4)
pop level 2: grad
L1 vmap  $8: f32[3] = aten.mul.Tensor($7, $2)
L1 vmap  $9: f32[3] = aten.mul.Tensor($7, $2)
L1 vmap  $10: f32[3] = aten.add.Tensor($8, $9)
pop level 1: vmap(batch_size=2, randomness='error')
""",
    )


@pytest.mark.slow
def test_the_level_is_read_from_the_environment():
    program = "import lamina, torch; lamina.vmap(torch.sin)(torch.ones(2))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LAMINA_DEBUG": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "push level 1: vmap(batch_size=2, randomness='error')" in run.stderr
