"""No public call on a tensor of a transform ends the process: right, or an error of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lamina import grad, jvp, vmap
from lamina_core.errors import MissingRuleError, MutationError

X = torch.tensor([[0.3, 1.1, -0.7], [0.2, 0.5, 0.9]])

# Calls every method and attribute of a tensor, with arguments of many kinds, on wrappers of every
# kind; each name in a process of its own. Prints those that end the process.
EVERY_METHOD = """
import json, os, signal, sys, warnings
import torch, lamina
from lamina import grad, jvp, vmap

warnings.simplefilter("ignore")
lamina.config.fallback = "silent"
X = torch.tensor([[0.3, 1.1, -0.7], [0.2, 0.5, 0.9]])
PLAIN, INTS = torch.ones(3), torch.tensor([0, 2, 1])
ARGUMENTS = [
    (), (0,), ("x",), ("plain",), (0, 0), (0, "x"), ("x", "x"), ("ints",), (torch.float64,),
    ("cpu",), ((3,),), (2.0,), (0, "ints", "x"), ("sum",), ("plain", "x"), (abs,), ("x", max),
    ("x", "x", max),
]
KINDS = {
    "vmap": lambda f: vmap(f, randomness="different")(X),
    "captured": lambda f: vmap(lambda x: (f(torch.ones(3)), x)[1], randomness="different")(X),
    "grad": lambda f: grad(lambda x: (f(x), x.sum())[1])(X[0]),
    "jvp": lambda f: jvp(lambda x: (f(x), x)[1], (X[0],), (X[0],)),
    "vmap(grad)": lambda f: vmap(grad(lambda x: (f(x), x.sum())[1]), randomness="different")(X),
}

def attempt(name, arguments):
    def f(x):
        values = {"x": x, "plain": PLAIN, "ints": INTS}
        given = [values.get(a, a) if isinstance(a, str) else a for a in arguments]
        found = getattr(x, name)
        out = found(*given) if callable(found) else found
        if isinstance(out, torch.Tensor):
            repr(out), out.tolist() if out.numel() == 0 else out.shape
    return f

for name in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        signal.alarm(120)
        for run in KINDS.values():
            for arguments in ARGUMENTS:
                try:
                    run(attempt(name, arguments))
                except Exception:
                    pass
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(name, status, flush=True)
"""
NOT_CALLS = {"__class__", "__init__", "__new__", "__del__", "__init_subclass__", "__subclasshook__"}
NAMES = sorted(set(dir(torch.Tensor)) - NOT_CALLS)
# What has ended the process once, or stands near what did.
SUSPECTS = (
    "__array__ __dlpack__ __dlpack_device__ __reduce_ex__ apply_ data data_ptr map_ map2_ numpy "
    "requires_grad_ resize_ set_ share_memory_ storage to_sparse tolist untyped_storage"
).split()


def ended(names):
    run = subprocess.run(
        [sys.executable, "-c", EVERY_METHOD, json.dumps(names)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return run.stdout.splitlines()


def test_what_has_ended_the_process_once():
    assert ended([name for name in SUSPECTS if hasattr(torch.Tensor, name)]) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(8))
def test_every_method_and_attribute(part):
    assert ended(NAMES[part::8]) == []


UNDER = {
    "vmap": lambda f: vmap(f, randomness="different")(X),
    "grad": lambda f: grad(lambda x: f(x).sum())(X[0]),
    "jvp": lambda f: jvp(f, (X[0],), (X[0],))[1],
}


@pytest.mark.parametrize("name", UNDER)
@pytest.mark.parametrize("export", [torch.to_dlpack, torch.utils.dlpack.to_dlpack])
def test_nothing_is_exported(export, name):
    assert export is torch.to_dlpack
    with pytest.raises(MissingRuleError, match="has none of its own"):
        UNDER[name](export)


@pytest.mark.parametrize("call", [lambda x: x.apply_(abs), lambda x: x.map_(x, max)])
def test_no_python_function_is_called_on_memory(call):
    with pytest.raises(MissingRuleError, match="has none of its own"):
        vmap(call)(X)


def test_a_captured_tensor_takes_no_value_of_the_transform_for_its_memory():
    p = torch.zeros(3)

    def f(x):
        p.data = x
        return p * 2

    for name in UNDER:
        with pytest.raises(MutationError, match=r"exchanged by \.data"):
            UNDER[name](f)
    assert p.tolist() == [0.0] * 3


def test_a_captured_tensor_takes_a_constant_for_its_memory():
    p = nn.Parameter(torch.zeros(3))

    def f(x):
        p.data = torch.ones(3, dtype=torch.float64)
        return p * x

    assert vmap(f)(X).dtype == torch.float64
    assert type(p) is nn.Parameter
    assert type(p.data) is torch.Tensor
    assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("name", UNDER)
@pytest.mark.parametrize("to", [nn.Module.double, nn.Module.bfloat16, lambda m: m.to("cpu")])
def test_a_captured_module_is_converted(name, to):
    net = nn.Linear(3, 2)
    weight = net.weight
    UNDER[name](lambda x: to(net)(x.to(next(to(net).parameters()).dtype)))
    assert net.weight is weight
    assert type(net.weight.data) is torch.Tensor


@pytest.mark.parametrize("name", UNDER)
@pytest.mark.parametrize("to", [nn.Module.double, nn.Module.half, lambda m: m.to(torch.float64)])
def test_a_module_made_inside_is_converted(name, to):
    def f(x):
        net = to(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval())
        assert all(p.requires_grad for p in net.parameters())
        return net(x.to(net[0].weight.dtype)[None]).to(x.dtype)

    assert torch.isfinite(UNDER[name](f)).all()


def test_lazy_modules_made_inside():
    def f(x):
        return nn.LazyLinear(2)(x)

    # Its parameters are captured ones to the transform, so all examples share their draws.
    assert vmap(f, randomness="same")(X).shape == (2, 2)
    assert grad(lambda x: f(x).sum())(X[0]).shape == (3,)


def test_data_of_a_tensor_made_inside():
    def f(x):
        p = torch.zeros(3)
        p.data = torch.ones(3)
        q = x * 2
        q.data = x * 3  # another value, the derivative of x * 2
        return (p + q).sum()

    expected = X[0].clone().requires_grad_()
    (derivative,) = torch.autograd.grad(f(expected), expected)
    torch.testing.assert_close(grad(f)(X[0]), derivative)
    torch.testing.assert_close(vmap(f)(X), 3 * X.sum(1) + 3)
    with pytest.raises(MutationError, match="another shape or dtype"):
        grad(lambda x: (setattr(x * 2, "data", torch.ones(2)), x.sum())[1])(X[0])


# Gives tensors of a transform other memory, and other tensors theirs. Prints what is not refused.
EXCHANGES = """
import torch
from lamina import grad, hessian, jvp, linearize, vmap
from lamina_core.errors import MutationError

