"""Load the weights that Park & Kim (2022) published, in the key names of their code or of timm.

| name | keys | built as |
|---|---|---|
| `resnet_18`, `resnet_50` | authors' | `resnet18`, `resnet50` |
| `alternet_50` | authors' | `alternet50` |
| `vit_ti_paper` | authors' | `vit_tiny`, whose layer norms use 1e-5 |
| `vit_ti` | timm | `vit_tiny` |
| `pit_ti`, `swin_ti` | timm | timm's own PiT and Swin for 32x32 images (extra `models`) |

All are for CIFAR-100: 32x32 images, 100 classes. The published files are resnet_50, vit_ti, pit_ti
and swin_ti, each a `.pth.tar` that holds `{"state_dict": ...}`.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape._checks import check_choice
from landscape._files import load_tensors
from landscape.models.alternet import alternet50
from landscape.models.resnet import resnet18, resnet50
from landscape.models.vit import vit_tiny

Rules = dict[str, str]  # start of a key (a pattern) -> what replaces it; the first match counts

# `layer1` … `layer4` have become `stages.0` … `stages.3` when these two tables are read.
RESNET_RULES: Rules = {
    r"layer0\.0": "stem.conv",
    r"layer0\.1": "stem.norm",
    r"(stages\.\d+\.\d+)\.shortcut\.0": r"\1.shortcut.conv",
    r"(stages\.\d+\.\d+)\.shortcut\.1": r"\1.shortcut.norm",
    r"(stages\.\d+\.\d+)\.conv(\d)\.0": r"\1.branch.conv\2",
    r"(stages\.\d+\.\d+)\.conv(\d)\.1": r"\1.branch.norm\2",
    r"classifier\.0\.dense": "head",
}
ALTERNET_RULES: Rules = {
    r"layer0\.layer0\.0": "stem.conv",
    # convolution blocks; their `conv2` and `conv3` are norm, ReLU, convolution
    r"(stages\.\d+\.\d+)\.shortcut\.0": r"\1.projection",
    r"(stages\.\d+\.\d+)\.bn": r"\1.preact.norm",
    r"(stages\.\d+\.\d+)\.conv1": r"\1.branch.conv1",
    r"(stages\.\d+\.\d+)\.conv2\.0": r"\1.branch.norm1",
    r"(stages\.\d+\.\d+)\.conv2\.2": r"\1.branch.conv2",
    r"(stages\.\d+\.\d+)\.conv3\.0": r"\1.branch.norm2",
    r"(stages\.\d+\.\d+)\.conv3\.2": r"\1.branch.conv3",
    # MSA blocks
    r"(stages\.\d+\.\d+)\.norm1": r"\1.preact.norm",
    r"(stages\.\d+\.\d+)\.conv": r"\1.branch.conv",
    r"(stages\.\d+\.\d+)\.norm2": r"\1.branch.norm",
    r"(stages\.\d+\.\d+)\.attn\.pos_embedding": r"\1.branch.attention.position_bias",
    r"(stages\.\d+\.\d+)\.attn\.attn\.to_q": r"\1.branch.attention.query",
    r"(stages\.\d+\.\d+)\.attn\.attn\.to_kv": r"\1.branch.attention.key_value",
    r"(stages\.\d+\.\d+)\.attn\.attn\.to_out\.0": r"\1.branch.attention.project",
    r"classifier\.0\.bn": "norm",
    r"classifier\.0\.dense": "head",
}
VIT_PAPER_RULES: Rules = {
    r"embedding\.0\.patch_embedding\.1": "patch_embed",
    r"embedding\.1\.cls_token": "cls_token",
    r"embedding\.2\.pos_embedding": "pos_embed",
    r"transformers\.(\d+)\.norm1": r"blocks.\1.msa.branch.norm",
    r"transformers\.(\d+)\.attn\.to_qkv": r"blocks.\1.msa.branch.attention.qkv",
    r"transformers\.(\d+)\.attn\.to_out\.0": r"blocks.\1.msa.branch.attention.project",
    r"transformers\.(\d+)\.norm2": r"blocks.\1.mlp.branch.norm",
    r"transformers\.(\d+)\.ff\.net\.0": r"blocks.\1.mlp.branch.fc1",
    r"transformers\.(\d+)\.ff\.net\.3": r"blocks.\1.mlp.branch.fc2",
    r"classifier\.1": "norm",
    r"classifier\.2": "head",
}
VIT_TIMM_RULES: Rules = {
    r"patch_embed\.proj": "patch_embed",
    r"blocks\.(\d+)\.norm1": r"blocks.\1.msa.branch.norm",
    r"blocks\.(\d+)\.attn\.qkv": r"blocks.\1.msa.branch.attention.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"blocks.\1.msa.branch.attention.project",
    r"blocks\.(\d+)\.norm2": r"blocks.\1.mlp.branch.norm",
    r"blocks\.(\d+)\.mlp\.fc1": r"blocks.\1.mlp.branch.fc1",
    r"blocks\.(\d+)\.mlp\.fc2": r"blocks.\1.mlp.branch.fc2",
}
# timm before 0.9 kept the step between two stages at the end of the first one, today's timm at the
# start of the second; it also had Swin's classifier as `head` and stored what it now computes.
OLD_PIT_RULES: Rules = {
    r"transformers\.0\.pool": "transformers.1.pool",
    r"transformers\.1\.pool": "transformers.2.pool",
}
OLD_SWIN_RULES: Rules = {
    r"layers\.0\.downsample": "layers.1.downsample",
    r"layers\.1\.downsample": "layers.2.downsample",
    r"layers\.2\.downsample": "layers.3.downsample",
    r"head(?!\.fc)": "head.fc",
}
COMPUTED = ("relative_position_index", "attn_mask")


@dataclass(frozen=True)
class Published:
    """How one published model is built, and how its keys become ours."""

    build: Callable[[], nn.Module]
    rules: Rules
    only_with: str = ""  # the rules apply only to checkpoints that have this key


def load_reference_checkpoint(source: str | Path | Mapping[str, Any], name: str) -> nn.Module:
    """Return the published model `name` with the weights of `source`, in eval mode on the CPU.

    Args:
        source: A checkpoint file, read with `weights_only=True`, or a state dict; either may be
            wrapped as `{"state_dict": ...}` and have keys that start with `module.`.
        name: `resnet_18`, `resnet_50`, `alternet_50`, `vit_ti`, `vit_ti_paper`, `pit_ti` or
            `swin_ti`; see the table above.

    Returns:
        A new float32 model; it shares no memory with `source`. No generator is advanced.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the model is built with timm and timm cannot be imported.
        ValueError: If `name` is unknown, or the file is no checkpoint of tensors or is
            truncated, or keys are missing or unexpected, or shapes differ.
    """
    check_choice("name", name, tuple(PUBLISHED))
    published = PUBLISHED[name]
    state = _state_dict(source)
    with torch.random.fork_rng(devices=[]):
        model = published.build()
    load_checked(model, state, published, name)
    return model.eval()


def load_checked(
    model: nn.Module, state: Mapping[str, Tensor], published: Published, name: str
) -> None:
    """Copy `state`, in its published key names, into `model`, or refuse it as a whole.

    Args:
        model: What `published.build()` returns; untouched unless everything fits.
        state: Tensors by published key.
        published: Whose rules translate the keys.
        name: Name of the model, for the error.

    Raises:
        ValueError: If keys are missing or unexpected, or shapes differ.
    """
    applies = not published.only_with or published.only_with in state
    rules = published.rules if applies else {}
    keys = {key: _translate(key, rules) for key in state if not key.endswith(COMPUTED)}
    ours = {new: _as_convolution(new, state[old]) for old, new in keys.items()}
    expected = model.state_dict()

    problems = {
        "missing": [key for key in expected if key not in ours],
        "unexpected": [old for old, new in keys.items() if new not in expected],
        "of another shape": [
            f"{old} {tuple(state[old].shape)} instead of {tuple(expected[new].shape)}"
            for old, new in keys.items()
            if new in expected and ours[new].shape != expected[new].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(
            f"`source` must hold the weights of {name!r}, but has keys {text}. Nothing was loaded; "
            f"check that `name` is the model of this file."
        )
    model.load_state_dict(ours)


def _state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file or mapping, out of its wrapping and without `module.`."""
    state: Any = _read(Path(source)) if isinstance(source, str | Path) else source
    if isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            "`source` must be a state dict (names to tensors) or a mapping with one under "
            f'"state_dict", got {type(state).__name__} holding something else.'
        )
    return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}


