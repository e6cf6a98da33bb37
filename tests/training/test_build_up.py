"""`build_up`: the walk over the stages, the table, and going on after an interruption."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from landscape import evaluate
from landscape.models import alternate, alternet18, resnet20
from landscape.training import BuildUp, DeviceImages, LabelSmoothing, build_up, fit
from landscape.training.build_up import next_step
from tests.cases import assert_untouched, snapshot


def walk(depths, kept, start=None):
    """Follow the rule with a given fate of each step; return stages and networks tried."""
    start = start or (0,) * len(depths)
    done, tried = [], []
    while (step := next_step(depths, start, done)) is not None:
        tried.append(step)
        done.append((step[0], len(done) == 0 or kept(step)))
    return tried


def test_msas_that_always_help_fill_every_stage_from_the_last_to_the_first():
    tried = walk((3, 4, 6, 3), lambda step: True)
    assert [stage for stage, _ in tried] == [-1, 3, 2, 2, 2, 1, 1, 0]
    assert [msas for _, msas in tried] == [
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 1, 1),
        (0, 0, 2, 1),
        (0, 0, 3, 1),
        (0, 1, 3, 1),
        (0, 2, 3, 1),
        (1, 2, 3, 1),
    ]


def test_msas_that_never_help_are_tried_once_a_stage():
    tried = walk((3, 4, 6, 3), lambda step: False)
    assert [msas for _, msas in tried] == [
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 1, 0),
        (0, 1, 0, 0),
        (1, 0, 0, 0),
    ]


def test_the_alternet_of_the_paper_is_the_end_of_its_own_walk():
    target = (0, 1, 3, 2)
    tried = walk((3, 4, 6, 4), lambda step: all(np.array(step[1]) <= target))
    assert [msas for _, msas in tried] == [
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 0, 2),
        (0, 0, 1, 2),
        (0, 0, 2, 2),
        (0, 0, 3, 2),
        (0, 1, 3, 2),
        (0, 2, 3, 2),  # refused: on to the first stage
        (1, 1, 3, 2),  # refused: the end
    ]


def test_a_stage_without_room_is_passed_over_and_msas_that_are_there_stay():
    tried = walk((2, 1, 4), lambda step: True, start=(0, 0, 1))
    assert [msas for _, msas in tried] == [(0, 0, 1), (0, 0, 2), (1, 0, 2)]
    assert walk((1, 1), lambda step: True) == [(-1, (0, 0))]


def make_model(**sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet20(width=2, depths=(2, 2, 3), num_classes=3, in_channels=1, **sizes)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (48, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(48) % 3
    images[labels == 1, :, :4] //= 2
    images[labels == 2, :, :, :4] //= 2
    return DeviceImages(images, labels, mean=(0.5,), std=(0.3,), batch_size=16, shuffle=True)


SETTINGS = {"epochs": 1, "channels_last": False}
SIZES = {"image_size": 8, "window": 2}


def tables_equal(one, other, but=("seconds", "provenance")):
    for name in set(one.__dataclass_fields__) - set(but):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_every_row_is_what_its_network_does_when_it_is_trained_alone(data):
    model = make_model()
    before = snapshot(model)
    table = build_up(model, data, validation=data, train=SETTINGS, **SIZES)
    assert_untouched(model, before)
    assert table.depths == (2, 2, 3)
    assert table.stage[:2].tolist() == [-1, 2]
    assert table.position[:2].tolist() == [-1, 2]
    assert table.msas[0].tolist() == [0, 0, 0]
    assert len(table.stage) == 4  # room for one MSA a stage, and each stage is tried once
    for i, msas in enumerate(table.msas.tolist()):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            twin = alternate(model, msas, **SIZES)
            fit(twin, data, **SETTINGS)
        scores = evaluate(twin, data)
        assert table.num_parameters[i] == sum(p.numel() for p in twin.parameters())
        for name in ("accuracy", "accuracy_stderr", "nll", "nll_stderr"):
            assert getattr(table, name)[i] == getattr(scores, name), name
    assert (table.seconds > 0).all()
    assert table.provenance.num_samples == 48
    assert table.provenance.model == "ResNet"


@pytest.mark.parametrize("criterion", ["accuracy", "nll"])
def test_a_step_is_kept_where_it_beats_the_best_before_it(data, criterion):
    """On logits that we set: the more of them are right, the surer are the wrong ones."""
    num_right = {(0, 0, 0): 12, (0, 0, 1): 13, (0, 1, 1): 11, (1, 0, 1): 12}
    num_right |= {(0, 1, 0): 13, (1, 0, 0): 11}

    def train(network, _):
        right = num_right[tuple(int("attention" in str(stage)) for stage in network.stages)]

        def forward(x):
            place = torch.arange(len(x))
            return right * F.one_hot((place + (place >= right)) % 3, 3).float()

        network.forward = forward

    whole = data.with_(batch_size=48, shuffle=False)
    table = build_up(
        make_model(), whole, validation=whole, train=train, criterion=criterion, **SIZES
    )
    if criterion == "accuracy":
        assert table.msas.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1]]
        assert table.kept.tolist() == [True, True, False, False]
        assert table.best == (0, 0, 1)
        np.testing.assert_allclose(table.accuracy * 48, [12, 13, 11, 12])
    else:
        assert table.msas.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
        assert table.kept.tolist() == [True, False, False, True]
        assert table.best == (1, 0, 0)
        assert table.nll[3] < table.nll[0] < table.nll[1] == table.nll[2]
    assert table.provenance.settings["train"].endswith("train")


def test_an_equal_network_is_not_kept(data):
    def train(network, _):
        network.forward = lambda x: torch.zeros(len(x), 3)

    table = build_up(make_model(), data, validation=data, train=train, **SIZES)
    assert table.kept.tolist() == [True, False, False, False]


def test_same_seed_same_table_whatever_the_global_state(data):
    tables = []
    for state, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        tables.append(build_up(make_model(drop_path=0.5), data, validation=data, train=SETTINGS,
                               seed=seed, **SIZES))  # fmt: skip
        assert torch.equal(torch.get_rng_state(), before)
    tables_equal(tables[0], tables[1])
    assert (tables[0].nll != tables[2].nll).all()


class Stop(Exception):
    """Stands for whatever ends a process."""


def test_an_interrupted_build_up_goes_on(data, tmp_path):
    calls = []

    def train(network, batches):
        calls.append(0)
        if len(calls) == 3:
            raise Stop
        fit(network, batches, **SETTINGS)

    expected = build_up(make_model(), data, validation=data, train=train_plainly, **SIZES)
    calls_of = {"folder": tmp_path, "validation": data, **SIZES}
    with pytest.raises(Stop):
        build_up(make_model(), data, train=named(train), **calls_of)
    assert len(BuildUp.load(tmp_path / "build_up.npz").stage) == 2
    table = build_up(make_model(), data, train=named(train), **calls_of)
    assert len(calls) == 1 + len(expected.stage)
    tables_equal(table, expected)
    again = build_up(make_model(), data, train=named(train), **calls_of)
    assert len(calls) == 1 + len(expected.stage)
    tables_equal(again, table, but=())
    weights = torch.load(tmp_path / "step-01.pt", weights_only=True)
    network = alternate(make_model(), table.msas[1].tolist(), **SIZES)
    network.load_state_dict(weights)
    assert evaluate(network, data).nll == table.nll[1]


def train_plainly(network, batches):
    fit(network, batches, **SETTINGS)


def named(function):
    function.__qualname__ = "train"
    return function


def test_with_settings_the_step_under_way_goes_on_from_its_last_epoch(data, tmp_path):
    epochs = []

    def stop(network, done):
        epochs.append(done)
        if len(epochs) == 5:
            raise Stop

    settings = {**SETTINGS, "epochs": 2, "callbacks": [stop]}
    with pytest.raises(Stop):
        build_up(make_model(), data, validation=data, train=settings, folder=tmp_path, **SIZES)
    table = build_up(make_model(), data, validation=data, train=settings, folder=tmp_path, **SIZES)
    assert epochs == [0, 1, 2, 0, 1, *[1, 2], *[0, 1, 2] * (len(table.stage) - 2)]
    settings.pop("callbacks")
    expected = build_up(make_model(), data, validation=data, train=settings, **SIZES)
    tables_equal(table, expected)


def test_a_folder_of_another_build_up_is_refused(data, tmp_path):
    def train(network, _):
        pass

    build_up(make_model(), data, validation=data, train=train, folder=tmp_path, **SIZES)
    other = make_model()
    with torch.no_grad():
        other.head.bias[0] += 1
    for arguments, what in (
        ({"seed": 1}, "`seed` is 0 and here 1"),
        ({"criterion": "nll"}, "`criterion` is 'accuracy' and here 'nll'"),
        ({"window": 1}, "`window` is 2 and here 1"),
        ({"model": other}, "`weights` is"),
        ({"train": SETTINGS}, "`train` is .*train' and here 'channels_last=False, epochs=1'"),
        ({"data": data.with_(seed=1)}, "`data.seed` is 0 and here 1"),
        ({"data": data.with_(images=255 - data.images)}, "`data.checksum` is"),
        ({"validation": data.with_(labels=data.labels.flip(0))}, "`validation.checksum` is"),
        ({"validation": list(data)}, "`validation` is 'DeviceImages' and here 'no DeviceImages'"),
    ):
        own = {"model": make_model(), "data": data, "validation": data, "train": train}
        full = {**own, **SIZES, **arguments}
        with pytest.raises(ValueError, match=f"`folder` must hold the same build-up, .*{what}"):
            build_up(folder=tmp_path, **full)


def test_a_build_up_does_not_go_on_with_another_augmentation(data, tmp_path):
    def grow(smoothing):
        settings = {**SETTINGS, "transform": LabelSmoothing(3, smoothing)}
        return build_up(
            make_model(), data, validation=data, train=settings, folder=tmp_path, **SIZES
        )

    tables_equal(grow(0.1), grow(0.1))
    with pytest.raises(ValueError, match="`train` is .*smoothing=0.1.* and here .*smoothing=0.2"):
        grow(0.2)


def test_what_cannot_be_is_refused_before_any_training(data):
    def train(network, _):
        raise AssertionError("trained")

    def refused(message, **arguments):
        full = {"validation": data, "train": train, **SIZES, **arguments}
        with pytest.raises(ValueError, match=message):
            build_up(full.pop("model", None) or make_model(), data, **full)

    refused("`criterion` must be one of 'accuracy', 'nll', got 'ece'", criterion="ece")
    refused("`window` must divide the side of the maps, got 3", window=3)
    refused("`train` must leave optimizer, seed to `build_up`", train={"seed": 1, "optimizer": 0})
    refused("`model` must be a ResNet", model=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be re-iterable"):
        build_up(make_model(), data, validation=iter([]), train=train)


def test_a_preactivation_network_begins_with_the_msas_that_it_has(data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = alternet18(
            depths=(1, 2, 2), msas=(0, 0, 1), heads=(1, 2, 4), width=2, head_dim=2, window=2,
            num_classes=3, in_channels=1,
        )  # fmt: skip
    table = build_up(model, data, validation=data, train=SETTINGS, image_size=8)
    assert table.msas.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert table.stage.tolist() == [-1, 1]
