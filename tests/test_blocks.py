"""Blocks: found, captured and removed, against plain hooks and models changed by hand."""

import copy
import functools
import math
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from landscape import (
    architecture,
    cka,
    evaluate,
    feature_variance,
    fourier_amplitude,
    lesion_study,
    loss_line,
)
from landscape.blocks import Blocks
from landscape.blocks.lesions import num_heads
from landscape.blocks.passes import PartialPasses
from landscape.models import alternet18, resnet20, vit_nano
from landscape.switches import without_fast_path
from tests.cases import assert_untouched, snapshot

SMALL = {
    "resnet": lambda: resnet20(width=4),
    "vit": lambda: vit_nano(depth=2, image_size=16),
    "gap": lambda: vit_nano(depth=2, image_size=16, pool="gap"),
    "alternet": lambda: alternet18(width=8, heads=(1, 2, 2, 4), head_dim=4, window=2),
}


def build(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@pytest.fixture(params=SMALL)
def model(request):
    return build(SMALL[request.param])


@pytest.fixture
def images(generator):
    return torch.randn(4, 3, 16, 16, generator=generator)


def hooked(model, x, path):
    """The output of a module, by a plain hook on a copy."""
    model, kept = copy.deepcopy(model).eval(), []
    model.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(out.clone()))
    with torch.no_grad():
        model(x)
    return kept[0]


def test_blocks_of_our_models():
    vit = Blocks(build(SMALL["vit"]))
    body = [f"blocks.{i}.{kind}" for i in range(2) for kind in ("msa", "mlp")]
    assert vit.names == ("stem", *body, "head")
    assert vit.kinds == ("stem", "msa", "mlp", "msa", "mlp", "head")
    assert [b.depth for b in vit] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert not any(b.subsamples for b in vit)
    resnet = Blocks(build(SMALL["resnet"]))
    stages = [f"stages.{i}.{j}" for i in range(3) for j in range(3)]
    assert resnet.names == ("stem", *stages, "head")
    assert [b.name for b in resnet if b.subsamples] == ["stages.1.0", "stages.2.0"]
    assert [b.stage for b in resnet][:-1] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert resnet["stages.2.1"].channels == 16
    alternet = Blocks(build(SMALL["alternet"]))
    assert alternet.kinds == ("stem", *["conv"] * 2, *["conv", "msa"] * 3, "head")


def test_captured_features_are_those_of_hooks(model, images):
    blocks = Blocks(model, example=images)
    features = blocks.capture(images)
    assert tuple(features) == blocks.names
    for block in list(blocks)[1:-1]:
        expected = hooked(model, images, block.name)
        if expected.dim() == 3:
            tokens = expected[:, expected.shape[1] % 2 :]  # without a class token
            expected = tokens.transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(features[block.name], expected, rtol=1e-5, atol=1e-6)
        assert features[block.name].shape[1:] == (block.channels, *block.grid)
    with torch.no_grad():
        torch.testing.assert_close(features["head"], model.eval()(images))


def test_captured_features_are_let_go_of_at_the_end(images):
    model = build(SMALL["vit"])
    before, blocks = snapshot(model), Blocks(model, example=images)
    kept = blocks.capture(images)
    assert isinstance(kept, dict)
    with blocks.capture(images) as features:
        torch.testing.assert_close(dict(features), dict(kept))
        held = weakref.ref(features["stem"])
    assert not features
    assert held() is None
    with pytest.raises(ZeroDivisionError), blocks.capture(images) as features:
        raise ZeroDivisionError
    assert not features
    assert tuple(kept) == blocks.names
    assert_untouched(model, before)


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "mapping"])
def test_inputs_take_the_precision_of_the_model(wrapped, images):
    model = build(SMALL["resnet"]).double()
    given = {"x": images} if wrapped else images
    blocks = Blocks(model, example=given)
    expected = model.eval()(images.double())
    torch.testing.assert_close(blocks.predict(given), expected)
    features = blocks.capture(given)
    torch.testing.assert_close(features["head"], expected.detach())
    assert features["stem"].dtype == torch.float64


def test_a_gate_between_two_blocks_is_no_residual_sum(images):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.gate = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = x + self.convs[0](x)
            x = x * self.gate(x).sigmoid()
            return (x + self.convs[1](x)).mean((2, 3))

    model = build(Gated)
    blocks = Blocks(model, example=images)
    assert blocks.kinds == ("conv", "pool", "conv", "head")
    features = blocks.capture(images)
    torch.testing.assert_close(features["convs.0"], (images + model.convs[0](images)).detach())


