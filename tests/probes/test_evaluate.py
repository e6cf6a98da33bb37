import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from landscape.probes.evaluate import Evaluation, evaluate
from landscape.probes.surface import loss_line
from tests.cases import MODELS, assert_untouched, make_batches, make_model, snapshot

NUMBERS = ("nll", "accuracy", "top5", "brier", "ece")
ERRORS = tuple(f"{name}_stderr" for name in NUMBERS)


class Identity(nn.Module):
    """Logits are the inputs, in float64."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return x


def logits_and_labels(n=200, classes=7, sharpness=2.0, seed=3):
    g = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=g)


def by_hand(logits, labels, num_bins=15):
    """Terms of every sample, one after the other, from the definitions."""
    terms = {"nll": [], "accuracy": [], "top5": [], "brier": []}
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(logits.numpy(), labels.tolist(), strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        order = np.argsort(-row, kind="stable")
        terms["nll"].append(-np.log(p[label]))
        terms["accuracy"].append(float(order[0] == label))
        terms["top5"].append(float(label in order[:5]))
        terms["brier"].append(sum((p[k] - (k == label)) ** 2 for k in range(len(p))))
        bins[int(np.ceil(p.max() * num_bins)) - 1].append((p.max(), float(order[0] == label)))
    return terms, bins


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("sizes", [(200,), (64, 64, 64, 8), (1,) * 200], ids=len)
def test_every_number_is_its_definition_however_batched(sizes, num_bins):
    logits, labels = logits_and_labels()
    data = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
    result = evaluate(Identity(), data, num_bins=num_bins)
    terms, bins = by_hand(logits, labels, num_bins)
    for name, values in terms.items():
        assert getattr(result, name) == pytest.approx(np.mean(values), rel=1e-12), name
        stderr = np.std(values, ddof=1) / np.sqrt(200)
        assert getattr(result, f"{name}_stderr") == pytest.approx(stderr, rel=1e-9), name
    np.testing.assert_array_equal(result.bin_count, [len(b) for b in bins])
    np.testing.assert_allclose(result.bin_edges, np.arange(num_bins + 1) / num_bins)
    gaps, signed, noise = 0.0, [], 0.0
    for held, confidence, accuracy in zip(
        bins, result.bin_confidence, result.bin_accuracy, strict=True
    ):
        if not held:
            assert np.isnan(confidence)
            assert np.isnan(accuracy)
            continue
        c, r = np.array(held).T
        assert confidence == pytest.approx(c.mean(), rel=1e-12)
        assert accuracy == pytest.approx(r.mean(), rel=1e-12)
        gaps += abs((r - c).sum())
        signed += list(np.sign((r - c).sum()) * (r - c))
        noise += np.sqrt(2 / np.pi * (c * (1 - c)).sum())
    assert result.ece == pytest.approx(gaps / 200, rel=1e-12)
    assert result.ece_stderr == pytest.approx(np.std(signed, ddof=1) / np.sqrt(200), rel=1e-9)
    assert result.ece_noise == pytest.approx(noise / 200, rel=1e-12)
    assert (result.num_samples, result.num_classes, result.num_nonfinite) == (200, 7, 0)


def test_equal_terms_have_an_error_of_zero():
    """A sum of squares less the square of the sum may be negative, and its root NaN."""
    for count in range(2, 40):
        data = [(torch.zeros(count, 3), torch.zeros(count, dtype=torch.long))]
        result = evaluate(Identity(), data)
        assert result.nll == pytest.approx(np.log(3))
        assert result.nll_stderr == pytest.approx(0, abs=1e-15)


def test_the_loss_of_a_certain_model_is_not_rounded_to_zero():
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    result = evaluate(model, [(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))])
    assert result.nll == pytest.approx(np.log1p(np.exp(-20)), rel=1e-6)


def test_a_uniform_prediction_has_a_closed_form():
    classes = 8
    data = [(torch.zeros(16, classes), torch.arange(16) % classes)]
    result = evaluate(Identity(), data)
    assert result.nll == pytest.approx(np.log(classes), rel=1e-15)
    assert result.nll_stderr == pytest.approx(0, abs=1e-15)
    assert result.accuracy == 1 / classes
    assert result.top5 == 5 / classes  # ties do not all count
    assert result.brier == pytest.approx(1 - 1 / classes)
    assert result.ece == pytest.approx(0, abs=1e-15)
    assert result.bin_count[1] == 16  # 1/8 lies in (1/15, 2/15]


def test_a_certain_prediction_lies_in_the_last_bin():
    logits = 1e4 * torch.eye(3)[[0, 1, 2, 2]]
    result = evaluate(Identity(), [(logits, torch.tensor([0, 1, 2, 0]))])
    assert result.bin_count[-1] == 4
    assert (result.ece, result.ece_noise, result.brier) == (0.25, 0.0, 0.5)
    assert result.nll == 2500


def test_noise_of_a_calibrated_model_and_error_of_a_miscalibrated_one_are_what_they_say():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 4, generator=g, dtype=torch.float64)
    calibrated, overconfident = [], []
    for _ in range(100):
        labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
        calibrated.append(evaluate(Identity(), [(logits, labels)]))
        overconfident.append(evaluate(Identity(), [(3 * logits, labels)]))
    ece = np.array([each.ece for each in calibrated])
    assert calibrated[0].ece_noise == pytest.approx(ece.mean(), rel=0.1)
    ece = np.array([each.ece for each in overconfident])
    assert ece.mean() > 5 * overconfident[0].ece_noise
    stderr = np.mean([each.ece_stderr for each in overconfident])
    # The confidences are the same in every draw: what varies is the labels alone, so that the
    # spread over draws is the smaller one.
    assert 0.7 * stderr < ece.std() < 1.1 * stderr


@pytest.mark.parametrize("count", [1, 10, 100])
def test_noise_of_a_model_that_is_hardly_ever_wrong_is_that_of_a_binomial_count(count):
    logits = torch.tensor([0.9999, 0.0001], dtype=torch.float64).log().expand(count, 2)
    result = evaluate(Identity(), [(logits, torch.zeros(count, dtype=torch.long))])
    wrong = stats.binom(count, 0.0001)
    expected = wrong.expect(lambda k: abs(k - wrong.mean())) / count
    assert result.ece_noise == pytest.approx(expected, rel=0.02)


def test_soft_targets_are_compared_as_probabilities():
    logits, _ = logits_and_labels(50)
    _, other = logits_and_labels(50, seed=4)
    soft = (0.9 * F.one_hot(other, 7) + 0.1 / 7).double()
    result = evaluate(Identity(), [(logits[:30], soft[:30]), (logits[30:], soft[30:])])
    assert result.nll == pytest.approx(F.cross_entropy(logits, soft).item(), rel=1e-12)
    p = logits.softmax(1)
    assert result.brier == pytest.approx((p - soft).square().sum(1).mean().item(), rel=1e-12)
    hard = evaluate(Identity(), [(logits, other)])
    for name in ("accuracy", "top5", "ece"):
        assert getattr(result, name) == pytest.approx(getattr(hard, name), rel=1e-12)
    assert result.nll != hard.nll


def test_a_class_that_is_ruled_out_counts_as_little_with_soft_targets_as_with_labels():
    logits, labels = logits_and_labels(50)
    logits[:, 3] = -torch.inf
    labels[labels == 3] = 4
    soft = evaluate(Identity(), [(logits, F.one_hot(labels, 7).double())])
    assert soft.nll == evaluate(Identity(), [(logits, labels)]).nll
    assert soft.num_nonfinite == 0
    labels[0] = 3
    assert evaluate(Identity(), [(logits, F.one_hot(labels, 7).double())]).nll == np.inf


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_top5_needs_five_classes(classes):
    logits, labels = logits_and_labels(20, classes)
    result = evaluate(Identity(), [(logits, labels)])
    assert result.top5 == (1.0 if classes == 5 else None)
    assert result.top5_stderr == (0.0 if classes == 5 else None)


def test_values_that_are_not_finite_are_counted_and_not_replaced():
    logits, labels = logits_and_labels(12)
    logits[3, 1] = torch.nan
    data = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    result = evaluate(Identity(), data)
    assert np.isnan([getattr(result, name) for name in (*NUMBERS, *ERRORS)]).all()
    assert result.num_nonfinite == 1
    assert result.bin_count.sum() == 11
    logits[3, 1] = -torch.inf  # an impossible class, which was right
    labels[3] = 1
    results = [evaluate(Identity(), data), evaluate(Identity(), [(logits, labels)])]
    for result in results:
        assert result.nll == np.inf
        assert result.num_nonfinite == 1
        assert np.isfinite([result.accuracy, result.brier, result.ece]).all()


def test_one_sample_has_no_standard_error():
    result = evaluate(Identity(), [(torch.eye(6)[:1], torch.tensor([0]))])
    assert np.isnan([getattr(result, name) for name in ERRORS]).all()
    assert result.accuracy == 1


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_metrics_of_a_loss_line(name):
    model, batches = make_model(name), make_batches((7, 7, 3))
    line = loss_line(model, batches, points=[0.0], metrics=("loss", "accuracy", "ece"))
    result = evaluate(model, batches)
    for ours in ("nll", "nll_stderr", "accuracy", "ece"):
        assert getattr(result, ours) == pytest.approx(getattr(line, ours)[0], rel=1e-12), ours


class Keywords(nn.Module):
    """A model of keyword arguments that returns an object, as those of Hugging Face."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values):
        return {"logits": self.inner(pixel_values)}


