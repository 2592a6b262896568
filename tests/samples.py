"""Which operators the laws are tried on, and with which inputs.

The operators come from PyTorch's own table of samples (`op_db`). `CURATED` names the ones that
models are made of; they run by default. All others run under the `exhaustive` marker. The table is
loaded on first use, for it takes seconds.

Treatment of what is not plain:

* An operator in `LEFT_OUT` is left out of all laws, for the reason stated there.
* A sample whose plain run moves the random number generator is *random*: the law `random` takes it
  in place of the laws `vmap`, `vmap_vjp` and `inplace`. The laws `vjp` and `jvp` take it like any
  other: with the same seed, the same draw.
* An operator in `UNINITIALISED` gives arbitrary values: only shapes and dtypes are compared.
* A sample that writes to its inputs is given fresh copies of them, made inside the function.
* Python values in a result are compared as tensors.
* A law that has nothing to say about any sample of an operator fails, unless `NOT_UNDER` says why.
"""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests import devices
from tests.expected import VMAP_LAWS

BATCH = 3
SAMPLES = 6  # a spread of this many out of the first FIRST
FIRST = 40

CURATED = {
    "pointwise": """
        abs add addcdiv addcmul atan2 ceil clamp clamp_max clamp_min cos div.no_rounding_mode eq erf
        exp expm1 floor ge gt isfinite isnan le lerp log log1p logaddexp logical_and logical_not lt
        masked_fill max.binary maximum min.binary minimum mul nan_to_num ne neg pow reciprocal
        remainder round rsqrt rsub sigmoid sign sin sqrt square sub tan tanh true_divide where xlogy
    """,
    "reductions": """
        all amax amin any argmax argmin cumprod cumsum linalg.vector_norm logcumsumexp logsumexp
        max.reduction_no_dim max.reduction_with_dim mean norm prod std sum trace var var_mean
    """,
    "views": """
        as_strided broadcast_to cat chunk clone contiguous diag_embed diagonal expand flatten flip
        movedim narrow permute repeat reshape roll select slice split squeeze stack t
        transpose tril triu unbind unflatten unfold unsqueeze view
    """,
    "indexing": """
        __getitem__ gather index_add index_copy index_put index_select masked_scatter
        nn.functional.embedding nn.functional.one_hot scatter scatter_add take_along_dim
    """,
    "sorting": "argsort cummax kthvalue searchsorted sort topk",
    "linalg": """
        cholesky_solve cross kron linalg.cholesky linalg.det linalg.eigh linalg.inv linalg.qr
        linalg.slogdet linalg.solve linalg.solve_triangular linalg.svdvals
    """,
    "matmul": """
        __rmatmul__ addmm addmv baddbmm bmm dot einsum inner matmul mm mv nn.functional.bilinear
        nn.functional.linear outer tensordot
    """,
    "conv": """
        nn.functional.conv1d nn.functional.conv2d nn.functional.conv3d
        nn.functional.conv_transpose1d nn.functional.conv_transpose2d
        nn.functional.interpolate.bilinear
        nn.functional.interpolate.nearest nn.functional.pad.constant nn.functional.pad.reflect
        nn.functional.pixel_shuffle nn.functional.unfold
    """,
    "pool": """
        nn.functional.adaptive_avg_pool2d nn.functional.adaptive_max_pool2d nn.functional.avg_pool1d
        nn.functional.avg_pool2d nn.functional.max_pool1d nn.functional.max_pool2d
    """,
    "norm": """
        nn.functional.batch_norm nn.functional.group_norm nn.functional.instance_norm
        nn.functional.layer_norm nn.functional.normalize nn.functional.rms_norm
    """,
    "loss": """
        nn.functional.binary_cross_entropy nn.functional.binary_cross_entropy_with_logits
        nn.functional.cosine_similarity nn.functional.cross_entropy nn.functional.huber_loss
        nn.functional.kl_div nn.functional.l1_loss nn.functional.mse_loss nn.functional.nll_loss
        nn.functional.smooth_l1_loss
    """,
    "activations": """
        log_softmax nn.functional.celu nn.functional.elu nn.functional.gelu nn.functional.glu
        nn.functional.hardsigmoid nn.functional.hardswish nn.functional.hardtanh
        nn.functional.leaky_relu nn.functional.logsigmoid nn.functional.mish nn.functional.prelu
        nn.functional.relu nn.functional.relu6 nn.functional.selu nn.functional.silu
        nn.functional.softplus softmax
    """,
    "attention": "nn.functional.scaled_dot_product_attention",
    "random": "bernoulli nn.functional.dropout rand_like randn_like",
    "factories": "full_like new_zeros ones_like zeros_like",
    "fft": "fft.fft fft.irfft fft.rfft",
}

