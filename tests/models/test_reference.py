"""Published architectures, key names and checkpoint files.

The logits come from the authors' code and from timm, with weights that are a function of each
parameter's name (`reference_weights.py`).
"""

import re
import sys

import pytest
import torch
from reference_weights import reference_images, reference_state, reference_table

from landscape.models import load_reference_checkpoint
from landscape.models.reference import PUBLISHED, load_checked

TABLE = reference_table()
THIRD_PARTY = ("pit_ti", "swin_ti")
NAMES = [pytest.param(n, marks=pytest.mark.thirdparty if n in THIRD_PARTY else ()) for n in TABLE]


@pytest.fixture(params=NAMES)
def name(request):
    if request.param in THIRD_PARTY:
        need_timm()
    return request.param


def need_timm() -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        pytest.skip(f"timm cannot be imported: {error}")


def assert_reference_logits(model, name):
    expected = torch.tensor(TABLE[name]["logits"])
    with torch.no_grad():
        logits = model(reference_images())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_logits_and_parameter_counts_are_the_published_ones(name):
    before = torch.get_rng_state()
    model = load_reference_checkpoint(reference_state(TABLE[name]["state"]), name)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in model.parameters()) == TABLE[name]["parameters"]
    assert not any(module.training for module in model.modules())
    assert_reference_logits(model, name)


def test_every_published_name_has_an_oracle():
    assert set(PUBLISHED) == set(TABLE)


@pytest.fixture(scope="module")
def vit_state():
    return reference_state(TABLE["vit_ti"]["state"])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "mapping"])
def test_wrapped_and_prefixed_checkpoints_load(vit_state, prefix, as_file, tmp_path):
    source = {"state_dict": {prefix + key: value for key, value in vit_state.items()}, "epoch": 300}
    if as_file:
        torch.save(source, tmp_path / "vit_ti.pth.tar")
        source = str(tmp_path / "vit_ti.pth.tar")
    assert_reference_logits(load_reference_checkpoint(source, "vit_ti"), "vit_ti")


def test_legacy_file_format_loads(vit_state, tmp_path):
    path = tmp_path / "vit_ti.pth.tar"
    torch.save({"state_dict": vit_state}, path, _use_new_zipfile_serialization=False)
    assert_reference_logits(load_reference_checkpoint(path, "vit_ti"), "vit_ti")


def test_model_shares_no_memory_with_the_state_dict(vit_state):
    model = load_reference_checkpoint(vit_state, "vit_ti")
    kept = vit_state["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(vit_state["head.weight"], kept)


@pytest.mark.thirdparty
@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("pit_ti", {r"transformers\.1\.pool": "transformers.0.pool"}),
        ("swin_ti", {r"layers\.1\.downsample": "layers.0.downsample", r"head\.fc": "head"}),
    ],
)
def test_layout_of_older_timm_loads(name, renamed):
    need_timm()
    renamed |= {
        r"transformers\.2\.pool": "transformers.1.pool",
        r"layers\.2\.downsample": "layers.1.downsample",
        r"layers\.3\.downsample": "layers.2.downsample",
    }
    old = {}
    for key, tensor in reference_state(TABLE[name]["state"]).items():
        for pattern, replacement in renamed.items():
            new = re.sub(f"^{pattern}", replacement, key)
            if new != key:
                break
        old[new] = tensor
    assert set(old) != set(TABLE[name]["state"])
    if name == "swin_ti":
        old["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
        old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    assert_reference_logits(load_reference_checkpoint(old, name), name)


def test_missing_unexpected_and_misshapen_keys_are_all_named_and_nothing_is_loaded(vit_state):
    state = dict(vit_state)
    del state["cls_token"]
    state["head_dist.weight"] = torch.zeros(100, 192)
    state["norm.weight"] = torch.ones(193)
    with torch.random.fork_rng(devices=[]):
        model = PUBLISHED["vit_ti"].build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="must hold the weights of 'vit_ti'") as error:
        load_checked(model, state, PUBLISHED["vit_ti"], "vit_ti")
    message = str(error.value)
    assert "missing: cls_token;" in message
    assert "unexpected: head_dist.weight;" in message
    assert "of another shape: norm.weight (193,) instead of (192,)." in message
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_weights_of_another_model_are_refused(vit_state):
    with pytest.raises(ValueError, match=r"'vit_ti_paper'.*missing: .* and 1\d\d more; unexpected"):
        load_reference_checkpoint(vit_state, "vit_ti_paper")
    with pytest.raises(ValueError, match="missing: "):
        load_reference_checkpoint({}, "resnet_18")


def test_paper_patch_embedding_of_another_patch_size_is_refused():
    state = reference_state(TABLE["vit_ti_paper"]["state"])
    key = "embedding.0.patch_embedding.1.weight"
    for columns in (48, 13):  # patches of 4; no patch at all
        state[key] = torch.zeros(192, columns)
        with pytest.raises(
            ValueError, match=rf"of another shape: {key} \(192, {columns}\) instead"
        ):
            load_reference_checkpoint(state, "vit_ti_paper")


class NotATensor:
    pass


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files_are_refused(fraction, legacy, tmp_path):
    path = tmp_path / "vit_ti.pth.tar"
    state = {f"layer{i}.weight": torch.ones(40, 40) for i in range(20)}
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match="must be a complete checkpoint of tensors"):
        load_reference_checkpoint(path, "vit_ti")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "vit_ti.pth.tar"
    torch.save({"state_dict": {"a.weight": torch.ones(4)}}, path, pickle_protocol=2)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"FloatStorage", b"FloatXtorage"))
    with pytest.raises(ValueError, match="must be a complete checkpoint of tensors"):
        load_reference_checkpoint(path, "vit_ti")
    at = content.index(b"_rebuild_tensor_v2")
    damaged = content[: at + 19] + content[at + 19 :].replace(b"(", b"K", 1)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="must be a complete checkpoint of tensors"):
        load_reference_checkpoint(path, "vit_ti")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html></html>", bytes(range(256)) * 40])
def test_files_that_are_no_checkpoints_are_refused(content, tmp_path):
    path = tmp_path / "vit_ti.pth.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vit_ti\.pth\.tar cannot be read as one"):
        load_reference_checkpoint(path, "vit_ti")


def test_files_with_other_objects_are_refused_and_not_run(tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": NotATensor()}, path)
    with pytest.raises(ValueError, match="must be a complete checkpoint of tensors"):
        load_reference_checkpoint(path, "vit_ti")
    torch.save({"state_dict": [1, 2]}, path)
    with pytest.raises(ValueError, match="must be a state dict"):
        load_reference_checkpoint(path, "vit_ti")
    with pytest.raises(ValueError, match="must be a state dict"):
        load_reference_checkpoint({"epoch": 3}, "vit_ti")


def test_missing_files_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`source` must be an existing checkpoint file"):
        load_reference_checkpoint(tmp_path / "none.pth.tar", "vit_ti")
    with pytest.raises(ValueError, match="`name` must be one of 'resnet_18'.*got 'vit_tiny'"):
        load_reference_checkpoint({}, "vit_tiny")


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_without_timm_the_error_says_what_to_install(name, monkeypatch):
    for module in ("timm", "timm.models.pit", "timm.models.swin_transformer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "landscape-probes\[models\]"'):
        load_reference_checkpoint({}, name)


def test_a_torchvision_for_another_torch_counts_as_absent(monkeypatch):
    def broken(module):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ImportError, match=r"torchvision::nms does not exist\); pip install"):
        load_reference_checkpoint({}, "swin_ti")
