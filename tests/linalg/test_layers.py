"""Every layer against PyTorch's own function: value, gradient, Hessian-vector product."""

import gc
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape import HessianOperator, Objective
from landscape.linalg import bilinear
from landscape.linalg.layer_norm import layer_norm
from landscape.linalg.layers import cheap_second_derivatives
from tests import oracles
from tests.cases import make_batches, make_model

BAND = torch.ones(5, 5, dtype=torch.bool).tril(1)
NOTHING = BAND & (torch.arange(5) != 2)[:, None]  # query 2 may attend to nothing
BIAS = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)


def batch_norm(x, *rest, training=False):
    mean, var = torch.linspace(-1, 1, 6).double(), torch.linspace(0.5, 2, 6).double()
    return F.batch_norm(x, mean, var, *rest, training=training)


def halved(x, w, *rest):
    y = F.conv2d(x, w)
    y.mul_(0.5)
    return batch_norm(y, *rest)


# name: (function of its tensors, their shapes, the node that replaces PyTorch's)
CASES = {
    "conv": (F.conv2d, [(2, 4, 5, 5), (6, 4, 3, 3), (6,)], "_Conv"),
    "conv in groups": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=(1, 0), dilation=2, groups=2),
        [(2, 4, 7, 7), (6, 2, 3, 3)],
        "_Conv",
    ),
    "conv, same padding": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        [(2, 4, 5, 5), (6, 4, 3, 3)],
        None,
    ),
    "conv of one image": (F.conv2d, [(4, 5, 5), (6, 4, 3, 3)], None),
    "conv and norm": (
        lambda x, w, s, b: batch_norm(F.conv2d(x, w), s, b),
        [(2, 4, 7, 7), (6, 4, 3, 3), (6,), (6,)],
        "_Conv",
    ),
    "conv of more weights than activations, and norm": (
        lambda x, w, s, b: batch_norm(F.conv2d(x, w), s, b),
        [(2, 4, 5, 5), (6, 4, 3, 3), (6,), (6,)],
        "_Normalise",
    ),
    "conv with bias and bare norm": (
        lambda x, w, b: batch_norm(F.conv2d(x, w, b)),
        [(2, 4, 7, 7), (6, 4, 3, 3), (6,)],
        "_Conv",
    ),
    "conv and norm in training": (
        lambda x, w, s, b: batch_norm(F.conv2d(x, w), s, b, training=True),
        [(2, 4, 5, 5), (6, 4, 3, 3), (6,), (6,)],
        None,
    ),
    "conv, changed, norm": (halved, [(2, 4, 7, 7), (6, 4, 3, 3), (6,), (6,)], "_Normalise"),
    "norm alone": (batch_norm, [(2, 6, 5, 5), (6,), (6,)], "_Normalise"),
    "norm of rows": (batch_norm, [(4, 6), (6,), (6,)], "_Normalise"),
    "norm, no shift": (batch_norm, [(2, 6, 3), (6,)], "_Normalise"),
    "bare norm": (lambda x: batch_norm(x.sin()), [(2, 6, 5, 5)], "_Normalise"),
    "linear": (F.linear, [(4, 3, 5), (6, 5), (6,)], "_Linear"),
    "linear without bias": (F.linear, [(4, 5), (6, 5)], "_Linear"),
    "conv by keyword": (
        lambda x, w: F.conv2d(stride=2, weight=w, input=x),
        [(2, 4, 5, 5), (6, 4, 1, 1)],
        "_Conv",
    ),
    "linear by keyword": (lambda x, w: F.linear(input=x, weight=w), [(4, 5), (6, 5)], "_Linear"),
    "linear, weight by keyword": (lambda x, w: F.linear(x, weight=w), [(4, 5), (6, 5)], "_Linear"),
    "attention by keyword": (
        lambda q, k, v: F.scaled_dot_product_attention(q, value=v, key=k),
        [(2, 5, 4)] * 3,
        "_Attention",
    ),
    "linear of one vector": (F.linear, [(5,), (6, 5)], None),
    "linear of nothing": (
        lambda x, w, b: F.linear(x[:, :0], w[:, :0], b),
        [(4, 5), (6, 5), (6,)],
        None,
    ),
    "linear, bias of a row": (F.linear, [(4, 5), (6, 5), (1, 6)], None),
    "relu": (F.relu, [(3, 5)], "_Relu"),
    "normalize": (lambda x: F.normalize(x, dim=(0, -1)), [(3, 2, 5)], "Mul"),
    "normalize by another norm": (lambda x: F.normalize(x, 1.0), [(3, 5)], "Div"),
    "relu, scaled": (lambda x, w: F.relu(x) * w, [(3, 5), (3, 5)], "Mul"),
    "relu of torch": (torch.relu, [(3, 5)], "_Relu"),
    "relu in place": (lambda x: F.relu(1 * x, inplace=True), [(3, 5)], None),
    "gelu": (F.gelu, [(3, 5)], "_Gelu"),
    "linear, gelu, linear": (
        lambda x, w, b, u, c: F.linear(F.gelu(F.linear(x, w, b)), u, c),
        [(4, 3, 5), (7, 5), (7,), (6, 7), (6,)],
        "_Mlp",
    ),
    "linear, gelu, linear without biases": (
        lambda x, w, u: F.linear(F.gelu(F.linear(x, w)), u),
        [(4, 5), (7, 5), (6, 7)],
        "_Mlp",
    ),
    "layer norm, linear, gelu, linear, with everything seen besides": (
        lambda x, s, t, w, b, u, c: (
            lambda h: (
                F.linear(h, u, c)
                + F.linear(h.tanh(), u) * F.gelu(h).sum()
                + F.linear(F.dropout(F.gelu(h), 0.5, training=False), u, c)
            )
        )(F.linear(F.layer_norm(x, (5,), s, t), w, b)),
        [(4, 5), (5,), (5,), (7, 5), (7,), (6, 7), (6,)],
        "Add",
    ),
    "linear, gelu, changed, linear": (
        lambda x, w, u: F.linear(F.gelu(F.linear(x, w)).mul_(0.5), u),
        [(4, 5), (7, 5), (6, 7)],
        "_Linear",
    ),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [(3, 5)], None),
    "layer norm": (lambda x, *r: F.layer_norm(x, (5,), *r), [(3, 5), (5,), (5,)], "Add"),
    "layer norm, bare of a shift": (lambda x, w: F.layer_norm(x, (5,), w), [(3, 5), (5,)], "Mul"),
    "layer norm and linear, twice": (
        lambda x, s, t, w, u, b: sum(
            F.linear(y, a, c) for y in [F.layer_norm(x, (5,), s, t)] for a, c in ((w, b), (u, None))
        ),
        [(4, 3, 5), (5,), (5,), (6, 5), (6, 5), (6,)],
        "Add",
    ),
    "bare layer norm and linear": (
        lambda x, w: F.linear(F.layer_norm(x, (5,)), w),
        [(4, 5), (6, 5)],
        "_Linear",
    ),
    "layer norm, changed, linear": (
        lambda x, s, w: F.linear(F.layer_norm(x, (5,), s).mul_(0.5), w),
        [(4, 5), (5,), (6, 5)],
        "_Linear",
    ),
    "bare layer norm": (lambda x: F.layer_norm(x, (5,)), [(3, 4, 5)], "Clone"),
    "layer norm of two": (lambda x: F.layer_norm(x, (4, 5)), [(3, 4, 5)], None),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 5, 4)] * 3, "_Attention"),
    "attention in a band": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BAND, scale=0.3),
        [(2, 3, 5, 4)] * 3,
        "_Attention",
    ),
    "attention at scale 0": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.0),
        [(2, 5, 4)] * 3,
        "_Attention",
    ),
    "attention to nothing": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=NOTHING),
        [(2, 5, 4)] * 3,
        "_Attention",
    ),
    "attention to fewer keys, with a bias": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=BIAS[:, :3]),
        [(2, 5, 4), (2, 3, 4), (2, 3, 4)],
        "_Attention",
    ),
    "attention with a trained bias": (
        F.scaled_dot_product_attention,
        [(2, 5, 4), (2, 5, 4), (2, 5, 4), (5, 5)],
        None,
    ),
    "causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 5, 4)] * 3,
        None,
    ),
    "a layer under vmap": (lambda x: vmap(F.gelu)(x), [(3, 5)], None),
}


