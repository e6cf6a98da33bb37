"""The lesion study, against models changed by hand and scored by themselves."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from landscape.blocks import Blocks
from landscape.models import alternet18, resnet50, vit_nano
from landscape.probes.evaluate import evaluate
from landscape.probes.lesion import LesionStudy, lesion_study
from tests.cases import assert_untouched, snapshot

SMALL = {
    "resnet": lambda: resnet50(width=4, depths=(2, 2), num_classes=5),
    "vit": lambda: vit_nano(depth=2, image_size=16, num_classes=5),
    "alternet": lambda: alternet18(
        width=4, depths=(2, 2), msas=(0, 1), heads=(1, 2), head_dim=4, window=2, num_classes=5
    ),
}


@pytest.fixture(params=SMALL)
def model(request):
    return build(request.param)


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SMALL[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # a random network with visible branches
            module.running_var.fill_(0.5)
    return model


def images(sizes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 3, 16, 16, generator=generator)
    y = torch.randint(5, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


class Without(nn.Module):
    """A module whose output is its input, or zero."""

    def __init__(self, inner, zero):
        super().__init__()
        self.inner, self.zero = inner, zero

    def forward(self, x):
        return torch.zeros_like(self.inner(x)) if self.zero else x


def changed(model, name, part):
    model = copy.deepcopy(model)
    path = f"{name}.branch.conv2" if part == "conv" else f"{name}.branch"
    parent, _, child = path.rpartition(".")
    inner = model.get_submodule(path)
    setattr(model.get_submodule(parent), child, Without(inner, zero=part == "branch"))
    return model


def test_equals_models_changed_by_hand(model):
    data = images((8, 8, 4))
    study = lesion_study(model, data)
    clean = evaluate(model, data)
    assert study.clean_accuracy == pytest.approx(clean.accuracy)
    assert study.clean_nll == pytest.approx(clean.nll)
    assert len(study.names) >= 2
    for u, (name, part) in enumerate(zip(study.names, study.parts, strict=True)):
        expected = evaluate(changed(model, name, part), data)
        assert study.accuracy[u] == pytest.approx(expected.accuracy)
        assert study.nll[u] == pytest.approx(expected.nll, rel=1e-5)
        assert study.delta_nll[u] == pytest.approx(expected.nll - clean.nll, rel=1e-4, abs=1e-6)
    assert study.provenance.settings["shared_prefix"]
    assert np.abs(study.delta_nll).max() > 1e-3


def test_named_blocks_have_their_convolutions_and_heads():
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    data = images((8,))
    study = lesion_study(plain, data, blocks=Blocks(plain, ["0", "1"], example=data[0][0]))
    without = copy.deepcopy(plain)
    without[1][0] = nn.Identity()
    assert (study.names, study.parts) == (("1",), ("conv",))
    assert study.nll[0] == pytest.approx(evaluate(without, data).nll, rel=1e-5)
    assert "0" in study.skipped
    vit = build("vit")
    found = lesion_study(vit, data, units="head")
    named = Blocks(vit, ["blocks.*.attention"], example=data[0][0])
    np.testing.assert_allclose(lesion_study(vit, data, blocks=named, units="head").nll, found.nll)


def test_units_of_the_paper():
    resnet = lesion_study(build("resnet"), images((8,)))
    assert set(resnet.parts) == {"conv"}
    assert "stages.0.0" in resnet.names  # its 3x3 convolution keeps the size
    assert "changes the size" in resnet.skipped["stages.1.0"]
    assert resnet.names + tuple(resnet.skipped) == ("stages.0.0", "stages.0.1", "stages.1.1",
                                                    "stages.1.0")  # fmt: skip
    vit = lesion_study(build("vit"), images((8,)))
    assert vit.kinds == ("msa", "mlp") * 2
    assert not vit.skipped
    branches = lesion_study(build("resnet"), images((8,)), units="branch")
    assert branches.names == ("stages.0.1", "stages.1.1")
    assert "projection" in branches.skipped["stages.0.0"]


def test_heads():
    model, data = build("vit"), images((8,))
    study = lesion_study(model, data, units="head")
    assert study.parts == ("head 0", "head 1", "head 2") * 2
    for u in (1, 5):
        cut = copy.deepcopy(model)
        project = cut.get_submodule(f"{study.names[u]}.branch.attention.project")
        project.weight.data.unflatten(1, (3, -1))[:, int(study.parts[u][-1])] = 0
        assert study.nll[u] == pytest.approx(evaluate(cut, data).nll, rel=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_pytorchs_attention(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5)
            self.attend = nn.MultiheadAttention(12, 3, batch_first=batch_first)

        def forward(self, x):
            x = self.embed(x).flatten(2).permute((0, 2, 1) if batch_first else (2, 0, 1))
            x = x + self.attend(x, x, x, need_weights=False)[0]
            return self.head(x.mean(1 if batch_first else 0))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        for parameter in model.attend.parameters():
            nn.init.normal_(parameter)
    data = images((8,))
    study = lesion_study(model, data, units="head")
    assert study.parts == ("head 0", "head 1", "head 2")
    assert np.abs(study.delta_nll).min() > 1e-3
    for head in range(3):
        cut = copy.deepcopy(model)
        cut.attend.out_proj.weight.data.unflatten(1, (3, -1))[:, head] = 0
        assert study.nll[head] == pytest.approx(evaluate(cut, data).nll, rel=1e-5)


def test_paired_error_is_that_of_the_differences():
    model, data = build("vit"), images((12,))
    study = lesion_study(model, data)
    (x, y), model = data[0], model.eval()
    with torch.no_grad():
        clean = nn.functional.cross_entropy(model(x), y, reduction="none")
        cut = changed(model, study.names[1], "branch")(x)
    difference = nn.functional.cross_entropy(cut, y, reduction="none") - clean
    stderr = float(difference.double().std() / 12**0.5)
    assert study.delta_nll_stderr[1] == pytest.approx(stderr, rel=1e-4)


def test_costs_half_of_a_pass_a_unit():
    with torch.random.fork_rng(devices=[]):
        model = vit_nano(depth=12, image_size=16, num_classes=5)
    data = images((8, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Blocks(model, example=data[0][0])
        for x, _ in data:
            model.eval()(x)
    once = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        lesion_study(model, data)
    passes = counter.get_total_flops() / once
    assert passes < 0.5 * 24 + 3.5  # and a whole, a stepwise and a checking pass


def test_batching_changes_nothing(model):
    whole, cut = lesion_study(model, images((20,))), lesion_study(model, images((7, 12, 1)))
    np.testing.assert_allclose(whole.delta_nll, cut.delta_nll, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.delta_nll_stderr, cut.delta_nll_stderr, rtol=1e-4)
    np.testing.assert_array_equal(whole.accuracy, cut.accuracy)


def test_again_the_same_and_untouched(model, tmp_path):
    model.train()
    before = snapshot(model)
    first = lesion_study(model, images((8,)))
    torch.rand(3)
    before["rng"] = torch.get_rng_state()
    second = lesion_study(model, images((8,)))
    assert_untouched(model, before)
    np.testing.assert_array_equal(first.nll, second.nll)
    first.save(tmp_path / "study")
    again = LesionStudy.load(tmp_path / "study.npz")
    assert again.skipped == first.skipped
    np.testing.assert_array_equal(again.delta_accuracy, first.delta_accuracy)


def test_values_that_steer_the_pass_are_computed():
    """Where a pass cannot begin in the middle, every lesion takes a whole one."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("vit")

        def forward(self, x):
            if not self.inner.patch_embed(x).isfinite().all():
                raise RuntimeError("no image")
            return self.inner(x)

    model, data = Gated(), images((8,))
    study = lesion_study(model, data)
    plain = lesion_study(model.inner, data)
    np.testing.assert_allclose(study.nll, plain.nll, rtol=1e-5)
    assert not study.provenance.settings["shared_prefix"]


