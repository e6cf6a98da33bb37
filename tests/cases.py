"""Small models and data that the tests share."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """LayerNorm, one head of fused attention with a residual, mean pooling; 83 parameters."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.head((x + F.scaled_dot_product_attention(q, k, v)).mean(1))


class Tied(nn.Module):
    """One matrix used twice under two names, and a parameter that the loss ignores."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Flatten()
        self.encode = nn.Linear(16, 5, bias=False)
        self.decode = nn.Linear(16, 5, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.flat(x)
        return self.head(torch.tanh(self.encode(x)) * torch.sigmoid(self.decode(x)))


def conv_net():
    """Convolutions with BatchNorm; a hundred-odd parameters."""
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


MODELS = {"conv": conv_net, "tied": Tied, "attention": Attention}


def make_model(name, dtype=torch.float64, seed=0):
    """A model of `MODELS` with reproducible weights and non-trivial BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.to(dtype)


def make_batches(sizes, dtype=torch.float64, seed=1):
    """Batches of (n, 4, 2, 2) inputs and labels in 0…2; the same samples however they are cut."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 4, 2, 2, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@contextmanager
def float64_by_default():
    """PyTorch's default type, on which no result may depend."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Replayed:
    """Stands in for `Recording` on a CPU: a replay does the work again, and puts it in place.

    Attributes:
        made: Number of recordings.
    """

    made = 0

    def __init__(self, work, stream, before=None):
        self.work = work
        self.result = work()
        Replayed.made += 1

    def replay(self, stream):
        found = self.work()
        if isinstance(found, torch.Tensor):
            self.result.copy_(found)
        else:
            vars(self.result).update(vars(found))


class Stream:
    """Stands in for a CUDA stream on a CPU, which is always done."""

    def query(self):
        return True


def snapshot(model):
    """Everything of a model that a probe must leave as it was."""
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "ids": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_untouched(model, before):
    after = snapshot(model)
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for name, grad in before["grads"].items():
        assert (grad is None) == (after["grads"][name] is None), name
        assert grad is None or torch.equal(grad, after["grads"][name]), name
    for key in ("requires_grad", "ids", "training", "hooks"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"]), "the global random state has moved"
