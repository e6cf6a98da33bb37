"""The table of a model's blocks, for a diagram."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from landscape import Blocks, Result
from landscape.models import resnet20, vit_nano
from landscape.plot.diagram import block_diagram
from landscape.probes.architecture import architecture
from tests.cases import assert_untouched, snapshot
from tests.test_thirdparty import zoo


def small(**sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet20(width=2, depths=(1, 2, 1), **sizes)


def test_the_table_is_that_of_the_network_as_it_was_built():
    result = architecture(small(), example=torch.zeros(1, 3, 32, 32))
    assert result.names == ("stem", "stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "head")
    assert result.kinds == ("stem", "conv", "conv", "conv", "conv", "head")
    assert result.channels.tolist() == [2, 2, 4, 4, 8, 10]
    assert result.grid.tolist() == [[32, 32], [32, 32], [16, 16], [16, 16], [8, 8], [0, 0]]
    assert result.stage.tolist() == [0, 0, 1, 1, 2, 2]
    assert result.subsamples.tolist() == [False, False, True, False, True, False]
    assert result.provenance.model == "ResNet"


def test_given_blocks_are_taken_and_those_of_another_model_are_refused():
    model = small()
    blocks = Blocks(model, ["stages.0", "stages.1"], example=torch.zeros(1, 3, 16, 24))
    result = architecture(model, blocks=blocks)
    assert result.names == ("stages.0", "stages.1")
    assert result.grid.tolist() == [[16, 24], [8, 12]]
    with pytest.raises(ValueError, match="`blocks` must be those of the model that is probed"):
        architecture(vit_nano(), blocks=blocks)


def test_the_example_may_have_any_number_of_samples_and_the_model_is_left_as_it_was():
    model = small(drop_path=0.5).train()
    before = snapshot(model)
    tables = [architecture(model, example=torch.zeros(n, 3, 32, 32)) for n in (1, 5)]
    assert_untouched(model, before)
    for name in ("channels", "grid", "depth", "stage", "subsamples"):
        one, other = (getattr(table, name) for table in tables)
        np.testing.assert_array_equal(one, other)


def test_it_is_saved_and_read_again(tmp_path):
    result = architecture(vit_nano(depth=1, dim=12))
    again = Result.load(result.save(tmp_path / "table"))
    assert again.names == result.names
    np.testing.assert_array_equal(again.grid, result.grid)
    assert result.kinds == ("stem", "msa", "mlp", "head")
    assert result.grid.tolist() == [[8, 8], [8, 8], [8, 8], [0, 0]]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="`model` must have residual blocks"):
        architecture(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), example=torch.zeros(1, 3, 8, 8))


@pytest.mark.thirdparty
def test_a_swin_of_timm_has_its_subsampling_between_the_stages():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2), "embed_dim": 12}
    model = zoo("timm").create_model("swin_tiny_patch4_window7_224", num_heads=(1, 2), **sizes)
    result = architecture(model)
    pair = ["msa", "mlp"] * 2
    assert result.kinds == ("stem", *pair, "pool", *pair, "head")
    assert result.grid.tolist() == [[16, 16]] * 5 + [[8, 8]] * 5 + [[0, 0]]
    assert result.channels.tolist() == [12] * 5 + [24] * 5 + [1000]
    ax = block_diagram(result)
    outputs = [text.get_text() for text in ax.texts if text.get_gid() == "output"]
    assert [text for text in outputs if "↓" in text] == ["↓ 24 × 8 × 8"]
    plt.close(ax.figure)
