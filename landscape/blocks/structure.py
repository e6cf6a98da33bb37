"""The residual blocks of a model, found in its trace.

A value is a *cut* when everything that reaches the output passes through it. A residual unit is an
addition whose sum is a cut and one of whose terms, the skip, is an ancestor of the other, the
branch, or (a projection) the shorter way from the last cut. That is how every residual network is
built, whatever its classes are called: a transformer block has two such sums, one behind the
attention and one behind the MLP; where they work side by side, `x + f(x) + g(x)`, the sum before is
the skip of the next. What the branch computes says of which kind the unit is.

Where something else is handed on beside the sums (a query that all blocks of a stage share), those
before the last one are no cuts; they are found as the skips of the sums behind them. Where maps are
handed on to be concatenated (U-Nets), or streams run beside each other, a sum is one whose branch
serves nothing else, begins where its skip does, and lies in no other branch. Where a decoder adds
the maps of an encoder, the branches of these sums are networks, whose units are the blocks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from landscape.blocks.tracing import INPUT, Step, Trace

Kind = Literal["stem", "conv", "msa", "mlp", "pool", "head", "other"]

ADDITIONS = frozenset({"add", "addcmul"})
ACTIVATIONS = frozenset({"relu", "relu6", "gelu", "silu", "hardswish", "leaky_relu", "mish", "elu"})
FUSED = frozenset(
    {"scaled_dot_product_attention", "multi_head_attention_forward"}
    | {"_native_multi_head_attention"}
)
PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
WEIGHTED = FUSED | CONVOLUTIONS | {"linear", "matmul", "softmax", "opaque"}
POOLING = frozenset(
    {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
    | {"lp_pool2d", "interpolate", "pixel_unshuffle"}
)


@dataclass(frozen=True)
class Unit:
    """One block of a traced model.

    Attributes:
        name: Name, unique in the model: that of the module that is the block where there is one.
        kind: What it computes.
        value: Its output, a step of the trace.
        addition: The step that adds branch and skip; `None` where there is no residual sum.
        skip: Position of the skip among the addition's tensor arguments.
        source: The value that the skip is, or is made of.
        projected: Whether the skip is a projection of the block's input, not the input itself.
        branch: Steps of the branch, in order.
        is_cut: Whether everything that follows depends on the output alone.
    """

    name: str
    kind: Kind
    value: int
    addition: int | None = None
    skip: int | None = None
    source: int | None = None
    projected: bool = False
    branch: tuple[int, ...] = ()
    is_cut: bool = True


def find_units(trace: Trace) -> list[Unit]:
    """Return stem, residual units, what lies between them, and head, in order.

    Args:
        trace: A forward pass.

    Returns:
        The units; none where the model has no residual sum on its path.
    """
    graph = _Graph(trace)
    residual = graph.residual_units()
    if not residual:
        return []
    units = sorted([*residual, *_plain_siblings(graph, residual)], key=lambda unit: unit.value)
    found: list[Unit] = []
    entry = graph.entry(units[0])
    if entry != INPUT and trace.steps[entry].ordinal is not None:
        found.append(Unit("stem", "stem", entry))
    for unit in units:
        between = graph.between(found[-1].value, graph.entry(unit)) if found else None
        found += [unit] if between is None else [between, unit]
    if len(trace.outputs) == 1:
        found.append(Unit("head", "head", trace.outputs[0]))
    return _uniquely_named(found)


def named_units(trace: Trace, paths: list[str]) -> list[Unit]:
    """Return the outputs of the named modules, in the order in which they are computed.

    Args:
        trace: A forward pass.
        paths: Names of modules; one that runs twice counts twice.

    Returns:
        The units, of the kind that their inside says.

    Raises:
        ValueError: If a module does not run, returns nothing that depends on the input, or makes
            calls that cannot be seen.
    """
    graph = _Graph(trace)
    found = []
    for path in paths:
        spans = [i for i, span in enumerate(trace.spans) if span.path == path]
        outputs = [(i, trace.spans[i].output) for i in spans]
        if not any(value is not None and value != INPUT for _, value in outputs):
            raise ValueError(
                f"`choose` must name modules that compute a feature map, but {path!r} "
                f"{'returns none' if spans else 'does not run in the forward pass'}."
            )
        for span, value in outputs:
            if value is not None and value != INPUT:
                if trace.steps[value].ordinal is None:
                    raise ValueError(
                        f"`choose` must name modules whose inside can be seen, got {path!r}; pass "
                        "the module that it was scripted or exported from."
                    )
                steps = tuple(
                    s for s in range(trace.spans[span].first, trace.spans[span].end)
                    if trace.steps[s].follows
                )  # fmt: skip
                known = graph.unit_with_output(value)
                unit = known or Unit(path, graph.kind(steps), value, branch=steps)
                found.append(replace(unit, name=path, is_cut=graph.is_cut(value)))
    return _uniquely_named(sorted(found, key=lambda unit: unit.value))


def modules_in_line(trace: Trace) -> list[str]:
    """Return modules of one parent through whose outputs everything passes, in order.

    Numbered ones, where there are any, and the most; in a model of several streams, through which
    there is no such passage, those that lie together. None where no module returns what was made.
    """
    graph = _Graph(trace)
    children: dict[int, list[str]] = {}
    streams: dict[str, list[str]] = {}
    for span in trace.spans[1:]:
        if span.output is not None and graph.is_cut(span.output):
            children.setdefault(span.parent, []).append(span.path)
        elif span.output is not None and span.path.count(".") <= 1:
            streams.setdefault(span.path.rpartition(".")[0], []).append(span.path)

    def suited(paths: list[str]) -> tuple[bool, int]:
        return paths[0].rpartition(".")[2].isdigit(), len(paths)

    return max((children or streams).values(), key=suited, default=[])


def share_outside(trace: Trace, units: list[Unit]) -> float:
    """Return the share of the weighted steps before the head that lie in no unit's branch."""
    inside = {step for unit in units for step in unit.branch}
    last = max((unit.value for unit in units if unit.kind != "head"), default=INPUT)
    weighted = [i for i, step in enumerate(trace.steps) if step.follows and step.name in WEIGHTED]
    outside = [i for i in weighted if i not in inside and i <= last]
    return len(outside) / max(len(weighted), 1)