X = torch.tensor([[0.3, 1.1, -0.7], [0.2, 0.5, 0.9]])
P, aten = torch.ones(3), torch.ops.aten
STORAGE = torch.ones(3).untyped_storage()
CALLS = [
    lambda x: x.set_(),
    lambda x: x.set_(STORAGE),
    lambda x: x.set_(STORAGE, 0, (3,)),
    lambda x: x.set_(STORAGE, 0, (3,), (1,)),
    lambda x: x.set_(P),
    lambda x: x.set_(P, 0, (3,), (1,)),
    lambda x: x.set_(x * 2),
    lambda x: torch.ones(3).set_(STORAGE),
    lambda x: torch.ones(3).set_(torch.ones(3).untyped_storage(), 0, (3,)) * x,
    lambda x: torch.ones(3).set_(P) * x,
    lambda x: torch.ones(3).set_(x),
    lambda x: P.set_(x),
    lambda x: P.set_(x.untyped_storage()),
    lambda x: P.set_(torch.ones(3).untyped_storage(), 0, (3,)) * x,
    lambda x: aten.set.default(x),
    lambda x: aten.set.source_Storage(x, STORAGE),
    lambda x: aten.set.source_Storage_storage_offset(x, STORAGE, 0, [3], [1]),
    lambda x: aten.set.source_Storage_out(x, STORAGE, out=torch.empty(3)),
    lambda x: aten.set.source_Tensor(P, x),
    lambda x: torch.ops.inductor.resize_storage_bytes_.default(x, 0),
]
KINDS = {
    "vmap": lambda f: vmap(f)(X.clone()),
    "grad": lambda f: grad(lambda x: f(x).sum())(X[0].clone()),
    "jvp": lambda f: jvp(f, (X[0].clone(),), (X[0],)),
    "linearize": lambda f: linearize(f, X[0].clone()),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x).sum()))(X.clone()),
    "hessian": lambda f: hessian(lambda x: f(x).sum())(X[0].clone()),
}
for name, run in KINDS.items():
    for at, call in enumerate(CALLS):
        try:
            run(call)
        except MutationError as error:
            assert "exchanges the memory of a tensor" in str(error)
        else:
            print(name, at)
assert P.tolist() == [1.0] * 3 and P.set_(STORAGE).numel() == 3
"""


def test_memory_is_not_exchanged():
    run = subprocess.run(
        [sys.executable, "-c", EXCHANGES],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_captured_tensor_takes_the_memory_of_another():
    source = torch.full((3,), 2.0)

    def f(x):
        p.set_(source)
        return p * x

    for name in UNDER:
        p = torch.ones(3)
        UNDER[name](f)
        assert p.data_ptr() == source.data_ptr()
