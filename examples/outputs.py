"""What the scripts of the figures write beside each other: pictures, and what they were made of."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from landscape.plot import style


def preset_of(args: argparse.Namespace) -> str:
    """Return the preset that a command line asks for."""
    return "quick" if args.quick else str(args.preset)


def figures_of(preset: str) -> Path:
    """Return where the figures of a preset go."""
    return Path("figures") if preset == "default" else Path("figures") / preset


def save_figure(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write a figure as PNG and PDF, fonts embedded as TrueType; `path` has no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(style.rc()):
        figure.savefig(path.with_suffix(".png"), dpi=dpi)
        figure.savefig(path.with_suffix(".pdf"))


def write_setting(folder: Path, setting: Mapping[str, Any]) -> None:
    """Write what the results in a folder were measured on, and by which command."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    content = {"command": command, **setting}
    (folder / "setting.json").write_text(json.dumps(content, indent=1) + "\n")


def read_setting(folder: Path) -> dict[str, Any]:
    """Return what `write_setting` wrote."""
    setting: dict[str, Any] = json.loads((folder / "setting.json").read_text())
    return setting
