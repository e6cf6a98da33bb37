"""Blocks of models we did not write: found by structure, captured where plain hooks find them."""

import argparse
import importlib

import numpy as np
import pytest
import torch
from PIL import Image

import landscape
from landscape.blocks import Blocks
from landscape.probes.lesion import lesion_study
from landscape.training import FolderImages
from tests.cases import assert_untouched, snapshot
from tests.test_package import ROOT, run
from tests.test_thirdparty import zoo

pytestmark = pytest.mark.thirdparty


def timm_model(name, **sizes):
    return zoo("timm").create_model(name, num_classes=10, **sizes)


def torchvision_model(name, **sizes):
    zoo("torchvision")
    import torchvision.models

    return getattr(torchvision.models, name)(num_classes=10, **sizes)


def hugging_face_model(name, **sizes):
    transformers = zoo("transformers")
    config = getattr(transformers, f"{name}Config")(num_labels=10, **sizes)
    return getattr(transformers, f"{name}ForImageClassification")(config)


TRANSFORMER = {"img_size": 32, "patch_size": 8}
WINDOWS = {"img_size": 32, "patch_size": 2, "window_size": 4}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}

# model: how to build it, side of its images, and the number of blocks of each kind
ZOO = {
    "timm vit": (timm_model, ("vit_tiny_patch16_224",), TRANSFORMER, 32, {"msa": 12, "mlp": 12}),
    "timm deit": (
        *(timm_model, ("deit_tiny_distilled_patch16_224",)),
        *(TRANSFORMER, 32, {"msa": 12, "mlp": 12}),
    ),
    "timm registers": (
        *(timm_model, ("vit_small_patch14_reg4_dinov2",)),
        *({"img_size": 28, "patch_size": 7, "depth": 2}, 28, {"msa": 2, "mlp": 2}),
    ),
    "timm swin": (
        *(timm_model, ("swin_tiny_patch4_window7_224",)),
        *(WINDOWS | {"depths": (2, 2, 2)}, 32, {"msa": 6, "mlp": 6, "pool": 2}),
    ),
    "timm swinv2": (
        *(timm_model, ("swinv2_tiny_window8_256",)),
        *(WINDOWS | {"depths": (2, 2)}, 32, {"msa": 4, "mlp": 4, "pool": 1}),
    ),
    "timm pit": (timm_model, ("pit_ti_224",), {}, 224, {"msa": 12, "mlp": 12, "pool": 2}),
    "timm convnext": (timm_model, ("convnext_atto",), {}, 64, {"conv": 12, "pool": 3}),
    "timm mixer": (timm_model, ("mixer_s32_224",), {}, 224, {"mlp": 16}),
    "timm resnet": (timm_model, ("resnet26",), {}, 64, {"conv": 8}),
    "timm mobilenet": (timm_model, ("mobilenetv3_small_100",), {}, 96, {"conv": 10}),
    "torchvision resnet": (torchvision_model, ("resnet18",), {}, 64, {"conv": 8}),
    "torchvision vit": (
        *(torchvision_model, ("vit_b_16",), {"image_size": 32}, 32, {"msa": 12, "mlp": 12}),
    ),
    "torchvision swin": (
        *(torchvision_model, ("swin_t",), {}, 64, {"msa": 12, "mlp": 12, "pool": 3}),
    ),
    "hugging face vit": (
        *(hugging_face_model, ("ViT",)),
        *(SMALL | {"image_size": 32, "patch_size": 8}, 32, {"msa": 12, "mlp": 12}),
    ),
    "hugging face swin": (
        *(hugging_face_model, ("Swin",)),
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4},
        *(32, {"msa": 4, "mlp": 4, "pool": 1}),
    ),
    "hugging face resnet": (
        *(hugging_face_model, ("ResNet",)),
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]},
        *(64, {"conv": 4}),
    ),
}