ROWS = torch.tensor([[0.0], [0.01], [1.0], [2.0]], dtype=torch.float64)

# What PyTorch gets wrong, or cannot do, against its own functions that it can do.
MENDED = {
    "weight norm": (
        lambda v, g: torch._weight_norm(v, g, 0),
        lambda v, g: g * F.normalize(v, dim=1),
        [(4, 3), (4, 1)],
    ),
    "weight norm of the last": (
        lambda v, g: torch._weight_norm(v, g, 2),
        lambda v, g: g * v / v.flatten(0, 1).norm(dim=0),
        [(4, 3, 2), (1, 1, 2)],
    ),
    "weight norm of all": (
        lambda v, g: torch._weight_norm(v, g, -1),
        lambda v, g: g * v / v.norm(),
        [(4, 3), ()],
    ),
    "normalize, of zeros too": (
        lambda x: F.normalize(ROWS * x, eps=0.1),
        lambda x: torch.cat([10 * ROWS[:2] * x[:2], x[2:] / x[2:].norm(dim=1, keepdim=True)]),
        [(4, 3)],
    ),
    "hard sigmoid": (
        lambda x: F.hardsigmoid(4 * x) * x,
        lambda x: (4 * x / 6 + 0.5).clamp(0, 1) * x,
        [(40,)],
    ),
    "hard sigmoid in place": (
        lambda x: F.hardsigmoid(y := 4 * x, inplace=True) * x + y,
        lambda x: (4 * x / 6 + 0.5).clamp(0, 1) * (x + 1),
        [(40,)],
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_mended_function_equals_its_definition(name, generator):
    function, definition, shapes = MENDED[name]
    leaves = [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]
    tangents = [torch.randn(s, generator=generator).double() for s in shapes]
    with cheap_second_derivatives():
        found = evaluate(function, leaves, tangents)
    torch.testing.assert_close(found, evaluate(definition, leaves, tangents))


def evaluate(function, tensors, tangents):
    """Output, gradient and Hessian-vector product of Σ sin(function) at the tensors."""
    with sdpa_kernel(SDPBackend.MATH):
        out = function(*tensors)
        wanted = [t for t in tensors if t.requires_grad]
        gradient = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)
        pairs = [(g, v) for g, v in zip(gradient, tangents, strict=True) if v is not None]
        product = torch.autograd.grad([g for g, _ in pairs], wanted, [v for _, v in pairs])
    return out, [*gradient, *product]


def in_place(function):
    """What follows a layer in place, as `nn.ReLU(inplace=True)` does."""
    return lambda *tensors: function(*tensors).mul_(0.7)


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_pytorch(name, generator):
    function, shapes, node = CASES[name]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tangents = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def compare(needed, directions):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        expected, derivatives = evaluate(function, leaves, directions)
        with cheap_second_derivatives():
            out, found = evaluate(function, leaves, directions)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, derivatives, rtol=1e-9, atol=1e-11)
        expected_node = node or _made_by(expected)
        if node == "_Mlp" and not all(needed):  # layer by layer without an input or weights
            expected_node = ("_Mlp", "_Linear")
        assert _made_by(out).startswith(expected_node)
        if "relu" in name:
            return  # PyTorch's needs its output, too
        _, expected = evaluate(in_place(function), leaves, directions)
        with cheap_second_derivatives():
            _, found = evaluate(in_place(function), leaves, directions)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    compare([True] * len(shapes), tangents)
    for index in range(len(shapes)):
        # a direction that leaves out one tensor, and a tensor that is no variable
        if len(shapes) > 1:
            compare(
                [True] * len(shapes), [t if i != index else None for i, t in enumerate(tangents)]
            )
            if name != "attention with a trained bias":
                compare(
                    [i != index for i in range(len(shapes))],
                    [t for i, t in enumerate(tangents) if i != index],
                )


