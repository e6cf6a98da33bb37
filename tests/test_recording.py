import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import landscape
from landscape import HessianOperator, recording
from landscape.linalg import recorded_hessian
from landscape.models import create_model
from landscape.recording import Recording, Repeated
from tests.cases import Replayed, make_batches, make_model

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("waits", [False, True])
def test_a_repeated_function_is_recorded_at_its_second_call(waits, recorded, monkeypatch):
    monkeypatch.setattr(recording, "trial", lambda work: (work(), not waits))
    double = Repeated(lambda v: 2 * v, torch.device("cpu"))
    results = []
    for call in range(4):
        v = torch.full((3,), float(call))
        results.append(double(v))
        v.zero_()  # the caller may do with it what it likes
        assert Replayed.made == (0 if waits or call == 0 else 1)
    for call, result in enumerate(results):
        assert torch.equal(result, torch.full((3,), 2.0 * call))


def test_a_trial_that_fails_is_made_again(recorded, monkeypatch):
    failures = [torch.OutOfMemoryError("CUDA out of memory.")]

    def trial(work):
        if failures:
            raise failures.pop()
        return work(), False

    monkeypatch.setattr(recording, "trial", trial)
    double = Repeated(lambda v: 2 * v, torch.device("cpu"))
    v = torch.ones(3)
    with pytest.raises(torch.OutOfMemoryError):
        double(v)
    assert [double(v)[0].item() for _ in range(3)] == [2.0] * 3
    assert Replayed.made == 0


class Drawing(nn.Module):
    """Draws in evaluation mode; what it adds is too little to be refused."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3).double()

    def forward(self, x):
        return self.head(x.flatten(1) + 1e-9 * torch.rand(16)).tanh()


@pytest.mark.parametrize(
    "probe",
    [
        lambda *on: landscape.loss_line(*on, points=4).nll,
        lambda *on: landscape.hessian_max_spectrum(*on, k=1).eigenvalues,
        lambda *on: landscape.hessian_spectrum(*on, k=1, memory=0).largest.values,
    ],
    ids=["line", "max", "memory"],
)
def test_passes_of_models_that_draw_are_not_recorded(probe, recorded, monkeypatch):
    model, data = Drawing(), make_batches((7, 5))
    passes, recording_now = [], []
    model.register_forward_hook(lambda *_: passes.extend(recording_now))

    class Noticing(Replayed):
        def __init__(self, *args):
            recording_now.append(True)
            super().__init__(*args)
            recording_now.clear()

    for module in (recording, recorded_hessian):
        monkeypatch.setattr(module, "Recording", Noticing)
    before = torch.get_rng_state()
    values = probe(model, data)
    assert torch.equal(torch.get_rng_state(), before)
    assert not passes
    assert (probe(model, data) == values).all()


def test_nothing_is_recorded_on_a_cpu():
    double = Repeated(lambda v: 2 * v, torch.device("cpu"))
    assert double.stream is None
    assert [double(torch.tensor([x])).item() for x in (1.0, 2.0)] == [2.0, 4.0]


class Waiting(nn.Module):
    """The derivative of its output waits for the device."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        out = self.head(x.flatten(1)).tanh()
        if out.requires_grad:
            out.register_hook(lambda g: g * float(g.sum().isfinite()))
        return out


