"""What `vmap` says about options that do not fit its arguments or outputs."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline

import lamina
from lamina import grad, vmap
from lamina_core.errors import BatchSizeError, StructureError
from tests.errors.saying import said

X = torch.arange(6.0).reshape(2, 3)


def first(*args):
    return args[0]


def test_in_dims_with_too_many_entries():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=(0, 0))(X)),
        """\
in_dims does not fit args
  in_dims has 2 entries but args has 1
  to fix: write in_dims like args, or put one value in its place for the whole of args""",
    )


def test_in_dims_with_too_few_entries_inside_an_argument():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=((0, 0),))((X, X, X))),
        """\
in_dims does not fit args
  in_dims[0] has 2 entries but args[0] has 3
  to fix: write in_dims[0] like args[0], or put one value in its place for the whole of args[0]""",
    )


def test_in_dims_with_other_keys():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=({"a": 0},))({"w": X})),
        """\
in_dims does not fit args
  keys of args[0] that in_dims[0] lacks: 'w'
  keys of in_dims[0] that args[0] lacks: 'a'
  to fix: write in_dims[0] like args[0], or put one value in its place for the whole of args[0]""",
    )


def test_in_dims_deeper_than_the_arguments():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=(0, (0, 0)))(X, X)),
        """\
in_dims does not fit args
  in_dims[1] is of type tuple but args[1] is a single leaf
  to fix: put one value in the place of in_dims[1]""",
    )


def test_in_dims_of_a_wrong_type():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims="rows")(X)),
        """\
in_dims is 'rows', of type str
  to fix: pass an int, or a tuple or list with an entry per positional argument""",
    )


def test_an_entry_of_in_dims_of_a_wrong_type():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=(0, {"w": 0.5}))(X, {"w": X})),
        """\
in_dims has 0.5 for argument args[1]['w']
  to fix: use an int or None""",
    )


def test_a_bool_is_no_dim():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=True)(X)),
        """\
in_dims has True for argument args[0]
  to fix: use an int or None""",
    )


def test_in_dims_out_of_range():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, in_dims=({"w": (None, -3)},))({"w": (X, X)})),
        """\
in_dims has -3 for argument args[0]['w'][1] of shape [2, 3]
  to fix: use an int in [-2, 1], or None""",
    )


def test_a_tensor_of_rank_0_cannot_be_mapped():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first)(X, torch.tensor(1.0))),
        """\
in_dims has 0 for argument args[1] of shape []
  to fix: use None: a tensor of shape [] has no dim to map over""",
    )


def test_sizes_that_differ():
    assert_expected_inline(
        said(
            BatchSizeError,
            lambda: vmap(first, in_dims=(0, {"w": 1, "b": None}))(X, {"w": X, "b": X}),
        ),
        """\
the mapped arguments of vmap have different sizes
  args[0] of shape [2, 3] has size 2 in dim 0
  args[1]['w'] of shape [2, 3] has size 3 in dim 1
  to fix: map over dims of one size, or pass None in in_dims for the others""",
    )


def test_no_tensor_to_map():
    assert_expected_inline(
        said(BatchSizeError, lambda: vmap(first)(1, 2.0)),
        """\
vmap has nothing to map over: no argument is mapped
  in_dims is 0, and the arguments hold 0 tensors
  to fix: pass at least one tensor positionally, with an int in in_dims""",
    )


@dataclasses.dataclass
class Box:
    """No pytree."""

    content: object


@pytest.mark.parametrize(
    "stray", [2.0, True, "text", None, np.ones(2), np.float32(1), [1.0, 2.0], len, Box(X)]
)
@pytest.mark.parametrize("in_dims", [0, (0, 0), (0, 1), (0, None)])
def test_what_is_no_tensor_is_not_mapped(stray, in_dims):
    reference = _refusal(lambda: torch.func.vmap(first, in_dims=in_dims)(X, stray))
    refusal = _refusal(lambda: vmap(first, in_dims=in_dims)(X, stray))
    assert (refusal is None) == (reference is None)
    if refusal is not None:
        assert isinstance(refusal, StructureError)
        assert "to fix: pass None for it in in_dims" in str(refusal)


def test_what_is_said_of_an_array():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first)(X, {"w": np.ones(2)})),
        """\