def _made_by(tensor):
    node = tensor.grad_fn
    while type(node).__name__ == "ViewBackward0":
        node = node.next_functions[0][0]
    return type(node).__name__


def test_attention_part_by_part_is_the_same(generator, monkeypatch):
    leaves = [torch.randn(5, 2, 5, 4, generator=generator).double() for _ in range(6)]
    tensors, tangents = [t.requires_grad_() for t in leaves[:3]], leaves[3:]
    with cheap_second_derivatives():
        _, whole = evaluate(F.scaled_dot_product_attention, tensors, tangents)
        monkeypatch.setattr("landscape.linalg.attention.CACHED", 2 * 2 * 5 * 5)  # 2 of 5 at a time
        _, parts = evaluate(F.scaled_dot_product_attention, tensors, tangents)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_rows_part_by_part_are_the_same(generator, monkeypatch):
    function, shapes, _ = CASES["linear, gelu, linear"]
    leaves = [torch.randn(s, generator=generator).double() for s in 2 * shapes]
    tensors, tangents = [t.requires_grad_() for t in leaves[:5]], leaves[5:]
    with cheap_second_derivatives():
        _, whole = evaluate(function, tensors, tangents)
        monkeypatch.setattr("landscape.linalg.mlp.FEWEST", 5)  # 12 rows: 5, 5 and 2
        monkeypatch.setattr("landscape.linalg.mlp.CACHED", 1)
        _, parts = evaluate(function, tensors, tangents)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_as_on_a_gpu(biased, generator):
    x, w, b = (torch.randn(s, generator=generator).double() for s in ((3, 5, 6), (6,), (6,)))
    tensors = [t.requires_grad_() for t in ([x, w, b] if biased else [x, w])]

    def norm(x, w, b=None):
        return layer_norm(x.transpose(0, 1), w, b, 1e-3)

    expected = F.layer_norm(x.transpose(0, 1), (6,), w, b if biased else None, 1e-3)
    torch.testing.assert_close(norm(*tensors), expected)
    assert torch.autograd.gradcheck(norm, tensors)
    assert torch.autograd.gradgradcheck(norm, tensors)


