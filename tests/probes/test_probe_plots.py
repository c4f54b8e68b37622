"""Pictures of attention: what is drawn, with which labels, and that it can be saved."""

import io
import subprocess
import sys

import numpy as np
import pytest

from jattn.probes import plots
from jattn.probes.plots import plot_attention, plot_heads, plot_layers


def texts(labels):
    return [label.get_text() for label in labels]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return buffer.getvalue()


def test_the_map_of_one_head_shows_its_weights_and_tokens():
    weights = np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None]
    figure = plot_attention(weights, ["$the", " cat", "\n"])
    axis = figure.axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), weights, rtol=1e-6)
    assert texts(axis.get_yticklabels()) == texts(axis.get_xticklabels()) == ["$the", " cat", "\\n"]
    assert axis.get_title() == ""
    assert png(figure).startswith(b"\x89PNG")


def test_a_grid_has_one_map_a_head_on_one_scale():
    weights = np.random.default_rng(0).random((4, 5, 7))
    figure = plot_attention(weights, list("abcde"), list("tuvwxyz"))
    maps = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in maps] == ["head 0", "head 1", "head 2", "head 3"]
    for axis, drawn in zip(maps, weights, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), drawn, rtol=1e-6)
        assert axis.images[0].get_clim() == (0, 1)
    assert texts(maps[0].get_xticklabels()) == list("tuvwxyz")
    assert texts(maps[0].get_yticklabels()) == list("abcde")


def test_long_axes_are_numbered():
    length = plots.MAX_LABELS + 1
    figure = plot_attention(np.eye(length), ["word"] * length)
    figure.draw_without_rendering()
    assert "word" not in texts(figure.axes[0].get_xticklabels())


def test_keys_without_labels_of_their_own_are_numbered():
    figure = plot_attention(np.ones((2, 5)) / 5, ["a", "b"])
    figure.draw_without_rendering()
    assert texts(figure.axes[0].get_yticklabels()) == ["a", "b"]
    assert "a" not in texts(figure.axes[0].get_xticklabels())


def test_few_heads_show_their_numbers_and_many_do_not():
    values = np.array([[0.25, 1.0], [0.5, 0.0], [0.125, 0.75]])
    axis = plot_heads(values, "sink mass").axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.25", "1.00", "0.50", "0.00", "0.12", "0.75"]
    assert axis.images[0].get_clim() == (0, 1)
    assert not list(plot_heads(np.zeros((41, 10)), "many").axes[0].texts)


def test_a_heat_map_of_zeros_can_be_drawn():
    assert png(plot_heads(np.zeros((2, 2)), "nothing")).startswith(b"\x89PNG")


def test_lines_over_layers():
    axis = plot_layers({"median": np.array([1.0, 2.0]), "first": [10.0, 100.0]}, logarithmic=True).axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in axis.lines} == {"median": [1, 2], "first": [10, 100]}
    assert axis.get_yscale() == "log"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_attention(np.zeros(3)), r"must be \[T, S\] or \[N, T, S\], got \[3\]"),
        (lambda: plot_attention(np.eye(3), ["a"]), "tokens holds 1, expected 3"),
        (lambda: plot_attention(np.eye(3), titles=["a", "b"]), "titles holds 2, expected 1"),
        (lambda: plot_heads(np.zeros(3), ""), r"must be \[L, N\], got \[3\]"),
        (lambda: plot_layers({}), "no line"),
        (lambda: plot_layers({"a": np.eye(2)}), r"a must be \[L\], got \[2, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_probes_imports_no_plots():
    code = "import sys, jattn.probes, jattn.probes.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