# Of the curated operators: the ones without a derivative, and the ones with an in-place variant.
NOT_DIFFERENTIABLE = frozenset(
    """
    all any argmax argmin argsort eq full_like ge gt isfinite isnan le logical_and
    logical_not lt ne new_zeros ones_like rand_like randn_like searchsorted zeros_like
    """.split()
)
INPLACE = frozenset(
    """
    abs add addcdiv addcmul addmm addmv atan2 baddbmm ceil clamp clamp_max clamp_min cos cumprod
    cumsum div.no_rounding_mode erf exp expm1 floor index_add index_copy index_put lerp log log1p
    masked_fill masked_scatter mul nan_to_num neg nn.functional.celu nn.functional.elu
    nn.functional.hardsigmoid nn.functional.leaky_relu nn.functional.mish nn.functional.selu
    nn.functional.silu pow reciprocal remainder round rsqrt scatter scatter_add sigmoid sign sin
    sqrt square sub tan tanh tril triu true_divide xlogy
    """.split()
)

# Operators all of whose samples draw random numbers, and operators of which some samples do.
DRAWS = frozenset(
    """
    bernoulli cauchy exponential geometric log_normal multinomial
    nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d normal normal.in_place
    normal.number_mean pca_lowrank rand_like randint randint_like randn randn_like svd_lowrank
    uniform
    """.split()
)
SOMETIMES_DRAWS = frozenset(
    """
    nn.functional.alpha_dropout nn.functional.dropout nn.functional.dropout2d
    nn.functional.dropout3d nn.functional.feature_alpha_dropout.with_train
    nn.functional.multi_head_attention_forward nn.functional.rrelu
    nn.functional.scaled_dot_product_attention
    """.split()
)

_CUDA = "runs on a GPU only"
_SPARSE = "takes or gives sparse tensors, which no transform here maps"
LEFT_OUT = {
    "as_strided.partial_views": "reads memory around its argument, which a stack does not have",
    "bmm.triton_optimized": _CUDA,
    "jiterator_2inputs_2outputs": _CUDA,
    "jiterator_4inputs_with_extra_args": _CUDA,
    "jiterator_binary": _CUDA,
    "jiterator_binary_return_by_ref": _CUDA,
    "jiterator_unary": _CUDA,
    "nn.functional.batch_norm.without_cudnn": _CUDA,
    "sparse.mm.reduce": _SPARSE,
    "sparse.sampled_addmm": _SPARSE,
    "to_sparse": _SPARSE,
    "torch._scaled_mm": _CUDA,
    "torch._scaled_mm_v2": _CUDA,
    "torch.ops.aten._efficient_attention_forward": _CUDA,
    "torch.ops.aten._flash_attention_forward": _CUDA,
}
UNINITIALISED = frozenset(
    """
    empty empty_like empty_permuted empty_strided new_empty new_empty_strided resize_ resize_as_
    """.split()
)


def _log_softmax_first(op: Callable) -> Callable:
    return lambda scores, *args, **kwargs: op(scores.log_softmax(-1), *args, **kwargs)


# What PyTorch calls the gradient of these is that of the operator behind another one.
BEHIND: dict[str, Callable[[Callable], Callable]] = {
    "nn.functional.ctc_loss": _log_softmax_first,
}


def _strided_scatter(x, src, size, stride, storage_offset=0):
    places = torch.arange(x.numel()).as_strided(size, stride, storage_offset).reshape(-1)
    return x.reshape(-1).index_put((places,), src.reshape(-1)).reshape(x.shape)


def _in_one_chunk(*args, options=None, **kwargs):
    return torch.nn.functional.linear_cross_entropy(*args, **kwargs)


# What PyTorch differentiates to give the reference, where its own formula is wrong.
REFERENCES: dict[str, Callable] = {
    "as_strided_scatter": _strided_scatter,
    "nn.functional.linear_cross_entropy.chunked": _in_one_chunk,
}


@functools.cache
def database() -> dict[str, Any]:
    """All of PyTorch's operator samples, by full name (``name.variant`` where there is one)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imported late: collecting tests must not wait for it.
        from torch.testing._internal import common_methods_invocations as table  # noqa: PLC0415
    # The table seeds its random operators, which would hide that they draw; the laws seed here.
    table.wrapper_set_seed = _call
    return {full_name(op): op for op in table.op_db}


def _itself(op: Callable) -> Callable:
    return op


def _call(op: Callable, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


def full_name(op: Any) -> str:
    """The name of an operator in these tests."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def curated(law: str) -> list[str]:
    """The curated operators that a law speaks of."""
    names = [name for family in CURATED.values() for name in family.split()]
    names = [name for name in names if name not in NOT_UNDER[law]]
    if law in VMAP_LAWS:
        return names
    if law == "inplace":
        return [name for name in names if name in INPLACE]
    if law == "random":
        return [name for name in names if name in DRAWS | SOMETIMES_DRAWS]
    return [name for name in names if name not in NOT_DIFFERENTIABLE]


