"""The correctness table of `benchmarks/` as tests: every check is green here, and can turn red."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import checks_curvature
import peers
from checks_surface import SURFACES
from correctness import CHECKS, judge, table

ADAPTERS = {name: adapter for name, (_, adapter) in peers.PEERS.items()}


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        state = np.random.get_state()  # noqa: NPY002
        yield
        np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize("check", CHECKS)
def test_this_package_passes(check):
    CHECKS[check](ADAPTERS["landscape"]())


class Walking:
    """Surfaces with the defects that the checks are for."""

    def plane(self, model, ends, loss, batches, steps):
        plane = ADAPTERS["landscape"]().plane(model, ends, loss, batches, steps)
        return np.array([row[:: 1 - 2 * (i % 2)] for i, row in enumerate(plane)])

    @torch.no_grad()
    def random_line(self, model, loss, batches, distance, seed=0):
        torch.manual_seed(seed)
        tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
        filters = [t.reshape(len(t), -1).norm(dim=1).min() for t in tensors]
        ways = [
            (torch.rand_like(t) - 2.5) * t.norm() / distance / (shortest > 0)
            for t, shortest in zip(tensors, filters, strict=True)
        ]
        values = []
        for _ in range(10):
            for t, way in zip(tensors, ways, strict=True):
                t.add_(way)
            values.append(loss(model(batches[0][0]), batches[0][1]).item())
        return np.array(values)


@pytest.mark.parametrize(
    "check", [c for c in SURFACES if c not in ("shuffled_mixup", "not_finite")]
)
def test_a_check_of_surfaces_can_fail(check):
    with pytest.raises(checks_curvature.Wrong):
        SURFACES[check](Walking())


@pytest.mark.parametrize("check", ["shuffled_mixup", "weight_decay", "walked_plane"])
def test_what_a_package_does_not_claim_is_outside_its_scope(check):
    with pytest.raises(peers.OutsideScope):
        CHECKS[check](ADAPTERS["script with eigsh"]())


@pytest.mark.parametrize("check", ["weighted_classes", "dropout", "shuffling", "buffers_and_mode"])
def test_a_check_of_curvature_can_fail(check):
    with pytest.raises(checks_curvature.Wrong):
        CHECKS[check](ADAPTERS["script with eigsh"]())


class Rough(ADAPTERS["landscape"]):
    """A peer without the defects that some rows are about, but with others.

    Power iteration that stops at a relative change of 1e-3, a tensor made once a process, and a
    random line that no bias of zeros survives.
    """

    def __init__(self):
        self.kept = []

    def top(self, operator, k):
        torch.manual_seed(0)
        values, vectors = [], []
        while len(values) < k:
            v, value, change = torch.randn(operator.dim), 0.0, np.inf
            while change > 1e-3 * abs(value):
                v = v - sum((v @ u) * u for u in vectors)
                v = v / v.norm()
                hv = operator.matvec(v)
                change, value = abs(float(v @ hv) - value), float(v @ hv)
                v = hv / hv.norm()
            values.append(value)
            vectors.append(v)
        return np.array(values)

    def product(self, operator, v):
        self.kept = self.kept or [torch.zeros(1)]
        return super().product(operator, v)

    def random_line(self, model, *args):
        if any(not p.any() for p in model.parameters()):
            raise ZeroDivisionError
        return super().random_line(model, *args)


@pytest.mark.parametrize("check", ["small_scale", "multiple", "no_leak", "running_statistics"])
def test_a_row_is_about_its_own_defect(check):
    CHECKS[check](Rough())


def test_a_bias_of_zeros_alone_is_an_obstacle_where_it_is_one():
    with pytest.raises(ZeroDivisionError):
        SURFACES["zero_parameters"](Rough())


def test_the_table_shows_every_verdict():
    rows = {name: {"verdict": "not installed"} for name in peers.PEERS}
    rows |= {"landscape": {"verdict": "right"}, "PyHessian": {"verdict": "wrong"}}
    text = table({"dropout": rows, "distance": {**rows, "curvlinops": {"verdict": "error"}}})
    said = "A model left in training mode has one Hessian: two equal products are equal."
    assert f"| {said} | ✓ | **wrong** |\n" in text
    assert "| Twice the distance reaches twice as far. | ✓ | **wrong** | error |\n" in text


class Sheared(Walking):
    """A peer that says of all that it has not got that it lacks it, as its adapter does."""

    def __getattr__(self, name):
        raise peers.OutsideScope(f"it has no {name}")


def test_a_wrong_answer_is_called_wrong_even_of_a_peer_with_little_scope(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "sheared", ("torch", Sheared))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    answers = []
    answer = type("Answer", (), {"send": staticmethod(answers.append)})
    for check in ("walked_plane", "density"):
        judge(check, "sheared", answer)
    assert [verdict for verdict, _ in answers] == ["wrong", "outside its scope"]
