"""Independent answers: closed forms, planted spectra, dense float64 autograd."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape import MatrixOperator


def planted(eigenvalues, seed=0, dtype=torch.float64):
    """Dense operator with the given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (q * torch.as_tensor(np.asarray(eigenvalues), dtype=torch.float64)) @ q.T
    return MatrixOperator(((matrix + matrix.T) / 2).to(dtype))


def softmax_regression_hessian(weight, x, weight_decay):
    """Closed form for logits W x: (1/N) Σ (diag p − p pᵀ) ⊗ x xᵀ + λ I, in the order of W.ravel."""
    p = (x @ weight.T).softmax(1)
    dim = weight.numel()
    total = weight_decay * torch.eye(dim, dtype=x.dtype)
    for p_n, x_n in zip(p, x, strict=True):
        curvature = torch.diag(p_n) - torch.outer(p_n, p_n)
        total += torch.kron(curvature, torch.outer(x_n, x_n)) / len(x)
    return total


def _flat_functions(model, names):
    chosen = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    others = {n: p.detach() for n, p in model.named_parameters() if n not in chosen}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}

    def unflatten(vector):
        out, start = {}, 0
        for name, p in chosen.items():
            out[name] = vector[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return out

    def outputs(vector, x):
        state = {**others, **buffers, **unflatten(vector)}
        return functional_call(model, state, (x,))

    return torch.cat([p.reshape(-1) for p in chosen.values()]), outputs


def dense(
    model,
    batches,
    *,
    kind="hessian",
    loss=F.cross_entropy,
    weight_decay=0.0,
    names=None,
    weights=None,
):
    """Dense curvature matrix over all samples at once, by torch.func in the model's precision.

    `weights` are those of the samples in the mean that the loss takes, where they are not equal.
    """
    was_training = model.training
    model.eval()
    x = torch.cat([b[0] for b in batches])
    y = torch.cat([b[1] for b in batches])
    shares = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
    shares = shares / shares.sum()
    theta, outputs = _flat_functions(model, names)
    with sdpa_kernel(SDPBackend.MATH):
        if kind == "hessian":
            matrix = hessian(lambda v: loss(outputs(v, x), y))(theta)
        else:
            jacobian = jacrev(lambda v: outputs(v, x))(theta)  # (n, classes, dim)
            logits = outputs(theta, x)
            if kind == "gauss-newton":
                curvature = hessian(lambda z: loss(z, y))(logits)  # (n, c, n, c)
                matrix = torch.einsum("nci,ncmd,mdj->ij", jacobian, curvature, jacobian)
            elif kind == "fisher":
                p = logits.softmax(1)
                curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
                curvature = curvature * shares[:, None, None]
                matrix = torch.einsum("nci,ncd,ndj->ij", jacobian, curvature, jacobian)
            else:
                slopes = torch.stack(
                    [
                        jacrev(lambda v, i=i: loss(outputs(v, x[i : i + 1]), y[i : i + 1]))(theta)
                        for i in shares.nonzero().flatten().tolist()
                    ]
                )
                matrix = slopes.T @ (slopes * shares[shares > 0, None])
    model.train(was_training)
    return matrix.detach() + weight_decay * torch.eye(len(theta), dtype=theta.dtype)