def test_the_stem_is_what_the_first_block_takes(images):
    model = build(SMALL["vit"])
    tokens = model.patch_embed(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    stem = Blocks(model).capture(images)["stem"]
    torch.testing.assert_close(stem, tokens.transpose(1, 2).unflatten(2, (4, 4)).detach())


class Grid(nn.Module):
    """A transformer without a class of its own, in any of the usual layouts."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.heads = layout, 2
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.registers = nn.Parameter(torch.randn(1, 3, 8))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))

    def attend(self, x):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-1, -2)) / 2).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, 8))

    def forward(self, x):
        x = self.embed(x)
        if self.layout == "nhwc":
            x = x.permute(0, 2, 3, 1)
            x = x + self.attend(self.norms[0](x).flatten(1, 2)).view_as(x)
            return (self.mlp(self.norms[1](x)) + x).mean((1, 2))
        x = x.flatten(2).transpose(1, 2)
        if self.layout == "registers":
            x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        if self.layout == "sequence first":
            x = x.transpose(0, 1)
            x = x + self.attend(self.norms[0](x).transpose(0, 1)).transpose(0, 1)
            return (x + self.mlp(self.norms[1](x))).mean(0)
        x = x + self.attend(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return x.mean(1)


@pytest.mark.parametrize("layout", ["nhwc", "tokens", "registers", "sequence first"])
def test_layouts_become_maps(layout, generator):
    model = build(lambda: Grid(layout))
    images = torch.randn(5, 3, 8, 12, generator=generator)  # a map of 2 x 3, not square
    blocks = Blocks(model, example=images)
    assert blocks.kinds == ("stem", "msa", "mlp", "head")
    features = blocks.capture(images)
    embedded = model.embed(images).detach()
    torch.testing.assert_close(features["stem"], embedded)
    for name in blocks.names[1:-1]:
        assert features[name].shape == (5, 8, 2, 3)
    # The branch of the MLP acts at each position by itself: it tells where every position went.
    before = features[blocks.names[1]].movedim(1, -1)
    after = before + model.mlp(model.norms[1](before))
    torch.testing.assert_close(features["mlp"].movedim(1, -1), after.detach())


def test_tokens_with_their_channels_first(generator):
    class ChannelsFirst(nn.Module):
        """Mixes its tokens by a convolution along the sequence."""

        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm1d(8)
            self.mix = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.embed(x).flatten(2)
            return (x + self.mix(self.norm(x))).mean(2)

    model = build(ChannelsFirst).eval()
    images = torch.randn(5, 3, 8, 12, generator=generator)
    features = Blocks(model, example=images).capture(images)
    embedded = model.embed(images)
    mixed = model.mix(model.norm(embedded.flatten(2))).view_as(embedded)
    torch.testing.assert_close(features["stem"], embedded.detach())
    torch.testing.assert_close(features["mix"], (embedded + mixed).detach())


@pytest.mark.parametrize("size", [(16, 24), [16, 24]], ids=str)
def test_a_model_may_state_a_size_that_is_not_square(size):
    class Stated(nn.Module):
        def __init__(self):
            super().__init__()
            self.image_size = size
            self.embed, self.layer = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
            self.place = nn.Parameter(torch.zeros(24, 8))

        def forward(self, x):
            x = self.embed(x).flatten(2).mT + self.place
            return (x + self.layer(x)).mean(1)

    assert Blocks(build(Stated))["layer"].grid == (4, 6)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_grid_of_few_rows_is_told_by_the_aspect_of_the_images(rows, prefix, generator):
    class Patches(nn.Module):
        """Cuts its patches by a reshape, so that no map is ever made."""

        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Linear(48, 8), nn.Linear(8, 8)
            self.extra = nn.Parameter(torch.randn(1, prefix, 8))

        def forward(self, x):
            x = x.unflatten(2, (rows, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5)
            x = self.embed(x.reshape(len(x), 3 * rows, 48))
            x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
            return (x + self.layer(x)).mean(1)

    images = torch.randn(2, 3, 4 * rows, 12, generator=generator)
    assert Blocks(build(Patches), example=images)["layer"].grid == (rows, 3)


@pytest.mark.parametrize("grid", [(1, 4), (4, 1)])
@pytest.mark.parametrize("layout", ["nhwc", "tokens", "registers", "sequence first"])
def test_tokens_of_a_single_row_or_column_are_a_map(layout, grid, generator):
    model = build(lambda: Grid(layout)).eval()
    images = torch.randn(2, 3, *(4 * side + 1 for side in grid), generator=generator)
    blocks = Blocks(model, example=images)
    assert [block.grid for block in blocks] == [grid] * 3 + [None]
    features = blocks.capture(images)
    torch.testing.assert_close(features["stem"], model.embed(images).detach())
    before = features[blocks.names[1]].movedim(1, -1)
    after = before + model.mlp(model.norms[1](before))
    torch.testing.assert_close(features["mlp"].movedim(1, -1), after.detach())


@pytest.mark.parametrize("first", [False, True])
def test_sequences_as_long_as_the_batch_that_is_traced(first, generator):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=not first)

        def forward(self, x):
            x = self.embed(x)
            x = self.layer(x.transpose(0, 1)).transpose(0, 1) if first else self.layer(x)
            return self.head(x.mean(1))

    model, x = build(Encoder).eval(), torch.randn(5, 3, 4, generator=generator)
    features = Blocks(model, example=x).capture(x)
    assert list(features) == ["stem", "layer.self_attn", "layer.linear2", "head"]
    expected = model.head(features["layer.linear2"].view(5, 3, 8).mean(1))
    torch.testing.assert_close(expected, features["head"])


class Windows(nn.Module):
    """A convolution, whose map is turned to channels last and cut in windows, as TinyViT's."""

    def __init__(self, added):
        super().__init__()
        self.added = added
        self.embed, self.conv = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.place = nn.Parameter(torch.randn(4, 6, 8))
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        x = x + self.place if self.added else x
        windows = x.unflatten(2, (3, 2)).unflatten(1, (2, 2)).transpose(2, 3).reshape(-1, 4, 8)
        windows = self.mlp(windows).reshape(-1, 2, 3, 2, 2, 8).transpose(2, 3)
        x = (x + windows.reshape_as(x)).permute(0, 3, 1, 2)
        return (x + self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("added", [False, True])
def test_a_map_is_turned_to_channels_last_before_its_windows(added, generator):
    model = build(lambda: Windows(added))
    images = torch.randn(2, 3, 16, 24, generator=generator)
    stem = Blocks(model, example=images).capture(images)["stem"]
    expected = model.embed(images) + added * model.place.movedim(2, 0)
    torch.testing.assert_close(stem, expected.detach())


def test_a_batch_norm_of_all_tokens_in_one_batch(generator):
    class Tokens(nn.Module):
        """As LeViT's: nothing behind the last sum tells where the channels are."""

        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            branch = self.linear(x)
            return (x + self.norm(branch.flatten(0, 1)).reshape_as(branch)).mean(1)

    model = build(Tokens).eval()
    images = torch.randn(2, 3, 16, 24, generator=generator)
    blocks = Blocks(model, example=images)
    assert [(block.channels, block.grid) for block in blocks][:-1] == [(8, (4, 6))] * 2
    feature = blocks.capture(images)[blocks.names[1]]
    torch.testing.assert_close(feature.mean((2, 3)), model(images).detach())


class Cut(nn.Module):
    """Residual blocks on a map that is cut in windows by tokens, as NesT's, or MobileViTv2's."""

    def __init__(self, channels_last):
        super().__init__()
        self.last = channels_last
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.layer = nn.Linear(8, 8) if channels_last else nn.Conv2d(8, 8, 1)
        self.end = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.embed(x)
        n, c, h, w = x.shape
        cut = x.reshape(n, c, h // 2, 2, w // 2, 2)
        if self.last:
            cut = cut.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 4, c)
            cut = (cut + self.layer(cut)).view(n, h // 2, w // 2, 2, 2, c)
            x = cut.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        else:
            cut = cut.permute(0, 1, 3, 5, 2, 4).reshape(n, c, 4, -1)
            cut = (cut + self.layer(cut)).view(n, c, 2, 2, h // 2, w // 2)
            x = cut.permute(0, 1, 4, 2, 5, 3).reshape(n, c, h, w)
        return (x + self.end(x)).mean((2, 3))


@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_by_tokens_are_no_map(channels_last, images):
    blocks = Blocks(build(lambda: Cut(channels_last)), example=images)
    assert blocks.kinds == ("stem", "mlp", "conv", "head")
    assert [(block.is_map, block.grid) for block in blocks][1:3] == [(False, None), (True, (8, 8))]
    assert blocks.capture(images)[blocks.names[1]].shape == (4, 8 * 8 * 8)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (4, 1), (2, 3)])
def test_strides_may_differ_down_and_across(strides, images):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, strides, 1)
            self.linears = nn.ModuleList([nn.Linear(4, 4), nn.Linear(16, 16)])

        def forward(self, x):
            x = self.conv(x).permute(0, 2, 3, 1)
            x = x + self.linears[0](x)
            x = torch.cat([x[:, ::2], x[:, 1::2]], -1)  # half of both, by no layer over space
            x = torch.cat([x[:, :, ::2], x[:, :, 1::2]], -1)
            return (x + self.linears[1](x)).mean((1, 2))

    blocks = Blocks(build(Strided), example=F.pad(images, (0, 8)))
    rows, columns = 16 // strides[0], 24 // strides[1]
    assert blocks.names == ("stem", "linears.0", "linears.1", "head")
    assert [block.grid for block in blocks][:2] == [(rows, columns)] * 2
    assert blocks["linears.1"].grid == (rows // 2, columns // 2)


def test_keys_by_channels_are_no_map(generator):
    """Where they are as many as the tokens: 4 keys of 16 channels, and 64 tokens."""

    class Reduced(nn.Module):
        """Attention to a smaller map, as PVT's and Twins'."""

        def __init__(self):
            super().__init__()
            self.embed, self.reduce = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 4, 4)
            self.query, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.embed(x)
            small = self.reduce(x).flatten(2).mT[:, None]
            x = x.flatten(2).mT
            weights = (self.query(x)[:, None] @ small.mT).softmax(-1)
            return (x + self.out((weights @ small)[:, 0])).mean(1)

    images = torch.randn(2, 3, 32, 32, generator=generator)
    blocks = Blocks(build(Reduced), example=images)
    assert [block.grid for block in blocks] == [(8, 8), (8, 8), None]


def test_names_and_globs(images):
    model = build(SMALL["resnet"])
    blocks = Blocks(model, ["stages.*.1", "stem.conv"], example=images)
    assert blocks.names == ("stem.conv", "stages.0.1", "stages.1.1", "stages.2.1")
    features = blocks.capture(images)
    for name in blocks.names:
        torch.testing.assert_close(features[name], hooked(model, images, name))
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(784, 2)
    )
    assert Blocks(plain, ["0", "1"], example=images).kinds == ("conv", "other")
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)))
    both = Blocks(nested, ["0", "0.0"], example=images).capture(images)  # which end in one call
    torch.testing.assert_close(both["0"], both["0.0"])
    captured = Blocks(plain, "0", example=images).capture(images)
    torch.testing.assert_close(captured["0"], plain[0](images).detach())  # before the in-place ReLU


