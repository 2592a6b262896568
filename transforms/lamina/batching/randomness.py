"""Random ops under vmap: one draw per example, one draw for all, or an error.

# NOTE [Seeds]
Under "different" a factory, a `*_like` op, and any op that draws each element on its own is one
call of the same op with the batch dim in front, so its numbers are those of plain PyTorch for that
shape, nested levels included (the outermost first). The others run example by example, in order.
Under "same" an op draws what it would draw outside vmap; one whose parameters are mapped draws for
each example from one seed.

A call in chunks gives what the call without gives: each chunk starts from the same state of every
generator, and under "different" draws the numbers of all examples, of which it keeps its own. That
costs the draws of all examples in every chunk, and the memory of one such draw at a time. Numbers
drawn by rejection (binomial, dirichlet, gamma, poisson) are the exception where parameters are
mapped: how many are taken depends on the parameters, and a chunk does not know those of the others.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import ensure_batched, logical_shape, pad_rank
from lamina_core.dispatch import lower
from lamina_core.errors import RandomnessError
from lamina_core.overloads import aten
from lamina_core.schema import OpFacts

__all__ = ["Part", "batch_random"]


def batch_random(
    interpreter: Any, known: OpFacts, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    """Run a random op (never an in-place one) as `randomness` says.

    Raises:
        RandomnessError: With `randomness="error"`.
    """
    op = known.op
    size = interpreter.batch_size
    batched = any(d is not None for d in _flat(dims))
    if op is aten.native_dropout.default and (not values[2] or values[1] in (0.0, 1.0)):
        # All or nothing is kept, so nothing is drawn.
        out, mask = lower(interpreter, op, tuple(values), kwargs)
        return (out, mask), (dims[0], dims[0])
    if interpreter.randomness == "error":
        raise interpreter.error(
            RandomnessError,
            f"{known.name} draws random numbers, and vmap was not told what that means",
            'to fix: pass randomness="different" for a draw per example, or "same" for one for all',
        )
    part = interpreter.part
    if part is not None:
        part.rewind.note(_generator(known, values, kwargs))
    if interpreter.randomness == "same":
        if not batched:
            return lower(interpreter, op, tuple(values), kwargs), None
        return _same_for_all(interpreter, known, values, dims, kwargs)
    if not known.tensor_args and not known.list_args:
        position = next(
            (i for i, name in enumerate(known.positional) if name in ("size", "n")), None
        )
        if position is not None and known.positional[position] == "size":
            args = list(values)
            args[position] = [size if part is None else part.total, *args[position]]
            return _own(part, size, lower(interpreter, op, tuple(args), kwargs)), 0
        return _one_by_one(interpreter, op, values, dims, kwargs)
    if op._schema.name in _BATCH_FREE:
        args = [
            ensure_batched(v, d, size) if isinstance(v, torch.Tensor) else v
            for v, d in zip(values, dims, strict=True)
        ]
        args = _pad_all(args, values, dims)
        if part is not None:
            args = [part.among_all(a) if isinstance(a, torch.Tensor) else a for a in args]
        return _own(part, size, lower(interpreter, op, tuple(args), kwargs)), 0
    return _one_by_one(interpreter, op, values, dims, kwargs)


# Ops that draw each element on its own, so a batch dim in front changes nothing but the shape.
_BATCH_FREE = frozenset(
    f"aten::{name}"
    for name in (
        "_standard_gamma",
        "bernoulli",
        "binomial",
        "cauchy",
        "exponential",
        "geometric",
        "log_normal",
        "native_dropout",
        "normal",
        "normal_functional",
        "poisson",
        "rand_like",
        "randint_like",
        "randn_like",
        "random",
        "rrelu_with_noise",
        "uniform",
    )
)


def _own(part: Part | None, size: int, drawn: Any) -> Any:
    """Of numbers for all examples those of this chunk; a copy, so that the rest is not kept."""
    if part is None:
        return drawn
    if isinstance(drawn, torch.Tensor):
        return drawn.narrow(0, part.start, size).clone()
    return tuple(_own(part, size, one) for one in drawn)


def _flat(dims: Any) -> list[Any]:
    found = []
    for dim in dims:
        found.extend(dim if isinstance(dim, list) else [dim])
    return found


def _pad_all(args: list[Any], values: list[Any], dims: tuple[Any, ...]) -> list[Any]:
    """Give all batched tensors one rank, so that operands of different ranks broadcast."""
    ranks = [
        value.dim() - (dim is not None)
        for value, dim in zip(values, dims, strict=True)
        if isinstance(value, torch.Tensor)
    ]
    rank = max(ranks)
    out = []
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.dim() < rank + 1:
            missing = rank + 1 - arg.dim()
            arg = arg.reshape(arg.shape[0], *([1] * missing), *arg.shape[1:])
        out.append(arg)
    return out


# Ops that look at the shape, dtype and device of their first operand, and not at its values.
_SHAPE_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        "cauchy",
        "exponential",
        "geometric",
        "log_normal",
        "normal_functional",
        "rand_like",
        "randint_like",
        "randn_like",
        "random",
        "uniform",
    )
)


def _same_for_all(
    interpreter: Any, known: OpFacts, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    """One draw for batched operands: of what does not depend on their values."""
    name = known.op._schema.name
    size = interpreter.batch_size

    def draw(op: Any, *args: Any, **kwargs: Any) -> Any:
        return lower(interpreter, op, args, kwargs)

    if name in _SHAPE_ONLY or known.op is aten.bernoulli.p:
        return draw(known.op, _example(values[0], dims[0]), *values[1:], **kwargs), None
    if known.op in (aten.bernoulli.default, aten.bernoulli.Tensor):
        last = len(values) - 1 if known.op is aten.bernoulli.Tensor else 0
        p, shape = values[last], _example(values[0], dims[0])
        uniform = draw(aten.uniform.default, shape.to(p.dtype), **kwargs)
        p = pad_rank(p, dims[last], uniform.dim())
        return (uniform < p).to(values[0].dtype), None if dims[last] is None else 0
    if name == "aten::native_dropout":
        x, p, _ = values
        scaled, mask = draw(known.op, _example(x, dims[0]) + 1, p, True)
        x = ensure_batched(x, dims[0], size)
        return (x * scaled, mask), (0, None)
    if known.op in _NORMAL:
        return _normal(draw, values, dims, kwargs), 0
    if name == "aten::multinomial":
        return _multinomial(
            draw, ensure_batched(values[0], dims[0], size), *values[1:], **kwargs
        ), 0
    return _from_one_seed(interpreter, known, values, dims, kwargs)


_NORMAL = (aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)


def _example(x: Any, x_bdim: int | None) -> Any:
    """Zeros of the shape, dtype and device of one example."""
    return x.new_zeros(logical_shape(x, x_bdim))


def _normal(draw: Any, values: list[Any], dims: tuple[Any, ...], kwargs: Any) -> Any:
    """One draw of standard normal numbers, scaled: mean + std z, with z of their shape."""
    std = values[1] if len(values) > 1 else 1.0
    both = list(zip((values[0], std), (*dims, None)[:2], strict=True))
    tensors = [(v, d) for v, d in both if isinstance(v, torch.Tensor)]
    shape = torch.broadcast_shapes(*[logical_shape(v, d) for v, d in tensors])
    z = draw(aten.normal_functional.default, tensors[0][0].new_zeros(shape), **kwargs)
    mean, std = (pad_rank(v, d, z.dim()) if isinstance(v, torch.Tensor) else v for v, d in both)
    return (mean + std * z).detach()  # PyTorch gives `normal` a derivative of 0


def _multinomial(draw: Any, p: Any, count: int, replacement: bool = False, **kwargs: Any) -> Any:
    """[B, *, n] -> [B, *, count]: equal rows of weights give equal draws.

    With replacement by the inverse of the distribution function, at one uniform number per draw;
    without by a race, in which category k needs an exponential time of rate p[k].
    """
    if replacement:
        level = draw(aten.uniform.default, p.new_zeros([*p.shape[1:-1], count]), **kwargs)
        reached = p.cumsum(-1) / p.sum(-1, keepdim=True)
        # Rounding must not leave a number above the last level, nor give it to a weight of 0.
        reached = reached / reached[..., -1:]
        level = level.expand(*p.shape[:-1], count).contiguous()
        return torch.searchsorted(reached, level, right=True)
    times = draw(aten.exponential.default, p.new_zeros(p.shape[1:]), **kwargs)
    return (p / times).topk(count, -1).indices


def _one_by_one(
    interpreter: Any, op: Any, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    """A draw per example, one after the other; with no examples one, to learn the shapes.

    In a chunk also a draw for each example of the others, which moves the generator on.
    """
    size = interpreter.batch_size
    part = interpreter.part
    start, total = (0, size or 1) if part is None else (part.start, part.total)
    outs = []
    for index in range(-start, total - start):
        own = 0 <= index < max(size, 1)
        args = _arguments_of(index if own else 0, size, values, dims)
        out = lower(interpreter, op, args, kwargs)
        if own:
            outs.append(out)
    return _stacked(outs, size)


def _from_one_seed(
    interpreter: Any, known: OpFacts, values: list[Any], dims: tuple[Any, ...], kwargs: Any
) -> tuple[Any, Any]:
    """A draw per example, each by a generator of the same seed, which is one draw.

    How much these ops take from a generator depends on their parameters, so the caller's own must
    not be the one: what is drawn next would depend on the last example.
    """
    size = interpreter.batch_size
    caller = _generator(known, values, kwargs)
    for level in interpreter.path():
        part = getattr(level, "part", None)
        if part is not None:
            part.rewind.note(caller)
    seed = int(torch.randint(2**62, (), generator=caller, device=caller.device))
    generator = torch.Generator(caller.device)
    values, dims = list(values), tuple(dims)
    if "generator" in known.positional:
        missing = known.positional.index("generator") + 1 - len(values)
        values, dims = [*values, *[None] * missing], (*dims, *[None] * missing)
        values[known.positional.index("generator")] = generator
    else:
        kwargs = {**kwargs, "generator": generator}
    outs = []
    for index in range(size or 1):
        generator.manual_seed(seed)
        args = _arguments_of(index, size, values, dims)
        outs.append(lower(interpreter, known.op, args, kwargs))
    return _stacked(outs, size)


def _arguments_of(
    index: int, size: int, values: list[Any], dims: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The arguments of one example; if there is none, ones, which are parameters of any draw."""
    return tuple(
        [
            v if d is None else v.select(d, index) if size else v.new_ones(logical_shape(v, d))
            for v, d in zip(values, dims, strict=True)
        ]
    )


