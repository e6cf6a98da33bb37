"""Claims of the paper next to what was measured: a table that says where they disagree."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Measured:
    """A number with its interval.

    Attributes:
        value: The number.
        low: Lower end of its 95 % interval; NaN where there is none, which decides nothing.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


ZERO = ("no change", Measured(0, 0, 0))
"""The other side of a claim that something rises or falls."""


def estimated(value: float, stderr: float) -> Measured:
    """Return a number with its normal 95 % interval."""
    return Measured(float(value), float(value - 1.96 * stderr), float(value + 1.96 * stderr))


def averaged(values: ArrayLike) -> Measured:
    """Return the mean of several values with the 95 % interval of their spread; NaN without."""
    values = np.asarray(values, dtype=float)
    if values.size < 2:
        return Measured(float(values.mean()) if values.size else math.nan, math.nan, math.nan)
    return estimated(values.mean(), values.std(ddof=1) / math.sqrt(values.size))


@dataclass(frozen=True)
class Claim:
    """A claim of the form `smaller < larger`.

    Attributes:
        text: The claim, in the paper's terms.
        quantity: What was measured.
        smaller: Name and number of the side that should be smaller.
        larger: Name and number of the side that should be larger.
    """

    text: str
    quantity: str
    smaller: tuple[str, Measured]
    larger: tuple[str, Measured]

    @property
    def verdict(self) -> str:
        """Compare the intervals: agrees, disagrees, or undecided where they overlap."""
        if self.smaller[1].high < self.larger[1].low:
            return "agrees"
        if self.smaller[1].low > self.larger[1].high:
            return "disagrees"
        return "undecided"


def format_table(claims: list[Claim]) -> str:
    """Return the claims as a Markdown table."""
    rows = ["| claim of the paper | measured | | | here |", "|---|---|---|---|---|"]
    for claim in claims:
        sides = sorted((claim.smaller, claim.larger), key=lambda side: side[0])
        cells = " | ".join(f"{name} {measured}" for name, measured in sides)
        rows.append(f"| {claim.text} | {claim.quantity} | {cells} | {claim.verdict} |")
    return "\n".join(rows)