class Shared(nn.Module):
    """Two residual convolutions that both see what is pooled of their common input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.query = nn.Conv2d(3, 3, 1)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(3, 4)

    def forward(self, x, removed=()):
        x = self.stem(x)
        query = self.query(x).mean((2, 3), keepdim=True)
        for index, conv in enumerate(self.convs):
            x = x if index in removed else x + conv(x * query)
        return self.head(x.mean((2, 3)))


def test_blocks_that_share_something_beside_their_sums(images):
    model = build(Shared).eval()
    blocks = Blocks(model, example=images)
    assert blocks.names == ("stem", "convs.0", "convs.1", "head")
    assert blocks.kinds == ("stem", "conv", "conv", "head")
    # What follows the first block needs the query besides its output.
    assert [unit.is_cut for unit in blocks.traced(images).units] == [True, False, True, True]
    for index, name in enumerate(["convs.0", "convs.1"]):
        with torch.no_grad(), blocks.lesion(name):
            torch.testing.assert_close(model(images), model.forward(images, (index,)))
    data = [(images, torch.arange(len(images)) % 4)]
    study = lesion_study(model, data, blocks=blocks)
    with torch.no_grad():
        right = [(model(images, (index,)).argmax(1) == data[0][1]) for index in range(2)]
    np.testing.assert_allclose(study.accuracy, [float(r.float().mean()) for r in right])


def test_streams_beside_the_blocks_are_told_of(images):
    class TwoStreams(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.right = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.last = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            left, right = x, x.flip(1)
            for a, b in zip(self.left, self.right, strict=True):
                left, right = left + a(right), right + b(left)
            x = torch.cat([left, right], 1)
            return (x + self.last(x)).mean((2, 3))

    with pytest.warns(UserWarning, match="86% of the layers with weights lie outside the blocks"):
        blocks = Blocks(build(TwoStreams), example=images)
    assert blocks.names[-2:] == ("last", "head")


class Side(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, pair):
        return self.left(pair[0]), self.right(pair[1])


class Apart(nn.Module):
    """Two streams that meet at the end only."""

    def __init__(self):
        super().__init__()
        self.both = nn.ModuleList([Side(), Side()])

    def forward(self, x):
        pair = x, x
        for both in self.both:
            pair = both(pair)
        return torch.cat(pair, 1).mean((2, 3))


class Beside(Side):
    def forward(self, x):
        return torch.cat(super().forward((x, x)), 1).mean((2, 3))


def test_errors_name_what_is_near(images):
    model = build(SMALL["resnet"])
    with pytest.raises(ValueError, match=r"`choose` .*'stages.0.7'.*nearest are 'stages.0"):
        Blocks(model, "stages.0.7", example=images)
    with pytest.raises(ValueError, match="at least one name"):
        Blocks(model, [], example=images)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"none in a Sequential; .*Blocks\(model, \['0', '1'\]\)"):
        Blocks(plain, example=images)
    with pytest.raises(ValueError, match=r"none in a Apart; .*\(model, \['both.0', 'both.1'\]\)"):
        Blocks(Apart(), example=images)
    with pytest.raises(ValueError, match=r"none in a Beside; .*\(model, \['left', 'right'\]\)"):
        Blocks(Beside(), example=images)
    with pytest.raises(
        ValueError, match="none in a Linear; it calls no module that could be named"
    ):
        Blocks(nn.Linear(3, 3), example=torch.ones(2, 3))
    with pytest.raises(TypeError, match="`example` must be a tensor or a mapping of .*, got a int"):
        Blocks(model, example=3)
    blocks = Blocks(model, example=images)
    with pytest.raises(ValueError, match="one of the 11 blocks, got 'stages.0.5'; the nearest"):
        blocks.index("stages.0.5")
    with pytest.raises(ValueError, match="`example` must be given for a Sequential"):
        Blocks(nn.Sequential(nn.Linear(7, 7)))
    with pytest.raises(ValueError, match="'0.weight'"):
        Blocks(nn.Sequential(nn.Linear(7, 7)), "0.weight", example=torch.ones(2, 7))
    with pytest.raises(TypeError, match="`inputs` must be a tensor or a mapping"):
        blocks.capture([1, 2])


class Unread:
    def __iter__(self):
        raise AssertionError("read before the arguments were checked")


@pytest.mark.parametrize("given", ["blocks.*", ["blocks.*"]], ids=str)
def test_probes_refuse_names_in_the_place_of_blocks(given):
    model, data = build(SMALL["vit"]), Unread()
    message = rf"must be Blocks of .*, got {type(given).__name__}; pass Blocks\(model, \[names or"
    for probe in (fourier_amplitude, feature_variance, lesion_study):
        with pytest.raises(TypeError, match=f"`blocks` {message}"):
            probe(model, data, blocks=given)
    with pytest.raises(TypeError, match=f"`blocks` {message}"):
        architecture(model, blocks=given)
    with pytest.raises(TypeError, match=f"`blocks_a` {message}"):
        cka(model, data, blocks_a=given)
    with pytest.raises(TypeError, match=f"`blocks_b` {message}"):
        cka(model, data, model, blocks_b=given)


def test_blocks_of_another_model_are_refused_before_any_pass():
    model, data, other = build(SMALL["vit"]), Unread(), Blocks(build(SMALL["vit"]))
    with pytest.raises(ValueError, match="`blocks` must be those of the model that is probed"):
        fourier_amplitude(model, data, blocks=other)
    with pytest.raises(ValueError, match="`blocks_b` must be those of the model that is probed"):
        cka(model, data, model, blocks_b=other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_torchscript_is_refused_where_it_hides_what_is_needed(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(torch.jit.script(nn.Sequential(*model, nn.Flatten())), nn.Linear(4, 3))
    data = [(images, torch.zeros(len(images), dtype=torch.long))]
    assert math.isfinite(evaluate(model, data).nll)
    with pytest.raises(
        TypeError, match="plain Python throughout, got TorchScript in '0'; pass the"
    ):
        Blocks(model, example=images)
    with pytest.raises(TypeError, match="plain Python throughout"):
        loss_line(model, data, points=3, batch_norm="recalibrate")
    with pytest.raises(TypeError, match="RecursiveScriptModule; pass what it was made of"):
        loss_line(model[0], data, points=3)


def test_a_module_that_does_not_run(images):
    model = build(SMALL["resnet"])
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'spare' does not run"):
        Blocks(model, "spare", example=images)


def test_control_flow_that_depends_on_the_data(images):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            if x.sum() > 0:
                x = x.flatten(1).view_as(x)
            return (x + self.conv(x)).mean((2, 3))

    blocks = Blocks(build(Moody), example=-images.abs())
    blocks.capture(-images.abs())
    with pytest.raises(ValueError, match="same calls for every batch"):
        blocks.capture(images.abs())


def test_maps_whose_size_depends_on_the_data(images):
    class Cropped(nn.Module):
        """Looks at less of its images where they are bright."""

        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.embed(x)[..., : 4 if x.mean() > 1 else None]
            return (x + self.conv(x)).mean((2, 3))

    blocks = Blocks(build(Cropped), example=images)
    assert blocks.capture(images)["conv"].shape == (4, 8, 8, 8)
    with pytest.raises(ValueError, match=r"same calls for every batch, got \(4, 8, 8, 4\) at"):
        blocks.capture(images + 5)


def test_a_model_that_caches_at_its_first_pass(images):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.scale = None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.ones(3, 1, 1).exp().log()
            for conv in self.convs:
                x = x + self.scale * conv(x)
            return x.mean((2, 3))

    model = build(Lazy)
    features = Blocks(model, example=images).capture(images)
    expected = images + model.convs[0](images)
    torch.testing.assert_close(features["convs.0"], expected.detach())
    model(images).sum().backward()  # the cache is no tensor of inference mode


def test_model_untouched_even_when_interrupted(model, images):
    model.train()
    model.register_buffer("passes", torch.zeros(()))
    model.register_forward_hook(lambda module, args, out: module.passes.add_(1) * 0 + out)
    before = snapshot(model)
    blocks = Blocks(model, example=images)
    blocks.capture(images)

    def stop(block, feature):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blocks.visit(images, stop)
    with pytest.raises(RuntimeError), blocks.lesion(blocks.names[2]):
        model(images[:, :2])
    assert_untouched(model, before)
    expected = copy.deepcopy(model).eval()(images)
    torch.testing.assert_close(model.eval()(images), expected)


def test_few_features_at_a_time(images):
    """What the model itself holds is alive, however many blocks there are."""
    peaks = []
    for depth in (2, 12):
        alive, peak = [], 0

        def look(block, feature, alive=alive):
            nonlocal peak
            peak = max(peak, sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(feature))

        model = build(functools.partial(resnet20, width=4, depths=(depth,)))
        with torch.inference_mode():
            Blocks(model, example=images).visit(images, look)
        assert len(alive) == depth + 2
        peaks.append(peak)
    assert peaks[0] == peaks[1] <= 3


def test_mapping_inputs_and_another_size(images):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixel_values, labels=None):
            return {"logits": self.inner(pixel_values)}

    inner = build(SMALL["resnet"])
    blocks = Blocks(Wrapped(inner), example={"pixel_values": images})
    plain = Blocks(inner, example=images).capture(images)
    captured = blocks.capture({"pixel_values": images})
    torch.testing.assert_close(captured["inner.stages.1.0"], plain["stages.1.0"])
    larger = blocks.capture({"pixel_values": torch.ones(2, 3, 24, 24)})
    assert larger["inner.stages.2.2"].shape == (2, 16, 6, 6)


@pytest.mark.parametrize("how", ["wrapped", "in place", "in part"])
def test_a_compiled_model(how, images):
    model = build(SMALL["vit"])
    plain, name = Blocks(model, example=images), "blocks.1.mlp"
    features = [*plain.capture(images).values(), *plain.capture(images[:2]).values()]
    with plain.lesion(name), torch.no_grad():
        lesioned = model.eval()(images)
    if how == "wrapped":
        model = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")
        name = "blocks.1._orig_mod.mlp"
    with torch.no_grad():
        model(images)  # compiled by now
        blocks = Blocks(model, example=images)
        captured = [*blocks.capture(images).values(), *blocks.capture(images[:2]).values()]
        torch.testing.assert_close(captured, features)
        with blocks.lesion(name):
            torch.testing.assert_close(model(images), lesioned)


class Selective(nn.Module):
    """A convolution that chooses between two kernels by a softmax, as SK's."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding=2)
        self.gate, self.out = nn.Linear(8, 16), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        both = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.gate(both.sum(1).mean((2, 3))).view(-1, 2, 8, 1, 1).softmax(1)
        return self.out((both * weights).sum(1))


