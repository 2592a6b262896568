"""The laws in half precision, over PyTorch's table of operators: see `tests/half_laws.py`."""

from __future__ import annotations

import pytest
import torch

from tests import half_laws
from tests.laws import try_on_all
from tests.samples import curated, others

LAWS = sorted(half_laws.LAWS)
KINDS = sorted(half_laws.SETTINGS)
# What a change is tried on; `vmap_vjp` takes a single `vjp` along.
QUICK = {
    ("half", "vmap"),
    ("half", "jvp"),
    ("half", "vmap_vjp"),
    ("mixed", "jvp"),
    ("mixed", "vmap_vjp"),
    ("autocast", "jvp"),
    ("autocast", "vmap_vjp"),
}
REST = [(kind, law) for kind in KINDS for law in LAWS]


def pytest_generate_tests(metafunc):
    """Reads the whole table only for the tests that ask for it, and only if they are to run."""
    if "case" not in metafunc.fixturenames:
        return
    quick = metafunc.function is test_in_bfloat16
    if quick:
        cases = [(kind, law, name) for kind, law in sorted(QUICK) for name in curated(law)]
    elif "not exhaustive" in metafunc.config.option.markexpr:
        cases = [("half", "vmap", "left out by -m")]
    else:
        cases = [(kind, law, name) for kind, law in REST for name in [*curated(law), *others(law)]]
    metafunc.parametrize("case", cases, ids="-".join)


def hold(case, dtype, count):
    kind, law, name = case
    if not half_laws.speaks(kind, name, dtype, law):
        return  # there are no samples, or no derivatives, in this precision
    with half_laws.quiet():
        settings = half_laws.SETTINGS[kind](name, dtype, law, count)
        if kind != "mixed":
            try_on_all(name, law, settings, half_laws.LAWS[law])
        elif settings:  # PyTorch takes two dtypes, though it may not differentiate then
            try_on_all(name, law, settings, lambda s: half_laws.LAWS[law](s) or True)


def test_in_bfloat16(case):
    hold(case, torch.bfloat16, 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", half_laws.HALF, ids=["bfloat16", "float16"])
def test_in_both(case, dtype):
    hold(case, dtype, 4)