@pytest.fixture(params=ZOO)
def case(request):
    make, names, sizes, side, expected = ZOO[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(*names, **sizes)
    return request.param, model, side, expected


def images(side, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_kinds_and_maps(case):
    name, model, side, expected = case
    model.train()
    before = snapshot(model)
    blocks = Blocks(model, example=images(side))
    features = blocks.capture(images(side))
    assert_untouched(model, before)
    counts = {kind: blocks.kinds.count(kind) for kind in set(blocks.kinds)}
    assert counts == {"stem": 1, "head": 1} | expected, name
    for block in list(blocks)[:-1]:
        feature = features[block.name]
        assert block.is_map, block
        assert feature.shape == (2, block.channels, *block.grid)
        assert feature.std() > 0
    pools = expected.get("pool", sum(block.subsamples for block in blocks))
    assert sum(block.subsamples for block in blocks) == pools
    assert features["head"].shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "block", "channels", "grid"),
    [
        ("tiny_vit_5m_224", "stages.1.downsample", 128, (28, 28)),
        ("levit_128", "stages.2.blocks.3.mlp", 384, (4, 4)),
        ("twins_pcpvt_small", "blocks.0.0.attn", 64, (56, 56)),
        ("mobilevitv2_050", "stages.2.1.transformer.0.mlp", 64, None),  # patches by pixels
        ("nest_tiny_jx", "levels.0.transformer_encoder.0.mlp", 96, None),  # windows by tokens
    ],
)
def test_maps_at_the_size_that_a_model_is_made_for(name, block, channels, grid):
    found = Blocks(timm_model(name))[block]
    assert (found.channels, found.grid, found.is_map) == (channels, grid, grid is not None)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_blocks_of_a_backbone_that_returns_a_list_of_maps(name):
    whole = Blocks(timm_model(name))
    maps = Blocks(zoo("timm").create_model(name, features_only=True))
    described = [[(b.kind, b.depth, b.stage, b.grid, b.channels) for b in each]
                 for each in (whole, maps)]  # fmt: skip
    assert described[0][:-1] == described[1]  # without the head


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("crossvit_tiny_240", {"msa": 21, "mlp": 15}),  # two streams
        ("cs3darknet_focus_s", {"conv": 9}),  # half of the channels go around the blocks
        ("dla46x_c", {"conv": 11}),  # trees, whose leaves are concatenated
        ("hrnet_w18_small", {"conv": 21}),  # four scales at once
    ],
)
def test_blocks_beside_others(name, counts):
    blocks = Blocks(timm_model(name))
    assert {kind: blocks.kinds.count(kind) for kind in counts} == counts


def inputs_of(model, x, path):
    """What a module is given in evaluation mode."""
    kept = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    model.eval()
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0].clone()


@pytest.mark.parametrize(
    ("name", "msa", "norm", "prefix"),
    [
        ("timm vit", "blocks.3.attn", "blocks.3.norm2", 1),
        ("timm deit", "blocks.3.attn", "blocks.3.norm2", 2),
        ("timm registers", "blocks.1.attn", "blocks.1.norm2", 5),
        ("timm pit", "transformers.1.blocks.2.attn", "transformers.1.blocks.2.norm2", 1),
        ("timm swin", "layers.1.blocks.1.attn", "layers.1.blocks.1.norm2", 0),
        (
            "torchvision vit",
            "encoder.layers.encoder_layer_2.self_attention",
            "encoder.layers.encoder_layer_2.ln_2",
            1,
        ),
        ("torchvision swin", "features.3.1.attn", "features.3.1.norm2", 0),
    ],
)
def test_an_msa_is_taken_after_its_sum(name, msa, norm, prefix):
    make, names, sizes, side, _ = ZOO[name]
    model = make(*names, **sizes)
    blocks = Blocks(model, example=images(side))
    feature = blocks.capture(images(side))[msa]
    expected = inputs_of(model, images(side), norm)  # the next norm is given the sum
    if expected.dim() == 3:
        expected = expected[:, prefix:].transpose(1, 2)
        assert expected.shape[2] == blocks[msa].grid[0] * blocks[msa].grid[1]
        expected = expected.unflatten(2, blocks[msa].grid)
    else:
        expected = expected.movedim(-1, 1)
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm vit", "timm swin", "timm convnext", "torchvision resnet",
                                  "torchvision vit", "hugging face swin"])  # fmt: skip
