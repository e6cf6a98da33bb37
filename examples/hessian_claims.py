"""Claims about Hessian max eigenvalue spectra of two networks, over runs."""

from collections.abc import Sequence

from claims import Claim, averaged

from landscape import HessianMaxSpectrum

NOTE = (
    "Intervals (95 %, Student's t) are those of the mean over runs with seeds of their own: "
    "initialisation, order, augmentation. Overlapping intervals are called undecided."
)

Side = tuple[str, Sequence[HessianMaxSpectrum]]


def smaller_nep(text: str, smaller: Side, larger: Side, about: int = 1) -> Claim:
    """Return the claim that the loss of one network is more convex than that of another."""
    return _compare(text, "NEP", "nep", smaller, larger, about)


def smaller_ape(text: str, smaller: Side, larger: Side, about: int = 1) -> Claim:
    """Return the claim that the loss of one network is flatter than that of another."""
    return _compare(text, "APE", "ape", smaller, larger, about)


def _compare(text: str, quantity: str, field: str, low: Side, high: Side, about: int) -> Claim:
    sides = [(name, averaged([getattr(s, field) for s in runs])) for name, runs in (low, high)]
    return Claim(text, f"{quantity}, mean over runs", sides[0], sides[1], about)
