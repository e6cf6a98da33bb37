"""Surfaces: the defects seen in published packages, each as a check against a known answer."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from checks_curvature import CROSS, expect, near, net
from peers import method
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Check = Callable[[Any], None]


class _Recorded(nn.Linear):
    """A layer that notes the weights with which it is called."""

    def __init__(self, width: int, filters: int) -> None:
        torch.manual_seed(0)
        super().__init__(width, filters, bias=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return super().forward(x)


def displacement(peer: Any, model: _Recorded, distance: float, seed: int = 0) -> Tensor:
    """Return the way from the weights to the last point of a random line."""
    start = model.weight.detach().clone()
    x = torch.randn(8, model.in_features, generator=torch.Generator().manual_seed(3))
    batches = [(x, torch.zeros(8).long())]
    method(peer, "random_line")(copy.copy(model), CROSS, batches, distance, seed)
    return model.seen[-1] - start


def walked_plane(peer: Any) -> None:
    """Every point of a plane is at its own place: squares have their closed form."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 1, bias=False) for _ in range(3)]
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    steps, weights = 6, [m.weight.detach().double() for m in models]
    found = method(peer, "plane")(models[0], models[1:], nn.MSELoss(), [(x, y)], steps)
    ways = [w - weights[0] for w in weights[1:]]
    expected = [
        [
            F.mse_loss(
                x.double() @ (weights[0] + i / steps * ways[0] + j / steps * ways[1]).T, y.double()
            )
            for j in range(steps)
        ]
        for i in range(steps)
    ]
    near(found, expected, 1e-5)


def left_as_found(peer: Any) -> None:
    """The weights are the same after a line, without an option that says so."""
    model = _Recorded(6, 4)
    before = model.weight.detach().clone()
    displacement(peer, model, 1.0)
    expect(torch.equal(model.weight, before), "left at other weights")


def distance(peer: Any) -> None:
    """Twice the distance reaches twice as far."""
    one, two = (float(displacement(peer, _Recorded(6, 4), d).norm()) for d in (0.5, 1.0))
    expect(abs(two / one - 2) < 0.01, f"reaches {two / one:.3g} times as far")


def independent_directions(peer: Any) -> None:
    """Two random directions in 10,000 dimensions are nearly orthogonal."""
    one, two = (displacement(peer, _Recorded(100, 100), 1.0, seed).flatten() for seed in (0, 1))
    cosine = float(F.cosine_similarity(one, two, dim=0))
    expect(abs(cosine) < 0.1, f"cosine {cosine:.2f}")


def filter_norms(peer: Any) -> None:
    """Each filter moves as far as it is long (Li et al. 2018, sec. 4)."""
    model = _Recorded(9, 5)
    with torch.no_grad():
        model.weight.mul_(torch.tensor([[0.1], [1.0], [2.0], [5.0], [10.0]]))
    norms = model.weight.detach().norm(dim=1)
    moved = displacement(peer, model, 1.0).norm(dim=1)
    near(moved / norms, torch.ones(5) * (moved / norms).mean(), 0.01)


def zero_parameters(peer: Any) -> None:
    """Biases and filters of zeros are no obstacle."""
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            (p if p.dim() == 1 else p[0]).zero_()
    batch = (torch.ones(4, 4), torch.zeros(4).long())
    values = method(peer, "random_line")(model, CROSS, [batch], 1.0)
    expect(bool(np.isfinite(values).all()), f"{np.sum(~np.isfinite(values))} points not finite")


def running_statistics(peer: Any) -> None:
    """Variances of batch norms do not move with the weights: far points are finite."""
    norm = nn.BatchNorm1d(5)
    nn.init.constant_(norm.bias, 0.5)  # as trained: zeros are another matter
    batch = (torch.ones(4, 4), torch.zeros(4).long())
    values = method(peer, "random_line")(net(norm).eval(), CROSS, [batch], 20.0)
    expect(bool(np.isfinite(values).all()), f"{np.sum(~np.isfinite(values))} points not finite")


def dropout_off(peer: Any) -> None:
    """A model in training mode is measured in evaluation mode."""
    batch = (torch.ones(4, 4), torch.zeros(4).long())
    values = []
    for mode in (True, False):
        model = net(nn.Dropout(0.5)).train(mode)
        values.append(method(peer, "random_line")(model, CROSS, [batch], 1.0))
    near(values[0], values[1], 1e-5)


def shuffled_mixup(peer: Any) -> None:
    """With a shuffling loader and random mixup a point still has one value."""
    from landscape import Directions, Objective, random_directions

    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=5, shuffle=True)
    model = net()
    one = random_directions(model, num=1)
    twice = Directions(one.vectors * 2, kind="random", ignored=one.ignored)

    def mix(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(x), generator=generator)
        return (x + x[order]) / 2, (F.one_hot(y, 3) + F.one_hot(y[order], 3)) / 2

    surface = method(peer, "surface_of")(
        model, loader, directions=twice, points=5, objective=Objective(transform=mix)
    )
    spread = np.ptp(np.diag(surface.nll[:, ::-1])) / np.ptp(surface.nll)
    expect(spread < 1e-4, f"five visits of one point spread over {spread:.2g} of the range")


def not_finite(peer: Any) -> None:
    """Points that are NaN stay NaN and are counted."""
    from landscape import Directions, Objective

    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.sqrt()

    model = Root(1, 1, bias=False)
    nn.init.ones_(model.weight)
    way = ({"weight": np.ones((1, 1))}, {"weight": np.ones((1, 1))})
    surface = method(peer, "surface_of")(
        model,
        [(torch.ones(2, 1), torch.zeros(2, 1))],
        directions=Directions(way, kind="random"),
        points=(3, 5),
        span=1.5,
        objective=Objective(loss=F.mse_loss),
    )
    weight = 1 + np.add.outer(np.linspace(-1.5, 1.5, 3), np.linspace(-1.5, 1.5, 5))
    expected = np.where(weight < 0, np.nan, weight)
    expect(np.allclose(surface.nll, expected, atol=1e-6, equal_nan=True), "other values")
    expect(surface.num_nonfinite == np.isnan(expected).sum(), f"counted {surface.num_nonfinite}")


SURFACES: dict[str, Check] = {
    check.__name__: check
    for check in (
        walked_plane,
        left_as_found,
        distance,
        independent_directions,
        filter_norms,
        zero_parameters,
        running_statistics,
        dropout_off,
        shuffled_mixup,
        not_finite,
    )
}
