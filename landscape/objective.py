"""The scalar whose landscape is probed: loss + weight decay, on frozen data.

    L(θ) = (1/N) Σ_n loss(f(x_n; θ), y_n) + (λ/2) ‖θ‖²

over all N samples that the data yield, with θ the chosen parameters. A random `transform` is drawn
once per probe: every pass over the data sees the same augmented batches, otherwise two evaluations
of L (or two products with its Hessian) would belong to two different functions.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointFunction

from landscape import trial
from landscape._checks import check_at_least, check_count, check_type
from landscape._names import name_of
from landscape.batches import (
    LABEL_KEYS,
    Inputs,
    Placement,
    PreparedBatch,
    Transform,
    argument_names,
    call_on,
    check_unchanged,
    copied,
    rows_of,
    versions_of,
)
from landscape.caches import Cache, caches_of, emptied
from landscape.frozen import FrozenBatches
from landscape.losses import (
    Loss,
    amount_averaged,
    amount_of_all,
    check_reduction,
    for_loss,
    is_classification,
    loss_settings,
    takes_float32,
)
from landscape.memory import free_memory
from landscape.parameters import Choice, ParameterSpace, call_with, check_parameters
from landscape.restore import (
    check_same_weights,
    eval_mode,
    exclusive,
    own_randomness,
    watched_streams,
)
from landscape.switches import without_fast_path

_HOOKED = "saved tensors are hooked"


@dataclass(frozen=True)
class Objective:
    """What is differentiated: loss, weight decay, transform, parameters.

    Attributes:
        loss: `loss(outputs, targets)` -> mean over the samples of a batch, a scalar. `None` takes
            the `.loss` that the model itself returns (Hugging Face models, mapping batches), which
            must be a mean over samples too: one over tokens is not, where their number differs.
            Labels that are lists of tensors or mappings, as detectors take, go to the model.
            Class weights and ignored labels are understood in `nn.CrossEntropyLoss`, `nn.NLLLoss`
            and `functools.partial` of their functional forms: the mean stays one over all data.
            Outputs in half precision go to cross-entropies and elementwise losses in float32.
        weight_decay: λ of the term (λ/2)‖θ‖² over the chosen parameters.
        transform: `transform(x, y, generator) -> (x, y)` on a batch already on the model's device,
            such as mixup; drawn once per probe and frozen. For a mapping batch, `x` is the mapping.
        parameters: Glob pattern(s) or predicate `(name, parameter)` choosing a subset.
        seed: Seed of the stream that `transform` draws from, a stream of its own for each batch.
    """

    loss: Loss | None = F.cross_entropy
    weight_decay: float = 0.0
    transform: Transform | None = None
    parameters: Choice = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("weight_decay", self.weight_decay, 0.0)
        if self.loss is not None and (isinstance(self.loss, type) or not callable(self.loss)):
            raise ValueError(
                f"`loss` must be a function of outputs and targets, or None, got {self.loss!r}; "
                "make a module of a class, as in `nn.CrossEntropyLoss()`."
            )
        check_reduction(self.loss)
        if self.transform is not None:
            check_transform(self.transform)
        check_parameters(self.parameters)
        check_count("seed", self.seed)

    def describe(self) -> str:
        """Return the objective in one line, for `Provenance`."""
        parts = [f"loss={name_of(self.loss)}", f"weight_decay={self.weight_decay:g}"]
        if self.transform is not None:
            parts.append(f"transform={name_of(self.transform)}, seed={self.seed}")
        if self.parameters is not None:
            choice = self.parameters
            parts.append(f"parameters={name_of(choice) if callable(choice) else choice!r}")
        return ", ".join(parts)

    def freeze(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        keep_bytes: int | None = None,
        check_mean: bool = True,
    ) -> "FrozenObjective":
        """Bind the objective to a model and to one fixed draw of the data.

        Args:
            model: Any module whose outputs are a tensor, or have `.logits`.
            data: Re-iterable of batches, each `(x, y)` or a mapping with a label entry.
            keep_bytes: Prepared batches are kept on the device up to this size, and drawn again
                from the same stream at each pass beyond it; the default is a quarter of the
                free memory.
            check_mean: Check that `loss` is a mean over samples where there are several batches.

        Returns:
            The frozen objective, after one pass over the data, a forward pass of one batch, two of
            16 of its samples (a second one of all in a batch of up to 32), one of two, and one of
            up to 16 samples of a second batch; with `loss=None`, three of one batch, one of two
            samples, and two of 32 samples of two batches, in parts too, with their gradients.
        """
        return FrozenObjective(self, model, data, keep_bytes, check_mean)


def check_transform(transform: Transform) -> None:
    """Refuse what cannot be called as `transform(x, y, generator)`."""
    wanted = "a function of (x, y, generator) that returns (x, y)"
    if not callable(transform):
        raise TypeError(f"`transform` must be {wanted}, got {type(transform).__name__}.")
    with suppress(ValueError):  # a function in C may not tell what it takes
        signature = inspect.signature(transform)
        try:
            signature.bind(None, None, None)
        except TypeError:
            raise TypeError(
                f"`transform` must be {wanted}, got {name_of(transform)}{signature}; pass "
                "`lambda x, y, generator: transform(x, y)` for one of two arguments."
            ) from None


def check_objective(objective: object) -> None:
    """Refuse what is no objective, such as a loss alone."""
    check_type("objective", objective, Objective, "an Objective", "pass `Objective(loss=…)`")


class FrozenObjective:
    """An objective on one model and one fixed draw of the data.

    Attributes:
        objective: The objective.
        model: The model; never changed.
        space: Its chosen parameters, copied at construction.
        batches: The prepared batches, the same at every pass.
        num_samples: Number of samples over all batches.
        num_batches: Number of batches.
        num_left_out: Number of batches besides, which have no sample or label that counts.
        are_kept: Whether the batches are kept, so that none is drawn again.
        recomputes: Whether the model hooks what autograd saves, as gradient checkpointing does.
        draws: Whether a pass moves the global random streams. They are set to a fixed seed for each
            pass and put back, which cannot be recorded on a GPU.
    """

    recomputes = False

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        data: Iterable[Any],
        keep_bytes: int | None = None,
        check_mean: bool = True,
    ) -> None:
        """Draw the data once; see `Objective.freeze`."""
        if parametrize._cache_enabled:  # weights would be those computed from the model's own
            raise RuntimeError(
                "Objectives must be frozen outside `torch.nn.utils.parametrize.cached`, which "
                "keeps weights whatever the parameters are."
            )
        self.objective = objective
        self.model = model
        self.space = ParameterSpace(model, objective.parameters)
        device = self.space.device
        batches = FrozenBatches(
            data,
            placement=Placement.of(model),
            transform=objective.transform,
            seed=objective.seed,
            amount=functools.partial(
                amount_of_all if check_mean else amount_averaged, objective.loss
            ),
            ignore=loss_settings(objective.loss)[1],
            labels=is_classification(objective.loss),
            wide=takes_float32(objective.loss),
            keep_bytes=free_memory(device) // 4 if keep_bytes is None else keep_bytes,
        )
        self.batches: Iterable[PreparedBatch] = batches
        self.num_samples, self.num_batches = batches.num_samples, batches.num_batches
        self.num_left_out = batches.num_drawn - batches.num_batches
        self.are_kept = batches.are_kept
        self._caches: list[Cache] = []
        self._lent: list[tuple[str, Tensor]] = []  # in the place of parameters, while it is tried
        self.draws = False
        self._check_model(batches, check_mean)
        self._lent.clear()

    def of_batch(self, batch: PreparedBatch) -> "FrozenObjective":
        """Return the objective of one mini-batch alone, with the same parameters."""
        view = copy.copy(self)
        view.batches = (dataclasses.replace(batch, weight=1.0),)
        view.num_samples, view.num_batches = batch.size, 1
        return view

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Return the model's raw output in evaluation mode with `parameters` in place."""
        with self.evaluating():
            return self._call(parameters, inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model in evaluation mode, without what it keeps of its own parameters."""
        randomness = own_randomness(self.model) if self.draws else nullcontext()
        with eval_mode(self.model), emptied(self._caches), without_fast_path(), randomness:
            yield

    def logits(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the model's outputs as one tensor."""
        return as_logits(self.outputs(parameters, inputs))

    def data_term(self, parameters: Mapping[str, Tensor], batch: PreparedBatch) -> Tensor:
        """Return the mean loss of one batch, without weight decay."""
        if self.objective.loss is None:
            return self.own_loss(parameters, batch)[0]
        return self.loss(self.logits(parameters, batch.inputs), batch)

    def own_loss(
        self, parameters: Mapping[str, Tensor], batch: PreparedBatch
    ) -> tuple[Tensor, Any]:
        """Return the mean loss of one batch that the model itself gives, and its raw output."""
        outputs = self.outputs(parameters, _with_labels(self.model, batch))
        has_entries = isinstance(outputs, Mapping)
        loss = outputs.get("loss") if has_entries else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                "`loss=None` needs a `model` that returns its own `.loss`, got a "
                f"{type(outputs).__name__} without; pass batches that are mappings with labels, or "
                "`Objective(loss=…)` with a function of outputs and targets."
            )
        return loss, outputs

    def loss(self, logits: Tensor, batch: PreparedBatch) -> Tensor:
        """Return the mean loss of one batch from its logits."""
        if self.objective.loss is None or batch.targets is None:
            raise ValueError(
                "`data` must hold targets for a `loss(outputs, targets)`; pass (x, y), or a "
                f"mapping with one of {LABEL_KEYS}."
            )
        return self.objective.loss(for_loss(self.objective.loss, logits), batch.targets)

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return (λ/2) Σ_p ‖p‖² over the given parameters, accumulated in float64."""
        squares = [p.double().square().sum() for p in parameters.values()]
        return 0.5 * self.objective.weight_decay * torch.stack(squares).sum()

    def value(self, parameters: Mapping[str, Tensor] | None = None) -> float:
        """Return L(θ) over all data; one forward pass.

        Args:
            parameters: The chosen parameters by name; the copied ones by default.
        """
        parameters = self.space.values if parameters is None else parameters
        with torch.no_grad():
            total = self.penalty(parameters)
            for batch in self.batches:
                total = total + batch.weight * self.data_term(parameters, batch).double()
        return float(total)

    def _check_model(self, batches: FrozenBatches, check_mean: bool) -> None:
        if check_mean and self.num_batches > 1 and trial.has_batch_statistics(self.model):
            warnings.warn(
                "`model` has a batch norm without running statistics, which normalises by the "
                "batch in evaluation mode too, so that results depend on how `data` is batched.",
                stacklevel=4,
            )
        batch = next(iter(batches))
        batch = dataclasses.replace(batch, inputs=copied(batch.inputs))  # it may write into them
        inputs, size = batch.inputs, batch.size
        with torch.no_grad(), exclusive(self.model), own_randomness(self.model):
            run = functools.partial(self._call_with_gradient, inputs, size)
            self._caches = caches_of(self.model, run, learned=True)
            if self.objective.loss is None:
                with trial.explained("`model` on", inputs), watched_streams(self.model) as moved:
                    once = self.data_term(self.space.values, batch)
                for _ in range(2):  # two numbers may agree by chance
                    trial.check_same(once, self._again(self.space.values, batch, self.data_term))
                if check_mean and self.num_batches > 1:
                    for one in (batch, self._other_batch(batches)):
                        self._check_own_mean(one)
                self.draws = moved()
                return
            versions = versions_of(inputs)
            weights = {**self.space.fixed, **self.space.values}
            own = [(n, t, t._version) for n, t in weights.items() if not t.is_inference()]
            with trial.explained("`model` on", inputs), watched_streams(self.model) as moved:
                once = self.logits(self.space.values, inputs)
            check_unchanged(inputs, versions)
            known = dict(self.model.named_parameters(remove_duplicate=False))
            check_same_weights([w for w in own if not torch.equal(w[1], known[w[0]])])
            if once.dim() == 0 or len(once) != size:
                raise ValueError(
                    f"`model` must return one output a sample, got shape {tuple(once.shape)} "
                    f"for {size} samples."
                )
            self._check_repeatable(once, inputs, size)
            self.draws = moved()
            loss = self.objective.loss
            trial.check_targets(loss, once, batch.targets)
            trial.check_labels(loss, once, batches.label_range)
            with trial.explained("`loss` on", once, batch.targets), trial.left_as_found(loss):
                value = trial.settled(functools.partial(self.loss, once, batch))
            if check_mean and self.num_batches > 1 and size > 1:
                assert batch.targets is not None  # the loss has been taken of them
                others = functools.partial(self._other_outputs, batches)
                trial.check_mean(loss, for_loss(loss, once), batch.targets, value, others)

    def _other_batch(self, batches: FrozenBatches) -> PreparedBatch:
        """Return another batch than the first: the last, or the second where they are drawn."""
        index = len(batches) - 1 if batches.are_kept else 1
        return next(itertools.islice(batches, index, None))

    def _other_outputs(self, batches: FrozenBatches) -> tuple[Tensor, Tensor]:
        """Return outputs and targets of a few samples of another batch than the first."""
        batch = self._other_batch(batches)
        few = slice(0, trial.FEW)
        outputs = self.logits(self.space.values, rows_of(batch.inputs, batch.size, few))
        assert self.objective.loss is not None  # of the first batch it has been taken
        assert batch.targets is not None  # as the first batch has them
        return for_loss(self.objective.loss, outputs), batch.targets[few]

    def _check_own_mean(self, batch: PreparedBatch) -> None:
        """Refuse a model whose own loss is not a mean over samples, as parts of a batch show."""
        few = min(batch.size, 2 * trial.FEW)
        cut = few // 3 or 1
        parts = [rows for rows in (slice(0, cut), slice(cut, few)) if rows.start < rows.stop]
        try:
            samples = [batch.part(rows) for rows in (slice(0, few), *parts)]
            values = [float(self.data_term(self.space.values, each)) for each in samples]
        except Exception:  # a model that needs batches of one size is spared
            return
        sizes = [part.size for part in samples[1:]]
        trial.check_own_mean(values[0], values[1:], sizes)
        try:
            whole, *each = map(self._own_gradient, samples)
        except Exception:  # a loss that has none
            return
        trial.check_own_gradient(whole, each, sizes)

    def _own_gradient(self, batch: PreparedBatch) -> Tensor:
        leaves = {name: t.detach().requires_grad_() for name, t in self.space.values.items()}
        with torch.enable_grad():
            loss = self.data_term(leaves, batch)
            gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return self.space.flatten(gradient)

    def _call(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Any:
        state = self.space.state(parameters)
        return call_on(functools.partial(call_with, self.model, state), inputs)

    def _call_with_gradient(self, inputs: Inputs, size: int) -> None:
        """Call the model on two samples, or on all where it wants them."""
        parameters = {**self.space.fixed, **self.space.values}
        floating = {name: t for name, t in parameters.items() if t.is_floating_point()}
        leaves = {name: t.detach().requires_grad_() for name, t in floating.items()}
        self._lent += leaves.items()
        with torch.enable_grad():
            try:
                self._call(leaves, rows_of(inputs, size, slice(0, 2)))
            except Exception:
                self._call(leaves, inputs)

    def _check_repeatable(self, once: Tensor, inputs: Inputs, size: int) -> None:
        values, awake = self.space.values, self.space.awake
        few = [slice(0, trial.FEW)] if size > 2 * trial.FEW else []
        # A model that needs batches of one size is called with all of it again.
        for rows in few if awake is values else [*few, slice(0, size)]:
            with suppress(Exception):
                part = rows_of(inputs, size, rows) if rows.stop < size else inputs
                once = self.logits(awake, part)
                values, inputs = awake, part
                break
        # A model may hook its activations where gradients are enabled: they must have some.
        leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
        trial.check_same(once, self._again(leaves, inputs, self.logits))

    def _again(self, values: Mapping[str, Tensor], data: Any, run: Callable[..., Tensor]) -> Tensor:
        """Return what a pass gives that records its graph, and look at that."""
        try:
            with torch.enable_grad(), disable_saved_tensors_hooks(_HOOKED), _noted() as noted:
                again = run(values, data)
            self.recomputes = self.recomputes or bool(noted)
        except RuntimeError as error:
            if _HOOKED not in str(error):
                raise
            self.recomputes = True
            again = run(values, data)
        trial.check_reached(self.model, self.space.values, again, self._lent)
        return again.detach()


@contextmanager
def _noted() -> Iterator[list[None]]:
    """Yield a list that grows where a model computes something without a graph, to be repeated.

    The reentrant form of gradient checkpointing does. Where its input needs no gradient, as that of
    a first layer, nothing else would show it.
    """
    calls: list[None] = []
    apply: Callable[..., Any] = CheckpointFunction.apply

    def noted(*args: Any) -> Any:
        calls.append(None)
        return apply(*args)

    with _one_at_a_time, patch.object(CheckpointFunction, "apply", noted):
        yield calls


_one_at_a_time = threading.Lock()  # patches of two threads would put each other back


def as_logits(outputs: Any) -> Tensor:
    """Return a model's output as one tensor: itself, or its `logits`.

    Raises:
        TypeError: If there is no such tensor.
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    elif not isinstance(outputs, Tensor) and hasattr(outputs, "logits"):
        outputs = outputs.logits
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"`model` must return a tensor or an object with `.logits`, got "
            f"{type(outputs).__name__}; wrap the model."
        )
    return outputs


def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the outputs of a model for one batch, a tensor or keyword arguments, as one tensor."""
    return as_logits(call_on(model, inputs))


def outputs_of(model: nn.Module, inputs: Inputs) -> Any:
    """Return the logits of a model for one batch, or all that it returns where it has none."""
    outputs = call_on(model, inputs)
    with suppress(TypeError):
        return as_logits(outputs)
    return outputs


def _with_labels(model: nn.Module, batch: PreparedBatch) -> Inputs:
    """Return the arguments of a model that takes its own loss, by its name for the labels."""
    if batch.targets is None or not isinstance(batch.inputs, Mapping):
        return batch.inputs
    arguments = argument_names(model)
    key = next((key for key in LABEL_KEYS if key in arguments), LABEL_KEYS[0])
    return {**batch.inputs, key: batch.targets}
