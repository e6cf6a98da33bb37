"""Curvature: the defects seen in published packages, each as a check against a known answer.

A check takes an adapter of `peers.py` and raises `Wrong` where the answer is not the known one. The
matrix with planted eigenvalues is the Hessian of ½ wᵀ A w; other answers are dense float64 Hessians
by plain double backward, over all samples at once.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import OutsideScope, method
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

Check = Callable[[Any], None]


class _Planted(nn.Module):
    """½ wᵀ A w for every sample, with given eigenvalues of A."""

    def __init__(self, eigenvalues: Any) -> None:
        super().__init__()
        values = torch.as_tensor(np.asarray(eigenvalues), dtype=torch.float64)
        g = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g).double())[0]
        self.matrix = ((q * values) @ q.T).float()
        self.w = nn.Parameter(torch.ones(len(values)))

    def forward(self, x: Tensor) -> Tensor:
        form: Tensor = 0.5 * self.w @ (self.matrix @ self.w)
        return x * form


ONE: list[tuple[Tensor, Tensor]] = [(torch.ones(4, 1), torch.zeros(4, 1))]


class Wrong(Exception):
    """The answer is not the known one."""


class _Mean(nn.Module):
    """The loss whose Hessian is the planted matrix."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).mean()


CROSS = nn.CrossEntropyLoss()
MEAN = _Mean()


def expect(condition: bool, message: str) -> None:
    """Fail with a message unless a condition holds."""
    if not condition:
        raise Wrong(message)


def net(*middle: nn.Module) -> nn.Module:
    """A small smooth classifier of 4 numbers into 3 classes, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3))


def data(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of these sizes, the same samples however they are cut."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(sum(sizes), 4, generator=g), torch.randint(3, (sum(sizes),), generator=g)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def dense(model: nn.Module, batches: Any, loss: Any = CROSS) -> Tensor:
    """The Hessian over all samples at once, in evaluation mode, in float64."""
    exact = copy.deepcopy(model).double().eval()
    names = [name for name, _ in exact.named_parameters()]
    sizes = [p.numel() for p in exact.parameters()]
    x = torch.cat([b[0] for b in batches]).double()
    y = torch.cat([b[1] for b in batches])
    loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss

    def value(flat: Tensor) -> Tensor:
        parts = zip(names, torch.split(flat, sizes), exact.parameters(), strict=True)
        state = {name: part.view_as(p) for name, part, p in parts}
        out: Tensor = loss(functional_call(exact, state, (x,)), y)
        return out

    with sdpa_kernel(SDPBackend.MATH):
        return torch.as_tensor(hessian(value, parameters_to_vector(exact.parameters()).detach()))


def near(got: Any, expected: Any, tolerance: float = 1e-3) -> None:
    """Fail unless the largest error is within a share of the largest expected magnitude."""
    got, expected = (np.asarray(v, dtype=np.float64) for v in (got, expected))
    expect(got.shape == expected.shape, f"shape {got.shape}, not {expected.shape}")
    error = np.abs(got - expected).max() / np.abs(expected).max()
    shown = [[float(f"{value:.4g}") for value in array.ravel()[:5]] for array in (got, expected)]
    expect(bool(error <= tolerance), f"got {shown[0]}, expected {shown[1]}")


def product_is_right(
    peer: Any, model: nn.Module, batches: Any, loss: Any = CROSS, same: nn.Module | None = None
) -> None:
    """Compare the product with one random vector; `same` is the model in other words."""
    matrix = dense(same or model, batches, loss)
    v = torch.randn(len(matrix), generator=torch.Generator().manual_seed(2))
    operator = method(peer, "operator")(model, loss, batches)
    near(peer.product(operator, v), matrix @ v.double())


def top_is_right(peer: Any, eigenvalues: Any, k: int) -> None:
    """Compare the k largest eigenvalues by magnitude, as a set."""
    operator = method(peer, "operator")(_Planted(eigenvalues), MEAN, ONE)
    found = np.sort(np.asarray(peer.top(operator, k), dtype=np.float64))
    wanted = np.asarray(eigenvalues)[np.argsort(-np.abs(np.asarray(eigenvalues)))[:k]]
    near(found, np.sort(wanted))


def small_scale(peer: Any) -> None:
    """The loss times 1e-7 has its eigenvalues times 1e-7."""
    top_is_right(peer, 1e-7 * np.r_[20, 5, 1, np.linspace(-0.01, 0.01, 37)], 3)  # far apart


def opposite_pair(peer: Any) -> None:
    """+5 and −5 are both in the set."""
    top_is_right(peer, np.r_[5, -5, np.linspace(-1, 1, 38)], 2)


def close_neighbours(peer: Any) -> None:
    """10, 9.9 and 9.8 are told apart."""
    top_is_right(peer, np.r_[10, 9.9, 9.8, np.linspace(-3, 7, 57)], 3)


def no_ghosts(peer: Any) -> None:
    """One eigenvalue far above the others is returned once."""
    top_is_right(peer, np.r_[263, 60, 30, 20, 12, np.linspace(-1, 1, 295)], 5)


def multiple(peer: Any) -> None:
    """An eigenvalue that is there twice is returned twice."""
    top_is_right(peer, np.r_[10, 10, 2, np.linspace(-0.02, 0.02, 37)], 3)


def uneven_batches(peer: Any) -> None:
    """Batches of 10 and 2 give the mean over 12 samples."""
    product_is_right(peer, net().eval(), data(10, 2))


def weighted_classes(peer: Any) -> None:
    """Class weights give the weighted mean over all samples, not a mean of batch means."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0]))
    product_is_right(peer, net().eval(), data(6, 6), loss)


