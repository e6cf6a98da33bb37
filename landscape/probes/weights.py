"""Weights moved along directions, all tensors of one precision in one flat update."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from landscape.parameters import shaped


class MovedWeights:
    """θ + Σ_k a_k d_k for any coordinates, computed afresh from θ and rounded once.

    The tensors that move lie one after the other in one vector for each precision, so a point
    takes as many operations as there are directions, whatever the number of tensors.

    Attributes:
        start: θ: every parameter by name, in the memory format of the moved ones.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, Tensor]],
        *,
        channels_last: bool = False,
    ) -> None:
        """Lay out θ and the directions.

        Args:
            start: Every parameter of the model.
            vectors: The d_k, as `Directions.tensors` gives them.
            channels_last: Give four-dimensional tensors this memory format.
        """
        self.start = laid_out(start, channels_last)
        groups: dict[torch.dtype, list[str]] = {}
        for name in vectors[0]:
            groups.setdefault(start[name].dtype, []).append(name)
        self._blocks = [
            _Block(names, dtype, start, vectors, channels_last) for dtype, names in groups.items()
        ]

    def at(self, point: Tensor) -> dict[str, Tensor]:
        """Return the parameters that move, by name.

        Args:
            point: Coordinates (a_1, …), on the device of the weights.
        """
        moved: dict[str, Tensor] = {}
        for block in self._blocks:
            moved.update(block.at(point))
        return moved


def laid_out(tensors: Mapping[str, Tensor], channels_last: bool) -> dict[str, Tensor]:
    """Return tensors by name, the four-dimensional ones with the channels last, or in order."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    return {n: t.contiguous(memory_format=form) if t.dim() == 4 else t for n, t in tensors.items()}


class _Block:
    """The tensors of one precision as one vector."""

    def __init__(
        self,
        names: Sequence[str],
        dtype: torch.dtype,
        start: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, Tensor]],
        channels_last: bool,
    ) -> None:
        self._names, self._dtype, self._channels_last = names, dtype, channels_last
        self._shapes = [start[name].shape for name in names]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._directions = [self._flat(vector) for vector in vectors]
        self._start = self._flat(start).to(self._directions[0].dtype)

    def at(self, point: Tensor) -> dict[str, Tensor]:
        flat = self._start.clone()
        for step, direction in zip(point.to(flat.dtype).unbind(), self._directions, strict=True):
            flat.addcmul_(direction, step)
        pieces = torch.split(flat.to(self._dtype), self._sizes)
        return {
            name: self._shaped(piece, shape)
            for name, piece, shape in zip(self._names, pieces, self._shapes, strict=True)
        }

    def _flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        chosen = [tensors[name] for name in self._names]
        if self._channels_last:
            chosen = [t.permute(0, 2, 3, 1) if t.dim() == 4 else t for t in chosen]
        return torch.cat([t.reshape(-1) for t in chosen])

    def _shaped(self, piece: Tensor, shape: torch.Size) -> Tensor:
        if self._channels_last and len(shape) == 4:
            n, c, h, w = shape
            return piece.view(n, h, w, c).permute(0, 3, 1, 2)
        return shaped(piece, shape)