def test_lesions(name):
    make, names, sizes, side, _ = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(*names, **sizes)
    x = images(side, 4)
    study = lesion_study(model, [(x, torch.tensor([0, 1, 2, 3]))])
    assert study.provenance.settings["shared_prefix"]
    blocks = Blocks(model, example=x)
    with torch.no_grad():
        for u in (0, len(study.names) // 2, -1):
            with blocks.lesion(study.names[u], study.parts[u]):
                logits = model.eval()(x)
            logits = getattr(logits, "logits", logits)
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
            np.testing.assert_allclose(study.nll[u], float(nll), rtol=1e-4)


def test_heads_of_a_fused_attention():
    """In torchvision one function does a whole attention: the head leaves its projection."""
    make, names, sizes, side, _ = ZOO["torchvision vit"]
    model = make(*names, **sizes).eval()
    blocks = Blocks(model, example=images(side))
    name = "encoder.layers.encoder_layer_2.self_attention"
    with torch.no_grad(), blocks.lesion(name, 3):
        lesioned = model(images(side))
    weight = model.get_submodule(name).out_proj.weight
    with torch.no_grad():
        weight.unflatten(1, (12, -1))[:, 3] = 0
        torch.testing.assert_close(lesioned, model(images(side)))


def test_a_figure_of_a_timm_model_on_a_folder_of_images(tmp_path):
    model = zoo("timm").create_model("resnet10t")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (190, 200, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    arguments = ("--model", "timm:resnet10t", "--weights", "weights.pth", "--images", "images")
    script = str(ROOT / "examples/reproduce_fig9.py")
    done = run(script, *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resnet10t Convs" in done.stdout
    assert (tmp_path / "out/fig9/variance_00_0.npz").exists()
    refused = run(script, "--model", "timm:resnet10t", cwd=tmp_path)
    assert refused.returncode != 0
    assert "needs --weights" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "block"),
    [
        (["timm:convnext_atto"], "stages.3.downsample.1: pool"),
        (["timm:nest_tiny", "--blocks", "levels.?"], "levels.1: msa, 192 x 28 x 28"),
    ],
    ids=["found", "named"],
)
def test_any_model_by_name(arguments, block, tmp_path):
    zoo("timm")
    done = run(str(ROOT / "examples/any_model.py"), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert block in done.stdout
    assert (tmp_path / "any_model.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", "resnet50.tv_in1k", "vit_base_patch16_clip_384.laion2b_ft_in1k"],
)
def test_any_model_sees_images_as_timm_makes_them(tmp_path, monkeypatch, name):
    """Crops of 0.9, bilinear interpolation, both sides alike."""
    timm = zoo("timm")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    images_of = importlib.import_module("any_model").images_of
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    expected = timm.data.create_transform(**config)(Image.fromarray(pixels))
    ((images, _),) = FolderImages(tmp_path, **images_of(config))
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-5)


def test_any_model_takes_weights_that_were_saved_on_a_gpu(tmp_path, monkeypatch):
    zoo("timm")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    any_model = importlib.import_module("any_model")
    options = argparse.Namespace(model="timm:test_vit", weights=None)
    saved = {name: value + 1 for name, value in any_model.load(options)[0].state_dict().items()}
    options.weights = tmp_path / "weights.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(saved, options.weights)
    loaded = any_model.load(options)[0].state_dict()
    torch.testing.assert_close(dict(loaded), saved)


def test_the_loss_of_any_model_by_name(tmp_path):
    zoo("timm")
    options = ("--points", "3", "--batch-size", "3", "--weight-decay", "0.1", "--out", "loss.png")
    done = run(str(ROOT / "examples/any_loss.py"), "timm:test_vit", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "VisionTransformer, 371,240 parameters, 12 samples, cpu float32" in done.stdout
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    spectrum = landscape.HessianSpectrum.load(tmp_path / "loss_spectrum.npz")
    assert str(spectrum) in done.stdout
    assert "weight_decay=0.1" in spectrum.provenance.objective
