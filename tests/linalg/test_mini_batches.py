import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import landscape
from landscape import HessianOperator, Objective, objective, recording
from landscape.linalg import lock_step, recorded_hessian
from landscape.linalg.gradient import GradientGraph
from landscape.linalg.lock_step import MiniBatchSolver
from landscape.linalg.mini_batches import MiniBatchHessian
from landscape.models import create_model
from tests.cases import Replayed, Stream, assert_untouched, make_batches, make_model, snapshot

OBJECTIVE = Objective(weight_decay=0.05)


def frozen_batches(model, batches, objective=OBJECTIVE):
    frozen = objective.freeze(model, batches, check_mean=False)
    return frozen, list(frozen.batches)


@pytest.mark.parametrize("name", ["conv", "tied", "attention"])
def test_recorded_products_are_those_of_each_mini_batch(name, generator, recorded):
    """Three shapes in turns; a shape that has been left is recorded anew."""
    model, batches = make_model(name), make_batches((4, 4, 3, 4))
    frozen, prepared = frozen_batches(model, batches)
    before = snapshot(model)
    hessian = MiniBatchHessian(frozen)
    for batch, own, made in zip(prepared, batches, (2, 0, 2, 2), strict=True):
        Replayed.made = 0
        hessian.load(batch)
        assert hessian.recorded
        assert hessian.kept
        assert Replayed.made == made
        alone = HessianOperator(model, [own], OBJECTIVE)
        for _ in range(2):
            v = torch.randn(frozen.space.dim, generator=generator, dtype=torch.float64)
            torch.testing.assert_close(hessian.matvec(v), alone.matvec(v))
        torch.testing.assert_close(hessian.exact_matvec(v), alone.matvec(v))
    assert_untouched(model, before)


def test_products_are_not_overwritten_by_the_next(generator, recorded):
    frozen, (batch,) = frozen_batches(make_model("conv"), make_batches((4,)))
    hessian = MiniBatchHessian(frozen)
    hessian.load(batch)
    v = torch.randn(frozen.space.dim, generator=generator, dtype=torch.float64)
    once = hessian.matvec(v)
    kept = once.clone()
    hessian.matvec(2 * v)
    assert torch.equal(once, kept)


def test_one_graph_serves_rounded_and_exact_products(generator, recorded, monkeypatch):
    frozen, (batch,) = frozen_batches(
        make_model("conv", torch.float32), make_batches((4,), torch.float32)
    )
    hessian = MiniBatchHessian(frozen, "tf32")
    asked = []
    product = GradientGraph.product

    def noted(self, tangents, precision="full"):
        asked.append(precision)
        return product(self, tangents)

    monkeypatch.setattr(GradientGraph, "product", noted)
    hessian.load(batch)
    assert Replayed.made == 3
    asked.clear()
    v = torch.randn(frozen.space.dim, generator=generator)
    torch.testing.assert_close(hessian.matvec(v), hessian.exact_matvec(v))
    assert asked == ["tf32", "full"]
    assert Replayed.made == 3


def test_exact_products_of_a_graph_in_half_precision(generator):
    model, batches = make_model("conv", torch.float32), make_batches((4, 4), torch.float32)
    frozen, prepared = frozen_batches(model, batches)
    hessian = MiniBatchHessian(frozen, "bf16")
    v = torch.randn(frozen.space.dim, generator=generator)
    for batch, own in zip(prepared, batches, strict=True):
        hessian.load(batch)
        exact = HessianOperator(model, [own], OBJECTIVE).matvec(v)
        torch.testing.assert_close(hessian.exact_matvec(v), exact)
        assert 1e-6 < (hessian.matvec(v) - exact).norm() / exact.norm() < 0.1


def test_what_waits_for_the_device_is_not_recorded(recorded, monkeypatch, generator):
    model, batches = make_model("conv"), make_batches((4, 4))
    frozen, prepared = frozen_batches(model, batches)
    v = torch.randn(frozen.space.dim, generator=generator, dtype=torch.float64)
    expected = HessianOperator(model, batches[:1], OBJECTIVE).matvec(v)
    for module in (recorded_hessian, recording):
        monkeypatch.setattr(module, "trial", lambda work: (work(), False))
    for memory, kept in (("auto", True), (0, False)):
        hessian = MiniBatchHessian(frozen, memory=memory)
        hessian.load(prepared[0])
        assert not hessian.recorded
        assert hessian.kept is kept
        for _ in range(2):
            torch.testing.assert_close(hessian.matvec(v), expected)
    assert recorded.made == 0


