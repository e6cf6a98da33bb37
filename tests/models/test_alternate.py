"""`alternate`: which blocks become MSAs, what stays as it was, and what does not fit."""

import pytest
import torch
from torch import nn

from landscape import Blocks
from landscape.models import alternate, alternet18, alternet50, resnet20, resnet34, vit_nano
from landscape.models.alternet import msa_positions
from landscape.models.residual_stages import block_shape, is_msa, resnet_stages
from landscape.models.resnet import BasicBlock
from tests.cases import assert_untouched, snapshot
from tests.test_thirdparty import zoo


def images(side=32, n=2):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def kinds(model):
    """Stages of a network as texts of C and A."""
    return ["".join("A" if is_msa(b) else "C" for b in stage) for stage in resnet_stages(model)]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((0, 0, 0, 0), ["CCC", "CCCC", "CCCCCC", "CCC"]),
        ((0, 0, 0, 1), ["CCC", "CCCC", "CCCCCC", "CCA"]),
        ((1, 2, 3, 1), ["CCA", "CACA", "CACACA", "CCA"]),
        ((0, 1, 2, 0), ["CCC", "CCCA", "CCCACA", "CCC"]),
    ],
)
def test_every_second_block_from_the_end_of_a_stage_becomes_an_msa(stages, expected):
    model = alternate(resnet34(width=4), stages)
    assert kinds(model) == expected
    assert model(images()).shape == (2, 10)
    found = Blocks(model, example=images()).kinds
    assert [k for k in found if k in ("conv", "msa")] == [
        {"A": "msa", "C": "conv"}[letter] for letter in "".join(expected)
    ]


def test_a_preactivation_network_becomes_the_alternet_of_the_paper():
    plain = alternet50(width=8, msas=(0, 0, 0, 0), num_classes=7)
    expected = alternet50(width=8, head_dim=8, num_classes=7)
    model = alternate(plain, (0, 1, 3, 2))
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert shapes == {name: t.shape for name, t in expected.state_dict().items()}
    assert model.image_multiple == expected.image_multiple == 32
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), expected.eval()(images()))
    with pytest.raises(ValueError, match="image height must be a multiple of 32, got 28"):
        model(images(28))


def test_the_default_sizes_are_those_of_the_released_network():
    with torch.device("meta"):
        plain = alternet50(msas=(0, 0, 0, 0), num_classes=100)
        model = alternate(plain, (0, 1, 3, 2))
    assert sum(p.numel() for p in model.parameters()) == 34_062_538  # reference/models.json


def test_a_postactivation_block_is_the_same_block_with_norm_and_activation_behind():
    model = alternate(resnet20(width=4), (0, 0, 1), window=8)
    block = model.stages[2][2].eval()
    with torch.no_grad():
        for norm in (block.branch.norm1, block.branch.norm2):
            norm.weight.uniform_(0.5, 2.0)
            norm.running_mean.normal_()
        block.branch.attention.position_bias.normal_()
    x = torch.randn(2, 16, 8, 8)
    attention = block.branch.attention
    inner = block.branch.norm1(nn.functional.conv2d(x, block.branch.conv.weight))
    # One window holds the whole map: attention over all 64 positions, by its definition.
    q = attention.query(inner).flatten(2).unflatten(1, (12, 4)).transpose(2, 3)
    k, v = (
        t.flatten(2).unflatten(1, (12, 4)).transpose(2, 3)
        for t in attention.key_value(inner).chunk(2, 1)
    )
    place = [(i, j) for i in range(8) for j in range(8)]
    table = attention.position_bias.detach()
    bias = torch.tensor([[table[c - a + 7, d - b + 7] for c, d in place] for a, b in place])
    weights = (q @ k.transpose(2, 3) / 2 + bias).softmax(-1)
    mixed = (weights @ v).transpose(2, 3).reshape(2, 48, 8, 8)
    update = block.branch.norm2(attention.project(mixed))
    torch.testing.assert_close(block(x), (x + update).relu(), rtol=1e-5, atol=1e-5)
    assert (x + update < 0).any()


