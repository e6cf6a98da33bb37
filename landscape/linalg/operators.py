"""Symmetric linear operators: what the algorithms of this package see of a matrix."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from landscape._checks import check_type

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from landscape.linalg.differences import GradientDifferences


class VectorSpace(Protocol):
    """What a vector is like: an operator and a `ParameterSpace` both say so.

    Attributes:
        dim: Number of entries.
        dtype: Precision.
        device: Device.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device


class SymmetricOperator(ABC):
    """A symmetric matrix known by its products.

    Attributes:
        dim: Number of rows.
        dtype: Precision of its vectors.
        device: Device of its vectors.
        num_matvecs: Number of vectors multiplied so far.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim = dim
        self.dtype = dtype
        self.device = device
        self.num_matvecs = 0

    @abstractmethod
    def _matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the columns of `vectors`, shape `(dim, k)`."""

    def matvec(self, v: Tensor) -> Tensor:
        """Return `A @ v`.

        Args:
            v: Vector of shape `(dim,)`; moved to the operator's precision and device.

        Returns:
            Vector of shape `(dim,)`.

        Raises:
            ValueError: If `v` does not have shape `(dim,)`.
        """
        _check_tensor(v)
        if v.shape != (self.dim,):
            raise ValueError(f"`v` must have shape ({self.dim},), got {tuple(v.shape)}.")
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return `A @ V`, column by column.

        Args:
            vectors: Matrix `V` of shape `(dim, k)`.

        Returns:
            Matrix of shape `(dim, k)`.

        Raises:
            ValueError: If `vectors` does not have shape `(dim, k)`.
        """
        _check_tensor(vectors)
        if vectors.dim() != 2 or len(vectors) != self.dim:
            raise ValueError(
                f"`vectors` must have shape ({self.dim}, k), got {tuple(vectors.shape)}."
            )
        if not vectors.shape[1]:
            return vectors.new_empty(self.dim, 0, dtype=self.dtype, device=self.device)
        self.num_matvecs += vectors.shape[1]
        return self._matmat(vectors.detach().to(self.device, self.dtype))

    def __matmul__(self, other: Tensor) -> Tensor:
        _check_tensor(other)
        return self.matvec(other) if other.dim() == 1 else self.matmat(other)

    def differences(self, certify: bool | float = True) -> "GradientDifferences | None":
        """Return products for a search whose pairs are checked, where that makes it cheaper.

        Args:
            certify: As in `top_eigenpairs`; without, the search is shorter.
        """
        return None

    def to_scipy(self) -> "LinearOperator":
        """Return the operator for SciPy's solvers, in float32 at least, through the host."""
        from scipy.sparse.linalg import LinearOperator  # slow to import

        def product(array: np.ndarray) -> np.ndarray:
            vectors = torch.from_numpy(np.ascontiguousarray(array).reshape(self.dim, -1))
            return to_array(self.matmat(vectors), self.dtype).reshape(array.shape)

        return LinearOperator(
            (self.dim, self.dim),
            matvec=product,
            rmatvec=product,
            matmat=product,
            dtype=to_array(torch.empty(0, device="cpu"), self.dtype).dtype,
        )


def _check_tensor(vectors: object) -> None:
    remedy = "call `torch.as_tensor`, or use `to_scipy()` for NumPy arrays"
    check_type("v", vectors, Tensor, "a tensor", remedy)


def to_array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a tensor as an array of a precision, float32 at least: NumPy has no bfloat16."""
    array: np.ndarray = tensor.to("cpu", torch.promote_types(dtype, torch.float32)).numpy()
    return array


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """Return a generator on a device, seeded by another one where that is on another device.

    A host takes 0.1 s to draw 20 million numbers; a GPU draws them, and draws others.
    """
    if device.type == generator.device.type:
        return generator
    seed = torch.randint(1 << 62, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))


class MatrixOperator(SymmetricOperator):
    """A symmetric matrix given by its entries."""

    def __init__(self, matrix: Tensor) -> None:
        """Wrap a matrix.

        Args:
            matrix: Symmetric, shape `(dim, dim)`, real floating point, finite.

        Raises:
            ValueError: If the matrix is not square, floating, finite and symmetric.
            TypeError: If it is no tensor.
        """
        check_type("matrix", matrix, Tensor, "a tensor", "call `torch.as_tensor`")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"`matrix` must be square, got shape {tuple(matrix.shape)}.")
        if not matrix.is_floating_point():
            raise ValueError(f"`matrix` must be real and floating, got {matrix.dtype}.")
        if not matrix.isfinite().all():
            raise ValueError("`matrix` must be finite, got NaN or infinite entries.")
        scale = matrix.abs().max()
        if (matrix - matrix.T).abs().max() > 100 * torch.finfo(matrix.dtype).eps * scale:
            raise ValueError("`matrix` must be symmetric; pass (M + M.T) / 2.")
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


def not_finite(dtype: torch.dtype) -> ValueError:
    """Return the error of products in this precision with NaN or infinity."""
    message = "`operator` must give finite products, got NaN or infinity"
    if dtype is torch.float16:
        message += "; float16 overflows above 65,504: convert the model with `model.float()`"
    return ValueError(f"{message}.")