@pytest.mark.parametrize("name", ["conv", "tied", "attention"])
@pytest.mark.parametrize("memory", [0, 2**20])
def test_batches_that_are_not_kept_are_copied_into_place(name, memory, generator, recorded):
    """Two shapes: the one that is not recorded has its graph built at every product."""
    model, batches = make_model(name), make_batches((4, 4, 3, 4))
    known = HessianOperator(model, batches, OBJECTIVE)
    vectors = torch.randn(known.dim, 3, generator=generator, dtype=torch.float64)
    expected = known @ vectors
    recorded.made = 0
    operator = HessianOperator(model, batches, OBJECTIVE, memory=memory)
    kept = 0 if memory == 0 else 4
    assert operator.num_kept == kept
    for _ in range(2):
        torch.testing.assert_close(operator @ vectors, expected)
        torch.testing.assert_close(operator.matvec(vectors[:, 0]), expected[:, 0])
    # Kept ones are one recording; of the others, the gradient and the product.
    assert recorded.made == (3 if memory == 0 else 1)
    torch.testing.assert_close(operator.gradient(), known.gradient())


@pytest.mark.parametrize("name", ["conv", "attention"])
@pytest.mark.parametrize("on", ["cpu", "recorded"])
def test_side_by_side_finds_what_one_after_the_other_does(name, on, request):
    """Seven mini-batches of two shapes, three at a time."""
    if on == "recorded":
        request.getfixturevalue("recorded")
    model, batches = make_model(name), make_batches((4, 4, 4, 4, 3, 3, 4))
    alone = [landscape.top_eigenpairs(HessianOperator(model, [b], OBJECTIVE)) for b in batches]
    before = snapshot(model)
    together = landscape.hessian_max_spectrum(model, batches, objective=OBJECTIVE, group=3)
    assert_untouched(model, before)
    expected = [found.values for found in alone]
    np.testing.assert_allclose(together.eigenvalues, expected, rtol=1e-3)
    assert together.converged.all()
    assert (together.residuals <= 0.1 * np.abs(together.eigenvalues)).all()
    assert together.provenance.settings["group"] == 3
    assert together.provenance.settings["kept_batches"] == 7
    assert together.num_hvps < 1.3 * sum(found.num_matvecs for found in alone)
    single = landscape.hessian_max_spectrum(model, batches, objective=OBJECTIVE)
    np.testing.assert_allclose(single.eigenvalues, expected, rtol=1e-3)
    # PyTorch has one thread here, on which one after the other is the default.
    assert single.provenance.settings["group"] == (1 if on == "cpu" else 2)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_result_does_not_depend_on_which_is_done_first(seed, recorded, monkeypatch):
    """Eight mini-batches, three at a time, by a device that is done with each at random."""
    model, batches = make_model("conv"), make_batches((4,) * 8)
    in_turns = landscape.hessian_max_spectrum(model, batches, group=3)
    dice = np.random.default_rng(seed)
    asked = []

    def query(self):
        asked.append(dice.random() < 0.3)
        return asked[-1]

    monkeypatch.setattr(Stream, "query", query)
    at_random = landscape.hessian_max_spectrum(model, batches, group=3)
    assert set(asked) == {True, False}
    np.testing.assert_array_equal(at_random.eigenvalues, in_turns.eigenvalues)
    assert at_random.num_hvps == in_turns.num_hvps


class Watched(MiniBatchHessian):
    """Notes where its products are made."""

    def __init__(self, *args):
        super().__init__(*args)
        self.threads = {}

    def matvec(self, v):
        self.threads[threading.current_thread()] = torch.get_num_threads(), torch.is_grad_enabled()
        return super().matvec(v)


@pytest.fixture
def places(monkeypatch):
    """The places that are taken."""
    made = []

    def make(*args):
        made.append(Watched(*args))
        return made[-1]

    monkeypatch.setattr(lock_step, "MiniBatchHessian", make)
    return made


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_cpu_works_on_two_threads(two_threads, places, with_gradients):
    """Each has half of PyTorch's; the first product tells the memory and is made before."""
    model, batches = make_model("conv"), make_batches((4,) * 5)
    ticks = []
    with torch.set_grad_enabled(with_gradients):
        frozen, _ = frozen_batches(model, batches)
        solver = MiniBatchSolver(
            frozen,
            2,
            tol=1e-3,
            max_iter=100,
            certify=True,
            memory="auto",
            generator=torch.Generator().manual_seed(0),
            group=None,
            first=None,
            precision="full",
        )
        rows = solver.run(lambda: ticks.append(threading.current_thread()))
    assert len(rows) == len(ticks) == solver.kept == 5
    assert solver.size == len(places) == len(set(ticks)) == 2
    main = threading.main_thread()
    first, second = (place.threads for place in places)
    assert first.pop(main) == (2, with_gradients)
    assert first.keys().isdisjoint(second)
    for threads in (first, second):
        assert list(threads.values()) == [(1, with_gradients)]
    assert not set(ticks) & set(threading.enumerate())
    with ThreadPoolExecutor(1) as pool:  # those that come later have all of PyTorch's, too
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2


