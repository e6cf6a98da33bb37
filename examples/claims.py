"""Claims of the paper next to what was measured: a table that says where they disagree."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from landscape.intervals import mean_interval


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
    """Return a number with its normal 95 % interval; without one where all samples agree."""
    stderr = stderr or math.nan  # all of them right tell little of the share of others
    return Measured(float(value), float(value - 1.96 * stderr), float(value + 1.96 * stderr))


def averaged(values: ArrayLike) -> Measured:
    """Return the mean of several values with the 95 % interval of their spread (Student's t)."""
    return Measured(*mean_interval(values))


def over_runs(runs: Sequence[Measured]) -> Measured:
    """Return the mean over runs with the 95 % interval of their spread; of one, its own."""
    return runs[0] if len(runs) == 1 else averaged([run.value for run in runs])


@dataclass(frozen=True)
class Claim:
    """A claim of the form `smaller < larger`.

    Attributes:
        text: The claim, in the paper's terms.
        quantity: What was measured.
        smaller: Name and number of the side that should be smaller.
        larger: Name and number of the side that should be larger.
        about: Number of the paper's claim that it is part of, as `summarize_claims.py` lists them.
    """

    text: str
    quantity: str
    smaller: tuple[str, Measured]
    larger: tuple[str, Measured]
    about: int

    @property
    def verdict(self) -> str:
        """Compare the intervals: agrees, disagrees, or undecided where they overlap."""
        if self.smaller[1].high < self.larger[1].low:
            return "agrees"
        if self.smaller[1].low > self.larger[1].high:
            return "disagrees"
        return "undecided"


def write_claims(
    out: Path, name: str, claims: Sequence[Claim], note: str, setting: Mapping[str, Any]
) -> str:
    """Write the table of a figure for readers and, beside its results, for `summarize_claims.py`.

    Args:
        out: Folder of the figures.
        name: Name of the figure's files.
        claims: What was compared.
        note: What the intervals mean, and what the setting cannot show.
        setting: What the numbers were measured on.

    Returns:
        The table with its note, in Markdown.
    """
    rows = [{**asdict(claim), "verdict": claim.verdict} for claim in claims]
    content = {"claims": rows, "note": note, "setting": dict(setting)}
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "claims.json").write_text(json.dumps(content, indent=1) + "\n")
    table = f"{format_table(claims)}\n\n{note}\n"
    (out / f"{name}_claims.md").write_text(table, encoding="utf-8")
    return table


def read_claims(path: Path) -> tuple[list[Claim], dict[str, Any]]:
    """Return the claims that `write_claims` wrote, and the setting."""
    content = json.loads(path.read_text())
    claims = []
    for row in content["claims"]:
        sides = {side: (row[side][0], Measured(**row[side][1])) for side in ("smaller", "larger")}
        claims.append(Claim(row["text"], row["quantity"], about=row["about"], **sides))
    return claims, content["setting"]


def format_table(claims: Sequence[Claim]) -> str:
    """Return the claims as a Markdown table."""
    rows = ["| claim of the paper | measured | | | here |", "|---|---|---|---|---|"]
    for claim in claims:
        sides = sorted((claim.smaller, claim.larger), key=lambda side: side[0])
        cells = " | ".join(f"{name} {measured}" for name, measured in sides)
        rows.append(f"| {claim.text} | {claim.quantity} | {cells} | {claim.verdict} |")
    return "\n".join(rows)
