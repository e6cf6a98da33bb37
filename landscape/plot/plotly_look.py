"""How the plotly figures look."""

_FONT = {"family": "Times New Roman, STIXGeneral, serif", "size": 14}
LOOK = {"template": "plotly_white", "font": _FONT, "margin": {"l": 60, "r": 20, "t": 60, "b": 60}}
"""Layout of every figure."""

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


def plotly_line(line: dict[str, str]) -> dict[str, str]:
    """Return a line of `style.line_styles` in the words of plotly."""
    return {"color": line["color"], "dash": _DASHES[line["linestyle"]]}
