"""Models we did not write: their curvature is found like that of ours."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import landscape
from tests.cases import assert_untouched, snapshot

pytestmark = pytest.mark.thirdparty


def zoo(package):
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:  # torchvision refuses the CPU build of torch
        pytest.skip(f"{package} cannot be imported: {error}")


def images(side, count=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, side, side, generator=generator)
    return [(x, torch.randint(10, (count,), generator=generator))]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_timm_models(name):
    timm = zoo("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "depth": 2} if "vit" in name else {}
        model = timm.create_model(name, num_classes=10, **sizes)
    check(model, images(32))


def test_torchvision_models():
    zoo("torchvision")
    from torchvision.models import resnet18, vit_b_16

    with torch.random.fork_rng():
        torch.manual_seed(0)
        check(resnet18(num_classes=10), images(32, 2))
        model = vit_b_16(num_classes=10, image_size=32)
        model.encoder.layers = model.encoder.layers[:2]
        check(model, images(32, 2))


def test_a_timm_model_that_looks_up_its_biases_once():
    timm = zoo("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("efficientvit_m0", num_classes=10).eval().double()
        x, y = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.arange(2)
        with torch.no_grad():
            for p in model.parameters():  # some are zero, and hide what comes before
                p += 0.1 * torch.randn_like(p)
            model(x)  # they are looked up
    operator = landscape.HessianOperator(model, [(x, y)])
    names = [n for n, _ in model.named_parameters()]
    v = torch.cat(
        [torch.full_like(p, "biases" in n).flatten() for n, p in model.named_parameters()]
    )
    found = operator.frozen.space.unflatten(operator @ v)
    model.eval()  # forgotten
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    along = sum(g.sum() for g, n in zip(gradient, names, strict=True) if "biases" in n)
    expected = torch.autograd.grad(along, parameters, materialize_grads=True)
    for name, rows in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], rows, rtol=1e-9, atol=1e-12)
    assert any(rows.any() for name, rows in found.items() if "biases" in name)


def check(model, batches):
    model.train()
    before = snapshot(model)
    result = landscape.hessian_max_spectrum(model, batches, k=1, certify=False)
    assert_untouched(model, before)
    assert result.converged.all()
    # An independent product: the change of the gradient along the eigenvector of largest |λ|.
    operator = landscape.HessianOperator(model, batches)
    pairs = landscape.top_eigenpairs(operator, 1, vectors=True, certify=False)
    np.testing.assert_allclose(pairs.values, result.eigenvalues[0, :1], rtol=2e-3)
    v = torch.from_numpy(pairs.vectors[0])
    residual = (operator @ v - float(pairs.values[0]) * v).norm()
    assert residual <= 2e-2 * abs(pairs.values[0])
