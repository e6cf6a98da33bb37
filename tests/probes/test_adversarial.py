import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape.probes.adversarial import AdversarialRobustness, adversarial_robustness
from landscape.training import DeviceImages
from tests.cases import assert_untouched, snapshot

ARRAYS = ("accuracy", "delta_accuracy", "nll", "delta_nll")
ARRAYS = (*ARRAYS, *(f"{name}_stderr" for name in ARRAYS))
CLEAN = ("clean_accuracy", "clean_accuracy_stderr", "clean_nll", "clean_nll_stderr")
MEAN, STD = (0.45, 0.5), (0.2, 0.3)
RADII = (0.0, 0.01, 0.05, 0.2)


def images(n=12, seed=0, low=0.0, high=1.0):
    """Pixels, and labels of two classes."""
    g = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(n, 2, 6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=g)


def normalised(x):
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (MEAN, STD))
    return (x - mean) / std


def cut(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def linear():
    """Two logits of all pixels, with weights of size about 1 a pixel."""
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 2, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.normal_(generator=g)
        model[1].bias.zero_()
    return model


def conv_net(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 2),
        )
    model = model.to(dtype).eval()
    with torch.no_grad():
        model[-1].weight *= 30
        margin = model(normalised(images()[0]).to(dtype)).diff(dim=1)
        model[-1].bias[0] += margin.median()
    return model.train()