class Context(nn.Module):
    """A convolution that adds one weighted mean of all positions, as GCNet's."""

    def __init__(self):
        super().__init__()
        self.conv, self.score = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.conv(x)
        weights = self.score(x).flatten(2).softmax(2)
        return x + (x.flatten(2) @ weights.mT)[..., None]


class Outlook(nn.Module):
    """Weights for every position, from that position alone, as VOLO's."""

    def __init__(self):
        super().__init__()
        self.value, self.score = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        values = self.value(x).flatten(2).mT
        weights = self.score(x).flatten(2).mT.softmax(-1)
        return (weights @ values).mT.reshape(x.shape)


class ClassQuery(nn.Module):
    """One query, of the mean, of one head."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        weights = (q.mean(-1, keepdim=True).mT @ k).softmax(dim=-1)
        return (v @ weights.mT)[..., None].expand(x.shape)


class Repeated(nn.Sequential):
    """A selective convolution behind another: its softmax comes after a product, not of one."""

    def __init__(self):
        super().__init__(Selective(), Selective())


class SpelledOut(nn.Module):
    """Attention by products that are summed."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).mT.chunk(3, -1)
        scores = (q[:, :, None] * k[:, None]).sum(-1) / 8**0.5
        weights = F.dropout(scores.softmax(-1), 0.1, self.training)
        return (weights[..., None] * v[:, None]).sum(2).mT.reshape(x.shape)


