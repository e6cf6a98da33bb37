"""Values of another type: the error names the argument, before the data are read."""

import numpy as np
import pytest
import torch
from torch import nn

import landscape
from landscape._checks import check_at_least, check_choice, check_count, check_positive, is_number


class Untouched(nn.Module):
    """A model that must not be called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        raise AssertionError("work was done")


class Unread:
    """Data that must not be read."""

    def __iter__(self):
        raise AssertionError("work was done")


STATES = [{"weight": torch.full((2, 3), float(step))} for step in range(3)]

PROBES = [
    ("loss_surface", {"span": None}, r"`span` must be a number, \(low, high\) or .* got None"),
    ("loss_surface", {"span": "3"}, "`span` must be a number, .* got '3'"),
    ("loss_surface", {"points": "x"}, "`points` must be a number or finite .* got 'x'"),
    ("loss_surface", {"metrics": None}, "`metrics` must be a string or several, got NoneType; "),
    ("loss_surface", {"metrics": (1,)}, "`metrics` must be a string or several, got int"),
    ("loss_surface", {"tol": np.inf}, "`tol` must be finite, got inf"),
    ("loss_line", {"tol": "x"}, "`tol` must be a number, got 'x'"),
    ("loss_line", {"resume": -1}, "`resume` must be a path, got int"),
    ("frequency_robustness", {"width": "x"}, "`width` must be positive and finite, got 'x'"),
    ("frequency_robustness", {"width": 1e30}, r"`width` must be at most 3.0, .* got 1e\+30"),
    ("frequency_robustness", {"norm": None}, "`norm` must be positive and finite, got None"),
    ("frequency_robustness", {"frequencies": "x"}, "`frequencies` must be numbers .* got 'x'"),
    ("adversarial_robustness", {"step_size": "x"}, "`step_size` must be positive .* got 'x'"),
    ("adversarial_robustness", {"radii": "x"}, "`radii` must be numbers from 0 .* got 'x'"),
    ("adversarial_robustness", {"radii": None}, "`radii` must be numbers from 0 .* got None"),
    ("adversarial_robustness", {"mean": "x", "std": 1}, "`mean` must be a number .* got 'x'"),
    ("corruption_robustness", {"mean": 0, "std": "x"}, "`std` must be a number .* got 'x'"),
    ("corruption_robustness", {"source": 3}, "`source` must be PublishedCorruptions, got int; see"),
    ("corruption_robustness", {"baseline": 3}, "`baseline` must be a CorruptionRobustness or"),
    ("corruption_robustness", {"severities": 3}, "`severities` must be a sequence .* got 3"),
    ("evaluate", {"num_bins": True}, "`num_bins` must be a whole number, got True"),
    (
        "feature_variance",
        {"blocks": ["*"]},
        r"`blocks` must be Blocks of the model, or None .*, got list; pass B",
    ),
    (
        "fourier_amplitude",
        {"blocks": "*"},
        "`blocks` must be Blocks of the model, or None .*, got str",
    ),
    ("lesion_study", {"blocks": "*"}, "`blocks` must be Blocks of the model, or None .*, got str"),
    ("cka", {"blocks_a": "*"}, "`blocks_a` must be Blocks of the model, or None .*, got str"),
    ("cka", {"model_b": "x"}, "`model_b` must be a torch.nn.Module, got str"),
]


@pytest.mark.parametrize(("probe", "arguments", "message"), PROBES, ids=str)
def test_a_probe_names_what_is_of_another_type(probe, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(landscape, probe)(Untouched(), Unread(), **arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            "architecture",
            {"model": Untouched(), "blocks": "*"},
            "`blocks` must be Blocks of the model, or None",
        ),
        ("random_directions", {"model": Untouched(), "exclude": None}, "`exclude` must be a str"),
        ("random_directions", {"model": Untouched(), "exclude": [3]}, "`exclude` .* got int; pass"),
        ("random_directions", {"model": Untouched(), "parameters": 3}, "`parameters` must be pat"),
        ("polar_trajectory", {"checkpoints": STATES, "model": 3}, "`model` must be a torch.nn.M"),
        ("polar_trajectory", {"checkpoints": 3}, "`checkpoints` must be a folder or a sequence"),
        ("pca_directions", {"checkpoints": STATES, "model": 3}, "`model` must be a torch.nn.Mod"),
        (
            "project_trajectory",
            {"checkpoints": STATES, "directions": None},
            "`directions` must be Directions, got NoneType; make them with",
        ),
        (
            "loss_surface",
            {
                "model": None,
                "data": Unread(),
                "directions": landscape.random_directions(Untouched()),
            },
            "`model` must be a torch.nn.Module, got NoneType",
        ),
    ],
)
def test_a_function_names_what_is_of_another_type(function, arguments, message):
    with pytest.raises(TypeError, match=message):
        getattr(landscape, function)(**arguments)


def test_a_trajectory_is_projected_with_the_model_alone():
    directions = landscape.random_directions(Untouched())
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got int"):
        landscape.project_trajectory(STATES, directions, model=3)


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(0.5), np.int64(2), torch.tensor(0.5), np.array(2)], ids=repr
)
def test_numbers_of_every_library_are_numbers(value):
    assert is_number(value)
    check_positive("x", value)
    check_at_least("x", value, 0.5)


@pytest.mark.parametrize(
    "value", [None, True, np.True_, "1", b"1", 1j, torch.ones(1), np.ones(2), [1]], ids=repr
)
def test_what_is_no_number_is_refused(value):
    assert not is_number(value)
    with pytest.raises(ValueError, match="`x` must be positive and finite, got"):
        check_positive("x", value)
    with pytest.raises(ValueError, match="`x` must be a number, got"):
        check_at_least("x", value, 0)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="`x` must be a whole number, got"):
        check_count("x", value, 0)


@pytest.mark.parametrize("value", [np.ones(2), torch.ones(2)], ids=["array", "tensor"])
def test_an_array_is_no_choice(value):
    with pytest.raises(ValueError, match="`x` must be one of 1, 2, got"):
        check_choice("x", value, (1, 2))
