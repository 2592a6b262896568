"""The laws of the transforms, each a function of one `Case`.

A law raises AssertionError where it does not hold. `hold` tries a law on all cases of an operator
and says which ones fail.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

import lamina
from tests import devices
from tests.expected import BrokenLawError, judged
from tests.oracles import pull_back
from tests.samples import BATCH, SAMPLES, Case, cases, database

Tensors = tuple[torch.Tensor, ...]


def hold(
    name: str,
    law: str,
    count: int = SAMPLES,
    dtypes: Sequence[torch.dtype] = (),
) -> None:
    """Fails unless the law holds for every case of the operator (or is expected not to).

    Args:
        name: full name of the operator.
        law: name of the law.
        count: how many samples of each dtype to try.
        dtypes: to try other dtypes than double precision.
    """
    try_on_all(name, law, cases(name, law, count, dtypes), LAWS[law])


def try_on_all(
    name: str,
    law: str,
    subjects: Sequence,
    holds: Callable[..., bool],
) -> None:
    """As `hold`, for a law `holds` of any subjects that have a `text` to print."""
    op = database()[name]
    with judged(op.name, op.variant_test_name, law):
        failures, tried = [], 0
        for subject in subjects:
            try:
                with _no_loop():
                    tried += holds(subject)
            except Exception as error:  # reported below, with the subject
                kind = type(error).__name__
                failures.append((f"{subject.text}\n{kind}: {error}", error))
        if failures:
            text = "\n\n".join(message[:1500] for message, _ in failures[:3])
            raise BrokenLawError(
                f"{law} fails for {len(failures)} of {name}'s samples\n\n{text}",
                {type(error) for _, error in failures},
            ) from failures[0][1]
        assert tried, f"the law {law!r} says nothing about {name}; see NOT_UNDER in samples.py"


@contextmanager
def _no_loop() -> Iterator[None]:
    """The loop over the examples and warnings of the library are errors; PyTorch's are ignored."""
    before = lamina.config.fallback
    lamina.config.fallback = "error"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        lamina.config.fallback = before
    own = [w for w in caught if w.category.__module__.split(".")[0] in OWN]
    assert not own, f"warned: {own[0].message}"


OWN = ("lamina", "lamina_core")


# ---------------------------------------------------------------------------------------------
# vmap
# ---------------------------------------------------------------------------------------------


def vmap_is_a_stacked_loop(case: Case) -> bool:
    """`vmap(f)(*batches) == stack(f(*examples))`, for every choice of batched arguments.

    Examples whose results differ in shape, or are Python values that differ, do not stack; `vmap`
    must then raise, and where a plain run does.
    """
    if case.random:
        return False
    if case.refused:
        args, in_dims = batch(case, range(len(case.generations[0])), "first")
        try:
            lamina.vmap(case.function, in_dims)(*args)
        except RuntimeError:
            return True
        raise AssertionError("vmap does not raise, and PyTorch does")
    for turn, batched in enumerate(subsets(len(case.generations[0]))):
        rows = [case.function(*examples(case, batched, i)) for i in range(BATCH)]
        ragged = not stackable(case, rows)
        expected = () if ragged else stacked(rows)
        for place in ("first", "last", "negative"):
            args, in_dims = batch(case, batched, place)
            out_dims = -1 if place == "negative" and turn == 0 else 0
            try:
                actual = lamina.vmap(case.function, in_dims, out_dims)(*args)
            except RuntimeError:
                if ragged:
                    continue
                raise
            assert not ragged, f"in_dims={in_dims}: the examples' results do not stack"
            wanted = tuple(t.movedim(0, out_dims) for t in expected)
            close(actual, wanted, f"in_dims={in_dims}, out_dims={out_dims}")
    return True


def stackable(case: Case, rows: Sequence[Tensors]) -> bool:
    """Whether the results of examples are of one shape each, and of one value if of Python."""
    columns = list(zip(*rows, strict=True))
    if any(len({t.shape for t in column}) > 1 for column in columns):
        return False
    return not case.python or all(torch.equal(t, column[0]) for column in columns for t in column)