def test_results_on_two_threads_are_the_same_in_every_run(two_threads):
    model, batches = make_model("attention"), make_batches((4,) * 5)
    once, again = (landscape.hessian_max_spectrum(model, batches) for _ in range(2))
    assert once.provenance.settings["group"] == 2
    np.testing.assert_array_equal(once.eigenvalues, again.eigenvalues)
    np.testing.assert_array_equal(once.errors, again.errors)


@pytest.mark.parametrize("graphs", [0, 1, 2])
def test_a_cpu_without_memory_for_two_graphs_works_on_one(two_threads, graphs):
    model, batches = make_model("conv"), make_batches((4, 4))
    frozen, prepared = frozen_batches(model, batches)
    hessian = MiniBatchHessian(frozen)
    hessian.load(prepared[0])
    memory = graphs * hessian.num_bytes
    settings = landscape.hessian_max_spectrum(model, batches, memory=memory).provenance.settings
    assert (settings["group"], settings["kept_batches"]) == (max(graphs, 1), 2 * bool(graphs))


def test_batches_that_are_drawn_again_are_drawn_by_one_thread(two_threads, places, monkeypatch):
    model, data = make_model("conv"), make_batches((4,) * 4)
    expected = landscape.hessian_max_spectrum(model, data, group=2)
    assert any(len(place.threads) > 1 for place in places)
    places.clear()
    monkeypatch.setattr(objective, "free_memory", lambda device: 0)
    for group in (2, None):
        found = landscape.hessian_max_spectrum(model, data, group=group)
        np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-3)
        assert found.provenance.settings["group"] == (group or 1)
    assert all(set(place.threads) == {threading.main_thread()} for place in places)


def test_a_gpu_is_worked_on_by_one_thread(two_threads, places, recorded):
    landscape.hessian_max_spectrum(make_model("conv"), make_batches((4,) * 4), group=2)
    assert [set(place.threads) for place in places] == [{threading.main_thread()}] * 2


def test_what_fails_on_a_thread_is_raised_and_ends_the_others(two_threads, monkeypatch):
    """The other one would go on for 100 products a mini-batch."""
    after = []

    class Failing(MiniBatchHessian):
        failed = threading.Event()

        def matvec(self, v):
            if self.failed.is_set():
                after.append(self)
            elif self._place == 1:
                self.failed.set()
                raise RuntimeError("of a mini-batch")
            elif threading.current_thread() is not threading.main_thread():
                self.failed.wait()
            return super().matvec(v)

    monkeypatch.setattr(lock_step, "MiniBatchHessian", Failing)
    with pytest.raises(RuntimeError, match="of a mini-batch"):
        landscape.hessian_max_spectrum(make_model("conv"), make_batches((4,) * 8))
    assert len(after) < 10
    assert torch.get_num_threads() == 2


def test_the_next_mini_batch_takes_the_place_of_one_that_is_done(monkeypatch):
    """Mini-batches of equal images have a Hessian of low rank, and are done early."""
    model = make_model("attention")
    x, y = make_batches((12,))[0]
    hard, easy = (x[:4], y[:4]), (torch.zeros_like(x[:4]), y[:4] * 0)
    loaded = []

    class Noted(MiniBatchHessian):
        def load(self, batch):
            loaded.append(self)
            super().load(batch)

    monkeypatch.setattr(lock_step, "MiniBatchHessian", Noted)
    result = landscape.hessian_max_spectrum(model, [hard, *[easy] * 6], group=2)
    assert len(loaded) == 7
    assert loaded[2] is loaded[1] is not loaded[0]
    alone = landscape.top_eigenpairs(HessianOperator(model, [hard]))
    np.testing.assert_allclose(result.eigenvalues[0], alone.values, rtol=1e-3)


def test_a_warm_start_serves_every_place():
    model, batches = make_model("conv"), make_batches((6, 6))
    kwargs = {"k": 2, "objective": OBJECTIVE}
    cold = landscape.hessian_max_spectrum(model, [batches[0]] * 3, group=3, **kwargs)
    found = landscape.top_eigenpairs(
        HessianOperator(model, batches[:1], OBJECTIVE), 2, vectors=True
    )
    warm = landscape.hessian_max_spectrum(model, [batches[0]] * 3, group=3, start=found, **kwargs)
    np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-3)
    assert warm.num_hvps < cold.num_hvps
    # The second in each place starts from what the first one found.
    twice = landscape.hessian_max_spectrum(model, [batches[0]] * 6, group=3, **kwargs)
    assert twice.num_hvps < 2 * cold.num_hvps