class Neighbours(nn.Module):
    """Attention of every position to the nine around it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, 1)
        k, v = (F.unfold(each, 3, padding=1).view(len(x), 8, 9, -1) for each in (k, v))
        weights = (q.flatten(2)[:, :, None] * k).sum(1).softmax(1)
        return (weights[:, None] * v).sum(2).reshape(x.shape)


@pytest.mark.parametrize(
    ("branch", "kind"),
    [(Selective, "conv"), (Repeated, "conv"), (Context, "conv"), (Outlook, "msa")]
    + [(ClassQuery, "msa"), (SpelledOut, "msa"), (Neighbours, "msa")],
)
def test_a_softmax_alone_is_no_attention(branch, kind, images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
            self.blocks = nn.ModuleList(branch() for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x.mean((2, 3)))

    blocks = Blocks(build(Net), example=images)
    assert blocks.kinds == ("stem", kind, kind, "head")
    traced = blocks.traced(images)
    assert num_heads(traced.trace, traced.units[1]) == 0


# --- lesions -------------------------------------------------------------------------------------


def without(model, path, make):
    model = copy.deepcopy(model).eval()
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, make(model.get_submodule(path)))
    return model


class Zero(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return torch.zeros_like(self.branch(x))


def test_lesion_of_a_branch(model, images):
    blocks = Blocks(model, example=images)
    model.eval()
    removable = 0
    for block in list(blocks)[1:-1]:
        if block.subsamples:
            with pytest.raises(ValueError, match="skip is a projection"), blocks.lesion(block.name):
                pass
            continue
        expected = without(model, f"{block.name}.branch", Zero)(images)
        with blocks.lesion(block.name):
            once, twice = model(images), model(images)
        torch.testing.assert_close(once, expected)
        torch.testing.assert_close(twice, expected)
        assert not torch.allclose(model(images), expected)
        removable += 1
    assert removable >= 4
    with pytest.raises(ValueError, match="no residual branch"), blocks.lesion("stem"):
        pass


def test_lesion_of_a_convolution(images):
    model = build(SMALL["resnet"]).eval()
    blocks = Blocks(model, example=images)
    for name in ("stages.0.1", "stages.1.0"):
        expected = without(model, f"{name}.branch.conv2", lambda conv: nn.Identity())(images)
        with blocks.lesion(name, "conv"):
            torch.testing.assert_close(model(images), expected)
    vit = build(SMALL["vit"])
    with pytest.raises(ValueError, match="no convolution over space"):
        Blocks(vit).lesion("blocks.0.msa", "conv").__enter__()


@pytest.mark.parametrize("fused", [True, False])
def test_lesion_of_a_head(fused, images):
    if fused:
        model, name, project = build(SMALL["vit"]), "blocks.0.msa", "branch.attention.project"
        blocks = Blocks(model, example=images)
    else:
        model, name, project = build(lambda: Grid("tokens")), "", "out"
        blocks = Blocks(model, example=images)
        name = blocks.names[1]
    traced = blocks.traced(images)
    heads = num_heads(traced.trace, traced.units[1])
    assert heads == model.get_submodule(f"{name}.branch.attention" if fused else "").heads
    for head in range(heads):
        changed = copy.deepcopy(model).eval()
        linear = changed.get_submodule(f"{name}.{project}" if fused else project)
        linear.weight.data.unflatten(1, (heads, -1))[:, head] = 0
        with blocks.lesion(name, head):
            torch.testing.assert_close(model.eval()(images), changed(images))
    with pytest.raises(ValueError, match=f"it has {heads} heads"), blocks.lesion(name, heads):
        pass


@pytest.mark.parametrize(
    ("network", "block", "parts"),
    [
        ("vit", "blocks.0.msa", "'branch' or a head from 0 to 2"),
        ("vit", "stem", "nothing"),
        ("resnet", "stages.0.1", "'branch' or 'conv'"),
        ("resnet", "stages.1.0", "'conv'"),
    ],
)
@pytest.mark.parametrize("part", ["branches", None, 1.0])
def test_a_lesion_says_what_can_be_removed(network, block, parts, part, images):
    blocks = Blocks(build(SMALL[network]), example=images)
    message = f"got {part!r} of '{block}', but what can be removed of it is {parts}."
    with pytest.raises(ValueError, match=message), blocks.lesion(block, part):
        pass


def test_gradients_flow_while_visited(images):
    model = build(SMALL["vit"])
    features = []
    logits = Blocks(model, example=images).visit(images, lambda b, f: features.append(f))
    loss = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)) + features[2].sum()
    gradient, unused = torch.autograd.grad(
        loss, [model.patch_embed.weight, model.head.weight], allow_unused=True
    )
    assert gradient.abs().sum() > 0
    assert unused is not None


def test_a_pass_that_ends_early(images):
    calls = iter([3, 1])
    passes = PartialPasses(lambda: sum(images + i for i in range(next(calls))), frozenset())
    with pytest.raises(ValueError, match="must make the same calls in every pass"):
        passes.value_at(4, None, None)


# --- scales beside each other ---------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x):
        return F.relu(self.skip(x) + self.branch(x))


class UNet(nn.Module):
    """Two scales; what the first one found is handed on, to be concatenated."""

    def __init__(self):
        super().__init__()
        self.embed, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 2, 2)
        self.fine, self.coarse = Residual(4, 4), nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.up, self.merge = (
            nn.Upsample(scale_factor=2),
            nn.Sequential(Residual(12, 4), Residual(4, 4)),
        )

    def forward(self, x):
        x = self.fine(self.embed(x))
        up = self.up(self.coarse(self.down(x)))
        return self.merge(torch.cat([x, up], 1)).mean((2, 3))


def test_blocks_of_scales_that_are_concatenated(images):
    model = build(UNet).eval()
    blocks = Blocks(model, example=images)
    coarse = ("down", "coarse.0", "coarse.1")
    assert blocks.names == ("stem", "fine", *coarse, "up", "merge.0", "merge.1", "head")
    assert blocks.kinds == ("stem", "conv", "pool", "conv", "conv", "pool", "conv", "conv", "head")
    assert [block.grid for block in blocks][1:6] == [(16, 16), *[(8, 8)] * 3, (16, 16)]
    features = blocks.capture(images)
    for name in ("fine", *coarse, "merge.0", "merge.1"):
        torch.testing.assert_close(features[name], hooked(model, images, name))
    data, removable = [(images, torch.arange(4))], ("fine", *coarse[1:], "merge.1")
    study = lesion_study(model, data, blocks=blocks, units="branch")
    assert study.names == removable
    assert "skip is a projection" in study.skipped["merge.0"]
    for name, nll in zip(removable, study.nll, strict=True):
        expected = without(model, f"{name}.branch", Zero)(images)
        with blocks.lesion(name):
            torch.testing.assert_close(model(images), expected)
        np.testing.assert_allclose(nll, F.cross_entropy(expected, data[0][1]).item(), rtol=1e-5)


def test_sums_of_a_feature_pyramid_are_no_blocks(images):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(Residual(3, 3), nn.AvgPool2d(2), Residual(3, 3))
            self.sides = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
            self.down = nn.Conv2d(3, 3, 3, 2, 1)

        def forward(self, x):
            fine = self.body[0](x)
            coarse = self.body[1:](fine)
            fine, top = self.sides[0](fine), self.sides[1](coarse)
            fine = fine + F.interpolate(top, scale_factor=2.0)
            return fine, top + self.down(fine)

    blocks = Blocks(build(Pyramid), example=images)
    assert blocks.names == ("body.0", "body.1", "body.2")


@pytest.mark.parametrize("wrap", [list, tuple, lambda maps: dict(enumerate(maps))])
def test_a_model_that_returns_its_maps(wrap, images):
    class Maps(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            x, maps = self.net.stem(x), []
            for stage in self.net.stages:
                x = stage(x)
                maps.append(x)
            return wrap(maps)

    net = build(SMALL["resnet"])
    plain, model = Blocks(net, example=images), Maps(net)
    blocks = Blocks(model, example=images)
    features, expected = blocks.capture(images), plain.capture(images)
    assert blocks.names == ("stem", *(f"net.{name}" for name in plain.names[1:-1]))
    for name, feature in zip(plain.names, features.values(), strict=False):
        torch.testing.assert_close(feature, expected[name])
    data = [(images, torch.zeros(4, dtype=torch.long))]
    of_maps, of_net = feature_variance(model, data), feature_variance(net, data)
    np.testing.assert_allclose(of_maps.variance, of_net.variance, rtol=1e-5)
    with pytest.raises(TypeError, match="must return a tensor or an object with `.logits`"):
        lesion_study(model, data)


class Highway(nn.Module):
    """A gate shares its input between the skip and the branch."""

    def __init__(self):
        super().__init__()
        self.gate, self.branch = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        gate = self.gate(x).sigmoid()
        return x * gate + self.branch(x) * (1 - gate)


class ScaledSkip(nn.Module):
    """As MetaFormer's."""

    def __init__(self):
        super().__init__()
        self.scale, self.branch = nn.Parameter(torch.rand(3, 1, 1)), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x * self.scale + self.branch(x)


