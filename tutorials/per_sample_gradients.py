"""Per-sample gradients: train a classifier with differential privacy.

PyTorch's `backward` adds the gradients of a batch together before anyone can look at them. Some
methods need them one by one. Differentially private SGD (Abadi et al., 2016) is one: it bounds what
a single training example can do to the model by clipping *that example's* gradient to a norm of at
most C, and hides what remains under Gaussian noise:

    gradient = (sum over examples of clip(g_i, C)  +  sigma * C * normal noise) / batch size

The only hard part is to get hold of the g_i quickly, and with function transforms it is one line:

    per_sample_grad = vmap(grad(loss), in_dims=(None, 0, 0))

Read it from the inside: `grad(loss)` is a function that returns the gradient for one example, and
`vmap` makes of it one for a batch of examples and one set of parameters. This tutorial builds that
line up, checks it against the obvious loop, times it, and trains a small CNN with it.

    python tutorials/per_sample_gradients.py [--epochs 20] [--out per_sample_gradients.png]

It needs scikit-learn (for the digits it ships: 1797 grey images of 8 x 8 pixels) and matplotlib.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lamina import functional_call, grad, vmap

Params = dict[str, Tensor]

# 1. The data and the model -----------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] between 0 and 1 and their labels [N], split in two."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(seed: int) -> Digits:
    """A fifth of the digits is held out for the test."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.2, random_state=seed, stratify=labels
    )

    def as_images(pixels) -> Tensor:
        return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16

    return Digits(
        as_images(train_x),
        torch.as_tensor(train_y),
        as_images(test_x),
        torch.as_tensor(test_y),
    )


def make_model() -> nn.Module:
    """Two convolutions and a linear layer, about 6,000 parameters.

    The norms are over groups of channels, not over the batch: batch normalisation mixes the
    examples of a batch, so that there is no such thing as the gradient of one of them.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


# 2. The gradient of one example, then of each ----------------------------------------------------


def make_loss(model: nn.Module) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """The loss of *one* example, as a pure function of the parameters.

    `grad` differentiates with respect to an argument, so the parameters must be one:
    `functional_call` runs the module with the tensors it is given in place of its own.
    """

    def loss(params: Params, image: Tensor, label: Tensor) -> Tensor:
        # A module expects a batch, so the one example is made a batch of one.
        logits = functional_call(model, params, (image.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    return loss


def make_per_sample_grad(model: nn.Module) -> Callable[[Params, Tensor, Tensor], Params]:
    """From [B, 1, 8, 8] images and [B] labels to a gradient of shape [B, *P] for each parameter.

    `in_dims` says what is batched: not the parameters (None), but dim 0 of images and labels.
    """
    return vmap(grad(make_loss(model)), in_dims=(None, 0, 0))


def per_sample_grad_by_loop(model: nn.Module, images: Tensor, labels: Tensor) -> Params:
    """The same without transforms: one forward and one backward pass for each example."""
    names, params = zip(*model.named_parameters(), strict=True)
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image.unsqueeze(0)), label.unsqueeze(0))
        rows.append(torch.autograd.grad(loss, params))
    return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


# 3. The check and the time -----------------------------------------------------------------------


def check_and_time(model: nn.Module, images: Tensor, labels: Tensor, tolerance: float) -> None:
    """Compares `vmap(grad(loss))` with the loop; exits with an error where they differ."""
    per_sample_grad = make_per_sample_grad(model)
    params = detached_params(model)

    ours = per_sample_grad(params, images, labels)
    loop = per_sample_grad_by_loop(model, images, labels)
    difference = max((ours[name] - loop[name]).abs().max().item() for name in loop)
    print(f"per-sample gradients of {len(images)} images: vmap(grad(loss)) against a loop")
    print(f"  largest absolute difference: {difference:.1e}")
    if not difference <= tolerance:  # written so that NaN fails too
        sys.exit(f"  that is more than rounding explains (tolerance {tolerance:.0e})")

    fast = seconds(lambda: per_sample_grad(params, images, labels))
    slow = seconds(lambda: per_sample_grad_by_loop(model, images, labels))
    print(f"  vmap(grad(loss)) {1e3 * fast:.1f} ms, loop {1e3 * slow:.1f} ms: ", end="")
    print(f"{slow / fast:.1f} times as fast\n", flush=True)


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The median time of a call."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def detached_params(model: nn.Module) -> Params:
    """The parameters as plain tensors: the transforms need no `requires_grad`."""
    return {name: param.detach() for name, param in model.named_parameters()}


# 4. Clipping and noise ---------------------------------------------------------------------------


def per_sample_norms(grads: Params) -> Tensor:
    """The norm [B] of each example's whole gradient, over all parameters together."""
    squares = [g.flatten(start_dim=1).square().sum(dim=1) for g in grads.values()]
    return torch.stack(squares).sum(dim=0).sqrt()


def privatise(
    grads: Params, norms: Tensor, clip: float, noise: float, generator: torch.Generator
) -> Params:
    """Clips each example's gradient to `clip`, sums, adds noise, divides by the batch size."""
    scale = (clip / norms.clamp(min=1e-12)).clamp(max=1.0)
    private = {}
    for name, g in grads.items():
        total = torch.einsum("b,b...->...", scale, g)
        # The sum changes by at most `clip` when one example changes: the noise is in units of that.
        jitter = torch.randn(total.shape, generator=generator) * (noise * clip)
        private[name] = (total + jitter) / len(norms)
    return private