def vmap_of_vmap_is_two_loops(case: Case) -> bool:
    """`vmap(vmap(f))` is a loop in a loop, with arguments mapped by both or by one of the two."""
    if case.random:
        return False
    tensors = case.generations[0]
    for levels in _levels(len(tensors)):
        places = [_nested_batch(case, k, both) for k, both in enumerate(levels)]
        rows = [
            [
                case.function(*(_picked(case, k, both, o, i) for k, both in enumerate(levels)))
                for i in range(BATCH)
            ]
            for o in range(OUTER)
        ]
        fits = stackable(case, [outs for row in rows for outs in row])
        args, outer_dims, inner_dims = zip(*places, strict=True)
        try:
            inner = lamina.vmap(case.function, inner_dims)
            actual = lamina.vmap(inner, outer_dims)(*args)
        except RuntimeError:
            if not fits:
                continue
            raise
        assert fits, f"{outer_dims}, {inner_dims}: the results do not stack"
        wanted = stacked([stacked(row) for row in rows])
        close(actual, wanted, f"in_dims={outer_dims} of the outer, {inner_dims} of the inner vmap")
    return True


OUTER = 2  # the batch size of the outer of two


def _levels(count: int) -> list[tuple[str, ...]]:
    """Which of two vmaps map each argument; both map something."""
    choices = [("both",) * count]
    if count > 1:
        choices.append(("outer",) + ("inner",) * (count - 1))
        choices.append(("inner",) + ("both",) * (count - 1))
    if count > 2:
        choices.append(("none", *("outer", "inner") * count)[:count])
    return choices


def _picked(case: Case, k: int, levels: str, o: int, i: int) -> torch.Tensor:
    at = {"both": (o + i) % BATCH, "outer": o, "inner": i, "none": 0}[levels]
    return case.generations[at][k]


def _nested_batch(case: Case, k: int, levels: str) -> tuple:
    """An argument, and its in_dims of the outer and of the inner vmap: never the same place.

    An example is laid out in memory as the sample is, which `as_strided` goes by.
    """
    rank = case.generations[0][k].ndim
    if levels == "none":
        return case.generations[0][k], None, None
    if levels == "outer":
        outer = torch.stack([_picked(case, k, levels, o, 0) for o in range(OUTER)])
        return outer.movedim(0, rank), rank, None
    rows = torch.stack(
        [
            torch.stack([_picked(case, k, levels, o, i) for i in range(BATCH)])
            for o in range(OUTER if levels == "both" else 1)
        ]
    ).movedim(1, -1)
    if levels == "inner":
        return rows[0], None, -1
    return rows.movedim(0, 1), 1, -1


def vmap_of_no_examples(case: Case) -> bool:
    """With a batch of size 0 the results have the shapes and dtypes of examples."""
    if case.random:
        return False
    rows = [case.function(*generation) for generation in case.generations]
    if case.python or not stackable(case, rows):
        return True  # the results depend on values, of which there are none
    plain = rows[0]
    everything = tuple(range(len(case.generations[0])))
    for batched in dict.fromkeys([everything, everything[:1]]):
        args, in_dims = batch(case, batched, "last")
        none = [a if d is None else a.narrow(d, 0, 0) for a, d in zip(args, in_dims, strict=True)]
        actual = lamina.vmap(case.function, in_dims)(*none)
        for out, example in zip(actual, plain, strict=True):
            assert out.shape == (0, *example.shape), f"in_dims={in_dims}: {out.shape}"
            assert out.dtype == example.dtype, f"in_dims={in_dims}: {out.dtype}"
    return True


def vmap_of_random_draws(case: Case) -> bool:
    """The three kinds of randomness, on equal examples.

    "same" gives equal results for equal examples, "different" gives results of the right shape and
    dtype (and not all equal, where plain runs never are), "error" raises.
    """
    if not case.random:
        return False
    tensors = case.generations[0]
    args = [torch.stack([t] * BATCH) for t in tensors]
    plain = case.function(*tensors)
    same = lamina.vmap(case.function, randomness="same")(*args)
    different = lamina.vmap(case.function, randomness="different")(*args)
    for outs in (same, different):
        for out, expected in zip(outs, plain, strict=True):
            assert out.shape == (BATCH, *expected.shape)
            assert out.dtype == expected.dtype
    for out in same:
        for example in out:
            torch.testing.assert_close(example, out[0], rtol=0, atol=0, equal_nan=True)
    reruns = [case.function(*tensors) for _ in range(6)]
    if all(_differ(a, b) for a, b in itertools.combinations(reruns, 2)):
        rows = [tuple(out[i] for out in different) for i in range(BATCH)]
        pairs = itertools.combinations(rows, 2)
        assert any(_differ(a, b) for a, b in pairs), "all examples drew the same"
    try:
        lamina.vmap(case.function)(*args)
    except RuntimeError:
        return True
    raise AssertionError('randomness="error" let a random draw pass')