in_dims has 0 for argument args[1]['w'], which is a ndarray
  to fix: pass None for it in in_dims, or torch.as_tensor(x) to map over it""",
    )


def _refusal(run):
    try:
        run()
    except ValueError as error:
        return error
    return None


@dataclasses.dataclass(slots=True)
class SlottedBox:
    content: object


HIDING = {
    "dataclass": Box,
    "dataclass with slots": lambda x: SlottedBox([x, 1]),
    "dict in an object": lambda x: Box({"x": (x * 2,)}),
    "frozenset": lambda x: (x, frozenset([x])),
    "namespace": lambda x: types.SimpleNamespace(x=x),
    "set": lambda x: {x},
}


@pytest.mark.parametrize("name", HIDING)
def test_tensors_in_what_is_no_pytree_are_not_handed_out(name):
    with pytest.raises(ValueError, match="only return Tensors"):
        torch.func.vmap(HIDING[name])(X)
    with pytest.raises(StructureError, match="that holds mapped tensors"):
        vmap(HIDING[name])(X)
    with pytest.raises(StructureError, match="that holds mapped tensors"):
        vmap(vmap(HIDING[name]))(X)


def test_other_objects_pass_through():
    box = Box(X)
    assert vmap(lambda x: (x, box))(X)[1] is box
    assert vmap(lambda x: (x, len, "text", 1.0, None))(X)[1:] == (len, "text", 1.0, None)
    assert torch.equal(vmap(lambda x: Box(torch.ones(2)))(X).content + 1, torch.full((2,), 2.0))


def test_nothing_is_mapped():
    assert_expected_inline(
        said(BatchSizeError, lambda: vmap(first, in_dims=(None, None))(X, X)),
        """\
vmap has nothing to map over: no argument is mapped
  in_dims is (None, None), and the arguments hold 2 tensors
  to fix: pass at least one tensor positionally, with an int in in_dims""",
    )


def test_no_argument():
    assert_expected_inline(
        said(BatchSizeError, lambda: vmap(lambda x: x)(x=X)),
        """\
vmap has nothing to map over: no argument is mapped
  in_dims is 0, and the arguments hold 0 tensors
  to fix: pass at least one tensor positionally, with an int in in_dims""",
    )


def test_out_dims_is_none_for_an_output_that_is_batched():
    assert_expected_inline(
        said(StructureError, lambda: vmap(lambda x: (3, {"w": x}), out_dims=None)(X)),
        """\
out_dims is None for output[1]['w'] of shape [3], which differs between examples
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: give it an int in out_dims""",
    )


def test_out_dims_is_none_in_a_nested_vmap():
    assert_expected_inline(
        said(StructureError, lambda: vmap(vmap(first, out_dims=None))(X)),
        """\
out_dims is None for output of shape [], which differs between examples
  while interpreting at level 2: vmap(batch_size=3, randomness='error')
  to fix: give it an int in out_dims""",
    )


def test_out_dims_out_of_range():
    assert_expected_inline(
        said(StructureError, lambda: vmap(lambda x: {"w": x}, out_dims=2)(X)),
        """\
out_dims is 2 for output['w'] of shape [3]
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use an int in [-2, 1], which counts the batch dim, or None""",
    )


def test_out_dims_of_a_wrong_type():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, out_dims="rows")(X)),
        """\
out_dims is 'rows' for output of shape [3]
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use an int in [-2, 1], which counts the batch dim, or None""",
    )


def test_a_bool_is_no_out_dim():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, out_dims=True)(X)),
        """\
out_dims is True for output of shape [3]
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: use an int in [-2, 1], which counts the batch dim, or None""",
    )


def test_out_dims_with_too_many_entries():
    assert_expected_inline(
        said(StructureError, lambda: vmap(lambda x: (x, x), out_dims=(0, 0, 0))(X)),
        """\
out_dims does not fit output
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  out_dims has 3 entries but output has 2
  to fix: write out_dims like output, or put one value in its place for the whole of output""",
    )


def test_out_dims_deeper_than_the_output():
    assert_expected_inline(
        said(StructureError, lambda: grad(lambda x: vmap(first, out_dims=(0, 1))(x).sum())(X)),
        """\
out_dims does not fit output
  while interpreting at level 2: vmap(batch_size=2, randomness='error')
  out_dims is of type tuple but output is a single leaf
  to fix: put one value in the place of out_dims""",
    )


def test_randomness_of_no_kind():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, randomness="all")),
        """\