def dropout(peer: Any) -> None:
    """A model left in training mode has one Hessian: two equal products are equal."""
    operator = method(peer, "operator")(net(nn.Dropout(0.5)).train(), CROSS, data(12))
    v = torch.ones(43)
    first = peer.product(operator, v)
    near(peer.product(operator, v), first, 1e-5)


class _Augmented(TensorDataset):
    """Samples with fresh noise at every visit."""

    def __getitem__(self, index: Any) -> Any:
        x, y = (tensor[index] for tensor in self.tensors)
        return x + 0.3 * torch.randn(4), y


def shuffling(peer: Any) -> None:
    """A loader that shuffles and augments has one Hessian: two equal products are equal."""
    loader = DataLoader(_Augmented(*data(12)[0]), batch_size=4, shuffle=True)
    operator = method(peer, "operator")(net().eval(), CROSS, loader)
    v = torch.ones(43)
    first = peer.product(operator, v)
    near(peer.product(operator, v), first, 1e-4)


def buffers_and_mode(peer: Any) -> None:
    """Running statistics and training flags are left as found."""
    model = net(nn.BatchNorm1d(5)).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    peer.product(method(peer, "operator")(model, CROSS, data(12)), torch.ones(53))
    moved = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
    expect(not moved, f"moved {', '.join(moved)}")
    expect(all(module.training for module in model.modules()), "left in evaluation mode")


def gradients_kept(peer: Any) -> None:
    """The user's `.grad` is left as found."""
    model = net().eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    peer.product(method(peer, "operator")(model, CROSS, data(12)), torch.ones(43))
    changed = sum(p.grad is None or not bool((p.grad == 3).all()) for p in model.parameters())
    expect(not changed, f"changed `.grad` of {changed} parameters")


def random_state(peer: Any) -> None:
    """The global random state is left as found."""
    operator = method(peer, "operator")(net().eval(), CROSS, data(12))
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    peer.top(operator, 2)
    expect(torch.equal(torch.get_rng_state(), before[0]), "moved the random state of torch")
    same = str(np.random.get_state()) == before[1]  # noqa: NPY002
    expect(same, "moved the random state of NumPy")


def second_object(peer: Any) -> None:
    """A second operator on the same model is right too."""
    model = net().eval()
    matrix, v = dense(model, data(12)), torch.ones(43)
    for _ in range(2):
        near(
            peer.product(method(peer, "operator")(model, CROSS, data(12)), v),
            matrix.sum(1),
        )