def _differ(first: Tensors, second: Tensors) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------
# Reverse and forward mode
# ---------------------------------------------------------------------------------------------


def vjp_is_autograd(case: Case) -> bool:
    """`vjp` gives what `torch.autograd.grad` gives for the same cotangents."""
    plain = differentiated(case, case.generations[0])
    if plain is None:
        return False
    outs, expected, cotangents = plain
    f, primals = restricted(case, case.generations[0])
    devices.seed(0)
    actual_outs, pullback = lamina.vjp(f, *primals)
    close(actual_outs, outs, "the value")
    close(pullback(cotangents), expected, "the cotangents")
    return True


def jvp_is_the_transposed_vjp(case: Case) -> bool:
    """`jvp` gives the derivative of PyTorch's pullback in its cotangent.

    Where PyTorch's pullback has no derivative, or not a finite one, the reference is a central
    difference.
    """
    tensors = case.generations[0]
    kept = kept_outputs(case, tensors)
    if not kept:
        return False
    f, primals = restricted(case, tensors, kept)
    tangents = tuple(noise(p, 7 + i) for i, p in enumerate(primals))
    plain, _ = restricted(of_reference(case), tensors, kept)
    expected, rough = expected_tangents(plain, primals, tangents)
    devices.seed(0)
    _, actual = lamina.jvp(f, primals, tangents)
    close(actual, expected, "the tangents", case.loose or rough)
    return True


def vmap_of_vjp_is_a_loop_of_autograd(case: Case) -> bool:
    """`vmap(vjp)` over everything, over one input, and over the cotangents alone."""
    if case.random:
        return False
    kept = kept_outputs(case, case.generations[0])
    if not kept:
        return False
    wrt = case.differentiable
    for batched in dict.fromkeys([wrt, wrt[:1], ()]):
        rows = [examples(case, batched, i) for i in range(BATCH)]
        plain = [differentiated(case, row, kept, seed=i) for i, row in enumerate(rows)]
        expected, cotangents = stacked([p[1] for p in plain]), stacked([p[2] for p in plain])
        args, in_dims = batch(case, batched, "first")

        def pulled_back(cts, *tensors, kept=kept):
            f, primals = restricted(case, tensors, kept)
            return lamina.vjp(f, *primals)[1](cts)

        actual = lamina.vmap(pulled_back, (0, *in_dims))(cotangents, *args)
        close(actual, expected, f"in_dims={in_dims} and batched cotangents")
    return True


LAWS: dict[str, Callable[[Case], bool]] = {
    "vmap": vmap_is_a_stacked_loop,
    "vmap_vmap": vmap_of_vmap_is_two_loops,
    "vmap_empty": vmap_of_no_examples,
    "inplace": vmap_is_a_stacked_loop,  # its cases call the in-place variant on a fresh copy
    "random": vmap_of_random_draws,
    "vjp": vjp_is_autograd,
    "jvp": jvp_is_the_transposed_vjp,
    "vmap_vjp": vmap_of_vjp_is_a_loop_of_autograd,
}


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def subsets(count: int) -> list[tuple[int, ...]]:
    """Choices of batched arguments, all of them first: every choice up to three arguments."""
    everything = tuple(range(count))
    if count > 3:
        return [everything, everything[1:], *((i,) for i in everything)]
    sizes = range(count, 0, -1)
    return [s for size in sizes for s in itertools.combinations(everything, size)]


def examples(case: Case, batched: Sequence[int], i: int) -> Tensors:
    """The arguments of example `i`; those not batched are the same for all."""
    return tuple(
        case.generations[i][k] if k in batched else tensor
        for k, tensor in enumerate(case.generations[0])
    )


def batch(case: Case, batched: Sequence[int], place: str) -> tuple[Tensors, tuple]:
    """The batched arguments and their in_dims."""
    args, in_dims = [], []
    for k, tensor in enumerate(case.generations[0]):
        if k not in batched:
            args.append(tensor)
            in_dims.append(None)
            continue
        dim = {"first": 0, "last": tensor.ndim, "negative": -(1 + k % (tensor.ndim + 1))}[place]
        stacked = torch.stack([generation[k] for generation in case.generations])
        args.append(stacked.movedim(0, dim))
        in_dims.append(dim)
    return tuple(args), tuple(in_dims)


