"""Running a rule again with the draws of its first run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

__all__ = ["Draws"]


class Draws:
    """The state of the random generators now, to be brought back for a second run."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self.on_cpu = torch.get_rng_state()
        accelerated = [t for t in tensors if t.device.type not in ("cpu", "meta")]
        self.kind = accelerated[0].device.type if accelerated else None
        self.devices, self.states = get_device_states(*accelerated) if accelerated else ([], [])

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw as then while the block runs, and go on as now behind it."""
        if self.kind is None:
            now = torch.get_rng_state()
            torch.set_rng_state(self.on_cpu)
            try:
                yield
            finally:
                torch.set_rng_state(now)
            return
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.on_cpu)
            set_device_states(self.devices, self.states, device_type=self.kind)
            yield
