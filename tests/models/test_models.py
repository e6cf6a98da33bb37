"""Every constructor: shapes, parameter counts, refused sizes, and what the options mean."""

import pytest
import torch
from torch import nn

from landscape import models
from landscape.models import create_model
from landscape.models.residual_stages import count_msas, resnet_stages

SMALL = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet20"), {"width": 4}),
    **dict.fromkeys(("vit_small", "vit_tiny", "vit_micro"), {"dim": 12, "depth": 2, "heads": 3}),
    "vit_nano": {},
    **dict.fromkeys(("alternet18", "alternet34", "alternet50"), {"width": 4, "head_dim": 4}),
}


def small(name: str, **sizes: object) -> nn.Module:
    torch.manual_seed(0)  # initialisation draws from the global generator, as in torch.nn
    return create_model(name, **{**SMALL[name], **sizes}).eval()


def images(n: int = 2, channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_one_row_an_image_and_one_column_a_class(name, channels):
    model = small(name, num_classes=7, in_channels=channels)
    assert model(images(5, channels)).shape == (5, 7)


def test_every_constructor_is_in_the_table_above():
    public = {name for name in models.__all__ if name[0].islower()}
    others = {"alternate", "create_model", "load_reference_checkpoint"}
    assert public - others == set(SMALL)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet20", 10, 272_474),  # He et al. with projections
        ("resnet18", 100, 11_220_132),  # reference/models.json
        ("resnet50", 100, 23_705_252),
        ("vit_tiny", 100, 5_403_172),
        ("alternet50", 100, 34_062_538),
    ],
)
def test_default_sizes_have_the_published_parameter_counts(name, num_classes, parameters):
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "depths", "msas"),
    [
        ("alternet18", (2, 2, 2, 2), (0, 1, 1, 1)),
        ("alternet34", (3, 4, 6, 4), (0, 1, 3, 2)),
        ("alternet50", (3, 4, 6, 4), (0, 1, 3, 2)),
    ],
)
def test_alternets_have_the_published_depths_and_msas(name, depths, msas):
    with torch.device("meta"):
        stages = resnet_stages(create_model(name))
    assert tuple(map(len, stages)) == depths
    assert tuple(map(count_msas, stages)) == msas


def test_a_vision_transformer_has_twelve_blocks_by_default():
    with torch.device("meta"):
        assert len(models.VisionTransformer(dim=12, heads=3).blocks) == 12


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
    + [("resnet101", 44_549_160)],  # torchvision's documentation
)
def test_imagenet_stem_gives_torchvisions_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, stem="imagenet")
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
        stages = model.stages(model.stem(torch.empty(1, 3, 224, 224)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert stages.shape[2:] == (7, 7)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip_reproduces_the_logits(name):
    first, second = small(name), small(name)
    with torch.no_grad():
        for tensor in first.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1).add_(0.01)
    assert not torch.equal(first(images()), second(images()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))


@pytest.mark.parametrize("name", ["resnet20", "vit_nano", "alternet18"])
def test_stochastic_depth_is_off_in_eval_mode_and_draws_per_sample_in_training(name):
    model, plain = small(name, drop_path=0.9), small(name)
    same = images(1).expand(8, -1, -1, -1)
    before = torch.get_rng_state()
    assert torch.equal(model(same), plain(same))
    assert torch.equal(torch.get_rng_state(), before)
    for module in model.modules():  # batch statistics would hide what depth does to one sample
        module.train(not isinstance(module, nn.BatchNorm2d))
    torch.manual_seed(3)
    logits = model(same)
    assert len({tuple(row.tolist()) for row in logits}) > 1


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_drop_path_zeroes_whole_samples_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    drop = models.layers.DropPath(rate)
    out = drop(torch.ones(4000, 3, 2))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    assert out.mean().item() == pytest.approx(1, abs=4 * (rate / (1 - rate) / 4000) ** 0.5)


def test_drop_path_rates_rise_linearly_to_the_last_block():
    model = create_model("vit_nano", depth=5, drop_path=0.2)
    rates = [(block.msa.drop_path.rate, block.mlp.drop_path.rate) for block in model.blocks]
    assert rates == [pytest.approx((0.05 * i, 0.05 * i)) for i in range(5)]
    resnet = create_model("resnet20", drop_path=0.4)
    assert [b.drop_path.rate for stage in resnet.stages for b in stage] == pytest.approx(
        [0.05 * i for i in range(9)]
    )


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_dropped_by_default(name):
    drops = [m for m in small(name).modules() if isinstance(m, models.layers.DropPath)]
    assert not any(drop.rate for drop in drops)


def test_dropout_acts_in_training_only():
    model, plain = small("vit_nano", dropout=0.5), small("vit_nano")
    assert torch.equal(model(images()), plain(images()))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(images()), plain(images()))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 33}, "`image_size` must be a multiple of 4, got 33; .* 32 or 36"),
        ({"image_size": 3}, "`image_size` must be a multiple of 4, got 3"),
        ({"dim": 50}, "`dim` must be a multiple of `heads` = 3, got 50"),
        ({"heads": 0}, "`heads` must be at least 1, got 0"),
        ({"num_classes": 0}, "`num_classes` must be at least 1, got 0"),
        ({"pool": "max"}, "`pool` must be one of 'cls', 'gap', got 'max'"),
        ({"window": 4}, "`window` must be odd and at least 1, got 4"),
        ({"window": 1.5}, "`window` must be a whole number, got 1.5"),
        ({"norm_eps": -1}, "`norm_eps` must be at least 0, got -1"),
        ({"norm_eps": "x"}, "`norm_eps` must be a number, got 'x'"),
        ({"drop_path": 1.0}, "`drop_path` must be at least 0 and below 1, got 1.0"),
    ],
)
def test_vit_refuses_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        create_model("vit_nano", **sizes)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("resnet20", {"in_channels": 0}, "`in_channels` must be at least 1, got 0"),
        ("resnet20", {"depths": ()}, "`depths` must be at least 1, got 0"),
        ("resnet20", {"depths": (2, 0, 2)}, "`depths` must be at least 1, got 0"),
        ("resnet20", {"stem": "tiny"}, "`stem` must be one of 'cifar', 'imagenet', got 'tiny'"),
        ("resnet20", {"drop_path": -0.1}, "`drop_path` must be at least 0 and below 1, got -0.1"),
        ("alternet18", {"msas": (0, 1, 1)}, "one entry per stage, got 4, 3 and 4 entries"),
        ("alternet18", {"msas": (0, 2, 1, 1)}, "`msas` must be 0 to 1 in a stage of 2 blocks"),
        ("alternet18", {"window": 0}, "`window` must be at least 1, got 0"),
    ],
)
def test_resnet_and_alternet_refuse_sizes_that_do_not_fit(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **sizes)