@pytest.mark.parametrize("block", [Highway, ScaledSkip])
def test_a_scaled_skip_is_no_projection(block, images):
    model = build(lambda: nn.Sequential(block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    blocks = Blocks(model.eval(), example=images)
    assert blocks.names == ("0", "1", "head")
    for name in ("0", "1"):
        expected = without(model, f"{name}.branch", Zero)(images)
        with blocks.lesion(name):
            torch.testing.assert_close(model(images), expected)


class SideBySide(nn.Module):
    """Three branches of one input, or of one normalisation of it, added one after the other."""

    def __init__(self, shared):
        super().__init__()
        self.norm, self.shared = nn.InstanceNorm2d(3, affine=True), shared
        self.first, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.second = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GELU(), nn.Conv2d(6, 3, 1))

    def forward(self, x):
        y = self.norm(x) if self.shared else x
        return self.third(y) + (x + self.first(y) + self.second(y))


@pytest.mark.parametrize("shared", [True, False])
def test_branches_that_are_added_one_after_the_other_are_blocks_each(shared, images):
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = build(lambda: nn.Sequential(SideBySide(shared), SideBySide(shared), *ends)).eval()
    blocks = Blocks(model, example=images)
    names = [f"{i}.{name}" for i in range(2) for name in ("first", "second", "third")]
    assert blocks.names == (*names, "head")
    assert [block.kind for block in blocks][:3] == ["conv", "mlp", "conv"]
    features = blocks.capture(images)
    y = model[0].norm(images) if shared else images
    torch.testing.assert_close(features["0.first"], images + model[0].first(y))
    torch.testing.assert_close(features["0.third"], model[0](images))
    for name in names:
        expected = without(model, name, Zero)(images)
        with blocks.lesion(name):
            torch.testing.assert_close(model(images), expected)


class Adds(nn.Module):
    def __init__(self, out, skips):
        super().__init__()
        self.conv, self.skips = nn.Conv2d(6, out, 1), skips

    def forward(self, x, branch):
        branch = self.conv(branch)
        return branch + x if self.skips else branch


class Layered(nn.Module):
    """As transformers' EfficientNet: a child of the block makes the sum."""

    def __init__(self, channels, out):
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, 6, 3, padding=1), Adds(out, channels == out)

    def forward(self, x):
        return self.project(x, self.expand(x).relu())