def unused_parameter(peer: Any) -> None:
    """A parameter that the loss does not use is a row of zeros."""
    model = net().eval()
    model.unused = nn.Parameter(torch.ones(2))
    v, matrix = torch.ones(45), dense(model, data(12))
    near(peer.product(method(peer, "operator")(model, CROSS, data(12)), v), matrix.sum(1))


class _Attention(nn.Module):
    """One head of fused attention over 3 tokens, with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.roll(1, 1), x.flip(1)], 1)[:, None]  # (samples, 1 head, 3, 4)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)
        logits: Tensor = self.head(out.mean((1, 2)))
        return logits


def fused_attention(peer: Any) -> None:
    """A model with fused attention has a Hessian without further ado."""
    product_is_right(peer, _Attention().eval(), data(8))


class _WeightNorm(nn.Module):
    """Weights as lengths times directions; by PyTorch's function, or as written in the paper."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.v = nn.Parameter(torch.randn(5, 4, generator=g))
        self.g = nn.Parameter(torch.rand(5, 1, generator=g) + 0.5)
        self.head, self.fused = nn.Parameter(torch.randn(3, 5, generator=g)), fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            weight = torch._weight_norm(self.v, self.g, 0)
        else:
            weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        return torch.tanh(x @ weight.T) @ self.head.T


def weight_norm(peer: Any) -> None:
    """Weight norm has its true Hessian, which PyTorch's second derivative (2.13, 2.14) misses."""
    written_out = _WeightNorm(fused=False)
    product_is_right(peer, _WeightNorm(fused=True).eval(), data(8), same=written_out)


def density(peer: Any) -> None:
    """The density integrates to 1, and to the mean eigenvalue."""
    eigenvalues = np.linspace(2, 8, 100)  # four standard errors of 10 probes are 20 % of the mean
    mass, mean = method(peer, "density")(_Planted(eigenvalues), MEAN, ONE)
    near(mass, 1.0, 0.03)
    near(mean, eigenvalues.mean(), 0.2)


def negative_trace(peer: Any) -> None:
    """A negative trace is as well known as a positive one."""
    eigenvalues = np.r_[-60, -20, np.linspace(-4, 2, 98)]
    trace, model = method(peer, "trace"), _Planted(eigenvalues)
    errors = [trace(model, MEAN, ONE, seed) - eigenvalues.sum() for seed in range(10)]
    # A sample of Hutchinson's estimate has an error of at most √2 ‖A‖, so 100 have 0.14 ‖A‖.
    ratio = float(np.sqrt(np.mean(np.square(errors))) / np.linalg.norm(eigenvalues))
    expect(ratio < 0.3, f"root mean square error of {ratio:.2f} ‖A‖ over 10 seeds")


def no_leak(peer: Any) -> None:
    """Operators that were dropped leave no tensor behind."""
    model, batches = net().eval(), data(12)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def use() -> None:
        peer.product(method(peer, "operator")(model, CROSS, batches), torch.ones(43))

    use()  # what is made once a process is no leak
    before = alive()
    for _ in range(3):
        use()
    after = alive()
    expect(after <= before, f"{after - before} tensors more than before")


def on_cpu_by_default(peer: Any) -> None:
    """A model on the CPU works without a word about devices."""
    method(peer, "on_cpu_by_default")(net().eval(), data(12))


def weight_decay(peer: Any) -> None:
    """L2 belongs to the objective: its Hessian adds λ to the diagonal."""
    model = net().eval()
    matrix = dense(model, data(12)) + 0.3 * torch.eye(43, dtype=torch.float64)
    try:
        operator = method(peer, "operator")(model, CROSS, data(12), weight_decay=0.3)
    except TypeError as error:
        raise OutsideScope("it knows no weight decay") from error
    near(peer.product(operator, torch.ones(43)), matrix.sum(1))


CURVATURE: dict[str, Check] = {
    check.__name__: check
    for check in (
        small_scale,
        opposite_pair,
        close_neighbours,
        no_ghosts,
        multiple,
        uneven_batches,
        weighted_classes,
        dropout,
        shuffling,
        buffers_and_mode,
        gradients_kept,
        random_state,
        second_object,
        unused_parameter,
        fused_attention,
        weight_norm,
        density,
        negative_trace,
        no_leak,
        on_cpu_by_default,
        weight_decay,
    )
}
