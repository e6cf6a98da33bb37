import numpy as np
import pytest

from landscape import plot
from landscape.plot import style
from tests.plot.cases import history, line


def test_validation_is_a_line_and_training_a_pale_one():
    result = history()
    ax = plot.training_history({"ResNet": result, "ViT": history(3)})
    first, pale, second, _ = ax.lines
    np.testing.assert_array_equal(first.get_xydata(), np.c_[result.epoch, result.validation_loss])
    np.testing.assert_array_equal(pale.get_ydata(), result.train_loss)
    assert pale.get_alpha() < 1
    assert first.get_color() == pale.get_color() == style.family_color("ResNet")
    assert second.get_color() == style.family_color("ViT")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ResNet", "ViT"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Epoch", "Loss (nats)")
    assert [text.get_text() for text in ax.texts] == ["pale: on training data"]


@pytest.mark.parametrize("epochs", [1, 2, 5, 100])
def test_ticks_are_whole_epochs(epochs):
    ticks = history(epochs).plot().get_xticks()
    assert len(ticks) > 0
    np.testing.assert_array_equal(ticks, np.round(ticks))


def test_training_alone_and_other_quantities():
    result = history(validated=False, loss="mse_loss")
    ax = result.plot(quantity="accuracy")
    (only,) = ax.lines
    np.testing.assert_allclose(only.get_ydata(), 100 * result.train_accuracy)
    assert only.get_alpha() is None
    assert ax.get_ylabel() == "Accuracy (%)"
    assert plot.training_history(result, log=True).get_ylabel() == "Loss"


def test_interactive_curves():
    figure = plot.interactive.training_history({"ViT": history(), "b": history(2, False)}, log=True)
    assert [trace.name for trace in figure.data] == [
        "ViT, training",
        "ViT, validation",
        "b, training",
    ]
    assert [trace.opacity < 1 for trace in figure.data] == [True, False, False]
    np.testing.assert_array_equal(figure.data[1].y, history().validation_loss)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.title.text == "Loss (nats)"


@pytest.mark.parametrize("draw", [plot.training_history, plot.interactive.training_history])
def test_bad_arguments(draw):
    with pytest.raises(TypeError, match="`FitResult`.* got LossLine"):
        draw(line([1, 2, 3]))
    with pytest.raises(ValueError, match="`quantity` must be one of 'loss', 'accuracy'"):
        draw(history(), quantity="ece")
    with pytest.raises(ValueError, match="`result` must"):
        draw({})