# Operators that a law cannot speak of, and why.
_DRAWS = dict.fromkeys(DRAWS, "every sample draws random numbers; the law `random` takes it")
_LENGTHS = dict.fromkeys(
    ["bincount", "nn.functional.one_hot"], "the largest value says how long the result is"
)
_INTEGERS = {"nn.functional.one_hot": "a function of integers alone"}
_REPEATS = (
    "where indices repeat the last entry wins, and PyTorch's pullback is that of no function; the "
    "variant `grad` has samples without repetitions"
)
NOT_UNDER: dict[str, dict[str, str]] = {
    "vmap": _DRAWS,
    "vmap_vmap": _DRAWS,
    "vmap_empty": {**_DRAWS, **_LENGTHS},
    "inplace": _DRAWS,
    "random": {},
    "vjp": _INTEGERS,
    "jvp": {
        **_INTEGERS,
        "linalg.norm.subgradients_at_zero": "not differentiable at its samples, on purpose",
        "nn.functional.max_unpool1d": _REPEATS,
        "nn.functional.max_unpool2d": _REPEATS,
        "nn.functional.max_unpool3d": _REPEATS,
    },
    "vmap_vjp": {
        **_DRAWS,
        **_INTEGERS,
        "nn.functional.multi_head_attention_forward": "all differentiable samples draw",
    },
}
# Operators that write to running statistics, in some samples with the values that these had.
STATISTICS = frozenset(
    """
    _batch_norm_with_update _native_batch_norm_legit native_batch_norm nn.functional.batch_norm
    nn.functional.instance_norm
    """.split()
)
# Operators too badly conditioned at their samples, or with too lossy a formula in PyTorch, for two
# ways to the same tangent to agree in all digits.
LOOSE = frozenset(["cholesky_inverse", "logcumsumexp"])


def others(law: str) -> list[str]:
    """The operators that a law speaks of and that are not curated."""
    known = {name for family in CURATED.values() for name in family.split()}
    names = []
    for name, op in database().items():
        if name in known or name in LEFT_OUT or name in NOT_UNDER[law]:
            continue
        if law in ("vjp", "jvp", "vmap_vjp") and not op.supports_autograd:
            continue
        if law == "inplace" and op.inplace_variant is None:
            continue
        if law == "random" and name not in DRAWS | SOMETIMES_DRAWS:
            continue
        names.append(name)
    return names


@dataclass(frozen=True)
class Case:
    """An operator on one sample, as a function of the tensors in it.

    Attributes:
        text: what to print about it.
        function: takes the tensors of a generation, gives a tuple of tensors.
        reference: the same function in operators that PyTorch differentiates rightly.
        generations: for each example of a batch, the tensors. Shapes and dtypes agree.
        differentiable: positions of the tensors to differentiate in.
        random: whether a plain run draws random numbers.
        loose: whether derivatives agree to a few digits only.
        python: whether a Python value is among the results.
        refused: whether a plain run raises, as an in-place variant may; so must every transform.
        numbers: the numbers among the arguments, such as the bounds of `clamp`.
    """

    text: str
    function: Callable[..., tuple[torch.Tensor, ...]]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    generations: tuple[tuple[torch.Tensor, ...], ...]
    differentiable: tuple[int, ...]
    random: bool
    loose: bool
    python: bool
    refused: bool
    numbers: tuple[float, ...]


def _device() -> str:
    return str(devices.current())


def dtype_of(op: Any) -> torch.dtype:
    """The dtype to try an operator with: float64 where it can."""
    order = (torch.float64, torch.float32, torch.int64, torch.complex128, torch.complex64)
    supported = op.supported_dtypes(_device())
    return next(dtype for dtype in (*order, torch.int32, torch.bool) if dtype in supported)


def other_dtypes(op: Any) -> list[torch.dtype]:
    """One dtype of each kind that an operator supports, beside those of `cases`."""
    supported = op.supported_dtypes(_device()) - {dtype_of(op)}
    kinds = (
        (torch.float32,),
        (torch.complex64,),
        (torch.bfloat16, torch.float16),
        (torch.int64, torch.int32),
        (torch.uint8, torch.int8, torch.int16),
        (torch.bool,),
    )
    return [dtype for kind in kinds for dtype in [d for d in kind if d in supported][:1]]