def _read(path: Path) -> Any:
    """Return what a checkpoint file holds, without running any code it may carry."""
    if not path.is_file():
        raise FileNotFoundError(f"`source` must be an existing checkpoint file, got {path}.")
    try:
        return load_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"`source` must be a complete checkpoint of tensors, but {path} cannot be read as "
            f"one ({error}); download it again."
        ) from error


def _translate(key: str, rules: Rules) -> str:
    """Return `key` with its first parts replaced by the first rule that matches them."""
    key = re.sub(r"^layer([1-4])(?=\.)", lambda m: f"stages.{int(m[1]) - 1}", key)
    for pattern, replacement in rules.items():
        translated, matched = re.subn(rf"^{pattern}(?=\.|$)", replacement, key)
        if matched:
            return translated
    return key


def _as_convolution(key: str, tensor: Tensor) -> Tensor:
    """Return a patch embedding that was stored as a matrix as the kernel of a convolution.

    The authors flatten a patch to (row, column, channel) before a linear layer, so its weight
    `(dim, p * p * 3)` is the kernel `(dim, 3, p, p)` with the channels last.
    """
    if key != "patch_embed.weight" or tensor.ndim != 2:
        return tensor
    side = round((tensor.shape[1] / 3) ** 0.5)
    if tensor.shape[1] != 3 * side**2:
        return tensor
    return tensor.reshape(-1, side, side, 3).permute(0, 3, 1, 2)


