"""Attention layers against one-token-at-a-time formulas, in float64."""

import math

import pytest
import torch
from torch import Tensor

from landscape.models import create_model
from landscape.models.layers import WindowAttention
from landscape.models.vit import Attention, neighbourhood_mask


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """`softmax(keys q / √d + bias) values`, for one query of one head."""
    weights = torch.softmax(keys @ q / math.sqrt(len(q)) + bias, dim=0)
    return weights @ values


@pytest.mark.parametrize("class_token", [True, False], ids=["cls", "gap"])
@pytest.mark.parametrize("window", [1, 3, 5, 9, None])
def test_windowed_attention_equals_attention_over_the_neighbours(window, class_token, generator):
    grid, dim, heads = 5, 6, 2
    mask = None if window is None else neighbourhood_mask(grid, window, class_token)
    attention = Attention(dim, heads, qkv_bias=True, dropout=0.0, mask=mask).double()
    randomise(attention, generator)
    tokens = grid**2 + class_token
    x = torch.randn(1, tokens, dim, generator=generator, dtype=torch.float64)

    radius = grid if window is None else window // 2
    places = [(None, None)] * class_token + [(i, j) for i in range(grid) for j in range(grid)]
    q, k, v = (x[0] @ attention.qkv.weight.T + attention.qkv.bias).split(dim, dim=1)
    rows = []
    for token, (i, j) in enumerate(places):
        seen = [
            other
            for other, (a, b) in enumerate(places)
            if i is None or a is None or (abs(i - a) <= radius and abs(j - b) <= radius)
        ]
        row = [
            attend(q[token, head], k[seen][:, head], v[seen][:, head])
            for head in (slice(0, 3), slice(3, 6))
        ]
        rows.append(torch.cat(row))
    expected = torch.stack(rows) @ attention.project.weight.T + attention.project.bias
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 4), (2, 8)])
def test_window_attention_equals_attention_inside_each_tile(height, width, generator):
    window, heads, d, channels = 2, 3, 4, 5
    attention = WindowAttention(channels, 7, heads=heads, head_dim=d, window=window).double()
    randomise(attention, generator)
    x = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)

    def projected(conv: torch.nn.Conv2d, at: Tensor) -> Tensor:
        return conv.weight[:, :, 0, 0] @ at

    expected = torch.zeros(2, 7, height, width, dtype=torch.float64)
    for n in range(2):
        for i in range(height):
            for j in range(width):
                top, left = i - i % window, j - j % window
                tile = [(top + a, left + b) for a in range(window) for b in range(window)]
                q = projected(attention.query, x[n, :, i, j])
                kv = torch.stack([projected(attention.key_value, x[n, :, a, b]) for a, b in tile])
                bias = torch.stack(
                    [
                        attention.position_bias[a - i + window - 1, b - j + window - 1]
                        for a, b in tile
                    ]
                )
                out = [
                    attend(
                        q[h * d : (h + 1) * d],
                        kv[:, h * d : (h + 1) * d],
                        kv[:, (heads + h) * d : (heads + h + 1) * d],
                        bias,
                    )
                    for h in range(heads)
                ]
                project = attention.project
                expected[n, :, i, j] = projected(project, torch.cat(out)) + project.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_a_window_that_covers_the_image_changes_nothing():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, wide, narrow = (create_model("vit_nano", window=w).eval() for w in (None, 15, 3))
    randomise(plain, torch.Generator().manual_seed(1))
    for model in (wide, narrow):
        model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(wide(images), plain(images))
    assert (narrow(images) - plain(images)).abs().max() > 0.1


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_head_reads_the_class_token_or_the_mean_over_patches(pool):
    model = create_model("vit_nano", pool=pool).eval()
    assert (model.cls_token is None) == (pool == "gap")
    assert model.pos_embed.shape == (1, 64 + (pool == "cls"), 48)
    tokens = []
    model.blocks.register_forward_hook(lambda module, args, out: tokens.append(out))
    logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    read = tokens[0][:, 0] if pool == "cls" else tokens[0].mean(dim=1)
    torch.testing.assert_close(logits, model.head(model.norm(read)))


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_only_position_embeddings_know_where_a_patch_was(pool):
    model = create_model("vit_nano", pool=pool).double().eval()
    randomise(model, torch.Generator().manual_seed(1))
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    rolled = image.roll((4, 8), dims=(2, 3))
    with torch.no_grad():
        assert (model(image) - model(rolled)).abs().max() > 0.1
        model.pos_embed.zero_()
        torch.testing.assert_close(model(image), model(rolled))


@pytest.mark.parametrize("name", ["vit_nano", "alternet18"])
def test_hooks_on_residual_units_see_the_sum_and_a_silent_branch_leaves_the_identity(name):
    sizes = {} if name == "vit_nano" else {"width": 4, "head_dim": 4}
    model = create_model(name, **sizes).eval()
    unit = model.blocks[1].msa if name == "vit_nano" else model.stages[1][1]
    seen = {}
    unit.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    silence = unit.branch.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images)
    assert torch.equal(seen["out"], seen["x"])
    silence.remove()
    unit.branch.register_forward_hook(lambda m, args, out: seen.update(update=out))
    model(images)
    assert torch.equal(seen["out"], seen["x"] + seen["update"])
    assert seen["update"].abs().max() > 0


def test_alternet_stages_end_with_alternating_msas():
    model = create_model("alternet50", width=4, head_dim=4)
    kinds = [
        "".join("A" if hasattr(b.branch, "attention") else "C" for b in s) for s in model.stages
    ]
    assert kinds == ["CCC", "CCCA", "CACACA", "CACA"]
    heads = [
        b.branch.attention.heads for s in model.stages for b in s if hasattr(b.branch, "attention")
    ]
    assert heads == [6, 12, 12, 12, 24, 24]