def test_images_of_another_size_are_refused_before_any_work():
    with pytest.raises(ValueError, match="images must be 32x32, got 31x32; resize them"):
        small("vit_nano")(torch.zeros(1, 3, 31, 32))
    with pytest.raises(ValueError, match="image width must be a multiple of 32, got 48"):
        small("alternet18")(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match="image height must be a multiple of 64, got 32"):
        small("alternet18", stem="imagenet", window=2)(torch.zeros(1, 3, 32, 64))
    large = small("alternet18", stem="imagenet", window=2)
    assert large(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert small("alternet18", window=2)(torch.zeros(1, 3, 32, 48)).shape == (1, 10)
    assert small("alternet18", msas=(0,) * 4)(torch.zeros(1, 3, 33, 45)).shape == (1, 10)
    assert small("resnet20")(torch.zeros(1, 3, 31, 45)).shape == (1, 10)


def test_create_model_names_the_nearest_models_and_sizes():
    with pytest.raises(ValueError, match="`name` must be a known model, got 'resnet_20'") as error:
        create_model("resnet_20")
    assert "'resnet20'" in str(error.value)
    with pytest.raises(ValueError, match="`widht` must be a size that 'resnet20' accepts.*'width'"):
        create_model("resnet20", widht=8)
    with pytest.raises(ValueError, match="`block` must be a size"):
        create_model("resnet20", block=nn.Linear)


@pytest.mark.parametrize("name", ["resnet20", "alternet18"])
def test_convolutions_start_kaiming_normal(name):
    model = create_model(name, width=32)
    convs = [
        m for k, m in model.named_modules() if isinstance(m, nn.Conv2d) and "attention" not in k
    ]
    fan_out = [conv.out_channels * conv.kernel_size[0] ** 2 for conv in convs]
    scaled = [conv.weight * (n / 2) ** 0.5 for conv, n in zip(convs, fan_out, strict=True)]
    values = torch.cat([weight.flatten() for weight in scaled])
    assert values.mean().item() == pytest.approx(0, abs=0.02)
    assert values.std().item() == pytest.approx(1, abs=0.02)


def test_attention_starts_normal_with_deviation_002():
    vit = create_model("vit_micro")
    alternet = create_model("alternet18", width=32)
    linear = [m for m in vit.modules() if isinstance(m, nn.Linear)]
    weights = [vit.pos_embed, vit.cls_token, *(m.weight for m in linear)]
    for key, parameter in alternet.named_parameters():
        if "attention" in key and not key.endswith("project.bias"):
            weights.append(parameter)
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert not any(m.bias.any() for m in linear if m.bias is not None)


@pytest.mark.parametrize("name", ["resnet20", "vit_nano", "alternet18"])
def test_a_stack_of_models_runs_under_vmap(name):
    sizes = {"drop_path": 0.5} | ({"window": 3} if name == "vit_nano" else {})
    members = [create_model(name, **(SMALL[name] | sizes)).eval() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(members)
    x = images()

    def forward(p, b):
        return torch.func.functional_call(members[0], (p, b), (x,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        stacked = torch.vmap(forward)(params, buffers)
        separate = torch.stack([member(x) for member in members])
        torch.testing.assert_close(stacked, separate)
        for module in members[0].modules():
            module.train(isinstance(module, models.layers.DropPath))
        dropped = torch.vmap(forward, randomness="different")(params, buffers)
    assert dropped.shape == stacked.shape
    assert not torch.allclose(dropped, stacked)


@pytest.mark.parametrize("name", ["resnet20", "vit_nano", "alternet18"])
def test_models_have_second_derivatives_under_the_math_kernel(name):
    """Double backward equals a finite difference of gradients, in float64."""
    torch.manual_seed(0)
    model = small(name, **({"window": 3} if name == "vit_nano" else {})).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    tangent = {k: torch.randn_like(p) * p.std(correction=0) for k, p in params.items()}
    x, y = images().double(), torch.tensor([1, 2])

    def loss(p):
        return nn.functional.cross_entropy(torch.func.functional_call(model, p, (x,)), y)

    gradient = torch.func.grad(loss)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (hv,) = torch.func.vjp(gradient, params)[1](tangent)
        step = 1e-7
        moved = [
            gradient({k: p + s * step * tangent[k] for k, p in params.items()}) for s in (1, -1)
        ]
    for key, value in hv.items():
        expected = (moved[0][key] - moved[1][key]) / (2 * step)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