def _stacked(outs: list[Any], size: int) -> tuple[Any, Any]:
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs)[:size], 0
    columns = zip(*outs, strict=True)
    return tuple(torch.stack(column)[:size] for column in columns), (0,) * len(outs[0])


# -- generators ------------------------------------------------------------------------------------


def _generator(known: OpFacts, values: list[Any], kwargs: dict[str, Any]) -> Any:
    """The generator that an op draws from."""
    given = kwargs.get("generator")
    if given is None:
        given = next((value for value in values if isinstance(value, torch.Generator)), None)
    if given is not None:
        return given
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    device = kwargs.get("device")
    if device is None:
        device = tensors[0].device if tensors else torch.get_default_device()
    device = torch.device(device)
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]


class Part:
    """Which of all examples a chunk holds, and how all chunks start from the same random state.

    Args:
        total: How many examples there are in all chunks.

    Attributes:
        start: The first example of the present chunk.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.start = 0
        self.rewind = Rewind()

    def at(self, start: int) -> Part:
        """Go on to the chunk that starts there."""
        self.start = start
        self.rewind.rewind()
        return self

    def among_all(self, x: Any) -> Any:
        """[chunk, ...] -> [total, ...]: parameters of the others, which are parameters of any."""
        count = x.shape[0]
        before, after = self.start, self.total - self.start - count
        others = [x[:1].expand(n, *x.shape[1:]) for n in (before, after)]
        return torch.cat([others[0], x, others[1]])


class Rewind:
    """Sets the generators of a chunked call back, so that all chunks draw the same."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[Any, Any]] = {}
        self.note(torch.default_generator)

    def note(self, generator: Any) -> None:
        """Remember the state of a generator when it is first drawn from."""
        if id(generator) not in self.states:
            self.states[id(generator)] = (generator, generator.get_state())

    def rewind(self) -> None:
        """Bring all of them back to that state."""
        for generator, state in self.states.values():
            generator.set_state(state)