class Recorder(nn.Module):
    """Keeps the inputs of its last calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.inner(x)


def assert_equal(a, b, **tolerance):
    for name in (*ARRAYS, *CLEAN):
        np.testing.assert_allclose(
            getattr(a, name), getattr(b, name), err_msg=name, **{"rtol": 0, **tolerance}
        )


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_a_linear_classifier_has_its_closed_form(attack, norm):
    # Pixels stay away from 0 and 1, where the ball would be cut.
    pixels, y = images(20, low=0.3, high=0.7)
    model = linear()
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(2, -1)
    w = (w / torch.tensor(STD, dtype=torch.float64)[:, None]).ravel()  # by pixels, not by x
    result = adversarial_robustness(
        model,
        cut(normalised(pixels), y, (9, 9, 2)),
        attack=attack,
        norm=norm,
        radii=RADII,
        steps=5,
        random_start=norm == "linf",  # in the L2 ball the way from elsewhere ends in the limit
        mean=MEAN,
        std=STD,
    )
    margin = model(normalised(pixels)).diff(dim=1)[:, 0].detach() * (2 * y - 1)
    for i, radius in enumerate(RADII):
        if norm == "linf":
            worst = margin - radius * w.abs().sum()
        else:
            worst = margin - radius * w.square().sum().sqrt()
        assert result.accuracy[i] == (worst > 0).double().mean()
        assert result.nll[i] == pytest.approx(F.softplus(-worst).mean().item(), rel=1e-9)
        change = (F.softplus(-worst) - F.softplus(-margin)).numpy()
        assert result.delta_nll[i] == pytest.approx(change.mean(), rel=1e-9, abs=1e-12)
        stderr = change.std(ddof=1) / np.sqrt(20)
        assert result.delta_nll_stderr[i] == pytest.approx(stderr, rel=1e-6, abs=1e-12)
        lost = (worst > 0).double().numpy() - (margin > 0).double().numpy()
        stderr = lost.std(ddof=1) / np.sqrt(20)
        assert result.delta_accuracy_stderr[i] == pytest.approx(stderr, rel=1e-9, abs=1e-12)
    assert result.clean_accuracy == (margin > 0).double().mean()
    assert len(set(result.accuracy)) > 2


def fgsm(model, x, y, radius, norm, mean, std):
    """Fast gradient sign method from its definition: one image after the other, in pixels."""
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (mean, std))
    out = []
    for image, label in zip(x, y, strict=True):
        pixel = (image * std + mean).requires_grad_()
        logits = model(((pixel - mean) / std)[None])[0]
        loss = torch.logsumexp(logits, 0) - logits[label]
        (gradient,) = torch.autograd.grad(loss, pixel)
        if norm == "linf":
            step = radius * torch.sign(gradient)
        else:
            step = radius * gradient / gradient.pow(2).sum().sqrt()
        moved = torch.clip(pixel.detach() + step, 0, 1)
        out.append((moved - mean) / std)
    return torch.stack(out)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_equals_its_definition(norm):
    pixels, y = images()
    x = normalised(pixels)
    model = Recorder(conv_net())
    result = adversarial_robustness(
        model, [(x, y)], attack="fgsm", norm=norm, radii=(0.1, 0.6), mean=MEAN, std=STD
    )
    # Calls: clean, then gradient and attack for each radius.
    assert len(model.seen) == 5 == result.provenance.num_forwards
    reference = model.inner.eval()
    for radius, shown in zip((0.1, 0.6), model.seen[2::2], strict=True):
        expected = fgsm(reference, x, y, radius, norm, MEAN, STD)
        torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-12)
        cut_off = (expected - normalised(torch.ones_like(x))).abs() < 1e-12
        assert cut_off.any()  # some pixels have met the end of the scale
    nll = F.cross_entropy(reference(expected), y).item()
    assert result.nll[1] == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_iterate_of_pgd_lies_in_the_ball_and_on_the_scale(norm, random_start):
    pixels, y = images()
    model = Recorder(conv_net())
    adversarial_robustness(
        model,
        [(normalised(pixels), y)],
        norm=norm,
        radii=(0.3,),
        steps=4,
        random_start=random_start,
        mean=MEAN,
        std=STD,
    )
    std = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    mean = torch.tensor(MEAN, dtype=torch.float64)[:, None, None]
    assert len(model.seen) == 6
    for step, shown in enumerate(model.seen[1:]):
        moved = shown * std + mean
        assert moved.min() >= -1e-12
        assert moved.max() <= 1 + 1e-12
        change = moved - pixels
        length = change.abs().amax((1, 2, 3)) if norm == "linf" else change.flatten(1).norm(dim=1)
        assert (length <= 0.3 + 1e-9).all()
        if step == 0 and not random_start:
            assert (length < 1e-12).all()
        else:
            assert (length > 0.05).all()


def test_pgd_by_hand():
    pixels, y = images(3)
    model = Recorder(conv_net())
    arguments = {"radii": (0.1,), "steps": 3, "step_size": 0.06, "random_start": False}
    adversarial_robustness(model, [(pixels, y)], **arguments)
    net = model.inner.eval()
    x = pixels.clone()
    for shown in model.seen[2:]:
        x.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
        x = (x.detach() + 0.06 * slope.sign()).clamp(pixels - 0.1, pixels + 0.1).clamp(0, 1)
        torch.testing.assert_close(shown, x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_work_makes_the_attack_stronger(norm):
    pixels, y = images(60)
    radii = (0.02, 0.05) if norm == "linf" else (0.2, 0.4)
    arguments = {"norm": norm, "radii": radii, "mean": MEAN, "std": STD}
    data = [(normalised(pixels), y)]
    model = conv_net()
    once = adversarial_robustness(model, data, attack="fgsm", **arguments)
    many = adversarial_robustness(model, data, steps=20, **arguments)
    thrice = adversarial_robustness(model, data, steps=20, restarts=3, **arguments)
    assert (many.nll > once.nll).all()
    assert (many.accuracy <= once.accuracy).all()
    assert (thrice.nll >= many.nll).all()
    assert (thrice.accuracy <= many.accuracy).all()
    assert (thrice.nll != many.nll).any()
    for result in (once, many):
        assert result.clean_accuracy > result.accuracy[0] > result.accuracy[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_radius_zero_is_clean(attack, norm, dtype):
    pixels, y = images()
    # Many pixels at the ends of the scale, or outside as far as rounding goes.
    x = normalised((pixels.round(decimals=1) * 1.008 - 0.004).to(dtype))
    model = Recorder(conv_net(dtype))
    result = adversarial_robustness(
        model, [(x, y)], attack=attack, norm=norm, radii=(0.0,), mean=MEAN, std=STD
    )
    assert result.accuracy[0] == result.clean_accuracy
    assert result.nll[0] == result.clean_nll
    assert result.delta_nll[0] == result.delta_nll_stderr[0] == 0
    assert all(torch.equal(shown, x) for shown in model.seen)


def test_the_gradient_of_certain_predictions_does_not_vanish():
    # The probability rounds to 1 and its logarithm to 0, even in float64: a gradient of exactly 0.
    model = linear().float()
    with torch.no_grad():
        model[1].weight *= 200
    pixels, _ = images(20, low=0.4, high=0.6)
    x = pixels.float()
    y = model(x).argmax(1)
    certain = F.cross_entropy(model(x).double(), y, reduction="none") == 0
    assert certain.sum() > 5
    result = adversarial_robustness(model, [(x, y)], attack="fgsm", radii=(0.3,))
    assert result.clean_accuracy == 1
    assert result.accuracy[0] == 0


def test_a_flat_model_is_not_moved_by_l2_attacks():
    model = linear()
    nn.init.zeros_(model[1].weight)
    pixels, y = images()
    for attack in ("fgsm", "pgd"):
        result = adversarial_robustness(model, [(pixels, y)], attack=attack, norm="l2", radii=(1,))
        assert result.nll[0] == pytest.approx(np.log(2))
        assert result.delta_nll[0] == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_batching_changes_nothing(norm):
    pixels, y = images(11)
    results = [
        adversarial_robustness(
            conv_net(), cut(pixels, y, sizes), norm=norm, radii=(0.05,), steps=4, restarts=2
        )
        for sizes in [(11,), (5, 5, 1), (1,) * 11]
    ]
    for other in results[1:]:
        assert_equal(results[0], other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball_and_are_common_to_radii(norm):
    pixels, y = images(300, low=0.4, high=0.6)
    model = Recorder(linear())
    adversarial_robustness(model, [(pixels, y)], norm=norm, radii=(0.05, 0.1), steps=1)
    first, second = (model.seen[i] - pixels for i in (1, 3))
    torch.testing.assert_close(2 * first, second, rtol=1e-9, atol=1e-12)
    if norm == "linf":
        assert second.abs().max() <= 0.1
        assert second.std().item() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    else:  # of a uniform point the length to the power of the dimension is uniform
        share = ((second.flatten(1).norm(dim=1) / 0.1) ** 72).sort().values
        assert (share - torch.linspace(0, 1, 300)).abs().max() < 0.1
    assert second.mean().abs() < 2e-3


def test_a_seed_fixes_the_attack_whatever_was_drawn_before():
    pixels, y = images()
    run = lambda g: adversarial_robustness(  # noqa: E731
        conv_net(), [(pixels, y)], radii=(0.03,), steps=2, generator=g
    )
    generator = torch.Generator().manual_seed(5)
    first = run(generator)
    torch.rand(4, generator=generator)
    torch.manual_seed(8)
    assert_equal(first, run(generator))
    assert first.nll != run(None).nll
    assert (first.seed, run(None).seed) == (5, 0)


def test_device_images_mappings_and_soft_targets_are_data():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = conv_net(torch.float32)

        def forward(self, pixel_values):
            return {"logits": self.inner(pixel_values)}

    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (9, 2, 6, 6), generator=g, dtype=torch.uint8)
    y = torch.randint(2, (9,), generator=g)
    data = DeviceImages(pixels, y, mean=MEAN, std=STD, batch_size=4)
    model = conv_net(torch.float32)
    expected = adversarial_robustness(model, data, radii=(0.05,), steps=2)
    assert expected.provenance.settings["mean"] == list(MEAN)
    arguments = {"radii": (0.05,), "steps": 2, "mean": MEAN, "std": STD}
    mappings = [{"pixel_values": x, "labels": y} for x, y in data]
    assert_equal(adversarial_robustness(Keywords(), mappings, **arguments), expected)
    soft = [(x, F.one_hot(y, 2).float()) for x, y in data]
    assert_equal(adversarial_robustness(model, soft, **arguments), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("broken")], ids=repr)
def test_the_model_is_left_as_found(error, norm):
    model = conv_net().train()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    pixels, y = images(6)
    F.cross_entropy(model(pixels), y).backward()
    calls = []

    def hook(*_):
        calls.append(1)
        if error is not None and len(calls) > 4:
            raise error

    model.register_forward_hook(hook)
    before = snapshot(model)
    run = lambda: adversarial_robustness(  # noqa: E731
        model, cut(pixels, y, (3, 3)), norm=norm, radii=(0.1,), steps=2
    )
    if error is None:
        with torch.no_grad():  # gradients by the inputs are taken all the same
            run()
        assert len(calls) == 8
    else:
        with pytest.raises(type(error)):
            run()
    assert_untouched(model, before)
    assert pixels.grad is None
    assert not pixels.requires_grad


def test_result_comes_back_from_disk_and_says_what_was_done(tmp_path):
    pixels, y = images()
    result = adversarial_robustness(conv_net(), [(pixels, y)], norm="l2", steps=3, restarts=2)
    loaded = AdversarialRobustness.load(result.save(tmp_path / "attack"))
    assert_equal(loaded, result)
    np.testing.assert_allclose(loaded.radii, np.array([1, 2, 4, 8]) / 255)
    assert (loaded.attack, loaded.norm, loaded.steps, loaded.restarts) == ("pgd", "l2", 3, 2)
    assert loaded.provenance.num_forwards == 1 + 4 * 2 * 4
    assert loaded.provenance.settings["num_gradients"] == 4 * 2 * 3
    once = adversarial_robustness(conv_net(), [(pixels, y)], attack="fgsm", restarts=5)
    assert (once.steps, once.restarts, once.random_start) == (1, 1, False)


class Forbidden(nn.Module):
    def forward(self, x):
        raise AssertionError("work was done")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attack": "cw"}, "`attack` must be one of 'fgsm', 'pgd', got 'cw'"),
        ({"norm": "l1"}, "`norm` must be one of 'linf', 'l2', got 'l1'"),
        ({"radii": ()}, "`radii` must be numbers from 0 upwards that increase"),
        ({"radii": (0.2, 0.1)}, "`radii` must be numbers"),
        ({"radii": (-0.1, 0.1)}, "`radii` must be numbers"),
        ({"radii": (1, 2, 4)}, "`radii` must be at most 1, full scale; is 4 in 1/255 of it"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"restarts": 0}, "`restarts` must be at least 1, got 0"),
        ({"restarts": 2, "random_start": False}, "`restarts` must be 1 without `random_start`"),
        ({"step_size": 0.0}, "`step_size` must be positive and finite, got 0.0"),
        ({"std": 1.0}, "`mean` and `std` must be given both or neither"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        adversarial_robustness(Forbidden(), [images()], **arguments)
    with pytest.raises(TypeError, match="`generator` must be a torch.Generator"):
        adversarial_robustness(Forbidden(), [images()], generator=0)


def test_bad_data_and_models_are_refused():
    pixels, y = images()
    with pytest.raises(ValueError, match="must have pixels in 0 … 1 .* got -2.25"):
        adversarial_robustness(Forbidden(), [(normalised(0 * pixels), y)])
    with pytest.raises(ValueError, match="must have pixels in 0 … 1 .* to 2"):
        adversarial_robustness(linear(), [(pixels, y), (1 + 0 * pixels, y), (2 + 0 * pixels, y)])
    with pytest.raises(ValueError, match="labels in 0 … 1 for the 2 outputs"):
        adversarial_robustness(linear(), [(pixels, y), (pixels, y + 1)])
    with pytest.raises(TypeError, match="one-shot"):
        adversarial_robustness(linear(), iter([(pixels, y)]))

    class Rounded(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)[:, :2]

    with pytest.raises(ValueError, match="`model` must be differentiable by its inputs"):
        adversarial_robustness(Rounded(), [(pixels, y)])
    with torch.inference_mode():
        made = linear()
    with pytest.raises(ValueError, match=r"`model` must have been made outside of `torch.infer"):
        adversarial_robustness(made, [(pixels, y)])
    adversarial_robustness(copy.deepcopy(made), [(pixels, y)])