@pytest.mark.parametrize("fits", [1, 2, 5])
def test_without_memory_for_all_fewer_go_on(monkeypatch, fits):
    """At any time `fits` mini-batches may be loaded; none is lost."""
    model, batches = make_model("conv"), make_batches((4,) * 6)
    expected = landscape.hessian_max_spectrum(model, batches).eigenvalues
    alive = []

    class Large(MiniBatchHessian):
        def matvec(self, v):
            if self not in alive:
                alive.append(self)
            if alive.index(self) >= fits and len(alive) > fits:
                alive.remove(self)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().matvec(v)

    monkeypatch.setattr(lock_step, "MiniBatchHessian", Large)
    result = landscape.hessian_max_spectrum(model, batches, group=4)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-3)
    assert result.provenance.settings["group"] == min(4, fits)


def test_the_last_one_out_of_memory_is_taken_up_again(monkeypatch):
    """It fails when the others are done already."""
    model, batches = make_model("conv"), make_batches((4, 4))
    expected = landscape.hessian_max_spectrum(model, batches).eigenvalues
    calls = []

    class Failing(MiniBatchHessian):
        def matvec(self, v):
            calls.append(self)
            done = calls.count(self) < len(calls) and calls[-2:] == [self] * 2
            if done and not getattr(Failing, "failed", False):
                Failing.failed = True
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().matvec(v)

    monkeypatch.setattr(lock_step, "MiniBatchHessian", Failing)
    result = landscape.hessian_max_spectrum(model, batches, group=2)
    assert Failing.failed
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-3)


def test_out_of_memory_for_one_alone_is_raised(monkeypatch):
    class Huge(MiniBatchHessian):
        def matvec(self, v):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(lock_step, "MiniBatchHessian", Huge)
    with pytest.raises(torch.OutOfMemoryError):
        landscape.hessian_max_spectrum(make_model("conv"), make_batches((4, 4)), group=2)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("last", [0, 3, 7])
def test_out_of_memory_while_a_batch_is_drawn_is_raised(monkeypatch, group, last):
    """Batches that follow it can no longer be drawn, so the others must not go on without end."""

    class Failing(lock_step._Queue):
        def __init__(self, batches):
            super().__init__(self.failing(batches))

        def failing(self, batches):
            for number, batch in enumerate(batches):
                if number == last:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                yield batch

    monkeypatch.setattr(lock_step, "_Queue", Failing)
    with pytest.raises(torch.OutOfMemoryError):
        landscape.hessian_max_spectrum(make_model("conv"), make_batches((4,) * 8), group=group)


def test_bad_groups_are_refused():
    model, batches = make_model("conv"), make_batches((4, 4))
    with pytest.raises(ValueError, match="`group` must be at least 1, got 0"):
        landscape.hessian_max_spectrum(model, batches, group=0)
    with pytest.raises(ValueError, match="`group` needs engine='native', got 'pyhessian'"):
        landscape.hessian_max_spectrum(model, batches, group=2, engine="pyhessian")


def test_models_in_half_precision():
    model, batches = make_model("conv", torch.bfloat16), make_batches((4, 4))
    alone, together = (
        landscape.hessian_max_spectrum(model, batches, k=1, group=group) for group in (1, 2)
    )
    np.testing.assert_allclose(together.eigenvalues, alone.eigenvalues, rtol=0.05)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1)).tanh()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_mapping_batches_and_the_loss_of_a_model(loss, recorded):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # in one model of a hundred a search misses a value, as it says
        model = Keyed().double()
    batches = [{"pixel_values": x, "labels": y} for x, y in make_batches((4, 4, 4))]
    objective = Objective(loss=loss)
    found = landscape.hessian_max_spectrum(model, batches, objective=objective, k=3, group=2)
    expected = [
        landscape.top_eigenpairs(HessianOperator(model, [batch], objective), 3).values
        for batch in batches
    ]
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["resnet20", "vit_nano"])
def test_side_by_side_on_a_gpu(name):
    model = create_model(name, num_classes=10).cuda()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 3, 32, 32, generator=generator).cuda()
    y = torch.randint(10, (90,), generator=generator).cuda()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    together = landscape.hessian_max_spectrum(model, batches)
    assert together.provenance.settings["group"] == 2
    alone = [landscape.top_eigenpairs(HessianOperator(model, [b])).values for b in batches]
    np.testing.assert_allclose(together.eigenvalues, alone, rtol=5e-3)
