"""What a figure shows, found by drawing it."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def boxes(figure):
    """Boxes of all texts that are drawn, in pixels."""
    drawn = []
    original = Text.draw

    def record(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            drawn.append(self)
        original(self, renderer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return [(text.get_text(), text.get_window_extent()) for text in dict.fromkeys(drawn)]


def begins_at_zero(ax):
    """Whether the vertical axis begins at 0, with room for half a mark there and no more."""
    low, high = ax.get_ylim()
    return -0.05 * high < low < -0.02 * high
