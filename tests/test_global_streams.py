"""Probes neither move the global random streams nor depend on them."""

import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

import landscape
from landscape import Objective
from landscape._loaders import one_pass
from landscape._streams import OwnStreams, read_streams, same_streams
from tests.cases import assert_untouched, snapshot

PROBES = {
    "hessian_spectrum": lambda m, d: landscape.hessian_spectrum(m, d, k=1).largest.values,
    "hessian_max_spectrum": lambda m, d: landscape.hessian_max_spectrum(m, d, k=1).eigenvalues,
    "hessian_trace": lambda m, d: landscape.hessian_trace(m, d, num_matvecs=12).value,
    "loss_line": lambda m, d: landscape.loss_line(m, d, points=3).loss,
    "evaluate": lambda m, d: landscape.evaluate(m, d).nll,
    "feature_variance": lambda m, d: landscape.feature_variance(m, d).variance,
    "cka": lambda m, d: landscape.cka(m, d).values,
    "frequency_robustness": lambda m, d: (
        landscape.frequency_robustness(m, d, norm=0.1, frequencies=[0.75], width=0.5).accuracy
    ),
    "lesion_study": lambda m, d: landscape.lesion_study(m, d).delta_nll,
}


def global_numbers():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def _streams_put_back():
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def test_every_batch_of_a_pass_draws_anew():
    xs = [x for x, _ in one_pass(DataLoader(Augmented(), batch_size=4))]
    assert not torch.equal(xs[0], xs[1])
    assert not torch.equal(xs[1], xs[2])


def test_streams_that_overlap_are_put_back_after_the_last():
    before = torch.get_rng_state()
    first, second = OwnStreams(1).entered(), OwnStreams(2).entered()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), np.random.rand, random.random])
def test_a_draw_from_any_stream_is_seen(draw):
    before = read_streams()
    assert same_streams(before, read_streams())
    draw()
    assert not same_streams(before, read_streams())


@pytest.mark.parametrize("attack", ["noise", "fgsm", "pgd"])
def test_noise_does_not_depend_on_the_default_precision(attack):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    data = [(torch.rand(9, 3, 8, 8), torch.arange(9) % 4)]

    def run():
        if attack == "noise":
            found = landscape.frequency_robustness(model, data, frequencies=[0.5], width=0.4)
        else:
            found = landscape.adversarial_robustness(model, data, attack=attack, radii=[0.1])
        return np.asarray(found.nll)

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)


class Augmented(Dataset):
    """Draws from all three global streams, as data sets with random crops do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(3, 4, 4) * np.random.rand() * random.random(), index % 3


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        torch.rand(2)  # it changes nothing
        x = self.stem(x)
        return self.head((x + self.conv(F.gelu(x))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PROBES)
def test_no_probe_moves_them_or_depends_on_them(name):
    seed_all(0)
    model = Residual()
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    found = []
    for seed in (1, 2):
        seed_all(seed)
        before = snapshot(model)
        found.append(np.asarray(PROBES[name](model, loader)))
        assert_untouched(model, before)
        numbers = global_numbers()
        seed_all(seed)
        assert numbers == global_numbers()
    np.testing.assert_array_equal(*found)


class Noisy(Dataset):
    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(3, 4, 4), torch.randint(9, (), generator=self.generator)


class Wrapped:
    """A loader in another, as timm's."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def own_generator(kind):
    """Return a shuffling loader of 12 samples with a generator of its own, and that."""
    generator = torch.Generator().manual_seed(4)
    data = TensorDataset(torch.rand(12, 3, 4, 4), torch.arange(12) % 3)
    if kind == "data set":
        return DataLoader(Noisy(generator), batch_size=4), generator
    if kind == "part of a data set":
        parts = ConcatDataset([Subset(Noisy(generator), range(8)), Noisy(generator)])
        return DataLoader(parts, batch_size=4), generator
    if kind == "wrapped":
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        return Wrapped(Wrapped(loader)), generator
    if kind == "sampler":
        sampler = RandomSampler(data, generator=generator)
        return DataLoader(data, batch_size=4, sampler=sampler), generator
    if kind == "batches":
        sampler = BatchSampler(RandomSampler(data, generator=generator), 4, drop_last=False)
        return DataLoader(data, batch_sampler=sampler), generator
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator), generator


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PROBES)
def test_no_probe_moves_a_generator_of_the_loader(name):
    model, (loader, generator) = Residual(), own_generator("loader")
    state = generator.get_state()
    found = [np.asarray(PROBES[name](model, loader)) for _ in range(2)]
    assert torch.equal(generator.get_state(), state)
    np.testing.assert_array_equal(*found)
    torch.rand(3, generator=generator)  # another order
    if name == "hessian_max_spectrum":
        assert not np.array_equal(PROBES[name](model, loader), found[0])


@pytest.mark.parametrize(
    "kind", ["loader", "sampler", "batches", "data set", "part of a data set", "wrapped"]
)
def test_passes_see_a_generator_of_the_loader_as_it_is(kind):
    loader, generator = own_generator(kind)
    state = generator.get_state()
    first = [y.tolist() for _, y in one_pass(loader)]
    assert sum(first, []) != sorted(sum(first, []))
    assert torch.equal(generator.get_state(), state)
    for a, b in zip(one_pass(loader), one_pass(loader), strict=True):  # two at a time
        assert torch.equal(a[1], b[1])
        assert torch.equal(generator.get_state(), state)
    assert [y.tolist() for _, y in loader] == first  # what the caller would have seen
    assert [y.tolist() for _, y in one_pass(loader)] != first


