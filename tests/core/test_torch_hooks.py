"""Hooks into torch's private parts: each is missed clearly when it is gone, or leads nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import lamina_core.dispatch
import lamina_core.mode
import lamina_core.wrapper
from lamina import grad, vmap
from lamina_core.errors import TorchHookError
from lamina_core.torch_hooks import doors
from lamina_core.torch_hooks.autograd import replace_engine, run_engine
from lamina_core.torch_hooks.doors import DOORS, door, proof, prove, require_proofs
from lamina_core.torch_hooks.functions import USUAL_APPLY
from lamina_core.torch_hooks.threads import in_own_thread
from lamina_core.wrapper import LevelTensor

WITHOUT_EACH = """
import importlib, json, os, sys, torch
import torch.utils.checkpoint, torch.autograd.forward_ad, torch._subclasses, torch._decomp
import torch.nn.utils.stateless

def attempt(path):
    *home, name = path.split(".")
    owner = torch
    for part in home[1:]:
        owner = getattr(owner, part)
    setattr(owner, name, None)
    try:
        import lamina
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return "imported"

for path in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, attempt(path).encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        print(json.dumps([path, answer.read()]), flush=True)
    os.wait()
"""


@pytest.mark.slow
def test_a_part_that_torch_no_longer_has_is_an_error_at_import():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EACH, json.dumps(sorted(DOORS))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    answers = dict(json.loads(line) for line in run.stdout.splitlines())
    assert set(answers) == set(DOORS)
    for path, answer in answers.items():
        assert answer.startswith("TorchHookError: "), (path, answer)
        assert f"has no {path}, on which Lamina stands" in answer
        assert DOORS[path] in answer


def test_what_is_missed_is_named_with_its_reason_and_the_way_out():
    with pytest.raises(TorchHookError) as caught:
        door("torch._C._no_such_thing", "an example")
    text = str(caught.value)
    assert "has no torch._C._no_such_thing" in text
    assert "it is needed for: an example" in text
    assert "to fix: install a version of torch" in text


def failing():
    return {found.name for found in prove() if not found.ok}


def test_all_is_well():
    assert failing() == set()


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "meta"],
)
def test_proofs_do_not_depend_on_where_the_import_is_met(around):
    with around:
        assert failing() == set()


def test_a_function_door_that_is_not_reached(monkeypatch):
    of_c = not isinstance(USUAL_APPLY, classmethod)
    owner = torch.autograd.Function if of_c else torch.autograd.function._SingleLevelFunction
    ours = owner.__dict__["apply"]
    if of_c:
        monkeypatch.setattr(owner, "apply", USUAL_APPLY)
        monkeypatch.delattr(torch.autograd.function.FunctionMeta, "_backward_cls")
        monkeypatch.setattr("lamina.proofs._Through", new_function("_Through"))
    else:
        monkeypatch.delattr(owner, "apply")
    try:
        assert "torch.autograd.Function" in failing()
        with pytest.raises(TorchHookError, match=r"is not hooked: torch\.autograd\.Function"):
            require_proofs("import")
    finally:
        owner.apply = ours


def new_function(name):
    def forward(ctx, x):
        return x.round()

    def backward(ctx, ct):
        return ct

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def test_an_engine_that_is_not_ours():
    ours = torch.autograd._engine_run_backward
    replace_engine(run_engine)
    try:
        assert failing() == {"the engine of autograd"}
    finally:
        replace_engine(ours)


def test_saved_tensor_hooks_that_nobody_hears_of(monkeypatch):
    monkeypatch.setattr(saved_tensors_hooks, "__enter__", saved_tensors_hooks.__enter__.__wrapped__)
    monkeypatch.setattr(saved_tensors_hooks, "__exit__", saved_tensors_hooks.__exit__.__wrapped__)
    assert failing() == {"saved-tensor hooks", "torch.utils.checkpoint"}


def test_memory_that_is_handed_out(monkeypatch):
    monkeypatch.delattr(LevelTensor, "__dlpack__")
    monkeypatch.setattr(torch.Tensor, "__dlpack__", lambda self: None)
    assert failing() == {"memory"}


def test_conjugates_that_handlers_do_not_see(monkeypatch):
    for module in (lamina_core.mode, lamina_core.wrapper):
        monkeypatch.setattr(module, "set_excluded", lambda key, value: None)
    assert failing() == {"lazy conjugates"}


def test_autocast_that_stops_at_composite_ops(monkeypatch):
    monkeypatch.setattr(lamina_core.dispatch, "autocast_keys", lambda: None)
    monkeypatch.setattr("lamina_core.scopes.autocast_keys", lambda: None)
    assert "autocast" in failing()


def test_a_proof_that_fails_says_what_was_found(monkeypatch):
    def check():
        raise AssertionError("3 where 2 is right")

    monkeypatch.setattr(doors, "_CHECKS", [])
    proof("a door", "an example", when="nesting")(check)
    require_proofs("import")
    with pytest.raises(TorchHookError) as caught:
        require_proofs("nesting")
    assert "is not hooked: a door" in str(caught.value)
    assert "found: AssertionError: 3 where 2 is right" in str(caught.value)
    assert "`python -m lamina.doctor` tries the others too" in str(caught.value)
    # Nothing that relies on it goes on, however often it is tried.
    with pytest.raises(TorchHookError, match="is not hooked: a door"):
        vmap(grad(torch.sin))(torch.ones(3))
    doors.UNPROVED.discard("nesting")


class Slow:
    """What takes a while to drop."""

    def __init__(self, dropped):
        self.dropped = dropped

    def __del__(self):
        time.sleep(0.1)
        self.dropped.append("all of it")


def test_nothing_is_left_of_a_thread_of_its_own_when_it_returns():
    dropped = []

    def leave_something():
        torch._C._stash_obj_in_tls("of a test", Slow(dropped))
        return threading.get_ident()

    assert in_own_thread(leave_something) != threading.get_ident()
    assert dropped == ["all of it"]
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)


USES = """
import sys, torch, lamina
from torch.utils.checkpoint import checkpoint
from lamina_core.torch_hooks.doors import UNPROVED

