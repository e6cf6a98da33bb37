import dataclasses
import io
import pickle
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from landscape.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from landscape.probes.corruption import CorruptionRobustness, corruption_robustness, to_bytes
from landscape.probes.pixels import PixelScale
from landscape.probes.published_corruptions import load_published_corruptions
from landscape.training import DeviceImages
from tests.cases import assert_untouched, snapshot
from tests.corruptions.cases import pictures

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SOME = ("gaussian_noise", "fog", "jpeg_compression")
ARRAYS = [
    f"{name}{suffix}"
    for name in ("error", "error_increase", "nll", "nll_increase")
    for suffix in ("", "_stderr")
] + ["ece"]
NUMBERS = [
    "clean_error", "clean_error_stderr", "clean_nll", "clean_nll_stderr", "clean_ece",
    "mean_corruption_error", "mean_corruption_error_stderr",
]  # fmt: skip


class Net(nn.Module):
    """BatchNorm, pooled colours, a linear layer; float64 so that only the method can differ."""

    def __init__(self, channels=3, dtype=torch.float64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(4 * channels, 4)
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * 2)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.norm(x).tanh(), 2).flatten(1))


class Never(Net):
    def forward(self, x):
        raise AssertionError("the model was called")


def normalised(pixels):
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


def samples(n=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pictures(n, seed=seed), torch.randint(4, (n,), generator=generator)


def cut(pixels, y, sizes):
    x = normalised(pixels)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def measure(model=None, sizes=(20,), **arguments):
    settings = {"corruptions": SOME, "severities": (1, 5), "mean": MEAN, "std": STD} | arguments
    return corruption_robustness(model or Net(), cut(*samples(), sizes), **settings)


@pytest.mark.parametrize("profile", ["imagenet", "cifar"])
def test_table_is_that_of_a_plain_loop(profile):
    pixels, y = samples()
    model = Net().eval()
    result = measure(profile=profile, severities=(5, 2))
    with torch.no_grad():
        clean = model(normalised(pixels))
        wrong_clean = (clean.argmax(1) != y).double()
        nll_clean = F.cross_entropy(clean, y, reduction="none")
        assert result.clean_error == pytest.approx(float(wrong_clean.mean()))
        assert result.clean_nll == pytest.approx(float(nll_clean.mean()))
        assert result.clean_nll_stderr == pytest.approx(float(nll_clean.std()) / 20**0.5)
        all_wrong = []
        for i, name in enumerate(SOME):
            for j, severity in enumerate((5, 2)):
                logits = model(normalised(corrupt(pixels, name, severity, profile=profile)))
                wrong = (logits.argmax(1) != y).double()
                nll = F.cross_entropy(logits, y, reduction="none")
                expected = {
                    "error": wrong.mean(),
                    "error_stderr": wrong.std() / 20**0.5,
                    "error_increase": wrong.mean() - wrong_clean.mean(),
                    "error_increase_stderr": (wrong - wrong_clean).std() / 20**0.5,
                    "nll": nll.mean(),
                    "nll_stderr": nll.std() / 20**0.5,
                    "nll_increase": nll.mean() - nll_clean.mean(),
                    "nll_increase_stderr": (nll - nll_clean).std() / 20**0.5,
                }
                for field, value in expected.items():
                    got = getattr(result, field)[i, j]
                    assert got == pytest.approx(float(value), rel=1e-9, abs=1e-12), field
                p = logits.softmax(1).amax(1)
                bins = ((p * 15).ceil() - 1).long()
                gaps = torch.zeros(15).double().index_add_(0, bins, 1 - wrong - p)
                assert result.ece[i, j] == pytest.approx(float(gaps.abs().sum() / 20))
                all_wrong.append(wrong)
    mean = torch.stack(all_wrong).mean(0)
    assert result.mean_corruption_error == pytest.approx(float(mean.mean()))
    assert result.mean_corruption_error == pytest.approx(result.error.mean())
    assert result.mean_corruption_error_stderr == pytest.approx(float(mean.std()) / 20**0.5)
    assert 0 < result.clean_error < 1
    assert len(np.unique(result.nll)) == 6


def test_default_is_the_whole_benchmark():
    result = corruption_robustness(Net(), cut(*samples(), (20,)), mean=MEAN, std=STD)
    assert result.corruptions == CORRUPTIONS
    assert result.severities == SEVERITIES
    assert result.error.shape == (15, 5)
    assert result.profile == "imagenet"
    assert result.seed == result.provenance.seed == 0
    assert result.provenance.num_forwards == 76
    assert result.provenance.num_samples == 20
    assert result.provenance.settings == {"mean": list(MEAN), "std": list(STD)}


@pytest.mark.parametrize("sizes", [(12, 8), (9, 9, 2), (1,) * 20], ids=str)
def test_results_do_not_depend_on_batching_or_on_the_global_random_state(sizes):
    whole = measure(corruptions=CORRUPTIONS)
    torch.rand(5)
    parts = measure(sizes=sizes, corruptions=CORRUPTIONS)
    for name in ARRAYS + NUMBERS:
        np.testing.assert_allclose(
            getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-12, err_msg=name
        )


def test_results_follow_the_seed_and_not_the_model_or_the_call():
    generator = torch.Generator().manual_seed(3)
    first = measure(generator=generator)
    torch.rand(1, generator=generator)
    again = measure(generator=generator)
    assert first.seed == again.seed == 3
    np.testing.assert_array_equal(first.nll, again.nll)
    other = measure(generator=torch.Generator().manual_seed(4))
    assert (first.nll[:2] != other.nll[:2]).all()  # noise and fog
    np.testing.assert_array_equal(first.nll[2], other.nll[2])  # JPEG
    # A subset of the table is the same as in the whole: conditions have streams of their own.
    part = measure(generator=generator, corruptions=("fog",), severities=(5,))
    np.testing.assert_array_equal(part.nll[0, 0], first.nll[1, 1])


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_found(fails):
    model = Net().train()
    model.norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.bias.requires_grad_(False)
    before = snapshot(model)
    if fails:
        calls = []

        def stop(module, arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        handle = model.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            measure(model)
        handle.remove()
    else:
        measure(model)
    assert_untouched(model, before)


def test_normalisation_is_read_off_the_data_and_does_not_matter():
    pixels, y = samples()
    kwargs = {"corruptions": SOME, "severities": (3,)}
    data = DeviceImages(pixels, y, mean=MEAN, std=STD, batch_size=8)
    model = Net(dtype=torch.float32)
    result = corruption_robustness(model, data, **kwargs)
    given = corruption_robustness(model, list(data), mean=MEAN, std=STD, **kwargs)
    np.testing.assert_array_equal(result.nll, given.nll)

    class Normalising(nn.Module):
        def forward(self, x):
            return model((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))

    model.eval()
    plain = corruption_robustness(Normalising(), [(pixels.float() / 255, y)], **kwargs)
    np.testing.assert_allclose(plain.nll, result.nll, rtol=1e-4)
    for x, _ in data:
        first = to_bytes(x, PixelScale(data, None, None))
        assert torch.equal(first, pixels[: len(x)])
        break


def test_grey_images_and_mappings():
    pixels, y = pictures(8, channels=1), samples(8)[1]
    model = Net(1)
    x = pixels.double() / 255
    kwargs = {"corruptions": CORRUPTIONS, "severities": (2,)}
    result = corruption_robustness(model, [(x, y)], **kwargs)
    assert np.isfinite(result.nll).all()

    class Wrapped(Net):
        def forward(self, pixel_values):
            return types.SimpleNamespace(logits=super().forward(pixel_values))

    mapped = corruption_robustness(Wrapped(1), [{"pixel_values": x, "labels": y}], **kwargs)
    np.testing.assert_allclose(mapped.nll, result.nll, rtol=1e-9)


def test_errors_relative_to_a_baseline_are_those_of_the_paper(tmp_path):
    base = measure(Net(seed=5))
    result = measure(baseline=base)
    ce = [result.error[c].sum() / base.error[c].sum() for c in range(3)]
    added = [
        (result.error[c] - result.clean_error).sum() / (base.error[c] - base.clean_error).sum()
        for c in range(3)
    ]
    np.testing.assert_allclose(result.relative.ce, ce)
    np.testing.assert_allclose(result.relative.relative_ce, added, atol=1e-12)
    assert result.relative.mce == pytest.approx(np.mean(ce))
    assert result.relative.relative_mce == pytest.approx(np.mean(added))
    same = base.relative_to(base)
    assert same.mce == same.relative_mce == 1
    flat = result.relative_to(measure(Net(seed=2)))  # a corruption adds nothing to its error
    assert np.isfinite(flat.ce).all()
    assert not np.isfinite(flat.relative_ce).any()
    loaded = CorruptionRobustness.load(result.save(tmp_path / "table"))
    assert loaded.corruptions == SOME
    assert loaded.severities == (1, 5)
    np.testing.assert_array_equal(loaded.relative.ce, result.relative.ce)
    with pytest.raises(ValueError, match="`baseline` must have the same severities"):
        measure(severities=(1,)).relative_to(base)


def test_relative_errors_have_those_of_their_samples():
    """Of one severity, and relative to a baseline that is equally bad under all corruptions."""
    result = measure(severities=(5,))
    clean, *each = result.error_covariance.diagonal() ** 0.5
    assert clean == pytest.approx(result.clean_error_stderr)
    np.testing.assert_allclose(each, result.error_stderr[:, 0])
    even = dataclasses.replace(
        result, error=np.full((3, 1), 0.5), error_increase=np.full((3, 1), 0.25)
    )
    relative = result.relative_to(even)
    np.testing.assert_allclose(relative.ce_stderr, result.error_stderr[:, 0] / 0.5)
    np.testing.assert_allclose(
        relative.relative_ce_stderr, result.error_increase_stderr[:, 0] / 0.25
    )
    assert relative.mce_stderr == pytest.approx(result.mean_corruption_error_stderr / 0.5)
    steps = result.error_covariance
    of_mean = steps[1:, 1:].mean() - 2 * steps[0, 1:].mean() + steps[0, 0]
    assert relative.relative_mce_stderr == pytest.approx(of_mean**0.5 / 0.25)
    older = dataclasses.replace(result, error_covariance=None).relative_to(even)
    assert np.isnan([*older.ce_stderr, older.mce_stderr]).all()
    np.testing.assert_array_equal(older.ce, relative.ce)


def test_outputs_that_are_not_finite_are_kept():
    class Broken(Net):
        def forward(self, x):
            z = super().forward(x)
            return torch.where(x.amax((1, 2, 3))[:, None] > 2.3, torch.nan, z)

    result = measure(Broken(), corruptions=("brightness", "contrast"), severities=(5,))
    assert np.isnan(result.error[0, 0])
    assert np.isnan(result.nll[0, 0])
    assert np.isfinite(result.nll[1, 0])
    assert np.isnan(result.mean_corruption_error)


def test_conditions_are_checked_before_work_and_may_come_from_an_iterator():
    with pytest.raises(ValueError, match="`severities` must be a whole number, got 1.0"):
        measure(severities=(1.0,), corruptions=("fog",))
    some = measure(severities=iter((1, 3)), corruptions=(name for name in ("fog", "contrast")))
    assert some.severities == (1, 3)
    assert some.corruptions == ("fog", "contrast")


def write_cifar_c(folder, pixels, y, names=SOME):
    """Files in the form of CIFAR-10-C, with `corrupt` for what made them."""
    for name in names:
        levels = [corrupt(pixels, name, s, profile="cifar") for s in SEVERITIES]
        np.save(folder / f"{name}.npy", torch.cat(levels).permute(0, 2, 3, 1).numpy())
    np.save(folder / "labels.npy", np.tile(y.numpy(), 5).astype(np.uint8))


def test_published_cifar_c_gives_what_made_it(tmp_path):
    pixels, y = samples()
    write_cifar_c(tmp_path, pixels, y)
    source = load_published_corruptions(tmp_path)
    assert source.corruptions == SOME
    assert source.severities == SEVERITIES
    assert source.name == "CIFAR-C"
    read = measure(source=source, sizes=(9, 11))
    made = measure(profile="cifar")
    for name in (*ARRAYS, *NUMBERS):
        np.testing.assert_allclose(getattr(read, name), getattr(made, name), rtol=1e-9, atol=1e-12)
    assert read.profile == "CIFAR-C"
    assert read.seed is None
    first = corruption_robustness(
        Net(), cut(pixels[:6], y[:6], (6,)), corruptions=SOME, severities=(1, 5),
        source=source.first(6), mean=MEAN, std=STD,
    )  # fmt: skip
    assert first.provenance.num_samples == 6
    with pytest.raises(ValueError, match="`corruptions` must be one of .* got 'snow'"):
        measure(source=source, corruptions=("snow",))
    with pytest.raises(ValueError, match="order of its files, got other labels .* from sample 0"):
        corruption_robustness(
            Net(), cut(pixels.flip(0), y.flip(0), (20,)), corruptions=SOME, source=source,
            mean=MEAN, std=STD,
        )  # fmt: skip
    with pytest.raises(ValueError, match="`data` must hold the 20 samples of `source`, got 12"):
        corruption_robustness(
            Net(), cut(pixels[:12], y[:12], (12,)), corruptions=SOME, source=source,
            mean=MEAN, std=STD,
        )  # fmt: skip
    larger = [(normalised(pictures(20, 40, 40)), y)]
    with pytest.raises(ValueError, match="images of the size of `source`"):
        corruption_robustness(Net(), larger, corruptions=SOME, source=source, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"`count` must be between 1 and 20, got 0"):
        source.first(0)


def test_published_imagenet_c_is_read_in_the_order_of_folders(tmp_path):
    pixels = pictures(6)
    y = torch.tensor([0, 0, 1, 1, 1, 2])
    classes = ("n01440764", "n01443537", "n01484850")
    stored = {}
    for group, name in (("blur", "defocus_blur"), ("weather", "fog")):
        for severity in (1, 2):
            images = corrupt(pixels, name, severity)
            for i, label in enumerate(y.tolist()):
                folder = tmp_path / group / name / str(severity) / classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"ILSVRC2012_val_{10 * i:08d}.JPEG"
                Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(file, quality=95)
                stored[name, severity, i] = np.array(Image.open(file))
    source = load_published_corruptions(tmp_path)
    assert source.name == "ImageNet-C"
    assert source.corruptions == ("defocus_blur", "fog")
    assert source.severities == (1, 2)
    assert source.labels.tolist() == y.tolist()
    taken = source.take("fog", 2, 3, pixels[3:5], y[3:5])
    for i in (3, 4):
        np.testing.assert_array_equal(taken[i - 3].permute(1, 2, 0), stored["fog", 2, i])
    result = corruption_robustness(
        Net(), cut(pixels, y, (4, 2)), corruptions=source.corruptions, severities=(1, 2),
        source=source, mean=MEAN, std=STD,
    )  # fmt: skip
    assert result.profile == "ImageNet-C"
    assert np.isfinite(result.nll).all()
    file = tmp_path / "weather" / "fog" / "2" / classes[1] / "ILSVRC2012_val_00000030.JPEG"
    Image.fromarray(np.zeros((40, 32, 3), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"images of one size, got \[\(32.*\(40.* in .*fog.2;"):
        source.take("fog", 2, 2, pixels[2:5], y[2:5])
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`source` must hold whole images, got .*0030\.JPEG"):
        source.take("fog", 2, 2, pixels[2:5], y[2:5])
    file.unlink()
    with pytest.raises(ValueError, match="fog/2 differs from defocus_blur/1; is it complete"):
        load_published_corruptions(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`path` must be a folder with `labels.npy`"):
        load_published_corruptions(tmp_path)
    pixels, y = samples(4)
    write_cifar_c(tmp_path, pixels, y, names=("fog",))
    good = (tmp_path / "fog.npy").read_bytes()
    (tmp_path / "fog.npy").write_bytes(good[:-100])
    with pytest.raises(ValueError, match=r"`path` must hold complete .npy files, got fog.npy"):
        load_published_corruptions(tmp_path)
    for count in (19, 15, 25):
        np.save(tmp_path / "fog.npy", np.zeros((count, 32, 32, 3), np.uint8))
        with pytest.raises(ValueError, match="as many labels, got uint8 .* 20 labels in fog.npy"):
            load_published_corruptions(tmp_path)
    (tmp_path / "fog.npy").write_bytes(good)
    np.save(tmp_path / "labels.npy", np.arange(20) % 3)
    with pytest.raises(ValueError, match="the same labels for every severity"):
        load_published_corruptions(tmp_path)
    for labels in (np.array(3), np.full(20, np.nan), np.array(["cat"] * 20)):
        np.save(tmp_path / "labels.npy", labels)
        with pytest.raises(ValueError, match="a whole number a sample in labels.npy, got"):
            load_published_corruptions(tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(20))
    header = (tmp_path / "labels.npy").read_bytes().replace(b"(20,)", b"(20, ")
    (tmp_path / "labels.npy").write_bytes(header)
    with pytest.raises(ValueError, match=r"complete .npy files, got labels.npy"):
        load_published_corruptions(tmp_path)
    buffer = io.BytesIO()
    pickle.dump(np.zeros(20), buffer)
    (tmp_path / "labels.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"complete .npy files, got labels.npy"):
        load_published_corruptions(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruptions": ("sepia",)}, r"`corruptions` must be one of .* got 'sepia'"),
        ({"corruptions": ()}, r"`corruptions` must be a sequence of one or more .* got \(\)"),
        ({"corruptions": "fog"}, r"`corruptions` must be a sequence .* got 'fog'"),
        ({"severities": (1, 1)}, r"`severities` must be a sequence .* different .* got \(1, 1\)"),
        ({"severities": (6,)}, r"`severities` must be one of 1, 2, 3, 4, 5, got 6"),
        ({"profile": "mnist"}, r"`profile` must be one of 'imagenet', 'cifar', got 'mnist'"),
        ({"mean": None, "std": None}, r"`data` must have pixels in 0 … 1 .* pass the `mean`"),
        ({"mean": (0.1, 0.2)}, r"`mean` must have one value per channel \(3\), got 2"),
        ({"std": (0.0, 1, 1)}, r"`std` positive"),
    ],
)
def test_errors_come_before_work(changes, message):
    with pytest.raises(ValueError, match=message):
        measure(Never(), **changes)


def test_errors_about_data():
    pixels, y = samples()
    x = normalised(pixels)
    options = {"corruptions": SOME, "severities": (1,), "mean": MEAN, "std": STD}
    with pytest.raises(TypeError, match="`data` must be re-iterable"):
        corruption_robustness(Net(), iter([(x, y)]), **options)
    with pytest.raises(ValueError, match="at least 32 pixels a side, got .* pad smaller"):
        corruption_robustness(Never(), [(x[..., :28], y)], **options)
    with pytest.raises(ValueError, match=r"labels in 0 … 3 .* got labels from 0 to 9"):
        corruption_robustness(Net(), [(x, torch.arange(20) // 2)], **options)
    with pytest.raises(ValueError, match=r"labels in 0 … 3 .* got labels from 0 to 9"):
        corruption_robustness(Net(), [(x, y), (x, torch.arange(20) // 2)], **options)
    with pytest.raises(ValueError, match=r"pixels in 0 … 1 .* pass the `mean`"):
        corruption_robustness(Net(), [(x, y), (x + 1, y)], **options)
    with pytest.raises(ValueError, match="`data` must yield at least one sample"):
        corruption_robustness(Net(), [], **options)
    with pytest.raises(TypeError, match="`generator` must be a torch.Generator"):
        corruption_robustness(Net(), [(x, y)], generator=0, **options)
