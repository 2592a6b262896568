"""`checkpoint`: compute again in the backward pass what a policy does not say to keep.

`torch.utils.checkpoint` runs the function a second time, under every transform: see
NOTE [Saved tensors]. A policy is about single ops. It is asked at level 0, where all transforms
have become ops on plain tensors: a dispatch mode under that of the levels keeps the outputs of the
ops that the policy names, and in the second run these ops are not computed but answered from there.

# NOTE [Answering from the first run]
The n-th call of an op in the second run is the n-th call of that op in the first, and is answered
if its arguments look alike: the same numbers, shapes and dtypes, and the same tensors where they
were there before the region. What has been written to since is computed again; so are views, which
cost nothing, and random ops, since the generator has to move on. PyTorch's own selective
checkpointing keeps tensors of the level it is entered at, wrappers with their place on a tape among
them, and can answer for one backward pass.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import checkpoint as _torch

from lamina.checkpointing.kept import DROP, Call, Kept, Offload, storage_of
from lamina_core import pytree
from lamina_core.debug import calling_line
from lamina_core.mode import mode_off, thread_mode
from lamina_core.schema import OpFacts, facts
from lamina_core.scopes import run_at
from lamina_core.tensors import tensors_in
from lamina_core.torch_hooks.modes import DispatchMode, pop_mode, push_mode
from lamina_core.wrapper import LevelTensor, plain_of

__all__ = [
    "HOME",
    "Policy",
    "Recording",
    "Region",
    "checkpoint",
    "checkpoint_name",
]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor
# The folder of the package, whose lines are not the user's.
HOME = str(Path(__file__).parents[1])
# `(op, *args, **kwargs)` -> whether the output is kept: a bool, an `Offload`, or `DROP`.
Policy = Callable[..., Any]


def checkpoint(fun: Callable[..., Any], *, policy: Policy | None = None) -> Callable[..., Any]:
    """Keep only the arguments of a function for the backward pass, and run it again there.

    It has no effect on the result, and none at all where nothing is differentiated in reverse.
    Random ops draw the same numbers again. It works under every transform and with PyTorch's own
    autograd, whose parameters the function may close over.

    Args:
        fun: Takes and returns pytrees of tensors, positionally and by keyword. It has to compute
            the same again when it is called again.
        policy: Which op outputs to keep all the same: one of `lamina.checkpoint_policies`, or a
            function `(op, *args, **kwargs) -> bool` that is asked for every ATen op on plain
            tensors. The default keeps none.

    Returns:
        A function of the same arguments.

    Raises:
        torch.utils.checkpoint.CheckpointError: By the backward pass, if the second run computes
            something else.

    Example:
        >>> import torch
        >>> from lamina import checkpoint, grad
        >>> runs = []
        >>> def block(x):
        ...     runs.append(x.shape)
        ...     return x.sin().cos()
        >>> grad(lambda x: checkpoint(block)(x).sum())(torch.zeros(2)), len(runs)
        (tensor([-0., -0.]), 2)
    """

    @functools.wraps(fun)
    def again(*args: Any, **kwargs: Any) -> Any:
        region = Region(policy)
        if _thread.depth == 0:  # what is inside a region is computed again with it
            for recording in _thread.recordings:
                region.source = calling_line(HOME)
                recording.regions.append((region, (args, kwargs)))
        _thread.depth += 1
        try:
            return _torch.checkpoint(
                functools.partial(fun, **kwargs),
                *args,
                use_reentrant=False,
                context_fn=_torch.noop_context_fn if policy is None else region.contexts,
            )
        finally:
            _thread.depth -= 1

    return again


def checkpoint_name(x: Any, name: str) -> Any:
    """Give a value a name that the policies of `checkpoint` speak of; returns the value.

    A name concerns the op that has computed the tensor: if the policy keeps it, that op is not
    computed again. Elsewhere the name has no effect.

    Args:
        x: A pytree of tensors.
        name: The name.

    Example:
        >>> import torch
        >>> from lamina import checkpoint, checkpoint_name, checkpoint_policies, grad
        >>> def block(x, w):
        ...     h = checkpoint_name(x @ w, "hidden")
        ...     return h.relu().sum()
        >>> keep = checkpoint_policies.save_only_these_names("hidden")
        >>> grad(checkpoint(block, policy=keep))(torch.ones(1, 2), torch.ones(2, 3))
        tensor([[3., 3.]])
    """
    if _thread.regions or _thread.recordings:
        for leaf in pytree.leaves(x):
            if isinstance(leaf, Tensor):
                plain = plain_of(leaf)
                for recording in _thread.recordings:
                    recording.names[storage_of(plain)] = name
                with run_at(None), torch.no_grad():
                    for region in _thread.regions:
                        region.name(plain, name)
    return x


class Recording:
    """What happens in a block: the regions entered, each with its arguments, and the names given.

    Attributes:
        regions: Pairs of a region and a pytree of its arguments.
        names: Names by the storage of the tensors that have them.
    """

    def __init__(self) -> None:
        self.regions: list[tuple[Region, Any]] = []
        self.names: dict[int, str] = {}

    def __enter__(self) -> Recording:
        _thread.recordings.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _thread.recordings.remove(self)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.depth = 0  # how many regions are being run
        self.regions: list[Region] = []  # in their first run, with a policy
        self.recordings: list[Recording] = []


_thread = _Thread()


class Region:
    """One call of a checkpointed function: what its policy has kept of the first run."""

    source = ""  # where it was called, if anybody asks

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self.kept: dict[tuple[int, int], Kept] = {}
        # In the first run: which call made a storage, with what is needed to keep it after all.
        self.makers: dict[int, tuple[Any, Any]] = {}

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the first run and around each later one, as `torch.utils.checkpoint` wants it."""
        return self._first(), _Below(functools.partial(_Again, self))

    @contextmanager
    def _first(self) -> Iterator[None]:
        _thread.regions.append(self)
        try:
            with _Below(functools.partial(_First, self)):
                yield
        finally:
            _thread.regions.remove(self)
            self.makers.clear()

    def tensors(self) -> list[tuple[str, Any]]:
        """All that is kept, each with the name of its op."""
        return [
            (one.call.name, leaf)
            for one in self.kept.values()
            for leaf in one.leaves
            if isinstance(leaf, Tensor)
        ]

    def made(self, call: Call, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Ask the policy about one call of the first run."""
        outs = tensors_in((out,), {})
        given = {storage_of(tensor) for tensor in tensors_in(args, kwargs)}
        if not outs or any(storage_of(tensor) in given for tensor in outs):
            return
        policy: Any = self.policy
        how = policy(op, *args, **kwargs)
        if how:
            self.kept[call.key] = Kept(call, out, how)
        first = outs[0]
        # The other outputs are kept until the region ends: a name may ask for all of them.
        shape = (first.shape, first.stride(), first.storage_offset(), first.dtype)
        rest = out[1:] if isinstance(out, tuple) else None
        self.makers[storage_of(first)] = call, (shape, rest)

    def name(self, tensor: Any, name: str) -> None:
        """Ask the policy about a named tensor."""
        maker = self.makers.get(storage_of(tensor))
        if maker is None:
            return  # an argument, or random: the second run has it anyway, or makes it anyway
        policy: Any = self.policy
        how = policy(checkpoint_name, tensor, name=name)
        call, ((size, stride, offset, dtype), rest) = maker
        if how is DROP:
            self.kept.pop(call.key, None)
        elif how and (call.key not in self.kept or isinstance(how, Offload)):
            if tensor.dtype is not dtype:
                return  # seen through another dtype, it does not show what the op gave
            whole = tensor.as_strided(size, stride, offset)
            out = whole if rest is None else (whole, *rest)
            self.kept[call.key] = Kept(call, out, how)


class _Counting(DispatchMode):
    """Tells the calls of one run apart."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region
        self.calls: Counter[int] = Counter()
        self.made: set[int] = set()  # the storages that this run has made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Go on to level 0 with what a rule calls on wrappers, then run the op as `run` says."""
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if not any(type(tensor) in _CLASSES for tensor in tensors):
            given = {storage_of(tensor) for tensor in tensors}
            out = self.run(func, args, kwargs)
            self.made |= {storage_of(tensor) for tensor in tensors_in((out,), {})} - given
            return out
        push_mode(self)  # torch has taken it off for this handler
        try:
            return LevelTensor.__torch_dispatch__(func, types, args, kwargs)
        finally:
            pop_mode(None)

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on plain tensors."""
        raise NotImplementedError

    def call(self, op: Any, args: Any, kwargs: Any) -> Call | None:
        """What tells this call from others; None for an op that is always computed."""
        known = facts(op)
        if known.is_view or known.may_be_view or known.mutated or _draws(known, args, kwargs):
            return None
        self.calls[id(op)] += 1
        looks = [self._look(arg) for arg in (*args, *kwargs.values())]
        return Call((id(op), self.calls[id(op)]), known.name, looks)

    def _look(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            storage = storage_of(arg)
            return arg.shape, arg.dtype, None if storage in self.made else storage
        return [self._look(item) for item in arg] if isinstance(arg, list | tuple) else arg


def _draws(known: OpFacts, args: Any, kwargs: Any) -> bool:
    """Whether a call moves a generator on: attention does so for a dropout of its own."""
    if not known.is_random or "dropout_p" not in known.arg_names:
        return known.is_random
    at = known.arg_names.index("dropout_p")
    return bool(args[at] if at < len(args) else kwargs.get("dropout_p", 0))


class _First(_Counting):
    """The first run."""

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Run it, and ask the policy."""
        call = self.call(op, args, kwargs)
        out = op(*args, **kwargs)
        if call is not None:
            self.region.made(call, op, args, kwargs, out)
        return out


class _Again(_Counting):
    """A later run."""

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Answer from the first run, if that has been kept."""
        call = self.call(op, args, kwargs)
        kept = None if call is None else self.region.kept.get(call.key)
        if kept is not None and kept.call == call and kept.is_intact():
            return kept.out()
        return op(*args, **kwargs)


class _Below:
    """Enter a fresh dispatch mode under that of the levels, where it sees what they end in."""

    def __init__(self, make: Callable[[], DispatchMode]) -> None:
        self.make = make
        self.entered: list[tuple[DispatchMode, bool]] = []

    def __enter__(self) -> None:
        mode = self.make()
        off = mode_off()
        off.__enter__()
        mode.__enter__()
        off.__exit__()
        thread_mode().depth += off.was_on
        self.entered.append((mode, off.was_on))

    def __exit__(self, *exc: object) -> None:
        mode, was_below = self.entered.pop()
        off = mode_off()
        if was_below:
            off.__enter__()
        mode.__exit__(None, None, None)
        if was_below:
            off.__exit__()
            thread_mode().depth -= 1
