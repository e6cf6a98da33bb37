"""Robustness against common corruptions (Hendrycks & Dietterich, 2019, arXiv 1903.12261).

With E_{s,c} the error of a model under corruption c at severity s and E its clean error, the mean
corruption error is that over all c and s. Relative to a baseline model (there AlexNet, section 4)

    CE_c = Σ_s E_{s,c} / Σ_s E⁰_{s,c},    relative CE_c = Σ_s (E_{s,c} − E) / Σ_s (E⁰_{s,c} − E⁰),

and mCE and relative mCE are their means over the corruptions. Here all of them are fractions.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from landscape._checks import check_choice, check_count, check_generator, check_type
from landscape.corruptions.apply import check_images, corrupt
from landscape.corruptions.severities import CORRUPTIONS, PROFILES, SEVERITIES, Profile
from landscape.objective import predict
from landscape.probes.corruption_scores import CorruptionScores
from landscape.probes.pixels import Channels, PixelScale, split_image
from landscape.probes.published_corruptions import PublishedCorruptions
from landscape.probes.scores import tracked_batches
from landscape.provenance import forward_provenance
from landscape.restore import untouched
from landscape.results import Provenance, Result


@dataclass(frozen=True)
class RelativeCorruptionError(Result):
    """Corruption errors in units of those of a baseline model; 1 is as good as that one.

    Attributes:
        corruptions: Names of the corruptions.
        ce: `(corruptions,)`: CE, the ratio of the errors summed over severities.
        relative_ce: `(corruptions,)`: relative CE, the ratio of what the corruption adds to the
            clean error, summed likewise.
        mce: Mean of `ce`.
        relative_mce: Mean of `relative_ce`.
        ce_stderr: `(corruptions,)`: standard error of `ce` over the model's samples, the
            baseline's numbers taken as given, like the three below.
        relative_ce_stderr: `(corruptions,)`: that of `relative_ce`.
        mce_stderr: That of `mce`; errors under all corruptions are of the same samples.
        relative_mce_stderr: That of `relative_mce`.
    """

    corruptions: tuple[str, ...]
    ce: np.ndarray
    relative_ce: np.ndarray
    mce: float
    relative_mce: float
    ce_stderr: np.ndarray | None = None
    relative_ce_stderr: np.ndarray | None = None
    mce_stderr: float = math.nan
    relative_mce_stderr: float = math.nan


@dataclass(frozen=True)
class CorruptionRobustness(Result):
    """Error, NLL and calibration of a classifier under corruptions, against the clean images.

    Errors are shares of samples between 0 and 1, NLL is in nats. Increases are corrupted minus
    clean on the same samples, and their standard errors those of paired differences.

    Attributes:
        corruptions: Names of the corruptions.
        severities: Severities, from 1 to 5.
        error: `(corruptions, severities)`: share of samples that are wrong.
        error_stderr: `(corruptions, severities)`: its standard error over samples.
        error_increase: `(corruptions, severities)`: error minus clean error.
        error_increase_stderr: `(corruptions, severities)`: its paired standard error.
        nll: `(corruptions, severities)`: mean negative log-likelihood.
        nll_stderr: `(corruptions, severities)`: its standard error over samples.
        nll_increase: `(corruptions, severities)`: NLL minus clean NLL.
        nll_increase_stderr: `(corruptions, severities)`: its paired standard error.
        ece: `(corruptions, severities)`: expected calibration error over 15 bins.
        clean_error: Error without corruption.
        clean_error_stderr: Its standard error.
        clean_nll: NLL without corruption.
        clean_nll_stderr: Its standard error.
        clean_ece: Expected calibration error without corruption.
        mean_corruption_error: Mean of `error` over corruptions and severities.
        mean_corruption_error_stderr: Its standard error over samples, each sample being the mean
            over its corrupted versions.
        profile: Strengths and kernels, `"imagenet"` or `"cifar"`, or the published files' name.
        seed: Seed of the corruptions, `None` for published files.
        relative: Errors in units of those of the baseline, where one was given.
        provenance: Where the result came from.
        error_covariance: `(1 + corruptions, 1 + corruptions)`: covariance over samples of
            `clean_error` and the means of `error` over severities.
    """

    _plot: ClassVar[str | None] = "corruption_robustness"

    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    error: np.ndarray
    error_stderr: np.ndarray
    error_increase: np.ndarray
    error_increase_stderr: np.ndarray
    nll: np.ndarray
    nll_stderr: np.ndarray
    nll_increase: np.ndarray
    nll_increase_stderr: np.ndarray
    ece: np.ndarray
    clean_error: float
    clean_error_stderr: float
    clean_nll: float
    clean_nll_stderr: float
    clean_ece: float
    mean_corruption_error: float
    mean_corruption_error_stderr: float
    profile: str
    seed: int | None
    relative: RelativeCorruptionError | None
    provenance: Provenance
    error_covariance: np.ndarray | None = None

    def relative_to(self, baseline: "CorruptionRobustness") -> RelativeCorruptionError:
        """Return CE, mCE and their relative forms; the formulas stand at the top of the module.

        Args:
            baseline: Result of the baseline model, for the same corruptions and severities.

        Returns:
            The ratios, NaN or infinite where the baseline makes no (additional) error.

        Raises:
            ValueError: If corruptions, severities or profile differ.
        """
        _check_alike(baseline, self.corruptions, self.severities, self.profile)
        covariance = self.error_covariance
        if covariance is None:  # saved before there was one
            covariance = np.full((1 + len(self.error),) * 2, np.nan)
        increase = np.eye(len(covariance))[1:] - np.eye(len(covariance))[0]
        fields: dict[str, Any] = {}
        for prefix, errors, units, spread in (
            ("", self.error, baseline.error, covariance[1:, 1:]),
            (
                "relative_",
                self.error_increase,
                baseline.error_increase,
                increase @ covariance @ increase.T,
            ),
        ):
            with np.errstate(divide="ignore", invalid="ignore"):
                unit = units.mean(1)
                ce, spread = errors.mean(1) / unit, spread / np.outer(unit, unit)
                stderrs = np.sqrt(spread.diagonal().clip(0)), np.sqrt(spread.mean().clip(0))
            fields |= {f"{prefix}ce": ce, f"{prefix}ce_stderr": stderrs[0]}
            fields |= {f"{prefix}mce": float(ce.mean()), f"{prefix}mce_stderr": float(stderrs[1])}
        return RelativeCorruptionError(corruptions=self.corruptions, **fields)


def corruption_robustness(
    model: nn.Module,
    data: Iterable[Any],
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    profile: Profile = "imagenet",
    source: PublishedCorruptions | None = None,
    baseline: CorruptionRobustness | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> CorruptionRobustness:
    """Measure a classifier under common corruptions (Hendrycks & Dietterich, 2019).

    Images are turned back into bytes, corrupted on the model's device and normalised again. What a
    sample gets depends on the seed and on its place in the data, not on batches or on the model, so
    that models are compared on the same corrupted images. `landscape.corruptions.corrupt` says how
    `profile` differs and that frost is procedural. Bytes are exact for float32 inputs; a bfloat16
    model sees images that are off by up to a grey level. Cost: 1 + corruptions · severities
    forward passes over the data (76 by default), in one pass over it.

    Args:
        model: Any module that returns a tensor `(n, classes)` or has it as `.logits`; left as it
            was found.
        data: Re-iterable of batches, each `(x, y)` or a mapping with `pixel_values`; images
            `(n, c, h, w)` of 1 or 3 channels and at least 32×32 pixels, unless `source` is given.
        corruptions: Names, of the 15 in `landscape.corruptions.CORRUPTIONS`.
        severities: Severities, from 1 to 5.
        profile: `"imagenet"` (ImageNet-C) or `"cifar"` (CIFAR-C, for 32×32 pixels).
        source: Published files to take the corrupted images from instead of making them; `data`
            are then the clean images in the order of the files.
        baseline: Result of another model, for CE and mCE in `relative`.
        mean: Mean of each channel that x was normalised with, in units of full scale; by default
            `data.mean` and `data.std` where there are such (`DeviceImages`), else 0 and 1.
        std: Standard deviation of each channel, likewise.
        generator: Its initial seed is that of the corruptions; what was drawn from it does not
            matter. `None` is seed 0.
        progress: Show a progress bar.

    Returns:
        The table, with the clean values inside.

    Raises:
        TypeError: If `data` cannot be iterated over twice.
        ValueError: If a name, severity or profile is unknown, pixels are not in 0 … 1 after
            de-normalisation, targets are not those of a classifier, `baseline` was measured
            otherwise, or the images are not those of `source`.
    """
    kinds = PublishedCorruptions | None
    check_type("source", source, kinds, "PublishedCorruptions", "see `load_published_corruptions`")
    check_type("baseline", baseline, CorruptionRobustness | None, "a CorruptionRobustness or None")
    maker = _Maker(profile, check_generator(generator).initial_seed()) if source is None else source
    names = _distinct("corruptions", corruptions, maker.corruptions)
    levels = _distinct("severities", severities, maker.severities)
    check_choice("profile", profile, PROFILES)
    if baseline is not None:
        _check_alike(baseline, names, levels, maker.name)
    scale = PixelScale(data, mean, std)
    began = time.perf_counter()
    batches = tracked_batches(model, data, "Corruption robustness", progress)
    table = CorruptionScores(names, levels)
    with untouched(model), torch.no_grad():
        for inputs, targets, _ in batches:
            x, put = split_image(inputs)
            scale.check(x)
            pixels = to_bytes(x, scale)
            maker.check(pixels)
            truth = table.add_clean(predict(model, inputs), targets)
            for condition, (name, level) in enumerate(table.conditions):
                changed = maker.take(name, level, table.count, pixels, truth.labels)
                changed = from_bytes(changed.to(x.device), scale, x.dtype)
                table.add(condition, predict(model, put(changed)), truth)
            table.close_batch()
    scale.finish()
    maker.finish(table.count)
    result = CorruptionRobustness(
        **table.fields(),
        profile=maker.name,
        seed=maker.seed,
        relative=None,
        provenance=forward_provenance(
            model,
            num_samples=table.count,
            seed=maker.seed,
            seconds=time.perf_counter() - began,
            num_forwards=1 + len(table.conditions),
            settings=scale.settings(),
        ),
    )
    if baseline is None:
        return result
    return dataclasses.replace(result, relative=result.relative_to(baseline))


class _Maker:
    """Makes corrupted images; has the methods of `PublishedCorruptions`."""

    corruptions, severities = CORRUPTIONS, SEVERITIES

    def __init__(self, profile: Profile, seed: int) -> None:
        self.name: Profile = profile
        self.seed = seed

    def check(self, pixels: Tensor) -> None:
        check_images(pixels, "data")

    def take(self, name: str, severity: int, start: int, pixels: Tensor, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return corrupt(pixels, name, severity, profile=self.name, generator=generator, start=start)

    def finish(self, count: int) -> None:
        """Accept any number of samples."""


def to_bytes(x: Tensor, scale: PixelScale) -> Tensor:
    """Return normalised images as bytes, rounded to the nearest and cut off at 0 and 255."""
    mean, std = (t.to(x.device).view(-1, 1, 1) for t in (scale.mean, scale.std))
    return (x.double() * (255 * std) + 255 * mean).round_().clamp_(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor, scale: PixelScale, dtype: torch.dtype) -> Tensor:
    """Return bytes as normalised images, (pixels / 255 − mean) / std."""
    mean, std = (t.to(pixels.device).view(-1, 1, 1) for t in (scale.mean, scale.std))
    working = torch.promote_types(dtype, torch.float32)
    factor, shift = (1 / (255 * std)).to(working), (-mean / std).to(working)
    return (pixels.to(working) * factor + shift).to(dtype)


def _distinct(name: str, values: Iterable[Any], choices: Sequence[object]) -> tuple[Any, ...]:
    """Return the values as a tuple.

    Raises:
        ValueError: If there is none, one comes twice, or one is unknown.
    """
    several = isinstance(values, Iterable) and not isinstance(values, str)
    chosen = tuple(values) if several else ()
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"`{name}` must be a sequence of one or more different values, got {values!r}."
        )
    for value in chosen:
        check_choice(name, value, choices)
        if not isinstance(value, str):
            check_count(name, value, 1)  # 1.0 is among them
    return chosen


def _check_alike(
    baseline: CorruptionRobustness,
    corruptions: tuple[str, ...],
    severities: tuple[int, ...],
    profile: str,
) -> None:
    """Refuse a baseline that was measured otherwise.

    Raises:
        ValueError: If corruptions, severities or profile differ.
    """
    expected = {"corruptions": corruptions, "severities": severities, "profile": profile}
    for name, ours in expected.items():
        theirs = getattr(baseline, name)
        if ours != theirs:
            raise ValueError(
                f"`baseline` must have the same {name}, got {theirs!r} for {ours!r}; measure both "
                "models alike."
            )
