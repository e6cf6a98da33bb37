"""Tests of kinks that are held, against masks by hand and against products of the Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape import HessianOperator
from landscape.linalg.kinks import Holding, Noting


def for_its_effect(*in_place):
    """Return a ReLU of which the model goes on with what it was given."""

    def relu(x):
        F.relu(x, *in_place) if in_place else x.relu_()
        return x

    return relu


RELUS = {
    "function": F.relu,
    "torch": torch.relu,
    "method": lambda x: x.relu(),
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "method in place": lambda x: x.relu_(),
    "for its effect": for_its_effect(),
    "by position": for_its_effect(True),
}
POOLS = {
    "function": lambda x: F.max_pool2d(x, 2),
    "torch": lambda x: torch.max_pool2d(x, (2, 1)),
    "module": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
}


class Net(nn.Module):
    """Convolutions, one of them with a stride and few channels, a ReLU twice and a pool."""

    def __init__(self, relu=F.relu, pool=POOLS["function"]):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.second = nn.Conv2d(6, 8, 1, stride=2)
            self.head = nn.Linear(8, 3)
        self.relu, self.pool = relu, pool

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.first(x))))
        return self.head(self.relu(self.second(x)).mean((2, 3)))


def problem(**parts):
    generator = torch.Generator().manual_seed(1)
    model = Net(**parts).double().eval()
    x = torch.randn(24, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model, x, torch.arange(24) % 3


def gradient(model, x, y):
    parts = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([part.reshape(-1) for part in parts])


def moved(model, direction, step):
    """Return a copy of a model at θ + step · direction."""
    other = Net(model.relu, model.pool).to(direction.dtype).eval()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat + step * direction, other.parameters())
    return other


def noted(model, x):
    choices = []
    with Noting(choices):
        outputs = model(x)
    return choices, outputs


@pytest.mark.parametrize("parts", [{"relu": r} for r in RELUS] + [{"pool": p} for p in POOLS])
def test_gradients_at_held_kinks_have_the_hessian_as_derivative(parts, generator):
    table = {"relu": RELUS, "pool": POOLS}
    model, x, y = problem(**{kind: table[kind][name] for kind, name in parts.items()})
    operator = HessianOperator(model, [(x, y)])
    assert operator.kinks == "held"
    v = torch.randn(operator.dim, generator=generator, dtype=x.dtype)
    v /= v.norm()
    choices, outputs = noted(model, x)
    torch.testing.assert_close(outputs, model(x), rtol=0, atol=0)
    ends, step = [], 0.1
    for sign in (1, -1):
        other = moved(model, v, sign * step)
        with Holding(choices):
            ends.append(gradient(other, x, y))
    product, exact = (ends[0] - ends[1]) / (2 * step), operator.matvec(v)
    assert (product - exact).norm() < 1e-2 * exact.norm()
    free = [gradient(moved(model, v, sign * step), x, y) for sign in (1, -1)]
    across = (free[0] - free[1]) / (2 * step)
    assert (across - exact).norm() > 5e-2 * exact.norm()


def test_held_relu_is_a_mask_and_a_held_pool_a_choice():
    x = torch.tensor([[[[1.0, 2.0, -1.0], [0.5, -3.0, 4.0]]]], requires_grad=True)
    choices, _ = noted(lambda t: (t.relu(), F.max_pool2d(t, (2, 1))), x)
    other = torch.tensor([[[[-1.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]], requires_grad=True)
    with Holding(choices):
        opened, largest = other.relu(), F.max_pool2d(other, (2, 1))
    torch.testing.assert_close(opened[0, 0], torch.tensor([[-1.0, 5.0, 0.0], [7.0, 0.0, 9.0]]))
    torch.testing.assert_close(largest[0, 0], torch.tensor([[-1.0, 5.0, 9.0]]))


def test_what_needs_no_gradient_is_left_as_it_is():
    weight = torch.tensor(1.0, requires_grad=True)

    def run(x):
        before = x * weight
        with torch.no_grad():
            factor = F.relu(before)
        first = F.max_pool2d(F.relu(x), 1) * weight
        return torch.cat([factor, first, F.relu(x * weight)])

    x = torch.tensor([[[1.0, -1.0]]])
    choices, _ = noted(run, x)
    assert len(choices) == 1
    with Holding(choices):
        out = run(-x).flatten()
    assert out.tolist() == [0.0, 1.0, 0.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "parts",
    [
        {"relu": F.relu6},
        {"relu": lambda x: torch.jit.script(F.relu)(x)},
        {"relu": lambda x: torch.relu(input=x)},
        {"relu": lambda x: F.relu(x) + 0 * F.hardtanh(x)},
        {"relu": lambda x: (F.relu(x), F.hardtanh(x, 0.0, 9.0))[1]},
        {"pool": lambda x: F.max_pool2d(x, 2, return_indices=True)[0]},
        {"pool": lambda x: F.max_pool2d(x, 2, 2, 0, 1, False, True)[0]},
        {"pool": nn.AdaptiveMaxPool2d(4)},
    ],
    ids=[
        "relu6",
        "script",
        "by name",
        "hardtanh",
        "dropped",
        "indices",
        "indices by position",
        "adaptive",
    ],
)
def test_kinks_that_are_not_noted_are_not_held(parts):
    model, x, y = problem(**parts)
    torch.testing.assert_close(noted(model, x)[1], model(x), rtol=0, atol=0)
    assert HessianOperator(model, [(x, y)]).kinks == "free"


def test_a_graph_that_is_built_again_is_noted_once():
    # a view that wants the channels first, where the first graph has them last
    model, x, y = problem(pool=lambda x: x.view(len(x), -1).view(x.shape))
    assert HessianOperator(model, [(x, y)]).kinks == "held"


def test_losses_without_kinks_are_known():
    model, x, y = problem(relu=F.gelu, pool=lambda x: F.avg_pool2d(x, 2))
    assert HessianOperator(model, [(x, y)]).kinks == "none"


def test_other_calls_than_those_noted_are_not_held():
    x = torch.tensor([2.0, -2.0], requires_grad=True)
    choices, _ = noted(F.relu, x)
    for call in (
        lambda t: F.relu(t[:1]),
        lambda t: F.conv2d(t.view(1, 1, 1, 2), t.view(1, 1, 1, 2)),
    ):
        with Holding(choices):
            torch.testing.assert_close(call(-x), call(-x.detach()))
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    pooled, _ = noted(lambda t: F.max_pool2d(t, 2), images[:1, :1])
    with Holding(pooled):
        torch.testing.assert_close(F.max_pool2d(images, 2), F.max_pool2d(images.detach(), 2))
    with Holding(choices):
        held, more = F.relu(-x), F.relu(-x)
    assert (held.tolist(), more.tolist()) == ([-2.0, 0.0], [0.0, 2.0])


def test_derivatives_by_torch_func_are_left_alone():
    x = torch.tensor([2.0, -2.0])
    choices, slopes = noted(torch.func.vmap(torch.func.grad(F.relu)), x)
    assert choices == []
    with Holding(choices):
        again = torch.func.vmap(torch.func.grad(F.relu))(x)
    assert again.tolist() == slopes.tolist() == [1.0, 0.0]


def test_convolutions_have_the_format_that_they_had():
    model, x, _ = problem()
    assert torch.contiguous_format in noted(model, x)[0]
    assert torch.channels_last not in noted(model, x)[0]
    model.to(memory_format=torch.channels_last)
    choices, _ = noted(model, x.contiguous(memory_format=torch.channels_last))
    forms = [choice for choice in choices if isinstance(choice, torch.memory_format)]
    # the second has a stride and too few channels for PyTorch's gradient in that format
    assert forms == [torch.channels_last, torch.contiguous_format]
    model.to(memory_format=torch.contiguous_format)
    outputs = []
    for layer in (model.first, model.second):
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    with Holding(choices):
        model(x)
    assert [out.is_contiguous() for out in outputs] == [False, True]


def test_one_image_alone_has_no_format():
    model, x, _ = problem()
    model.first.to(memory_format=torch.channels_last)
    choices, out = noted(model.first, x[0])
    with Holding(choices):
        torch.testing.assert_close(model.first(x[0]), out)