def attention_of(trace: Trace, branch: tuple[int, ...]) -> list[Step]:
    """Return the calls of a branch that weigh values of the input by what it says itself.

    A softmax is one where its weights go into a matrix product with something else of the input.
    Gates of convolutional networks do not (SK, ResNeSt), or know of one query alone, which is no
    product itself (the context of GCNet). A product may be spelled out as the sum of `a * b`, where
    the softmax is that of such a sum, and a factor in one.
    """
    steps = trace.steps
    products = {s for s in branch if steps[s].name in PRODUCTS and len(set(steps[s].inputs)) > 1}
    known = products | {s for s in branch if steps[s].name == "softmax"}
    behind: dict[int, set[int]] = {}  # products and softmaxes that a step depends on
    for s in branch:
        direct = known.intersection(steps[s].inputs)
        behind[s] = direct.union(*(behind.get(value, ()) for value in steps[s].inputs))
    weighing = set().union(*(behind[product] for product in products)) - products
    spelled = _spelled_out(steps, branch)

    def has_queries(s: int) -> bool:
        shape, dim = steps[s].shape or (1,), steps[s].dim
        rows = math.prod(shape) // shape[-1 if dim is None else dim]
        return rows > trace.num_samples or bool(behind[s] & products)

    return [
        steps[s] for s in branch
        if steps[s].name in FUSED or s in spelled or (s in weighing and has_queries(s))
    ]  # fmt: skip


def _spelled_out(steps: list[Step], branch: tuple[int, ...]) -> set[int]:
    """Return the softmaxes of a sum of products that are factors in a sum of products."""
    products: set[int] = set()
    factors: set[int] = set()
    for s in branch:
        summed = steps[s].inputs[0] if steps[s].name == "sum" else INPUT
        if summed != INPUT and steps[summed].name == "mul" and len(set(steps[summed].inputs)) > 1:
            products.add(s)
            factors.update(_origin(steps, value) for value in steps[summed].inputs)
    softmaxes = [s for s in branch if steps[s].name == "softmax" and s in factors]
    return {s for s in softmaxes if _origin(steps, steps[s].inputs[0]) in products}


def _origin(steps: list[Step], value: int) -> int:
    """Return the value that this one is a view, or a multiple, or the like of."""
    while value != INPUT and len(steps[value].inputs) == 1:
        if steps[value].name in WEIGHTED | {"sum"}:
            break
        value = steps[value].inputs[0]
    return value