@pytest.mark.parametrize(
    "make", [lambda: resnet20(width=4), lambda: alternet18(width=4, msas=(0, 0, 0, 0))]
)
def test_untouched_blocks_keep_their_weights_and_the_original_is_left_as_it_was(make):
    plain = make()
    stages = [1] * len(plain.stages)
    before = snapshot(plain)
    with torch.random.fork_rng():
        model = alternate(plain, stages)
    assert_untouched(plain, before)
    replaced = [f"stages.{i}.{len(stage) - 1}." for i, stage in enumerate(plain.stages)]
    old, new = plain.state_dict(), model.state_dict()
    kept = [name for name in old if not name.startswith(tuple(replaced))]
    assert len(kept) < len(old)
    assert all(torch.equal(old[name], new[name]) for name in kept)
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in model.parameters()}


def test_a_network_built_up_in_two_steps_keeps_its_first_msa():
    first = alternate(resnet34(width=4), (0, 0, 0, 1))
    second = alternate(first, (0, 0, 2, 1))
    assert kinds(second) == ["CCC", "CCCC", "CCCACA", "CCA"]
    state = {n: t for n, t in first.state_dict().items() if n.startswith("stages.3")}
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in state.items())
    preact = alternet18(width=4, msas=(0, 0, 1, 0))
    preact = alternet18(width=4, msas=(0, 0, 1, 0))
    preact = alternate(preact, (0, 1, 1, 0), window=(2, 12, 2, 2), image_size=48)
    assert preact.image_multiple == 48  # both 2 * 12, of the new one, and 4 * 4, of the old one
    with pytest.raises(
        ValueError, match="`stages` must keep the MSAs that are there, 1 in stage 4"
    ):
        alternate(second, (0, 0, 2, 0))


def test_new_blocks_take_over_precision_mode_and_stochastic_depth():
    plain = resnet20(width=4, drop_path=0.4).double().eval()
    model = alternate(plain, (0, 1, 1))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert model.stages[1][2].drop_path.rate == plain.stages[1][2].drop_path.rate == 0.25
    new = model.stages[2][2]
    assert (new.window, new.branch.attention.heads) == (8, 12)
    assert new.branch.attention.query.weight.shape == (12 * 4, 16, 1, 1)
    assert new.branch.attention.query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert new.branch.conv.weight.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.1)
    other = alternate(plain, (0, 1, 1), heads=(1, 2, 4), head_dim=3, window=(9, 4, 2))
    assert other.stages[2][2].branch.attention.query.weight.shape == (4 * 3, 16, 1, 1)
    assert [other.stages[i][2].window for i in (1, 2)] == [4, 2]


def test_a_block_that_drops_nothing_has_stochastic_depth_of_rate_0():
    block = nn.Module()
    block.conv1, block.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    block.conv2, block.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    block.drop_path = nn.Identity()
    assert block_shape(block).drop_path == 0
    for rate in (None, 0.25):  # None is that of timm's `DropPath()`
        block.drop_path.drop_prob = rate
        assert block_shape(block).drop_path == (rate or 0)


