"""How the interactive figures look."""

from typing import Any

_FONT = {"family": "Times New Roman, STIXGeneral, serif", "size": 14}

LOOK: dict[str, Any] = {
    "template": "plotly_white",
    "font": _FONT,
    "margin": {"l": 60, "r": 20, "t": 60, "b": 60},
}
"""Layout of every figure."""


def plotly_line(line: dict[str, str]) -> dict[str, str]:
    """Return the colour and dashes of a line of `style.line_styles` in plotly's terms."""
    dashes = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
    return {"color": line["color"], "dash": dashes[line["linestyle"]]}