# 5. Training -------------------------------------------------------------------------------------


@dataclass
class History:
    """What the plot shows: one entry per epoch, and the gradient norms of two epochs."""

    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    first_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    last_norms: Tensor = field(default_factory=lambda: torch.empty(0))


def train(model: nn.Module, data: Digits, args: argparse.Namespace) -> History:
    """DP-SGD with momentum; updates the model's parameters in place.

    Batches are shuffled here. A privacy guarantee in numbers would ask for batches drawn by Poisson
    sampling and for an accountant that adds the epochs up; neither changes how the gradients are
    computed.
    """
    per_sample_grad = make_per_sample_grad(model)
    params = detached_params(model)  # shares memory with the module, which therefore learns too
    momentum = {name: torch.zeros_like(p) for name, p in params.items()}
    generator = torch.Generator().manual_seed(args.seed)
    history = History()

    for epoch in range(args.epochs):
        norms_of_epoch = []
        order = torch.randperm(len(data.train_images), generator=generator)
        for batch in progress(order.split(args.batch_size), f"epoch {epoch + 1}/{args.epochs}"):
            grads = per_sample_grad(params, data.train_images[batch], data.train_labels[batch])
            norms = per_sample_norms(grads)
            norms_of_epoch.append(norms)
            step = privatise(grads, norms, args.clip, args.noise, generator)
            for name, param in params.items():
                momentum[name].mul_(args.momentum).add_(step[name])
                param.sub_(args.learning_rate * momentum[name])

        loss, train_accuracy = evaluate(model, data.train_images, data.train_labels)
        _, test_accuracy = evaluate(model, data.test_images, data.test_labels)
        history.loss.append(loss)
        history.train_accuracy.append(train_accuracy)
        history.test_accuracy.append(test_accuracy)
        history.last_norms = torch.cat(norms_of_epoch)
        if epoch == 0:
            history.first_norms = history.last_norms
        print(
            f"epoch {epoch + 1:2d}  loss {loss:.3f}  train accuracy {train_accuracy:.1%}  "
            f"test accuracy {test_accuracy:.1%}  median gradient norm "
            f"{history.last_norms.median():.2f}",
            flush=True,
        )
    return history


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels)
    return loss.item(), (logits.argmax(dim=1) == labels).float().mean().item()


def progress(batches: Iterable[Tensor], label: str, width: int = 30) -> Iterator[Tensor]:
    """Yields the batches and draws a bar on the terminal, if there is one."""
    batches = list(batches)
    visible = sys.stderr.isatty()
    for done, batch in enumerate(batches):
        if visible:
            filled = width * done // len(batches)
            bar = "#" * filled + "." * (width - filled)
            print(f"\r{label} [{bar}] {done}/{len(batches)}", end="", file=sys.stderr, flush=True)
        yield batch
    if visible:
        print("\r\033[K", end="", file=sys.stderr, flush=True)  # the epoch's line takes its place


# 6. The picture ----------------------------------------------------------------------------------


def plot(history: History, clip: float, path: Path) -> None:
    """Loss, accuracy, and what the clipping did, side by side."""
    # A Figure made without pyplot draws to files only, on machines without a screen too.
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = range(1, len(history.loss) + 1)

    left.plot(epochs, history.loss, marker="o", markersize=3)
    left.set(title="training loss", xlabel="epoch", ylim=(0, None))

    middle.plot(epochs, history.train_accuracy, marker="o", markersize=3, label="training")
    middle.plot(epochs, history.test_accuracy, marker="o", markersize=3, label="test")
    middle.set(title="accuracy", xlabel="epoch", ylim=(0, 1))
    middle.legend(loc="lower right")

    both = torch.cat([history.first_norms, history.last_norms]).clamp(min=1e-6).log10()
    bins = torch.logspace(both.min().item(), both.max().item(), 40).tolist()
    right.hist(history.first_norms.tolist(), bins, alpha=0.6, label="first epoch")
    right.hist(history.last_norms.tolist(), bins, alpha=0.6, label="last epoch")
    right.axvline(clip, color="black", linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
    right.set(title="norms of per-sample gradients", xlabel="norm", ylabel="examples")
    right.set_xscale("log")
    right.legend(loc="upper left")

    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> History:
    """Checks, times, trains, draws."""
    parser = argparse.ArgumentParser(description="DP-SGD on digits by vmap(grad(loss)).")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--clip", type=float, default=1.0, help="C, the largest norm let through")
    parser.add_argument("--noise", type=float, default=0.8, help="sigma, the noise in units of C")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("per_sample_gradients.png"))
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    data = load_data(args.seed)
    model = make_model()
    n = args.batch_size
    check_and_time(model, data.train_images[:n], data.train_labels[:n], tolerance=1e-5)

    start = time.perf_counter()
    history = train(model, data, args)
    print(f"\ntrained in {time.perf_counter() - start:.1f} s", end="")
    print(f", final test accuracy {history.test_accuracy[-1]:.1%}")
    plot(history, args.clip, args.out)
    print(f"wrote {args.out}")
    return history


if __name__ == "__main__":
    main()