def test_the_same_global_seed_makes_the_same_blocks():
    plain = resnet20(width=4)
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(alternate(plain, (0, 0, 1)).stages[2][2].branch.attention.query.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_gradients_reach_every_parameter_of_a_new_block():
    model = alternate(resnet20(width=4), (0, 1, 1))
    model(images()).square().sum().backward()
    for name, p in model.stages[2][2].named_parameters():
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_positions_leave_a_convolution_block_before_each_msa(depth):
    for count in range(depth // 2 + 1):
        positions = msa_positions(depth, count)
        assert len(positions) == count
        assert all(p >= 1 and p - 1 not in positions for p in positions)
        assert not count or positions[0] == depth - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": (0, 1)}, "`stages` must have one number of MSAs per stage, 3 in all, got 2"),
        ({"stages": (0, 0, 2)}, "`stages` must be 0 to 1 in stage 3, which has 3 blocks .* got 2"),
        ({"stages": (-1, 0, 0)}, "`stages` must be 0 to 1 in stage 1.* got -1"),
        ({"stages": (0, 0, 1), "heads": (1, 2)}, "`heads` must have one entry per stage"),
        ({"stages": (0, 0, 1), "heads": (1, 2, 0)}, "`heads` must be at least 1, got 0"),
        ({"stages": (0, 0, 1), "head_dim": 0}, "`head_dim` must be at least 1, got 0"),
        ({"stages": (0, 0, 1), "window": 0}, "`window` must be at least 1, got 0"),
        ({"stages": (0, 0, 1), "window": 1.5}, "`window` must be a whole number, got 1.5"),
        ({"stages": (0, 0, 1), "window": (1, 2)}, "`window` must be one number or one per stage"),
        (
            {"stages": (0, 1, 0), "window": 7},
            "`window` must divide the side of the maps, got 7 for the 16x16 maps of stage 2 at "
            r"`image_size` 32; \[2, 4, 8, 16\] would fit there",
        ),
        ({"stages": (1, 0, 0), "image_size": 30}, "got 8 for the 30x30 maps of stage 1"),
        ({"stages": (0, 0, 1), "image_size": 4}, "`image_size` must leave the last stage a map"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        alternate(resnet20(width=4), **arguments)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="`model` must be a ResNet, .* got a VisionTransformer"):
        alternate(vit_nano(), (1,))

    class PreAct(nn.Module):  # norm first: which MSA block fits is not to be seen from outside
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
            self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    model = nn.Module()
    model.layer1 = nn.Sequential(PreAct(), PreAct())
    with pytest.raises(ValueError, match="must consist of residual blocks.* got a PreAct"):
        alternate(model, (1,))


def test_a_block_that_changes_the_shape_is_not_replaced():
    model = resnet20(width=4)
    model.stages[1][2] = BasicBlock(8, 8, stride=2, drop_path=0.0)
    with pytest.raises(ValueError, match="keep the shape of the map .* a BasicBlock there changes"):
        alternate(model, (0, 1, 0), window=2)


def test_maps_that_the_windows_do_not_tile_are_refused_at_the_block():
    model = alternate(resnet20(width=4), (0, 0, 1))
    with pytest.raises(ValueError, match="`window` must divide the maps .* got 8 for a map of 7x7"):
        model(images(28))


@pytest.mark.thirdparty
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_of_timm(name):
    timm = zoo("timm")
    plain = timm.create_model(name, num_classes=10, drop_path_rate=0.2)
    before = snapshot(plain)
    with torch.random.fork_rng():
        model = alternate(plain, (0, 1, 1, 1), image_size=64)
    assert_untouched(plain, before)
    assert type(model) is type(plain)
    assert [kind[-1] for kind in kinds(model)] == list("CAAA")
    depth = len(plain.layer3)
    new = getattr(model.layer3, str(depth - 1))
    assert new.window == 2
    assert new.branch.attention.heads == 12
    assert new.branch.attention.query.weight.shape[0] == 12 * 64
    assert new.drop_path.rate == pytest.approx(plain.layer3[depth - 1].drop_path.drop_prob)
    old, state = plain.state_dict(), model.state_dict()
    same = [n for n in old if n in state and torch.equal(old[n], state[n])]
    assert all(n in same for n in old if n.startswith(("conv1", "bn1", "layer1", "fc")))
    assert model.eval()(images(64)).shape == (2, 10)
    assert Blocks(model, example=images(64)).kinds.count("msa") == 3


@pytest.mark.thirdparty
def test_a_resnet_of_torchvision():
    zoo("torchvision")
    from torchvision.models import resnet18

    model = alternate(resnet18(num_classes=10), (0, 0, 0, 1), image_size=224)
    assert model.layer4[1].window == 7
    assert model.eval()(images(224)).shape == (2, 10)
