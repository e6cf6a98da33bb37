"""How the interactive figures look."""

from typing import Any

_FONT = {"family": "Times New Roman, STIXGeneral, serif", "size": 14}

LOOK: dict[str, Any] = {
    "template": "plotly_white",
    "font": _FONT,
    "margin": {"l": 60, "r": 20, "t": 60, "b": 60},
}
"""Layout of every figure."""


_SYMBOLS = {
    r"$\Delta$": "Δ", r"$\lambda$": "λ", r"$\pi$": "π",
    "$a$": "a", "$b$": "b", "$d_1$": "d₁", "$d_2$": "d₂", "\n": "<br>",
}  # fmt: skip


def plotly_text(label: str) -> str:
    """Return the label of an axis of matplotlib in plotly's terms."""
    for written, shown in _SYMBOLS.items():
        label = label.replace(written, shown)
    return label


def named_line(name: str, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with points, named in the legend, in a style of `style.line_styles`."""
    return {"mode": "lines+markers", "name": name, "legendgroup": name, "line": plotly_line(line)}


def plotly_line(line: dict[str, Any]) -> dict[str, str]:
    """Return the colour and dashes of a line of `style.line_styles` in plotly's terms."""
    drawn, named = line["linestyle"], {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
    own = isinstance(drawn, tuple)  # matplotlib's (offset, lengths)
    dash = ",".join(f"{2 * length}px" for length in drawn[1]) if own else named[drawn]
    return {"color": line["color"], "dash": dash}
