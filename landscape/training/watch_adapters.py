"""A `Watch` inside the training loops of other libraries, which are imported at the call only."""

import importlib
from typing import Any

from landscape.training.watch import Watch


def LightningWatch(watch: Watch) -> Any:
    """Return a callback for Lightning that calls `watch` before the first epoch and after each.

        Trainer(callbacks=[LightningWatch(watch)], …)

    The probes see the `LightningModule`: its `forward` must return the logits. In a distributed run
    the process of rank 0 measures alone.

    Args:
        watch: What to measure.

    Returns:
        A `lightning.pytorch.Callback`.

    Raises:
        ImportError: If Lightning is not installed.
    """
    base = importlib.import_module("lightning.pytorch").Callback

    class LightningCallback(base):  # type: ignore[misc, valid-type]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._call(trainer, pl_module, trainer.current_epoch)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self._call(trainer, pl_module, trainer.current_epoch + 1)

        def _call(self, trainer: Any, model: Any, epochs: int) -> None:
            if trainer.is_global_zero:
                watch(model, epochs)

    return LightningCallback()


def TrainerWatch(watch: Watch) -> Any:
    """Return a callback for the Hugging Face `Trainer`, called before training and after epochs.

        Trainer(model, callbacks=[TrainerWatch(watch)], …)

    In a distributed run the process of rank 0 measures alone.

    Args:
        watch: What to measure.

    Returns:
        A `transformers.TrainerCallback`.

    Raises:
        ImportError: If transformers is not installed.
    """
    base = importlib.import_module("transformers").TrainerCallback

    class WatchCallback(base):  # type: ignore[misc, valid-type]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._call(state, kwargs["model"])

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._call(state, kwargs["model"])

        def _call(self, state: Any, model: Any) -> None:
            if state.is_world_process_zero:
                watch(model, round(state.epoch or 0))

    return WatchCallback()