def cases(
    name: str, law: str, count: int = SAMPLES, dtypes: Sequence[torch.dtype] = ()
) -> list[Case]:
    """The cases of an operator under a law: a spread of `count` of its first samples.

    They are of double precision, real and complex, unless `dtypes` says otherwise.
    """
    op = database()[name]
    dtype = dtype_of(op)
    with warnings.catch_warnings():
        # PyTorch draws some samples with functions that it deprecates itself.
        warnings.simplefilter("ignore")
        if dtypes:
            return [case for d in dtypes for case in _cases(op, name, law, d, count)]
        found = list(_cases(op, name, law, dtype, count))
        if dtype.is_floating_point and torch.complex128 in op.supported_dtypes(_device()):
            found += _cases(op, name, law, torch.complex128, min(count, 2))
    return found


def _cases(op: Any, name: str, law: str, dtype: torch.dtype, count: int) -> Iterator[Case]:
    differentiates = law in ("vjp", "jvp", "vmap_vjp")
    if differentiates and dtype not in op.supported_backward_dtypes(_device()):
        return
    runs = [
        list(itertools.islice(_samples(op, dtype, differentiates, generation), FIRST))
        for generation in range(BATCH)
    ]
    step = -(-len(runs[0]) // count) or 1
    for i in range(0, len(runs[0]), step):
        same = [run[i] for run in runs if i < len(run)]
        case = _case(op, name, law, same)
        if case is not None:
            yield case


def _samples(op: Any, dtype: torch.dtype, requires_grad: bool, generation: int) -> Iterator[Any]:
    random.seed(generation)
    numpy.random.seed(generation)
    devices.seed(generation)
    # Not `op.sample_inputs`, which seeds anew for each sample: all generations would be the same.
    return iter(op.sample_inputs_func(op, _device(), dtype, requires_grad))


def _case(op: Any, name: str, law: str, samples: list[Any]) -> Case | None:
    flat = [tree_flatten((s.input, s.args, s.kwargs)) for s in samples]
    leaves, spec = flat[0]
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    generations = tuple(
        tuple(_alike(leaves[i], other[i] if len(other) == len(leaves) else None) for i in at)
        for other, _ in flat
    )
    generations += (generations[0],) * (BATCH - len(generations))
    differentiable = tuple(k for k, i in enumerate(at) if leaves[i].requires_grad)
    if law in ("vjp", "jvp", "vmap_vjp"):
        process, wrapper = samples[0].output_process_fn_grad, op.gradcheck_wrapper
        if wrapper.__name__ == "wrapper_set_seed":
            wrapper = _call

        behind = BEHIND.get(name, _itself)

        def call(*args, **kwargs):
            return process(wrapper(behind(op.get_op()), *args, **kwargs))
    elif law == "inplace":
        if not isinstance(samples[0].input, torch.Tensor) or samples[0].broadcasts_input:
            return None
        call = op.get_inplace()
    else:
        call = op.get_op()
    copies = law == "inplace"

    def function(*tensors, use=None):
        filled = list(leaves)
        for i, tensor in zip(at, tensors, strict=False):
            filled[i] = tensor.clone() if copies else tensor
        first, args, kwargs = tree_unflatten(filled, spec)
        out = _tensors((use or call)(first, *args, **kwargs))
        if name in UNINITIALISED:
            out = tuple(torch.zeros_like(o) for o in out)
        return out

    if not at:  # nothing to batch: a bystander is
        generations = ((torch.zeros(()),),) * BATCH
    results = []

    def noted(*args, **kwargs):
        results.append(call(*args, **kwargs))
        return results[0]

    before, tried = devices.random_state(), [t.clone() for t in generations[0]]
    refused = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*tried, use=noted)
    except RuntimeError:
        if law != "inplace":
            raise
        refused = True  # the result does not fit into the input
    moved = not all(map(torch.equal, before, devices.random_state()))
    copies = copies or name in STATISTICS or not all(map(_identical, tried, generations[0]))
    text = f"{name}({', '.join(_brief(leaf) for leaf in leaves)})"
    reference = function
    if name in REFERENCES:
        reference = functools.partial(function, use=REFERENCES[name])
    python = any(
        leaf is not None and not isinstance(leaf, torch.Tensor) for leaf in tree_flatten(results)[0]
    )
    return Case(
        text,
        function,
        reference,
        generations,
        differentiable,
        random=moved,
        loose=name in LOOSE,
        python=python,
        refused=refused,
        numbers=tuple(float(n) for n in leaves if type(n) in (int, float)),
    )


def _alike(leaf: torch.Tensor, other: Any) -> torch.Tensor:
    fits = (
        isinstance(other, torch.Tensor)
        and other.shape == leaf.shape
        and other.dtype == leaf.dtype
        and other.layout == leaf.layout
    )
    return (other if fits else leaf).detach()


def _identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=0, atol=0, equal_nan=True
    )


def _tensors(out: Any) -> tuple[torch.Tensor, ...]:
    flat = [leaf for leaf in tree_flatten(out)[0] if leaf is not None]
    return tuple(leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf) for leaf in flat)


def _brief(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)[:60]