class Shifted(nn.Module):
    """Reads a tensor that is an attribute, as its loss does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.offset = torch.linspace(0, 1, 16)

    def forward(self, x):
        return (self.head(x.flatten(1)) * self.offset.sum() / 8).tanh()


class Prior(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("prior", torch.tensor([0.5, 0.1, -0.2]))

    def forward(self, out, y):
        return F.cross_entropy(out + self.prior, y)


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("memory", ["auto", 0])
    def test_what_a_recording_reads_may_be_replaced(self, memory):
        model, loss = Shifted().double().cuda(), Prior().double().cuda()
        model.offset = model.offset.double().cuda()
        data = make_batches((4, 4, 4))
        operator = HessianOperator(model, data, landscape.Objective(loss=loss), memory=memory)
        v = torch.ones(operator.dim).double().cuda()
        before = [operator.matvec(v) for _ in range(3)][-1]
        model.offset = torch.zeros_like(model.offset)
        loss.cpu()
        rest = [torch.zeros(64).double().cuda() for _ in range(64)]  # takes the memory that is free
        assert torch.equal(operator.matvec(v), before)
        del rest

    def test_other_threads_work_on_no_stream_that_is_in_use(self):
        stream = recording.side_stream(torch.device("cuda", torch.cuda.current_device()))
        entered, order = threading.Event(), []

        def second():
            entered.wait(10)
            with recording.apart(stream):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        with recording.apart(stream):
            entered.set()
            thread.join(0.2)
            order.append("first")
        thread.join(10)
        assert order == ["first", "second"]

    @pytest.mark.parametrize("name", ["conv", "tied", "attention"])
    @pytest.mark.parametrize("memory", ["auto", 0])
    def test_products_are_those_of_the_cpu_at_every_call(self, name, memory):
        data = make_batches((7, 5))
        expected = HessianOperator(make_model(name), data)
        operator = HessianOperator(make_model(name).cuda(), data, memory=memory)
        generator = torch.Generator().manual_seed(0)
        found, known = [], []
        for _ in range(5):
            v = torch.randn(operator.dim, generator=generator, dtype=torch.float64)
            found.append(operator.matvec(v.cuda()))
            known.append(expected.matvec(v))
        assert operator._multiply_kept._recording is not None
        for product, other in zip(found, known, strict=True):
            torch.testing.assert_close(product.cpu(), other)

    @pytest.mark.parametrize("name", ["resnet20", "vit_nano"])
    def test_many_at_once_and_on_another_stream(self, name):
        model = create_model(name, num_classes=3).double().cuda()
        x, y = torch.randn(6, 3, 32, 32).double().cuda(), torch.arange(6).cuda() % 3
        operator = HessianOperator(model, [(x, y)])
        vectors = torch.randn(operator.dim, 5).double().cuda()
        together = operator @ vectors
        with torch.cuda.stream(torch.cuda.Stream()):
            alone = [operator.matvec(v) for v in vectors.unbind(1)]
            torch.cuda.current_stream().synchronize()
        torch.testing.assert_close(together, torch.stack(alone, 1))

    def test_models_that_wait_are_not_recorded_and_leave_no_mark(self):
        data = make_batches((4, 4, 4))
        model = Waiting().double()
        expected = landscape.hessian_max_spectrum(model, data, k=2)
        operator = HessianOperator(model.cuda(), data)
        v = torch.randn(operator.dim).double().cuda()
        products = [operator.matvec(v) for _ in range(3)]
        assert operator._multiply_kept._recording is None
        assert torch.equal(products[0], products[2])
        found = landscape.hessian_max_spectrum(model, data, k=2, group=2)
        torch.testing.assert_close(
            torch.from_numpy(found.eigenvalues),
            torch.from_numpy(expected.eigenvalues),
            rtol=1e-3,
            atol=0,
        )
        assert torch.cuda.get_sync_debug_mode() == 0
        assert torch.randn(3, device="cuda").isfinite().all()  # random numbers still work

    def test_a_dropped_operator_returns_its_memory(self):
        model = create_model("resnet20", num_classes=3).cuda()
        x, y = torch.randn(32, 3, 32, 32).cuda(), torch.arange(32).cuda() % 3
        taken = []
        for _ in range(4):
            operator = HessianOperator(model, [(x, y)])
            for _ in range(3):
                operator.matvec(torch.ones(operator.dim, device="cuda"))
            del operator
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_allocated())
        assert taken[3] <= taken[1]

    def test_a_recording_shares_the_memory_of_the_one_before(self):
        stream = torch.cuda.Stream()
        x = torch.zeros(1 << 20, device="cuda")

        def first():
            return (x + 1) * 2

        def second():
            return F.relu(x - 1) + 3

        for work in (first, second):
            with recording.apart(stream):
                work()
        one = Recording(first, stream)
        two = Recording(second, stream, one)
        for value in (1.0, 5.0):
            x.fill_(value)
            one.replay(stream)
            two.replay(stream)
            assert (one.result == 2 * (value + 1)).all()
            assert (two.result == max(value - 1, 0) + 3).all()