def test_chosen_blocks_that_are_no_cuts():
    model, data = build("vit"), images((8,))
    names = ["blocks.0.msa.branch", "blocks.1.msa", "blocks.1.mlp"]
    study = lesion_study(model, data, blocks=Blocks(model, names), units="branch")
    assert study.names == ("blocks.1.msa", "blocks.1.mlp")
    assert "no residual branch" in study.skipped["blocks.0.msa.branch"]
    assert study.provenance.settings["shared_prefix"]
    expected = evaluate(changed(model, "blocks.1.mlp", "branch"), data)
    assert study.nll[1] == pytest.approx(expected.nll, rel=1e-5)


def test_blocks_that_write_in_place():
    class Scaled(nn.Module):
        """Every block halves what it is given, in place, before its branch."""

        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = x * 1
            for layer in self.layers:
                x = x.mul_(0.5)
                x = x + layer(x)
            return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    model, data = Scaled(), images((8,))
    study = lesion_study(model, data, units="branch")
    assert study.names == ("layers.0", "layers.1", "layers.2")
    assert study.provenance.settings["shared_prefix"]
    for u, name in enumerate(study.names):
        cut = copy.deepcopy(model)
        for parameter in cut.get_submodule(name).parameters():
            parameter.data.zero_()
        assert study.nll[u] == pytest.approx(evaluate(cut, data).nll, rel=1e-5)


def test_errors():
    model, data = build("vit"), images((8,))
    with pytest.raises(ValueError, match="`units` must be one of 'paper'"):
        lesion_study(model, data, units="layer")
    with pytest.raises(ValueError, match="got 'conv', which leaves nothing"):
        lesion_study(model, data, units="conv")
    with pytest.raises(ValueError, match="those of another VisionTransformer"):
        lesion_study(model, data, blocks=Blocks(build("vit")))
    with pytest.raises(ValueError, match="at least one sample"):
        lesion_study(model, [])
    with pytest.raises(TypeError, match="one-shot"):
        lesion_study(model, iter(data))
    with pytest.raises(ValueError, match="labels in 0 … 4"):
        lesion_study(model, [(data[0][0], data[0][1] + 3)])
