"""Derivative of the backward pass of the CTC loss, which PyTorch has no formula for.

The loss itself borrows PyTorch's formula. Its gradient is that of the loss of `log_softmax(scores)`
in the scores: `exp(log_probs)` less the posterior probability of each class at each step, by the
forward-backward recursion of Graves et al., Connectionist Temporal Classification (2006).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from lamina.autodiff.declare import decomposition
from lamina_core.overloads import aten

# Stands for the logarithm of 0: infinities would make the derivatives of a sum of zeros NaN.
_NEVER = -1e30


def _paths(targets: Any, lengths: Any, size: int, blank: int) -> Any:
    """Classes with blanks around each: targets [N, S] or one after the other -> [N, size]."""
    count = (size - 1) // 2
    if targets.dim() == 1:
        starts = lengths.cumsum(0) - lengths
        places = starts.unsqueeze(1) + torch.arange(count, device=targets.device)
        # Behind its end a row reads those of the next, which no path of its own gets to.
        places = places.clamp(max=max(targets.shape[0] - 1, 0))
        targets = targets.take(places) if count else targets.new_zeros((len(lengths), 0))
    blanks = torch.full_like(targets[:, :count], blank)
    pairs = torch.stack([blanks, targets[:, :count]], -1).flatten(1)
    return pad(pairs, (0, 1), value=blank)


def _shifted(state: Any, by: int) -> Any:
    """The state of the place `by` before (or behind, if negative): [N, L] -> [N, L]."""
    if by > 0:
        return pad(state, (by, 0), value=_NEVER)[:, : state.shape[1]]
    return pad(state, (0, -by), value=_NEVER)[:, -by:]


def _step(state: Any, by: int, skips: Any) -> Any:
    """The logarithm of the sum over where a path may come from: here, next to it, or by a skip."""
    ways = [state, _shifted(state, by), _shifted(state, 2 * by).masked_fill(~skips, _NEVER)]
    return torch.stack(ways).logsumexp(0)


def _occupied(log_probs: Any, path: Any, steps: Any, lengths: Any, blank: int) -> Any:
    """The posterior probability of each place at each step: [T, N, L]."""
    total, size = log_probs.shape[0], path.shape[1]
    seen = log_probs.gather(2, path.expand(total, *path.shape))
    changes = (path != blank) & (path != pad(path, (2, 0), value=blank)[:, :size])
    skips = changes & (torch.arange(size, device=path.device) >= 2)
    back = pad(skips, (0, 2))[:, 2:]
    places = torch.arange(size, device=path.device)
    ends = (2 * lengths).unsqueeze(1)
    last = (places == ends) | (places == ends - 1)
    steps = steps.unsqueeze(1)

    state = seen[0].masked_fill(places > 1, _NEVER)
    ahead = [state]
    for t in range(1, total):
        state = torch.where(t < steps, _step(state, 1, skips) + seen[t], state)
        ahead.append(state)
    likelihood = state.masked_fill(~last, _NEVER).logsumexp(1, keepdim=True)

    state = torch.full_like(state, _NEVER)
    behind = []
    for t in reversed(range(total)):
        begun = torch.where(last, 0.0, _NEVER).to(seen.dtype)
        onward = _step(state, -1, back) if t + 1 < total else state
        state = torch.where(t == steps - 1, begun, onward) + seen[t]
        behind.append(state)
    both = torch.stack(ahead) + torch.stack(behind[::-1])
    return (both - seen - likelihood).exp()


def _pulled(
    grad: Any,
    log_probs: Any,
    targets: Any,
    steps: Any,
    lengths: Any,
    neg_log_likelihood: Any,
    log_alpha: Any,
    blank: int,
    zero_infinity: bool,
) -> Any:
    path = _paths(targets, lengths, log_alpha.shape[-1], blank)
    occupied = _occupied(log_probs, path, steps, lengths, blank)
    places = path.expand(occupied.shape)
    posterior = torch.zeros_like(log_probs).scatter_add(2, places, occupied)
    pulled = (log_probs.exp() - posterior) * grad.unsqueeze(1)
    impossible = neg_log_likelihood.isinf().unsqueeze(1)
    pulled = pulled.masked_fill(impossible, 0.0 if zero_infinity else torch.nan)
    t = torch.arange(log_probs.shape[0], device=log_probs.device).reshape(-1, 1, 1)
    return pulled.masked_fill(t >= steps.unsqueeze(1), 0)


@decomposition(aten._ctc_loss_backward.default)
def ctc_loss_backward(
    grad: Any,
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    neg_log_likelihood: Any,
    log_alpha: Any,
    blank: int,
    zero_infinity: bool = False,
) -> Any:
    """[N], [T, N, C], classes [N, S] or [sum of lengths], N and N lengths, ... -> [T, N, C]"""
    steps, lengths = (
        torch.tensor(list(found), dtype=torch.int64, device=log_probs.device)
        for found in (input_lengths, target_lengths)
    )
    options = (neg_log_likelihood, log_alpha, blank, zero_infinity)
    return _pulled(grad, log_probs, targets, steps, lengths, *options)


@decomposition(aten._ctc_loss_backward.Tensor)
def ctc_loss_backward_of_tensors(
    grad: Any,
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    neg_log_likelihood: Any,
    log_alpha: Any,
    blank: int,
    zero_infinity: bool = False,
) -> Any:
    """The same, with the lengths in tensors [N], or [] of one example."""
    steps, lengths = input_lengths.reshape(-1), target_lengths.reshape(-1)
    options = (neg_log_likelihood, log_alpha, blank, zero_infinity)
    return _pulled(grad, log_probs, targets, steps, lengths, *options)