def test_autocast_and_half_precision_are_left_alone():
    x, w = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    with cheap_second_derivatives():
        assert _made_by(F.linear(x, w)) == "_LinearBackward"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = F.linear(x, w)
        assert out.dtype == torch.bfloat16
        half = F.linear(x.bfloat16(), w.bfloat16())
    assert _made_by(half) != "_LinearBackward" != _made_by(F.linear(x, w))


def test_a_dropped_graph_is_freed():
    gc.collect()
    gc.disable()  # what only the collector could free is a reference cycle
    try:
        perceptron = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        model = nn.Sequential(nn.Flatten(2), perceptron, nn.LayerNorm(4), nn.GELU())
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(16, 3)).double()
        for made in (model, make_model("attention"), make_model("conv")):
            outputs = []
            watch = made.register_forward_hook(
                lambda *args, kept=outputs: kept.append(ref(args[2]))
            )
            operator = HessianOperator(made, make_batches((7,)))
            watch.remove()
            operator @ torch.ones(operator.dim)
            graph = ref(operator._graphs[0].gradient[0])
            del operator
            assert graph() is None
            assert outputs
            assert all(output() is None for output in outputs)
    finally:
        gc.enable()


class Cut(nn.Module):
    """Layers that are made anew with their neighbours, with a cut in the graph between these."""

    def __init__(self, cut, *layers):
        super().__init__()
        self.first, self.second = nn.Sequential(*layers[:-1]), layers[-1]
        self.cut, self.head = cut, nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.second(self.cut(self.first, x)).flatten(1))