class _Graph:
    """The dataflow of a trace, from the input to the logits."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.steps = trace, trace.steps
        self._relevant = set().union(*(self._ancestors(v, INPUT) for v in trace.outputs))
        self._users: dict[int, set[int]] = {value: set() for value in [INPUT, *self._relevant]}
        for step in self._relevant:
            for value in self.steps[step].inputs:
                if value in self._users:
                    self._users[value].add(step)
        self.cuts = self._find_cuts()
        for value in trace.outputs:  # what is returned on the way is no way around what follows
            self._users[value].add(len(self.steps))
        self._cut_set = frozenset(self.cuts)
        self._ran = {span.path for span in trace.spans}
        self._units: list[Unit] | None = None

    def is_cut(self, value: int) -> bool:
        """Whether every way from the input to the output passes through a value."""
        return value in self._cut_set

    def residual_units(self) -> list[Unit]:
        """Return every residual sum that is a cut, a skip of one, or lies beside all of these."""
        if self._units is None:
            candidates = (self._residual(step) for step in self.cuts if step != INPUT)
            found = [unit for unit in candidates if unit is not None]
            found += [before for unit in found for before in self._skips(unit)]
            found = [unit for unit in found if not self._is_network(unit)]
            inside = {step for unit in found for step in (unit.addition, *unit.branch)}
            for step in sorted(self._relevant, reverse=True):  # the outer sum is the later one
                unit = None if step in inside else self._residual(step)
                if unit and self._is_of_samples(step) and not self._is_network(unit):
                    inside.update(unit.branch)
                    found.append(unit)
            self._units = [self._placed(unit, found) for unit in found]
        return self._units

    def _skips(self, unit: Unit) -> Iterator[Unit]:
        """Yield the residual units whose sums are skips of one another, and are no cuts."""
        current: Unit | None = unit
        while current is not None and current.addition is not None and current.skip is not None:
            step = self.steps[current.addition]
            value = step.inputs[step.positions.index(current.skip)]
            current = None if self.is_cut(value) else self._residual(value, alone=False)
            if current is not None:
                yield current

    def unit_with_output(self, value: int) -> Unit | None:
        """Return the residual unit whose output is `value`."""
        return next((unit for unit in self.residual_units() if unit.value == value), None)

    def entry(self, unit: Unit) -> int:
        """Return the unit's input: the last cut before its own module begins, or what it takes."""
        if not unit.is_cut and unit.source is not None:
            return unit.source
        start = unit.branch[0] if unit.branch else unit.value
        step = self.steps[unit.value if unit.addition is None else unit.addition]
        if step.span > 0:
            start = min(start, self.trace.spans[step.span].first)
        return self._last_cut_before(start)

    def between(self, last: int, entry: int) -> Unit | None:
        """Return what changes the size of the map between two units, if anything does."""
        if entry <= last:
            return None
        span = tuple(sorted(self._ancestors(entry, last)))
        if not any(self._work(span)) or self.steps[entry].ordinal is None:
            return None
        path = self._module_of(span)
        if not any(ran.path == path and ran.output == entry for ran in self.trace.spans):
            inner = {s for s in self._relevant if self.trace.path(s).startswith(f"{path}.")}
            if any(self._work(inner.difference(span))):  # that module does more
                path = self.trace.path(max(s for s in span if any(self._work([s]))))
        return Unit(path or "pool", "pool", entry)

    def kind(self, branch: tuple[int, ...]) -> Kind:
        """Return what a branch is: attention, else a convolution over space, else linear maps."""
        if attention_of(self.trace, branch):
            return "msa"
        if any(_kernel(self.steps[s]) > 1 for s in branch):
            return "conv"
        names = {self.steps[s].name for s in branch}
        return "mlp" if names & ({"linear"} | CONVOLUTIONS) else "other"

    def _find_cuts(self) -> list[int]:
        """Return the values through which every way from the input to the last output passes."""
        cuts, open_until = [INPUT], max(self._users[INPUT], default=INPUT)
        for s in sorted(self._relevant):
            if open_until <= s:  # no earlier value is used after this one was made
                cuts.append(s)
            open_until = max([open_until, *self._users[s]])
        return cuts

    def _residual(self, s: int, alone: bool = True) -> Unit | None:
        """Return the residual unit whose sum is step `s`, if it is one.

        Args:
            s: The step.
            alone: Whether its branch must take what its skip takes, and serve nothing else.
        """
        step = self.steps[s]
        if step.name not in ADDITIONS or len(set(step.inputs)) != 2:
            return None
        if any(step.sizes[position] != step.shape for position in step.positions):
            return None
        own = [self._own(value, s) for value in step.inputs]
        before = self._sum_before(s, own)
        if before is not None:  # the branches of the sum before are blocks of their own
            own[before[0]] = set()
        work = [self._work(steps) for steps in own]
        if work[0] == work[1]:
            return None
        skip = int(work[0] > work[1])
        value, branch = step.inputs[skip], own[1 - skip]
        source = self._taken(own[skip]) or {value if before is None else before[1]}
        if alone and before is None and not source <= self._taken(branch):
            return None
        size = max(math.prod(self._shape(taken)) for taken in source)
        branch = branch | self._way(max(source), step.inputs[1 - skip])
        projected = any(work[skip]) or size != math.prod(self._shape(s))
        end = self._end(s)
        return Unit(
            name="",
            kind=self.kind(tuple(sorted(branch))),
            value=end,
            addition=s,
            skip=step.positions[skip],
            source=max(source),
            projected=projected,
            branch=tuple(sorted(branch)),
            is_cut=self.is_cut(end),
        )

    def _is_network(self, unit: Unit) -> bool:
        """Whether a branch is little else than residual units in a row, which are the blocks then.

        A decoder that adds maps of the encoder makes a branch of what lies between the two.
        """
        branch = set(unit.branch)
        sums = (self._residual(s) for s in unit.branch)
        inner = [u for u in sums if u is not None and branch.issuperset(u.branch)]
        ends = {u.value for u in inner}
        ways = (self._way(u.source, u.value) for u in inner if u.source is not None)
        few = 4 * self._work(branch.difference(*ways))[0] < self._work(branch)[0]
        return few and any(u.source in ends for u in inner)

    def _sum_before(self, s: int, own: list[set[int]]) -> tuple[int, int] | None:
        """Return which term is `x + f(x)` in the sum `s` of `x + f(x) + g(x)`, and `x`."""
        values = self.steps[s].inputs[:2]
        for position, value in enumerate(values):
            terms = self._terms(value, s)
            if len(terms) > 1 and any(self._work(own[1 - position])):
                parts = {*terms, values[1 - position]}
                for x in terms:
                    if all(self._way(x, part) for part in parts - {x}):
                        return position, x
        return None

    def _is_whole(self, value: int) -> bool:
        """Whether the first or the second axis of a value is that of the samples."""
        return self.trace.num_samples in self._shape(value)[:2]

    def _is_of_samples(self, value: int) -> bool:
        """Whether a value is whole, or its first axis that of pieces of the samples."""
        shape = self._shape(value)
        pieces = len(shape) > 2 and shape[0] % self.trace.num_samples == 0
        return pieces or self._is_whole(value)

    def _terms(self, value: int, s: int) -> list[int]:
        """Return what is added up to `value`, which serves the step `s` alone if it is a sum."""
        terms, todo = [], [(value, s)]
        while todo:
            value, s = todo.pop()
            if self._users[value] == {s} and value != INPUT and self.steps[value].name in ADDITIONS:
                todo += [(term, value) for term in self.steps[value].inputs]
            else:
                terms.append(value)
        return terms

    def _own(self, value: int, s: int) -> set[int]:
        """Return the steps that reach an output through `value` as a term of the step `s` alone."""
        own: set[int] = set()
        todo = {value} if self._users[value] == {s} else set()
        while (current := max(todo, default=INPUT)) != INPUT:  # users are newer than what they use
            todo.remove(current)
            if current == value or self._users[current] <= own:
                own.add(current)
                todo.update(self.steps[current].inputs)
        return own

    def _way(self, start: int, end: int) -> set[int]:
        """Return the steps by which `end` depends on `start`."""
        way: set[int] = set()
        for s in sorted(self._ancestors(end, start)):
            if not (way | {start}).isdisjoint(self.steps[s].inputs):
                way.add(s)
        return way

    def _taken(self, steps: set[int]) -> set[int]:
        """Return the values that some steps take from others."""
        return {value for step in steps for value in self.steps[step].inputs} - steps

    def _work(self, steps: Iterable[int]) -> tuple[int, int]:
        """Return how many steps have weights, or products, and how many pool."""
        names = [self.steps[step].name for step in steps]
        return sum(n in WEIGHTED for n in names), sum(n in POOLING for n in names)

    def _shape(self, value: int) -> tuple[int, ...]:
        return (self.trace.input_shape if value == INPUT else self.steps[value].shape) or ()

    def _end(self, s: int) -> int:
        """Return the block's output: the sum, or what its module makes of the sum alone."""
        owner, size = self.steps[s].span, math.prod(self._shape(s))
        while len(users := self._users[s]) == 1:
            (t,) = users
            if t == len(self.steps):
                break
            step = self.steps[t]
            inside = owner > 0 and self.trace.inside(t, owner)
            if (
                set(step.inputs) != {s}
                or step.shape is None
                or step.name in ADDITIONS | WEIGHTED | POOLING
                or not (inside or step.name in ACTIVATIONS)
                or math.prod(step.shape) != size
                or self._is_whole(t) != self._is_whole(s)
            ):
                break
            s = t
        return s

    def owner(self, unit: Unit, units: list[Unit]) -> int:
        """Return the span that adds, or one around it that holds the branch and no other sum."""
        assert unit.addition is not None
        adds = owner = self.steps[unit.addition].span
        weighted = [s for s in unit.branch if self.steps[s].name in WEIGHTED]
        while owner > 0 and not all(self.trace.inside(s, owner) for s in weighted):
            owner = self.trace.spans[owner].parent
        sums = sum(self.trace.inside(u.addition or 0, owner) for u in units)
        is_unit = owner > 0 and self.trace.spans[owner].output == unit.value and sums == 1
        return owner if is_unit else adds

    def _placed(self, unit: Unit, units: list[Unit]) -> Unit:
        """Name a unit by the module that it is, or else by the module that holds its branch."""
        owner = self.owner(unit, units)
        alone = sum(self.steps[u.addition or 0].span == owner for u in units) <= 1
        if owner > 0 and alone and self.trace.spans[owner].output == unit.value:
            return replace(unit, name=self.trace.spans[owner].path)
        return replace(unit, name=self._module_of(unit.branch, owner))

    def _module_of(self, steps: tuple[int, ...], owner: int = 0) -> str:
        """Return the deepest module below `owner` that holds every weighted step."""
        weighted = [s for s in steps if self.steps[s].name in WEIGHTED | POOLING] or list(steps)
        weighted = [s for s in weighted if self.trace.inside(s, owner)] or weighted
        paths = [self.trace.path(s).split(".") for s in weighted]
        shared: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        path, whole = ".".join(shared), self.trace.spans[owner].path
        if len(path) <= len(whole):  # some are held elsewhere
            path = self._caller_of(weighted)
        if path in {"", whole}:  # several children: the last one's is the output
            longer = range(len(shared) + 1, len(paths[-1]) + 1)
            ran = (".".join(paths[-1][:end]) for end in longer)
            path = next((path for path in ran if path in self._ran), path)
        return path

    def _caller_of(self, steps: list[int]) -> str:
        """Return the innermost module that calls what makes all steps, wherever that is held."""
        last = self.steps[steps[-1]].span
        while not all(self.trace.inside(s, last) for s in steps):
            last = self.trace.spans[last].parent
        return self.trace.spans[last].path

    def _last_cut_before(self, s: int) -> int:
        return max((cut for cut in self.cuts if cut < s), default=INPUT)

    def _ancestors(self, value: int, after: int) -> set[int]:
        """Return `value` and what it depends on among the steps after the value `after`."""
        found: set[int] = set()
        todo = [value]
        while todo:
            current = todo.pop()
            if current > after and current not in found:
                found.add(current)
                todo += self.steps[current].inputs
        return found


