"""Whole models: per-sample gradients, ensembles, jacobians and Hessians against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    stack_module_state,
    vmap,
)

EXAMPLES = 4


class Cnn(nn.Module):
    """Two convolutions with group norm between them, a pool and a head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        x = F.relu(self.conv2(x)).mean((-2, -1))
        return self.head(x)


class Recurrent(nn.Module):
    """A recurrent layer of the given kind and a head on its last output."""

    def __init__(self, kind, **kwargs):
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **kwargs)
        self.head = nn.Linear(5 * (1 + self.layer.bidirectional), 5)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Pooled(nn.Module):
    """A transformer's encoder layer, its output averaged over the positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            8, nhead=2, dim_feedforward=12, dropout=0.0, batch_first=True, norm_first=False
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 6), nn.GELU(), nn.Linear(6, 5))


MODELS = {
    "mlp": (mlp, (7,)),
    "cnn with group norm": (Cnn, (3, 9, 10)),
    "transformer layer": (Pooled, (6, 8)),
    "transformer layer, eval": (lambda: Pooled().eval(), (6, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3)),
    "bidirectional two-layer gru": (
        lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True),
        (4, 3),
    ),
}


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def buffers_of(model):
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def autograd_grads(model, loss):
    """The gradient of a loss in the model's own parameters, by plain autograd."""
    names, values = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(
        loss, values, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, grads, strict=True))


