"""Write `figures/CLAIMS.md`: every claim of the paper with the verdicts of all figures.

    python examples/summarize_claims.py [--figures figures]

Everything on the page comes from the `claims.json` beside the results of each figure.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims import Claim, read_claims

PAPER = {
    1: "MSAs flatten the loss landscape (smaller Hessian eigenvalues), but the losses of ViTs are "
    "non-convex (negative ones)",
    2: "MSAs are low-pass filters, Convs are high-pass filters; ViT is hurt by low-, ResNet by "
    "high-frequency noise",
    3: "MSAs reduce feature-map variance; Convs and MLPs increase it",
    4: "Multi-stage networks behave like small models in series; MSAs at the end of a stage matter "
    "most",
    5: "AlterNet, whose stages end in MSAs, beats CNNs in small-data regimes too",
    6: "Beside these: a weak inductive bias disturbs the training of ViTs, it does not make them "
    "overfit; global average pooling and local attention predict better",
}
HEAD = """# The paper's claims, and what was measured here

Written by `python examples/summarize_claims.py` from the `claims.json` of every figure. A claim
*agrees* where the 95 % intervals of its two sides lie apart in the paper's order, *disagrees* where
they lie apart in the other, and is *undecided* where they overlap or one has none. The networks are
small, and so are the images: a verdict is about the setting that it names, not about the paper's.
What an interval covers (runs, images, mini-batches, blocks) stands below the table of each figure.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder of figures")
    folder = parser.parse_args().figures
    found = {path.parent.name: read_claims(path) for path in folder.glob("*/claims.json")}
    if not found:
        parser.error(f"{folder} holds no figure with claims (FIGURE/claims.json).")
    (folder / "CLAIMS.md").write_text(page(found), encoding="utf-8")
    print(f"wrote {folder}/CLAIMS.md")


def page(found: dict[str, tuple[list[Claim], dict[str, Any]]]) -> str:
    """Return the page of the claims and settings of every figure."""
    figures = sorted(found, key=lambda name: (not name.startswith("fig"), len(name), name))
    every = [(name, claim) for name in figures for claim in found[name][0]]
    parts = [HEAD]
    for number, text in PAPER.items():
        of_claim = [(name, claim) for name, claim in every if claim.about == number]
        parts.append(f"## {number}. {text}\n\n{_tally(of_claim)}\n")
        if of_claim:
            parts.append(_table(of_claim))
    parts.append("## Settings\n")
    rows = "\n".join(f"| {_label(name)} | {_setting(found[name][1])} |" for name in figures)
    parts.append(f"| figure | networks trained on |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _tally(claims: Sequence[tuple[str, Claim]]) -> str:
    """Return the verdicts in numbers; what two figures share is counted once."""
    if not claims:
        return "Not measured."
    first: dict[Any, str] = {}  # both sides of a comparison -> figure
    counted = [
        claim
        for name, claim in claims
        if first.setdefault((claim.smaller, claim.larger), name) == name
    ]
    counts = Counter(claim.verdict for claim in counted)
    again = len(claims) - len(counted)
    words = {"agrees": "agree", "disagrees": "disagree", "undecided": "undecided"}
    shares = [f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict]]
    tally = f"**{len(counted)} comparisons: {', '.join(shares)}.**"
    return f"{tally} Rows that repeat those of an earlier figure: {again}." if again else tally


def _table(claims: Sequence[tuple[str, Claim]]) -> str:
    rows = ["| figure | part | measured | smaller in the paper | larger | here |"]
    rows.append("|---|---|---|---|---|---|")
    for name, claim in claims:
        sides = " | ".join(f"{side} {value}" for side, value in (claim.smaller, claim.larger))
        evidence = f"[{_label(name)}]({name}_claims.md)"
        verdict = claim.verdict if claim.verdict == "undecided" else f"**{claim.verdict}**"
        rows.append(f"| {evidence} | {claim.text} | {claim.quantity} | {sides} | {verdict} |")
    return "\n".join(rows) + "\n"


def _label(name: str) -> str:
    return name.replace("fig", "Figure ") if name.startswith("fig") else "Appendix C"


def _setting(setting: dict[str, Any]) -> str:
    """Return in words what the networks of a figure were trained on."""
    if "dataset" not in setting:
        models = ", ".join(setting.get("models", []))
        return f"{models}: weights from files, measured on {setting.get('images', 'images')}"
    images = f"{setting['train_images']:,} training images of `{setting['dataset']}`"
    words = f"{images}, {_training(setting)}"
    if "build_up" in setting:
        words += f"; build-up: {_training(setting['build_up'])}"
    return words


def _training(setting: dict[str, Any]) -> str:
    seeds = setting.get("seeds")
    runs = f"{seeds} runs per network" if seeds else "one run per network"
    return f"{setting['epochs']} epochs ({setting['warmup_epochs']} of warm-up), {runs}"


if __name__ == "__main__":
    main()