def _plain_siblings(graph: _Graph, units: list[Unit]) -> Iterator[Unit]:
    """Yield blocks of the same classes that have no residual sum (they change the size)."""
    trace, steps = graph.trace, graph.steps
    owners = [graph.owner(unit, units) for unit in units]
    kinds = {trace.spans[owner].kind for owner in owners if owner > 0}
    kinds -= {nn.Module, nn.Sequential}
    for index, span in enumerate(trace.spans):
        if span.kind not in kinds or span.output is None or not graph.is_cut(span.output):
            continue
        inside = tuple(s for s in range(span.first, span.end) if steps[s].follows)
        if inside and not any(owner == index or trace.inside(u.addition or 0, index)
                              for owner, u in zip(owners, units, strict=True)):  # fmt: skip
            yield Unit(span.path, graph.kind(inside), span.output, branch=inside)


def _uniquely_named(units: list[Unit]) -> list[Unit]:
    """Number the further calls of one module: `block`, `block#2`."""
    seen: dict[str, int] = {}
    named = []
    for unit in units:
        seen[unit.name] = count = seen.get(unit.name, 0) + 1
        named.append(unit if count == 1 else replace(unit, name=f"{unit.name}#{count}"))
    return named


def _kernel(step: Step) -> int:
    """Return the largest side of a convolution's kernel, 0 for another step."""
    if step.name not in CONVOLUTIONS or len(step.sizes) < 2:
        return 0
    return max(step.sizes[1][2:], default=0)