def test_a_child_that_adds_is_not_the_block(images):
    model = build(lambda: nn.Sequential(Layered(3, 3), Layered(3, 4), Layered(4, 4), nn.Flatten()))
    blocks = Blocks(model.eval(), example=images)
    assert [(block.name, block.kind) for block in blocks][:3] == [(n, "conv") for n in "012"]


class Pieces(nn.Module):
    """As MobileViT: pieces of the map along the batch axis, between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.inner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.first(x).reshape(n, 8, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1)
        y = y.reshape(4 * n, h * w // 4, 8)
        for layer in self.inner:
            y = y + layer(y)
        y = y.reshape(n, 2, 2, h // 2, w // 2, 8).permute(0, 5, 3, 1, 4, 2)
        return torch.cat([x, self.last(y.reshape(n, 8, h, w))], 1)


def test_blocks_of_pieces_along_the_batch_axis_are_found(images):
    ends = nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = build(lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Pieces(), *ends)).eval()
    blocks = Blocks(model, example=images)
    inner = [block.name for block in blocks if block.kind == "mlp"]
    assert inner == ["1.inner.0", "1.inner.1"]
    features = blocks.capture(images)
    h, w = images.shape[2:]
    assert all(features[name].shape == (4 * len(images), 8, h // 2, w // 2) for name in inner)
    for name in inner:
        expected = without(model, name, Zero)(images)
        with blocks.lesion(name):
            torch.testing.assert_close(model(images), expected)


class Adder(nn.Module):
    """As LinkNet, DPT and FPNs: the decoder adds what comes from below to the encoder's maps."""

    def __init__(self):
        super().__init__()
        self.net = SMALL["resnet"]()
        self.up = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(16, 8, 1)])

    def forward(self, x):
        x, maps = self.net.stem(x), []
        for stage in self.net.stages:
            x = stage(x)
            maps.append(x)
        for lateral, below in zip(self.up[::-1], maps[-2::-1], strict=True):
            x = below + F.interpolate(lateral(x), size=below.shape[2:])
        return x.mean((2, 3))


def test_a_decoder_that_adds_hides_no_block_of_the_encoder(images):
    model = build(Adder).eval()
    plain, blocks = Blocks(model.net, example=images), Blocks(model, example=images)
    inner = [f"net.{name}" for name in plain.names[1:-1]]
    assert [name for name in blocks.names if name.startswith("net.")] == inner


# --- several inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_given_beside_the_images_hides_no_block(order, images):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = SMALL["vit"]()

        def forward(self, x, scale, shift):
            return self.vit(x * shift[:, None, None, None]) * scale

    model = build(Scaled).eval()
    inputs = {"x": images, "scale": torch.tensor([0.5]), "shift": torch.linspace(1, 2, 4)}
    inputs = dict(list(inputs.items())[::order])
    blocks, plain = Blocks(model, example=inputs), Blocks(model.vit, example=images)
    assert [b.kind for b in blocks][1:-1] == [b.kind for b in plain][1:-1]
    with blocks.lesion(blocks.names[1]), torch.no_grad():
        found = model(**inputs)
    with plain.lesion(plain.names[1]), torch.no_grad():
        expected = model.vit(images * inputs["shift"][:, None, None, None]) * 0.5
    torch.testing.assert_close(found, expected)
    data = [{**inputs, "labels": torch.arange(4) % 3}]
    study = lesion_study(model, data, blocks=blocks)
    assert study.provenance.settings["shared_prefix"]
    changed = F.cross_entropy(found, data[0]["labels"]) - study.clean_nll
    np.testing.assert_allclose(study.delta_nll[0], float(changed), atol=1e-6)


# --- passes within passes ------------------------------------------------------------------------

PARTS = {
    "resnet": (("stages.0.1", "branch"), ("stages.1.1", "conv")),
    "vit": (("blocks.0.mlp", "branch"), ("blocks.1.msa", 0)),
}


def changed_by_hand(model, network):
    if network == "resnet":
        model = without(model, "stages.0.1.branch", Zero)
        return without(model, "stages.1.1.branch.conv2", lambda conv: nn.Identity())
    model = without(model, "blocks.0.mlp.branch", Zero)
    attention = model.blocks[1].msa.branch.attention
    attention.project.weight.data.unflatten(1, (attention.heads, -1))[:, 0] = 0
    return model


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("network", PARTS)
def test_two_lesions_at_once(network, size, order, generator):
    """Of images of a size that one Blocks, or the other, or neither has seen."""
    images = torch.randn(4, 3, size, size, generator=generator)
    make = SMALL["resnet"] if network == "resnet" else lambda: vit_nano(depth=2, image_size=size)
    model = build(make).eval()
    expected = changed_by_hand(model, network)(images)
    seen = Blocks(model, example=images)
    for one, other in ((seen, seen), (Blocks(model), seen), (seen, Blocks(model))):
        (first, a), (second, b) = PARTS[network][::order]
        with one.lesion(first, a), other.lesion(second, b):
            torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("network", PARTS)
def test_a_lesioned_model_is_observed(network, images):
    model = build(SMALL[network]).eval()
    (first, a), (second, b) = PARTS[network]
    by_hand = changed_by_hand(model, network)
    blocks, expected = Blocks(model, example=images), Blocks(by_hand, example=images)
    data = [(images, torch.arange(4) % 3)]
    with blocks.lesion(first, a), blocks.lesion(second, b):
        features = blocks.capture(images)
        later = Blocks(model, example=images).capture(images)  # found beside the lesions
        study = lesion_study(model, data, blocks=blocks)
    for name, feature in expected.capture(images).items():
        torch.testing.assert_close(features[name], feature)
        torch.testing.assert_close(later[name], feature)
    plain = lesion_study(by_hand, data, blocks=expected)
    assert study.clean_nll == pytest.approx(plain.clean_nll, rel=1e-6)
    others = [i for i, name in enumerate(plain.names) if name not in {first, second}]
    assert others
    np.testing.assert_allclose(study.delta_nll[others], plain.delta_nll[others], atol=1e-6)


