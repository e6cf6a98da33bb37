"""Comparison with torchmetrics (Apache-2.0)."""

import pytest
import torch
from torch import nn

from landscape.probes.evaluate import evaluate

pytestmark = pytest.mark.thirdparty

SIZES = (400, 400, 224)


@pytest.fixture(scope="module")
def classification():
    try:
        from torchmetrics.functional import classification
    except (ImportError, RuntimeError) as error:  # it takes torchvision along where there is one
        pytest.skip(f"torchmetrics cannot be imported: {error}")
    return classification


@pytest.fixture(scope="module", params=[0.5, 3.0], ids=["hesitant", "confident"])
def predictions(request):
    """Logits of ten classes, and labels that are often the most likely ones."""
    g = torch.Generator().manual_seed(0)
    logits = request.param * torch.randn(sum(SIZES), 10, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
    data = list(zip(logits.split(SIZES), labels.split(SIZES), strict=True))
    return logits, labels, evaluate(nn.Identity(), data), evaluate(nn.Identity(), data, num_bins=10)


def test_calibration_error(classification, predictions):
    logits, labels, fifteen, ten = predictions
    for num_bins, result in ((15, fifteen), (10, ten)):
        theirs = classification.multiclass_calibration_error(
            logits.double().softmax(1), labels, num_classes=10, n_bins=num_bins, norm="l1"
        )
        assert result.ece == pytest.approx(float(theirs), abs=1e-6)  # theirs sums in float32
        assert result.ece > 0.01


@pytest.mark.parametrize(("k", "name"), [(1, "accuracy"), (5, "top5")])
def test_accuracy(classification, predictions, k, name):
    logits, labels, result, _ = predictions
    theirs = classification.multiclass_accuracy(
        logits, labels, num_classes=10, top_k=k, average="micro"
    )
    assert getattr(result, name) == pytest.approx(float(theirs), abs=1e-7)
    assert 0.1 < getattr(result, name) < 1