def stacked(rows: Sequence[Tensors]) -> Tensors:
    """The outputs of all examples, output by output."""
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


# ---------------------------------------------------------------------------------------------
# Derivatives by PyTorch
# ---------------------------------------------------------------------------------------------


def restricted(case: Case, tensors: Tensors, kept: Sequence[int] | None = None):
    """The case as a function of its differentiable tensors, giving its differentiable outputs."""
    if kept is None:
        kept = kept_outputs(case, case.generations[0])

    def f(*primals):
        filled = list(tensors)
        for k, primal in zip(case.differentiable, primals, strict=True):
            filled[k] = primal
        outs = case.function(*filled)
        return tuple(outs[i] for i in kept)

    return f, tuple(tensors[k] for k in case.differentiable)


def of_reference(case: Case) -> Case:
    """The case with the function that PyTorch differentiates."""
    return dataclasses.replace(case, function=case.reference)


def kept_outputs(case: Case, tensors: Tensors) -> list[int]:
    """Positions of the outputs that PyTorch gives a derivative."""
    filled = [
        t.detach().requires_grad_() if k in case.differentiable else t
        for k, t in enumerate(tensors)
    ]
    return [i for i, out in enumerate(case.function(*filled)) if out.requires_grad]


def differentiated(case: Case, tensors: Tensors, kept: list[int] | None = None, seed: int = 0):
    """Outputs, gradients and cotangents, by `torch.autograd.grad`; None without outputs."""
    kept = kept_outputs(case, tensors) if kept is None else kept
    if not kept:
        return None
    f, primals = restricted(of_reference(case), tensors, kept)
    primals = tuple(p.detach().requires_grad_() for p in primals)
    devices.seed(0)
    outs = f(*primals)
    cotangents = tuple(noise(out, 100 * seed + i) for i, out in enumerate(outs))
    grads = torch.autograd.grad(
        outs, primals, cotangents, allow_unused=True, materialize_grads=True
    )
    return tuple(o.detach() for o in outs), grads, cotangents


def expected_tangents(
    f: Callable[..., Tensors], primals: Tensors, tangents: Tensors
) -> tuple[Tensors, bool]:
    """The pushforward by PyTorch's pullback, else a central difference; and whether it is that."""
    try:
        expected = _pushforward(f, primals, tangents)
    except (RuntimeError, NotImplementedError):
        expected = None
    if expected is None or not all(t.isfinite().all() for t in expected):
        return _central_difference(f, primals, tangents), True
    return expected, False


def _pushforward(f: Callable[..., Tensors], primals: Tensors, tangents: Tensors) -> Tensors:
    devices.seed(0)
    leaves = tuple(p.detach().requires_grad_() for p in primals)
    outs = f(*leaves)
    probes = tuple(noise(out, 50 + i).requires_grad_() for i, out in enumerate(outs))
    pulled = pull_back(outs, leaves, probes, create_graph=True)
    return pull_back(pulled, probes, tangents)


def _central_difference(f: Callable[..., Tensors], primals: Tensors, tangents: Tensors) -> Tensors:
    step = 1e-6 if primals[0].dtype in (torch.float64, torch.complex128) else 1e-3

    def at(sign: int) -> Tensors:
        devices.seed(0)
        moved = [p + sign * step * t for p, t in zip(primals, tangents, strict=True)]
        return f(*moved)

    return tuple((hi - lo) / (2 * step) for hi, lo in zip(at(1), at(-1), strict=True))


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """A tensor of normal values, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)


def _tolerance(dtype: torch.dtype) -> float:
    if dtype in (torch.float64, torch.complex128):
        return 1e-7
    if dtype in (torch.float32, torch.complex64):
        return 1e-4
    return 2 * torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def close(actual: Sequence, expected: Sequence, what: str, loose: bool = False) -> None:
    """Fails unless values, shapes and dtypes agree, to within rounding of the largest entry.

    A batch may be computed in another order than its examples. Integers must be equal; half types
    may differ by two units in the last place of the largest entry.
    """
    assert len(actual) == len(expected), f"{what}: {len(actual)} outputs, not {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        tolerance = 1e-4 if loose else _tolerance(e.dtype)
        scale = 1.0
        if e.is_floating_point() or e.is_complex():
            finite = e.abs()[e.isfinite()]
            scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(
            a,
            e.detach(),
            rtol=tolerance,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda text: f"{what}\n{text}",
        )
