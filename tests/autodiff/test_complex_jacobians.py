"""Derivatives of functions of complex numbers, holomorphic and not, against finite differences."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from lamina import Wirtinger, grad, hessian, jacfwd, jacobian, jacrev, value_and_grad, vmap
from lamina_core.errors import NonScalarLossError, NotDifferentiableError
from tests.errors.saying import said

X = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
Z = torch.complex(X, X.cos())
JACOBIANS = {"jacrev": jacrev, "jacfwd": jacfwd, "jacobian": jacobian}
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 2])
EVERY = pytest.mark.parametrize("name", JACOBIANS)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


def along(f, x, unit):
    """[*output shape, *input shape]: central differences of f in each element, along a unit."""
    step = 1e-6
    columns = []
    for e in torch.eye(x.numel(), dtype=x.dtype):
        moved = step * unit * e.reshape(x.shape)
        columns.append((f(x + moved) - f(x - moved)) / (2 * step))
    return torch.stack(columns, -1).reshape(*columns[0].shape, *x.shape)


def test_differences_know_a_derivative():
    close(along(lambda z: z**2, Z, 1), torch.diag(2 * Z))
    close(along(lambda z: z.conj(), Z, 1j), torch.diag(torch.full_like(Z, -1j)))


# -- the entries of a jacobian ---------------------------------------------------------------------


def neither(z):
    """Complex in and out, not holomorphic; more outputs than inputs."""
    return torch.stack(
        [z[0] * z[1].conj(), z.prod() + z.abs().sum(), z[2].exp(), z.sum().real * z[0]]
    )


def narrow(z):
    return z.prod() * z[0].conj()


@EVERY
@CHUNKS
@pytest.mark.parametrize("f", [neither, narrow])
def test_complex_to_complex_is_a_pair(name, chunk_size, f):
    pair = JACOBIANS[name](f, chunk_size=chunk_size)(Z)
    assert isinstance(pair, Wirtinger)
    by_x, by_y = along(f, Z, 1), along(f, Z, 1j)
    close(pair.z, (by_x - 1j * by_y) / 2)
    close(pair.z_conj, (by_x + 1j * by_y) / 2)
    t = Z.exp()
    close(pair.z @ t + pair.z_conj @ t.conj(), torch.autograd.functional.jvp(f, Z, t)[1])


@EVERY
@CHUNKS
def test_complex_to_real_is_the_gradient_of_each_output(name, chunk_size):
    def f(z):
        return (z.abs() ** 2 * z.real).cumsum(0)

    found = JACOBIANS[name](f, chunk_size=chunk_size)(Z)
    close(found, along(f, Z, 1) + 1j * along(f, Z, 1j))
    close(found[2], grad(lambda z: f(z)[2])(Z))


@EVERY
@CHUNKS
def test_real_to_complex_is_the_derivative(name, chunk_size):
    def f(x):
        return (x * 1j).exp() * x.sum()

    found = JACOBIANS[name](f, chunk_size=chunk_size)(X)
    close(found, along(f, X, 1))


@EVERY
def test_every_pair_of_leaves_by_its_own_kinds(name):
    def f(tree):
        z, x = tree["z"], tree["x"]
        return {"complex": z * z.conj().sum() * x, "real": (z.abs() * x).sum()}

    args = {"z": Z, "x": X, "n": 3}
    found = JACOBIANS[name](f)(args)
    by_z, by_x = found["complex"]["z"], found["complex"]["x"]
    of_z, of_x = (lambda z: f({"z": z, "x": X})), (lambda x: f({"z": Z, "x": x}))
    along_x = along(lambda z: of_z(z)["complex"], Z, 1)
    along_y = along(lambda z: of_z(z)["complex"], Z, 1j)
    close((by_z.z, by_z.z_conj), ((along_x - 1j * along_y) / 2, (along_x + 1j * along_y) / 2))
    close(by_x, along(lambda x: of_x(x)["complex"], X, 1))
    real = found["real"]
    close(
        real["z"],
        along(lambda z: of_z(z)["real"], Z, 1) + 1j * along(lambda z: of_z(z)["real"], Z, 1j),
    )
    close(real["x"], along(lambda x: of_x(x)["real"], X, 1))
    assert real["n"] is None


def test_pairs_under_vmap():
    rows = torch.stack([Z, Z.exp()])
    for transform in JACOBIANS.values():
        pairs = vmap(transform(neither))(rows)
        for i, row in enumerate(rows):
            close((pairs.z[i], pairs.z_conj[i]), tuple(transform(neither)(row)))


def test_the_hessian_of_a_real_function_of_complex_numbers():
    """It is the jacobian of the gradient g = 2 df/dz*: dg = A dz + B dz*."""

    def f(z):
        return (z.abs() ** 2).sum() * z.real.sum() + z.prod().imag

    found = hessian(f)(Z)
    gradient = grad(f)
    by_x, by_y = along(gradient, Z, 1), along(gradient, Z, 1j)
    close((found.z, found.z_conj), ((by_x - 1j * by_y) / 2, (by_x + 1j * by_y) / 2))


def test_a_pair_of_zero_size():
    pair = jacrev(lambda z: z * z.conj())(Z[:0])
    assert pair.z.shape == pair.z_conj.shape == (0, 0)


# -- holomorphic functions -------------------------------------------------------------------------


def holomorphic(z):
    return z.exp() * z.prod() + z.cumsum(0) ** 2


@EVERY
@CHUNKS
def test_the_complex_derivative(name, chunk_size):
    found = JACOBIANS[name](holomorphic, holomorphic=True, chunk_size=chunk_size)(Z)
    close(found, along(holomorphic, Z, 1))
    pair = JACOBIANS[name](holomorphic, chunk_size=chunk_size)(Z)
    close((found, torch.zeros_like(found)), (pair.z, pair.z_conj))


def test_the_complex_gradient():
    def f(z, w):
        return (holomorphic(z) * w.sin()).sum()

    found = grad(f, (0, 1), holomorphic=True)(Z, Z.cos())
    close(found[0], along(lambda z: f(z, Z.cos()), Z, 1))
    close(found[1], along(lambda w: f(Z, w), Z.cos(), 1))
    value, again = value_and_grad(f, holomorphic=True)(Z, Z.cos())
    close((value, again), (f(Z, Z.cos()), found[0]))
    close(vmap(grad(lambda z: z**3, holomorphic=True))(Z), 3 * Z**2)


def test_the_complex_hessian():
    def f(z):
        return (holomorphic(z) * z).sum()

    found = hessian(f, holomorphic=True)(Z)
    close(found, along(grad(f, holomorphic=True), Z, 1))
    value, first, second = hessian(f, holomorphic=True, with_value=True)(Z)
    close((value, first, second), (f(Z), grad(f, holomorphic=True)(Z), found))


def test_constants_beside_holomorphic_arguments():
    found = grad(lambda tree: tree["z"].prod() * tree["n"], holomorphic=True)({"z": Z, "n": 2})
    close(found["z"], 2 * Z.prod() / Z)
    assert found["n"] is None


def test_a_real_argument():
    assert_expected_inline(
        said(NotDifferentiableError, lambda: grad(lambda x: x.sum(), holomorphic=True)(X)),
        """\
grad got holomorphic=True, but not everything is complex
  args[0]: torch.float64 tensor of shape [3]
  to fix: leave holomorphic out, or convert with .to(torch.complex64)""",
    )


def test_a_real_loss():
    assert_expected_inline(
        said(NonScalarLossError, lambda: grad(lambda z: z.abs().sum(), holomorphic=True)(Z)),
        """\
grad got holomorphic=True, but a loss of dtype torch.float64
  while interpreting at level 1: grad
  to fix: leave holomorphic out, for the gradient of a real loss""",
    )