def under_no_grad(first, x):
    with torch.no_grad():
        return first(x)


def detached(first, x):
    y = first(x)
    return y.detach() if y._is_view() else y.detach_()


def begun_again(first, x):
    return under_no_grad(first, x).requires_grad_()


def hooked(first, x):
    y = first(x)
    if y.requires_grad:
        y.register_hook(lambda g: 0.5 * g)
    return y


made_with_neighbours = pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        lambda: (nn.LayerNorm(2), nn.Linear(2, 5)),
        lambda: (nn.Linear(2, 5), nn.GELU(), nn.Linear(5, 2)),
        lambda: (nn.Linear(2, 5), nn.GELU()),
    ],
    ids=["conv", "layer norm", "mlp", "gelu"],
)


@made_with_neighbours
def test_a_hook_between_layers_is_noticed(layers):
    model, batches = Cut(hooked, *layers()).double(), make_batches((7,))
    model(batches[0][0])
    with pytest.raises(ValueError, match="changes a gradient by a hook"):
        HessianOperator(model, batches)


@pytest.mark.parametrize("cut", [under_no_grad, detached, begun_again])
@made_with_neighbours
def test_a_cut_between_layers_stays_one(layers, cut, generator):
    model, batches = Cut(cut, *layers()), make_batches((7,))
    x, y = batches[0]
    model.double()(x)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    model.eval()
    operator = HessianOperator(model, batches)
    v = torch.randn(operator.dim, generator=generator, dtype=torch.float64)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    kept = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, **kept)])
    product = torch.autograd.grad(gradient @ v, parameters, allow_unused=True)
    parts = [
        torch.zeros_like(p) if h is None else h for p, h in zip(parameters, product, strict=True)
    ]
    torch.testing.assert_close(operator.gradient(), gradient.detach())
    torch.testing.assert_close(operator.matvec(v), torch.cat([h.flatten() for h in parts]))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_attention_over_nothing_is_pytorchs(shape):
    q = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with cheap_second_derivatives():
        assert F.scaled_dot_product_attention(q, q, q).shape == shape


class Energy(nn.Module):
    """Its outputs are a gradient of its own."""

    def __init__(self, *layers):
        super().__init__()
        self.energy = nn.Sequential(*layers)

    def forward(self, x):
        with torch.enable_grad():
            x = x.flatten(1).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return slope[:, :3]


def test_a_gradient_within_the_model_is_refused_where_it_would_be_wrong():
    batches = make_batches((7,))
    for middle in (nn.GELU(), nn.LayerNorm(16)):
        model = Energy(nn.Linear(16, 16), middle, nn.Linear(16, 1)).double()
        with pytest.raises(RuntimeError, match="must not take a gradient with `create_graph=True`"):
            HessianOperator(model, batches)


@pytest.mark.parametrize("middle", [nn.GELU(), nn.BatchNorm1d(16)], ids=["gelu", "batch norm"])
def test_a_gradient_within_the_model_is_refused_behind_other_layers_too(middle):
    """Behind no linear layer a GELU is one by itself."""
    model = Energy(nn.Linear(16, 16), nn.Tanh(), middle, nn.Linear(16, 1)).double()
    with pytest.raises(RuntimeError, match="must not take a gradient with `create_graph=True`"):
        HessianOperator(model, make_batches((7,)))