def test_mappings_and_loaders_are_data():
    model, batches = make_model("conv"), make_batches((7, 3))
    expected = evaluate(model, batches)
    mappings = [{"pixel_values": x, "labels": y} for x, y in batches]
    samples = [(x, y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
    loader = torch.utils.data.DataLoader(samples, batch_size=4)
    for result in (evaluate(Keywords(model), mappings), evaluate(model, loader)):
        assert result.nll == pytest.approx(expected.nll, rel=1e-12)
        np.testing.assert_array_equal(result.bin_count, expected.bin_count)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_found(name, error):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model(name)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.replaced = self.replaced + 1
            if error is not None and self.calls == 2:
                raise error
            return self.inner(x)

    model = Counter().train()
    next(model.inner.children()).eval()
    list(model.parameters())[0].requires_grad_(False)
    F.cross_entropy(model(make_batches((4,))[0][0]), make_batches((4,))[0][1]).backward()
    model.calls.zero_()
    model.register_forward_hook(lambda *_: None)
    before, replaced = snapshot(model), model.replaced
    if error is None:
        evaluate(model, make_batches((5, 3)))
    else:
        with pytest.raises(type(error)):
            evaluate(model, make_batches((5, 3)))
    assert_untouched(model, before)
    assert model.replaced is replaced


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_of_any_type_may_be_parameters(dtype):
    model = nn.Linear(4, 3)
    model.index = nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    expected = F.cross_entropy(model(x), y).item()
    assert evaluate(model, [(x, y)]).nll == pytest.approx(expected, rel=1e-6)


def test_nothing_random_and_nothing_global_matters(tmp_path):
    model, batches = make_model("conv", torch.float32), make_batches((6, 2), torch.float32)
    first = evaluate(model, batches)
    torch.manual_seed(3)
    with torch.inference_mode():
        again = evaluate(model, batches)
        made = copy.deepcopy(model)
    for other in (again, evaluate(made, batches)):
        for name in (*NUMBERS, *ERRORS):
            assert getattr(first, name) == getattr(other, name)
    loaded = Evaluation.load(first.save(tmp_path / "evaluation"))
    np.testing.assert_array_equal(loaded.bin_accuracy, first.bin_accuracy)
    assert (loaded.top5, loaded.ece_noise) == (None, first.ece_noise)
    assert first.provenance.num_forwards == 1
    assert first.provenance.num_samples == 8


def test_progress_is_shown_on_request(capsys):
    model, batches = make_model("conv"), make_batches((3, 3))
    evaluate(model, batches)
    assert capsys.readouterr() == ("", "")
    evaluate(model, batches, progress=True)
    shown = capsys.readouterr().err
    assert "Evaluation:" in shown
    assert "/2 [" in shown  # the number of batches is known


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.zeros(2, 3), torch.tensor([0, 3]))], "labels in 0 … 2 for the 3 outputs .* to 3"),
        ([(torch.zeros(2, 3), torch.tensor([-100, 0]))], "got labels from -100 to 0; leave out"),
        ([(torch.zeros(2, 3), torch.zeros(2))], "integer labels .* got torch.float64"),
        ([(torch.zeros(2, 3), torch.zeros(2, 3).long())], "integer labels"),
        ([(torch.zeros(2, 3), torch.ones(2, 3))], "probabilities, got entries .* by up to 2"),
        ([(torch.zeros(2, 3), torch.tensor([[2.0, -1, 0]] * 2))], "entries as low as -1"),
        ([(torch.zeros(2, 3, 4), torch.zeros(2, 4).long())], r"`model` must return .* \(2, 3, 4\)"),
        ([(torch.zeros(2, 1), torch.zeros(2).long())], "`model` must return one output for each"),
        ([(torch.zeros(2, 3), None)], "must hold class labels, got no targets"),
        ([], "at least one sample"),
    ],
)
def test_bad_data_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Identity(), data)


def test_a_bad_label_in_a_later_batch_is_refused():
    good = (torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="got labels from 0 to 7"):
        evaluate(Identity(), [good, (torch.zeros(1, 3), torch.tensor([7])), good])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        evaluate(Identity(), [], num_bins=0)
    with pytest.raises(TypeError, match="one-shot"):
        evaluate(Identity(), iter([]))
    batch = -torch.ones(2, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match="not modify its input in place"):
        evaluate(nn.ReLU(inplace=True), [batch])
    assert (batch[0] == -1).all()
    nothing = type("Nothing", (nn.Module,), {"forward": lambda self, x: None})()
    with pytest.raises(TypeError, match="must return a tensor or an object with `.logits`"):
        evaluate(nothing, [(torch.zeros(2, 3), torch.zeros(2).long())])
