"""What `Blocks.capture` returns: the outputs of all blocks, for as long as they are needed."""

from types import TracebackType

from torch import Tensor


class Features(dict[str, Tensor]):
    """Outputs by the names of their blocks, in network order.

    A dictionary, and a context that is empty at its end, so that the memory of all maps of a model
    is not held for longer than they are used.
    """

    def __enter__(self) -> "Features":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear()