def _listed(keys: list[str]) -> str:
    """Return the first five of `keys` and how many more there are."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more


def _pit_ti() -> nn.Module:
    """Build PiT-Ti for 32x32: patches of 2 with stride 1, so a first map of 31 x 31."""
    model: nn.Module = _timm("timm.models.pit").PoolingVisionTransformer(
        img_size=32,
        patch_size=2,
        stride=1,
        base_dims=(32, 32, 32),
        depth=(2, 6, 4),
        heads=(2, 4, 8),
        num_classes=100,
    )
    return model


def _swin_ti() -> nn.Module:
    """Build Swin-Ti for 32x32: patches of 1, windows of 4, no biases in queries, keys, values."""
    model: nn.Module = _timm("timm.models.swin_transformer").SwinTransformer(
        img_size=32,
        patch_size=1,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=4,
        qkv_bias=False,
        num_classes=100,
    )
    return model


def _timm(module: str) -> Any:
    """Import one of timm's modules; a torchvision built for another torch raises RuntimeError."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "pit_ti and swin_ti are built with timm, which cannot be imported "
            f'({error}); pip install "landscape-probes[models]".'
        ) from error


PUBLISHED = {
    "resnet_18": Published(partial(resnet18, num_classes=100), RESNET_RULES),
    "resnet_50": Published(partial(resnet50, num_classes=100), RESNET_RULES),
    "alternet_50": Published(partial(alternet50, num_classes=100), ALTERNET_RULES),
    "vit_ti_paper": Published(partial(vit_tiny, num_classes=100, norm_eps=1e-5), VIT_PAPER_RULES),
    "vit_ti": Published(partial(vit_tiny, num_classes=100), VIT_TIMM_RULES),
    "pit_ti": Published(_pit_ti, OLD_PIT_RULES, only_with="transformers.0.pool.conv.weight"),
    "swin_ti": Published(_swin_ti, OLD_SWIN_RULES, only_with="layers.0.downsample.norm.weight"),
}