def test_data_that_are_drawn_again_begin_where_they_were_frozen():
    loader, generator = own_generator("loader")
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    frozen = Objective().freeze(model, loader, keep_bytes=0)
    first = [batch.targets.tolist() for batch in frozen.batches]
    torch.rand(3, generator=generator)  # the caller goes on with it
    state = generator.get_state()
    assert [batch.targets.tolist() for batch in frozen.batches] == first
    assert torch.equal(generator.get_state(), state)


def test_a_wrapped_loader_is_read_with_workers_of_its_own():
    settings = {"batch_size": 4, "shuffle": True, "num_workers": 1, "persistent_workers": True}
    data = Wrapped(DataLoader(Augmented(), **settings))
    first, again = ([x for x, _ in one_pass(data)] for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert data.loader._iterator is None


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_workers_that_outlive_a_pass_are_left_alone(generator):
    settings = {"batch_size": 4, "shuffle": True, "num_workers": 1, "persistent_workers": True}
    loader = DataLoader(Augmented(), generator=generator, **settings)
    passes = [[x for x, _ in one_pass(loader)] for _ in range(3)]
    for other in passes[1:]:
        assert all(map(torch.equal, passes[0], other))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    assert np.isfinite(Objective().freeze(model, loader, keep_bytes=0).value())

    def order(probe):
        seed_all(0)
        indices = DataLoader(torch.arange(12), generator=generator, **settings)
        if generator is not None:
            generator.manual_seed(0)
        seen = []
        for index in indices:
            if probe and len(seen) == 1:
                list(one_pass(indices))  # within a pass of the caller's
            seen.append(index.tolist())
        return seen

    assert order(True) == order(False)


def test_threads_that_share_a_loader_put_its_generator_back():
    loader, generator = own_generator("loader")
    state = generator.get_state()

    def labels(_):
        return [y.tolist() for _, y in one_pass(loader)]

    expected = labels(0)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(labels, range(200)))
    assert found == [expected] * 200
    assert torch.equal(generator.get_state(), state)


def test_a_pass_lets_the_caller_draw_between_batches():
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    seed_all(5)
    expected = [global_numbers() for _ in range(4)]
    seed_all(5)
    between, first = [], []
    for x, _ in one_pass(loader):
        first.append(x)
        between.append(global_numbers())
    assert [*between, global_numbers()] == expected
    for x, (again, _) in zip(first, one_pass(loader), strict=True):
        assert torch.equal(x, again)
        break  # a pass that is not finished leaves the streams as they are, too
    seed_all(5)
    for _ in one_pass(loader):
        break
    assert global_numbers() == expected[0]


def test_data_made_in_a_thread_that_probes_too():
    teacher, student = Residual(), Residual()
    batch = (torch.rand(6, 3, 4, 4), torch.arange(6) % 3)

    class Prefetched:
        def __iter__(self):
            made = queue.Queue(1)

            def make():
                for _ in range(3):
                    landscape.evaluate(teacher, [batch])
                    made.put(batch)

            threading.Thread(target=make, daemon=True).start()
            return (made.get(timeout=20) for _ in range(3))

    state = torch.get_rng_state()
    assert landscape.evaluate(student, Prefetched()).num_samples == 18
    assert torch.equal(torch.get_rng_state(), state)


def test_an_exception_in_the_data_leaves_them():
    def failing():
        yield torch.rand(2)
        raise RuntimeError("unreadable file")

    seed_all(3)
    expected = global_numbers()
    seed_all(3)
    with pytest.raises(RuntimeError, match="unreadable"):
        list(one_pass(failing()))
    assert global_numbers() == expected


def test_a_shuffling_loader_can_be_redrawn():
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    kept, redrawn = (Objective().freeze(nn.Linear(4, 3), loader, keep_bytes=b) for b in (None, 0))
    for a, b in zip(kept.batches, redrawn.batches, strict=True):
        assert torch.equal(a.inputs, b.inputs)


class Dropping(nn.Module):
    """Random in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        return self.head(F.dropout(x.flatten(1), 0.5))


def test_a_model_that_is_random_in_evaluation_mode_draws_from_a_stream_of_its_own():
    model, data = Dropping(), [(torch.rand(8, 3, 4, 4), torch.arange(8) % 3)]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(landscape.evaluate(model, data).nll)
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


def test_lazy_models_are_refused_by_forward_probes():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="lazy parameter '1.weight'"):
        landscape.evaluate(model, [(torch.rand(8, 3, 4, 4), torch.arange(8) % 3)])
    assert isinstance(model[1], nn.LazyLinear)


def test_data_that_hold_themselves_or_raise_are_no_obstacle():
    class Proxy:
        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            return Proxy()

    class Odd(Wrapped):
        dataset = Proxy()

        def __iter__(self):
            return iter([(torch.zeros(2, 3), torch.arange(2))])

        @property
        def datasets(self):
            raise ValueError("not loaded")

    data = Odd(None)
    data.loader = data
    assert len(list(one_pass(data))) == 1