def close(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    xs = torch.randn(EXAMPLES, *shape, dtype=torch.float64)
    ys = torch.tensor([0, 4, 2, 1])

    def loss(parameters, x, y):
        out = functional_call(model, parameters, (x.unsqueeze(0),))
        return F.cross_entropy(out, y.unsqueeze(0))

    parameters = parameters_of(model)
    grads, values = vmap(grad_and_value(loss), (None, 0, 0))(parameters, xs, ys)
    rows, losses = [], []
    for x, y in zip(xs, ys, strict=True):
        plain = F.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
        rows.append(autograd_grads(model, plain))
        losses.append(plain.detach())
    close(grads, {k: torch.stack([row[k] for row in rows]) for k in parameters})
    torch.testing.assert_close(values, torch.stack(losses))


def test_per_sample_gradients_in_chunks():
    torch.manual_seed(0)
    model = mlp().double()
    xs = torch.randn(5, 7, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    parameters = parameters_of(model)
    whole = vmap(grad(loss), (None, 0))(parameters, xs)
    close(vmap(grad(loss), (None, 0), chunk_size=2)(parameters, xs), whole)


@pytest.mark.parametrize("name", MODELS)
def test_ensemble(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    models = [make().double() for _ in range(3)]
    base = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)
    xs = torch.randn(EXAMPLES, *shape, dtype=torch.float64)

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    same_data = vmap(call, (0, 0, None))(parameters, buffers, xs)
    torch.testing.assert_close(same_data, torch.stack([m(xs) for m in models]))
    per_model = torch.randn(3, EXAMPLES, *shape, dtype=torch.float64)
    own_data = vmap(call)(parameters, buffers, per_model)
    expected = torch.stack([m(x) for m, x in zip(models, per_model, strict=True)])
    torch.testing.assert_close(own_data, expected)


def test_gradients_of_an_ensemble():
    torch.manual_seed(0)
    models = [mlp().double() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(EXAMPLES, 7, dtype=torch.float64)

    def loss(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (x,)).square().mean()

    grads = vmap(grad(loss))(parameters, buffers)
    rows = [autograd_grads(m, m(x).square().mean()) for m in models]
    close(grads, {k: torch.stack([row[k] for row in rows]) for k in rows[0]})


def test_backward_through_an_ensemble_reaches_the_stacked_parameters():
    torch.manual_seed(0)
    models = [mlp().double() for _ in range(2)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(EXAMPLES, 7, dtype=torch.float64)
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    out.square().sum().backward()
    rows = [autograd_grads(m, m(x).square().sum()) for m in models]
    close(
        {k: p.grad for k, p in parameters.items()},
        {k: torch.stack([row[k] for row in rows]) for k in rows[0]},
    )


@pytest.mark.parametrize("name", ["mlp", "cnn with group norm", "lstm"])
def test_jacrev_equals_jacfwd(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    x = torch.randn(1, *shape, dtype=torch.float64)
    reverse = jacrev(lambda x: model(x)[0])(x)
    forward = jacfwd(lambda x: model(x)[0])(x)
    plain = torch.autograd.functional.jacobian(lambda x: model(x)[0], x)
    torch.testing.assert_close(reverse, plain)
    torch.testing.assert_close(forward, plain)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobian_in_the_parameters(jacobian):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(4, dtype=torch.float64)
    jacobians = jacobian(lambda p: functional_call(model, p, (x,)))(parameters_of(model))
    rows = [autograd_grads(model, entry) for entry in model(x)]
    close(jacobians, {k: torch.stack([row[k] for row in rows]) for k in rows[0]})


def test_hessian_of_a_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def loss(parameters):
        return F.mse_loss(functional_call(model, parameters, (x,)), y)

    actual = hessian(loss)(parameters_of(model))
    names, values = zip(*model.named_parameters(), strict=True)
    first = torch.autograd.grad(F.mse_loss(model(x), y), values, create_graph=True)
    for i, row in enumerate(names):
        entries = [
            torch.autograd.grad(
                e, values, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for e in first[i].reshape(-1)
        ]
        for j, column in enumerate(names):
            expected = torch.stack([e[j] for e in entries])
            shape = values[i].shape + values[j].shape
            torch.testing.assert_close(actual[row][column], expected.reshape(shape))


def test_hessian_vector_products_agree_both_ways():
    torch.manual_seed(0)
    model = mlp().double()
    x, v = torch.randn(2, 7, dtype=torch.float64)

    def loss(x):
        return model(x).square().sum()

    expected = torch.autograd.functional.hvp(loss, x, v)[1]
    torch.testing.assert_close(grad(lambda x: grad(loss)(x) @ v)(x), expected)
    torch.testing.assert_close(jacfwd(lambda t: grad(loss)(x + t * v))(x.new_zeros(())), expected)


def batch_normed():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double()


def test_batch_norm_in_eval_mode_under_per_sample_gradients():
    torch.manual_seed(0)
    model = batch_normed()
    model(torch.randn(6, 3, 5, 6, dtype=torch.float64))  # makes the running statistics uneven
    model.eval()
    xs = torch.randn(EXAMPLES, 3, 5, 6, dtype=torch.float64)
    parameters, buffers = parameters_of(model), buffers_of(model)
    kept = {k: b.clone() for k, b in buffers.items()}

    def loss(parameters, x):
        return functional_call(model, (parameters, buffers), (x.unsqueeze(0),)).square().sum()

    grads = vmap(grad(loss), (None, 0))(parameters, xs)
    rows = [autograd_grads(model, model(x.unsqueeze(0)).square().sum()) for x in xs]
    close(grads, {k: torch.stack([row[k] for row in rows]) for k in rows[0]})
    close(buffers, kept)


def test_batch_norm_in_train_mode_under_grad_updates_its_statistics():
    torch.manual_seed(0)
    model = batch_normed()
    x = torch.randn(EXAMPLES, 3, 5, 6, dtype=torch.float64)
    parameters, buffers = parameters_of(model), buffers_of(model)
    weight = torch.randn(EXAMPLES, 4 * 3 * 4, dtype=torch.float64)

    def loss(parameters, buffers):
        return (functional_call(model, (parameters, buffers), (x,)) * weight).sum()

    grads = grad(loss)(parameters, buffers)
    expected = autograd_grads(model, (model(x) * weight).sum())
    close(grads, expected)
    close(buffers, buffers_of(model))
    assert buffers["1.num_batches_tracked"].item() == 1
    assert not buffers["1.running_mean"].requires_grad


def test_batch_norm_in_train_mode_with_statistics_of_each_example():
    torch.manual_seed(0)
    models = [batch_normed() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    parameters = {k: p.detach() for k, p in parameters.items()}
    buffers = {k: b.clone() for k, b in buffers.items()}
    xs = torch.randn(3, EXAMPLES, 3, 5, 6, dtype=torch.float64)

    def call(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,))

    actual = vmap(call)(parameters, buffers, xs)
    expected = torch.stack([m(x) for m, x in zip(models, xs, strict=True)]).detach()
    torch.testing.assert_close(actual, expected)
    rows = [buffers_of(m) for m in models]
    close(buffers, {k: torch.stack([row[k] for row in rows]) for k in rows[0]})


def test_per_sample_gradients_leave_the_model_alone():
    torch.manual_seed(0)
    model = mlp().double()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    identities = {k: id(p) for k, p in model.named_parameters()}
    xs = torch.randn(EXAMPLES, 7, dtype=torch.float64)
    vmap(grad(lambda p, x: functional_call(model, p, (x,)).sum()), (None, 0))(
        parameters_of(model), xs
    )
    assert identities == {k: id(p) for k, p in model.named_parameters()}
    close(parameters_of(model), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def stop(*args):
    raise ValueError("stop")


class Twice(nn.Module):
    """One part, reached by two paths."""

    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm1d(2)
        self.b = self.a
        self.c = nn.Sequential(self.a)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_part_reached_by_several_paths_gets_its_tensors_back(tie_weights):
    module = Twice()
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    names = dict(module.named_parameters(remove_duplicate=tie_weights))
    x = torch.randn(4, 2)
    given = {name: p.detach() * 2 for name, p in names.items()}
    if not tie_weights:
        given = {name: given["a." + name.rpartition(".")[2]] for name in given}
    out = functional_call(module, given, (x,))
    assert all(now is before[name] for name, now in module.named_parameters())
    assert isinstance(module.a.weight, nn.Parameter)
    module.register_forward_hook(stop)
    with pytest.raises(ValueError, match="stop"):
        functional_call(module, given, (x,))
    assert all(now is before[name] for name, now in module.named_parameters())
    assert out.shape == x.shape
