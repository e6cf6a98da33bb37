"""What the Hessian benchmark runs: workloads, solvers and turns, in three sizes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import solvers
import workloads
from workloads import Batch

Which = Literal["LM", "BE"]  # of eigenvalues: largest by magnitude, both ends

OURS = ("landscape", "landscape, certify=False")
ALL = tuple(solvers.EIGENVALUES)
USUAL = tuple(solver for solver in ALL if solver not in solvers.SLOW)
ESTIMATES = tuple(solvers.DENSITIES)


@dataclass(frozen=True)
class Workload:
    """One question to some solvers.

    Attributes:
        name: `"W1"` … `"W5"`.
        model: Its model.
        images: Images of a batch.
        batches: Number of batches.
        each: Whether every batch has a Hessian of its own, instead of one over all of them.
        density: Steps and probes of an eigen-density; `None` asks for the 5 largest eigenvalues.
        part: Whether this is a smaller stand-in, for peers that are too slow for the whole.
        solvers: Who takes part, where installed.
        turns: How many turns each has; 1 where it is not named.
    """

    name: str
    model: str
    images: int
    batches: int = 1
    each: bool = False
    density: tuple[int, int] | None = None
    part: bool = False
    solvers: tuple[str, ...] = USUAL
    turns: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Return the number of images, and of batches where there are several."""
        several = f"{self.batches} x {self.images}" if self.batches > 1 else str(self.images)
        return f"{several}, each" if self.each else several

    @property
    def title(self) -> str:
        """Return the name with steps and probes of a density."""
        return self.name + (" {} x {}".format(*self.density) if self.density else "")

    @property
    def k(self) -> int:
        """Number of eigenvalues in the reference."""
        return 2 if self.density else 5

    @property
    def which(self) -> Which:
        """Which eigenvalues: both ends of a density, or the largest by magnitude."""
        return "BE" if self.density else "LM"

    def groups(self) -> list[list[Batch]]:
        """Return the batches of each Hessian."""
        data = workloads.batches(self.batches, self.images)
        return [[batch] for batch in data] if self.each else [data]


@dataclass(frozen=True)
class Preset:
    """Workloads, and the models they are on."""

    steps: int  # of training
    sizes: dict[str, dict[str, int]]  # model -> its sizes
    workloads: tuple[Workload, ...]

    def only(self, names: list[str], rounds: int | None) -> Iterator[Workload]:
        """Yield the workloads of these names, with as many turns of every solver if given."""
        for workload in self.workloads:
            if workload.name in names:
                turns = (
                    workload.turns if rounds is None else dict.fromkeys(workload.solvers, rounds)
                )
                yield replace(workload, turns=turns)


CONV, VIT = "resnet20", "vit_micro"
SIZES: dict[str, dict[str, int]] = {CONV: {}, VIT: {}}
NATIVE, SCRIPT = "landscape", "kept graph + eigsh"
STARTS = {NATIVE: 5}
DENSITY_STARTS = {NATIVE: 3, "products alone": 3}
# Next to ours on a part: those that take too long on the whole.
OF_W3 = (NATIVE, "PyHessian", *solvers.SLOW, "hessian-eigenthings")
OF_W5 = (NATIVE, "hessian-eigenthings", SCRIPT)

DEFAULT = Preset(
    steps=200,
    sizes=SIZES,
    workloads=(
        Workload("W1", CONV, 64, turns=STARTS),
        Workload("W2", VIT, 64, turns=STARTS),
        Workload("W3", CONV, 64, batches=8, solvers=(NATIVE, SCRIPT)),
        Workload("W3", CONV, 16, batches=2, part=True, solvers=OF_W3),
        Workload("W4", CONV, 64, density=(80, 1), solvers=(NATIVE, "products alone")),
        Workload("W4", CONV, 64, density=(64, 4), solvers=(NATIVE,)),
        Workload("W4", CONV, 16, density=(80, 1), part=True, solvers=ESTIMATES),
        Workload("W5", CONV, 16, batches=10, each=True, solvers=(*OURS, "PyHessian")),
        Workload("W5", CONV, 16, batches=2, each=True, part=True, solvers=OF_W5),
        Workload("W5", VIT, 16, batches=10, each=True, solvers=(*OURS, "PyHessian")),
        Workload("W5", VIT, 16, each=True, part=True, solvers=OF_W5),
    ),
)
FULL = Preset(
    steps=200,
    sizes=SIZES,
    workloads=(
        Workload("W1", CONV, 64, solvers=ALL, turns=dict.fromkeys(ALL, 5)),
        Workload("W2", VIT, 64, solvers=ALL, turns=dict.fromkeys(ALL, 5)),
        Workload("W3", CONV, 64, batches=8, solvers=ALL),
        Workload("W4", CONV, 64, density=(80, 1), solvers=ESTIMATES, turns=DENSITY_STARTS),
        Workload("W4", CONV, 64, density=(64, 4), solvers=ESTIMATES, turns=DENSITY_STARTS),
        Workload("W5", CONV, 16, batches=10, each=True, solvers=ALL, turns=dict.fromkeys(ALL, 2)),
        Workload("W5", VIT, 16, batches=10, each=True, solvers=ALL, turns=dict.fromkeys(ALL, 2)),
    ),
)
NANO = "vit_nano"
QUICK = Preset(
    steps=10,
    sizes={CONV: {"width": 4}, NANO: {"dim": 24, "depth": 2, "heads": 3}},
    workloads=(
        Workload("W1", CONV, 8),
        Workload("W2", NANO, 8),
        Workload("W3", CONV, 8, batches=2, solvers=OURS),
        Workload("W4", CONV, 8, density=(12, 1), solvers=ESTIMATES),
        Workload("W5", CONV, 4, batches=2, each=True, solvers=OURS),
        Workload("W5", NANO, 4, batches=2, each=True, solvers=OURS),
    ),
)
PRESETS = {"quick": QUICK, "default": DEFAULT, "full": FULL}
