"""What the interactive figures share: their look, and results by label."""

from collections.abc import Mapping
from typing import Any

_FONT = {"family": "Times New Roman, STIXGeneral, serif", "size": 14}

LOOK: dict[str, Any] = {
    "template": "plotly_white",
    "font": _FONT,
    "margin": {"l": 60, "r": 20, "t": 60, "b": 60},
}
"""Layout of every figure."""


def named(results: Any) -> dict[str, Any]:
    """Return results by label, a single one under an empty label.

    Raises:
        ValueError: If `results` is empty.
    """
    by_label = dict(results) if isinstance(results, Mapping) else {"": results}
    if not by_label:
        raise ValueError("`results` must hold at least one result, got an empty mapping.")
    return by_label


def plotly_line(line: dict[str, str]) -> dict[str, str]:
    """Return the colour and dashes of a line of `style.line_styles` in plotly's terms."""
    dashes = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
    return {"color": line["color"], "dash": dashes[line["linestyle"]]}