randomness of vmap is 'all'
  to fix: pass 'error', 'same' or 'different'""",
    )


def test_chunk_size_of_zero():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, chunk_size=0)),
        """\
chunk_size of vmap is 0
  to fix: pass an int > 0, or None""",
    )


def test_chunk_size_of_a_wrong_type():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, chunk_size=1.5)),
        """\
chunk_size of vmap is 1.5
  to fix: pass an int > 0, or None""",
    )


def test_a_number_that_differs_between_chunks():
    counts, x = iter(range(9)), torch.ones(2)
    assert_expected_inline(
        said(
            StructureError, lambda: vmap(lambda x: (x, next(counts)), chunk_size=1)(torch.ones(2))
        ),
        """\
an output that is no tensor differs between chunks: 0 and 1
  to fix: return a tensor, or leave chunk_size out""",
    )
    out, *others = vmap(lambda x: (x, "a", float("nan"), [1, 2.0]), chunk_size=1)(x)
    assert out.shape == (2,)
    assert others[0] == "a"


def test_chunk_size_is_no_bool():
    assert_expected_inline(
        said(StructureError, lambda: vmap(first, chunk_size=True)),
        """\
chunk_size of vmap is True
  to fix: pass an int > 0, or None""",
    )


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_single_output_and_a_tuple_of_one(chunk_size):
    v = torch.ones(2)
    assert vmap(first, out_dims=(1,), chunk_size=chunk_size)(X).equal(X.T)
    assert vmap(first, out_dims=(0,), chunk_size=chunk_size)(X).equal(X)
    assert vmap(lambda x: v, out_dims=(None,), chunk_size=chunk_size)(X).equal(v)
    with pytest.raises(StructureError, match="out_dims"):
        vmap(lambda x: (x, x), out_dims=(0,), chunk_size=chunk_size)(X)


LIBRARIES = pytest.mark.parametrize("lib", [lamina, torch.func], ids=["lamina", "torch.func"])


@LIBRARIES
@pytest.mark.parametrize("name", ["grad", "grad_and_value", "jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("argnums", [2, -3, (0, 0), (), 1.0, (0, 5)])
def test_argnums_that_do_not_fit_are_the_error_that_torch_func_has(lib, name, argnums):
    with pytest.raises(RuntimeError, match="arg"):
        getattr(lib, name)(lambda a, b: (a * b).sum(), argnums=argnums)(X, X)


@pytest.mark.parametrize("name", ["grad", "grad_and_value", "jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("argnums", [-1, (0, -1), (-2,)])
def test_argnums_from_the_end(name, argnums):
    from_start = {-1: 1, (0, -1): (0, 1), (-2,): (0,)}[argnums]
    transform, x = getattr(lamina, name), X[0]
    f = lambda a, b: (a * b * b).sum()
    found, expected = (transform(f, argnums=at)(x, x + 1) for at in (argnums, from_start))
    torch.testing.assert_close(found, expected)


@LIBRARIES
def test_words_that_callers_match(lib):
    no_pair = r"should be a tuple: \(output, aux\) if has_aux is True"
    for call in (
        lambda: lib.grad(torch.sum, has_aux=True)(X),
        lambda: lib.vjp(torch.sum, X, has_aux=True),
        lambda: lib.jvp(torch.sum, (X,), (X,), has_aux=True),
        lambda: lib.jacrev(torch.sum, has_aux=True)(X),
        lambda: lib.jacfwd(torch.sum, has_aux=True)(X),
    ):
        with pytest.raises(RuntimeError, match=no_pair):
            call()


@LIBRARIES
def test_tangents_and_structures_are_runtime_errors_too(lib):
    for call in (
        lambda: lib.jvp(torch.sin, X, X),
        lambda: lib.jvp(torch.sin, (X,), (X[0],)),
        lambda: lib.jvp(torch.sin, (X,), (X, X)),
        lambda: lib.jvp(torch.sin, (), ()),
        lambda: lib.vjp(torch.sin, X)[1]((X, X)),
        lambda: lib.jvp(lambda x: X, (X,), (X,), strict=True),
        lambda: lib.grad(torch.sum)(X.int()),
        lambda: lib.stack_module_state([]),
    ):
        with pytest.raises(RuntimeError):
            call()