def so_far():
    heavy = ("torch.distributed.tensor", "torch._dynamo")
    print(sorted(UNPROVED), [name for name in heavy if name in sys.modules])

x = torch.ones(3)
so_far()
lamina.grad(lambda x: (x * x).sum())(x)
lamina.vmap(torch.sin)(x)
so_far()
lamina.vmap(lamina.grad(torch.sin))(x)
so_far()
lamina.grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum())(x)
so_far()
"""


def test_what_torch_takes_long_to_get_ready_for_is_proved_at_its_first_use():
    run = subprocess.run(
        [sys.executable, "-c", USES],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.stdout.splitlines() == [
        "['checkpoint', 'nesting'] []",
        "['checkpoint', 'nesting'] []",
        "['checkpoint'] ['torch.distributed.tensor']",
        "[] ['torch.distributed.tensor', 'torch._dynamo']",
    ]


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, ct):
        return -ctx.factor * ct, None


class ReverseInTwoSteps(torch.autograd.Function):
    @staticmethod
    def forward(x, factor=2.0):
        return x.clone(), x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, ct, other):
        return ctx.factor * (other - ct), None


@pytest.mark.parametrize("outside", [False, True])
def test_an_apply_that_was_stored_before_the_import(outside):
    """Also where a plain argument requires grad, and C++ would like to add a graph of its own."""
    one, two = (USUAL_APPLY.__get__(None, cls) for cls in (Reverse, ReverseInTwoSteps))
    x = torch.randn(3, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=outside)
    assert grad(lambda x: one(x * w, 3.0).sum())(x).tolist() == (-3.0 * w).tolist()
    assert vmap(grad(lambda x: two(x, 5.0)[0]))(x).tolist() == [-5.0] * 3
    assert grad(lambda x: sum(two(x)).sum())(x).tolist() == [0.0] * 3
    if outside:
        vmap(lambda x: one(w, 3.0) * x)(x).sum().backward()
        assert w.grad.tolist() == pytest.approx([-3.0 * x.sum().item()] * 3)
        torch.manual_seed(0)
        assert (
            grad(lambda x: grad(lambda y: one(y * w, 2.0).sum())(x).sum())(x).tolist() == [0.0] * 3
        )
    leaf = x.clone().requires_grad_()
    one(leaf, 3.0).sum().backward()
    assert leaf.grad.tolist() == [-3.0] * 3


def test_the_import_leaves_what_torch_loads_late():
    """Symbolic shapes bring sympy with them, which takes half a second."""
    code = "import sys, torch; old = set(sys.modules); import lamina; print(set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lamina" in done.stdout
    assert "sympy" not in done.stdout