class Biased(nn.Module):
    """A transformer that looks up its attention biases once in evaluation mode, as LeViT does."""

    def __init__(self, keeps=True):
        super().__init__()
        self.keeps, self.kept = keeps, {}
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.biases = nn.ParameterList(torch.randn(16) for _ in range(3))
        self.maps = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.register_buffer("index", (torch.arange(16)[:, None] - torch.arange(16)).abs())
        self.head = nn.Linear(8, 3)

    def train(self, mode=True):
        if mode:
            self.kept = {}
        return super().train(mode)

    def bias(self, i):
        if self.training or not self.keeps:
            return self.biases[i][self.index]
        if i not in self.kept:
            self.kept[i] = self.biases[i][self.index]
        return self.kept[i]

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        for i, linear in enumerate(self.maps):
            q, k, v = linear(x).chunk(3, -1)
            x = x + (q @ k.mT + self.bias(i)).softmax(-1) @ v
        return self.head(x[:, 0])


@pytest.mark.parametrize("used", ["never", "before", "after"])
def test_what_a_model_has_kept_moves_no_call(used, images):
    """Neither what an earlier pass has kept, nor what `train` has forgotten since."""
    model, plain = build(Biased), build(lambda: Biased(keeps=False)).eval()
    if used == "before":
        model.eval()(images)
    blocks, expected = Blocks(model, example=images), Blocks(plain, example=images)
    if used == "after":
        model.eval()(images)
    for _ in range(2):
        model.eval()
        for name in expected.names[1:-1]:
            with blocks.lesion(name), expected.lesion(name):
                torch.testing.assert_close(model(images), plain(images))
        features = blocks.capture(images)
        for name, feature in expected.capture(images).items():
            torch.testing.assert_close(features[name], feature)
        with torch.no_grad():
            for bias, other in zip(model.biases, plain.biases, strict=True):
                other.copy_(bias.mul_(-1))
        model.train()


def test_what_a_function_has_cached_moves_no_call(images):
    """As the indices of BEiT's relative positions."""

    @functools.lru_cache(maxsize=4)
    def places(size):
        return torch.arange(size).add(1)

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

        def forward(self, x):
            for conv in self.convs:
                x = x + conv(x * places(x.shape[-1]))
            return x.mean((2, 3))

    model = build(Cached).eval()
    blocks = Blocks(model, example=images)
    for x in (images, F.pad(images, (0, 4, 0, 4))):
        features = blocks.capture(x)
        torch.testing.assert_close(features["convs.1"].mean((2, 3)), features["head"])
        for name in ("convs.0", "convs.1"):
            expected = without(model, name, Zero)(x)
            with blocks.lesion(name):
                torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_model_that_keeps_nothing_is_traced_by_one_pass(keeps, images):
    model, made = build(lambda: Biased(keeps=keeps)), []
    model.register_forward_pre_hook(lambda module, args: made.append(1))
    Blocks(model, example=images)
    assert (len(made) > 1) == keeps


def test_no_probe_keeps_what_the_model_looks_up(images):
    model, plain = build(Biased).train(), build(lambda: Biased(keeps=False))
    data = [(images, torch.arange(4) % 3)]
    for _ in range(2):
        assert evaluate(model, data).nll == pytest.approx(evaluate(plain, data).nll, rel=1e-6)
        assert not model.kept
        with torch.no_grad():
            for bias, other in zip(model.biases, plain.biases, strict=True):
                other.copy_(bias.mul_(-1))


def test_other_calls_than_in_the_trace_are_told(images):
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.turned = False

        def forward(self, x):
            x = x.relu() if self.turned else x
            for conv in self.convs:
                x = x + conv(x)
            return x.mean((2, 3))

    model = build(Turns)
    blocks = Blocks(model, example=images)
    model.turned = True
    with pytest.raises(ValueError, match="must make the same calls"), blocks.lesion("convs.1"):
        model(images)


def test_a_block_that_calls_what_another_module_holds_has_a_name(images):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.blocks = nn.ModuleList(Calling() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x, self.conv)
            return x.mean((2, 3))

    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, shared):
            return shared(self.own(x))

    names = Blocks(build(Shared), example=images).names
    assert names == ("blocks.0", "blocks.1", "head")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_modules_whose_inside_is_hidden_are_no_blocks(images):
    class Hidden(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.stem, self.conv = inner, nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return (x + self.conv(x)).mean((2, 3))

    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model = Hidden(torch.jit.trace(inner, images))
    with pytest.raises(ValueError, match="`choose` must name modules whose inside .* got 'stem'"):
        Blocks(model, ["stem"], example=images)
    seen = Hidden(inner)
    seen.conv = model.conv
    blocks, plain = Blocks(model, example=images), Blocks(seen, example=images)
    assert blocks.names == plain.names[1:]
    torch.testing.assert_close(blocks.capture(images)["conv"], plain.capture(images)["conv"])


def test_what_a_lesioned_model_keeps_is_that_of_its_pass(images):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.last = SMALL["vit"](), None

        def forward(self, x):
            self.last = self.vit(x)
            return self.last + 1

    model = build(Keeping).eval()
    blocks = Blocks(model, example=images)
    model(images)
    with blocks.lesion(blocks.names[1]):
        out = model(images)
        torch.testing.assert_close(model.last + 1, out)


def test_tokens_are_followed_though_a_mask_is_floating():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.qkv = nn.Embedding(7, 8), nn.Linear(8, 24)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens, mask):
            x = self.words(tokens)
            q, k, v = self.qkv(x).chunk(3, -1)
            x = x + (q @ k.mT + mask).softmax(-1) @ v
            return self.head(x.mean(1))

    model = build(Masked)
    inputs = {"mask": torch.zeros(4, 5, 5), "tokens": torch.randint(7, (4, 5))}
    assert Blocks(model, example=inputs).kinds == ("stem", "msa", "head")


def test_blocks_do_not_depend_on_whether_another_thread_forbids_the_fast_path(images):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(self.patches(x).flatten(2).mT).mean(1))

    def features(before, after):
        with before():
            blocks = Blocks(model, example=images)
        with after(), torch.no_grad():
            found = blocks.capture(images)
            with blocks.lesion("layer.linear2"):
                return found | {"lesion": model(images)}

    model = build(Encoder).eval()
    expected = features(nullcontext, nullcontext)
    assert list(expected) == ["stem", "layer.self_attn", "layer.linear2", "head", "lesion"]
    for contexts in ((without_fast_path, nullcontext), (nullcontext, without_fast_path)):
        found = features(*contexts)
        assert list(found) == list(expected)
        assert all(map(torch.equal, found.values(), expected.values()))