@pytest.mark.parametrize("chosen", [["1.bias"], ["1.bias", "4.weight"], ["1.*"], ["0.*", "1.bias"]])
def test_a_group_norm_of_which_some_parameters_are_chosen(chosen):
    """In the bias alone PyTorch's own crashes behind a convolution in channels-last format."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1),
        nn.GroupNorm(2, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    batches, names = make_batches((7,)), [n for n, _ in model.named_parameters()]
    names = [
        n for n in names if n in chosen or n.startswith(tuple(c[:2] for c in chosen if "*" in c))
    ]
    operator = HessianOperator(model, batches, Objective(parameters=chosen))
    matrix = operator @ torch.eye(operator.dim, dtype=torch.float64)
    torch.testing.assert_close(matrix, oracles.dense(model, batches, names=names))


@pytest.mark.parametrize("learned", ["mean", "var"])
def test_learned_statistics_are_pytorchs_to_refuse(learned):
    x, mean, var = torch.randn(2, 6, 5), torch.zeros(6), torch.ones(6)
    {"mean": mean, "var": var}[learned].requires_grad_()
    with cheap_second_derivatives(), pytest.raises(RuntimeError, match="not differentiable"):
        F.batch_norm(x, mean, var)


class ByDefinition(nn.Module):
    """A norm with scale and shift over some dimensions."""

    def __init__(self, *dims):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.dims = dims

    def forward(self, x):
        var, mean = torch.var_mean(x, self.dims, unbiased=False, keepdim=True)
        z = (x - mean) * torch.rsqrt(var + 1e-5)
        return torch.addcmul(self.bias[:, None, None], self.weight[:, None, None], z)


class Column(nn.Module):
    """Pixels in a column."""

    def forward(self, x):
        return x.flatten(2)[..., None]


@pytest.mark.parametrize("sizes", [(1,), (7,), (4, 1)], ids=str)
@pytest.mark.parametrize(
    ("norm", "dims"),
    [
        (nn.InstanceNorm2d(4, affine=True), (2, 3)),
        (nn.BatchNorm2d(4, track_running_stats=False), (0, 2, 3)),
    ],
    ids=["instance", "batch"],
)
@pytest.mark.parametrize("shaped", [nn.Identity(), Column()], ids=["image", "column"])
@pytest.mark.filterwarnings("ignore:`model` has a batch norm without:UserWarning")
def test_norms_in_which_a_size_is_one(sizes, norm, dims, shaped):
    """PyTorch may take their gradient for one of another memory format."""
    own, by_definition = (
        nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.Tanh(), shaped, norm, shaped, nn.Tanh(), nn.Conv2d(4, 3, 1)
        ).double()
        for norm in (norm, ByDefinition(*dims))
    )
    by_definition.load_state_dict(own.state_dict())
    for batch in make_batches(sizes):
        operator = HessianOperator(own, [batch], Objective(loss=flat_cross_entropy))
        matrix = operator @ torch.eye(operator.dim, dtype=torch.float64)
        expected = oracles.dense(by_definition, [batch], loss=flat_cross_entropy)
        torch.testing.assert_close(matrix, expected)


def flat_cross_entropy(outputs, targets):
    return F.cross_entropy(outputs.flatten(1), targets)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("own", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("padding", [0, "valid"])
def test_kernels_that_break_in_channels_last_format_are_taken_in_the_other(
    channels, own, padding, generator, monkeypatch
):
    """oneDNN writes beyond a buffer: such a gradient would be wrong, or end the process."""
    first = []

    def spy(g, x, weight, *rest):
        if weight.shape[2:] == (1, 1) and rest[-1][1]:
            # strides tell more than `is_contiguous`, which is true of kernels of one pixel
            first.append([t.stride() == torch.empty(t.shape).stride() for t in (x, weight)])
        x, weight = (t.clone(memory_format=torch.contiguous_format) for t in (x, weight))
        return torch.ops.aten.convolution_backward(g, x, weight, *rest)

    monkeypatch.setattr(bilinear, "_convolution_backward", spy)
    narrow = nn.Conv2d(channels, 8, 1, stride=2, padding=padding)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), narrow, nn.Flatten())
    model = model.to(memory_format=own)
    data = [(torch.randn(6, 3, 9, 9, generator=generator), torch.arange(6))]
    operator = HessianOperator(model, data)
    operator.matvec(torch.randn(operator.dim, generator=generator))
    assert len(first) > 1
    assert all(x == (channels < 16) for x, _ in first)
    assert channels == 16 or all(weight for _, weight in first)
