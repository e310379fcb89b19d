"""The attention figures: tokens and layers on the axes, edges of the range, colour bar, kinds without colour."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from safety_mech import (
    LayerRange,
    QuestionAttention,
    min_max,
    plot_attention,
    plot_contrastive_pair,
    plot_word_shares,
    word_shares,
)

N_LAYERS = 12


def attention_of(tokens: list[str], seed: int = 0) -> QuestionAttention:
    weights = torch.rand(N_LAYERS, len(tokens), generator=torch.Generator().manual_seed(seed))
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return QuestionAttention("".join(tokens), tuple(tokens), spans, weights)


TOKENS = ["How", " do", " I", " spend", " $", "5", " on", " $", "x", "?"]
ATTENTION = attention_of(TOKENS)


def tick_labels(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def edges(ax: Axes) -> set[float]:
    return {float(np.asarray(line.get_ydata())[0]) for line in ax.lines}


def test_the_heatmap_is_the_scaled_data_with_a_column_a_token_and_a_row_a_layer():
    figure = plot_attention(ATTENTION, LayerRange(3, 6))
    ax, bar = figure.axes
    (image,) = ax.images
    assert np.array_equal(np.asarray(image.get_array()), min_max(ATTENTION.weights).numpy())
    assert image.origin == "lower"
    assert image.get_clim() == (0.0, 1.0)
    assert tick_labels(ax) == [token.strip() for token in TOKENS]
    assert ax.get_ylabel() == "layer (0 = first block)"
    assert "scaled per layer" in bar.get_ylabel()


def test_dollar_signs_are_text_and_the_figure_can_be_drawn():
    figure = plot_attention(ATTENTION, LayerRange(3, 6))
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())
    figure.canvas.draw()


def test_a_token_of_white_space_has_a_label():
    assert tick_labels(plot_attention(attention_of(["a", "\n\n", " "])).axes[0]) == ["a", "\\n\\n", " "]


def test_the_range_is_marked_at_both_of_its_edges_and_named():
    ax = plot_attention(ATTENTION, LayerRange(3, 6)).axes[0]
    assert edges(ax) == {2.5, 6.5}
    assert [text.get_text() for text in ax.texts] == ["range [3, 6]"]
    unmarked = plot_attention(ATTENTION).axes[0]
    assert [*unmarked.lines, *unmarked.texts] == []


def test_grey_levels_grow_with_attention():
    """Printed in grey, more attention is always lighter."""
    image = plot_attention(ATTENTION).axes[0].images[0]
    grey = image.cmap(np.linspace(0, 1, 50))[:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(grey) > 0).all()


def test_a_contrastive_pair_is_side_by_side_under_its_names():
    other = attention_of(["How", " do", " I", " bake", "?"], seed=1)
    left, right, _ = plot_contrastive_pair(ATTENTION, other, LayerRange(0, 0)).axes
    assert [left.get_title(), right.get_title()] == ["harmful prompt", "harmless prompt"]
    assert len(tick_labels(left)) == 10
    assert tick_labels(right) == ["How", "do", "I", "bake", "?"]
    assert edges(left) == edges(right) == {-0.5, 0.5}


def test_word_shares_have_a_line_a_kind_its_equal_share_and_the_range():
    shares = word_shares([attention_of(TOKENS, seed) for seed in range(8)])
    figure = plot_word_shares({"malicious": shares, "normal": shares}, LayerRange(3, 6))
    assert len(figure.axes) == 2
    for ax in figure.axes:
        curves = [line for line in ax.lines if len(np.asarray(line.get_xdata())) == N_LAYERS]
        equal = [line for line in ax.lines if line not in curves]
        for index, (curve, level) in enumerate(zip(curves, equal, strict=True)):
            mean = 100 * shares.shares[..., index].mean(dim=0).numpy()
            assert np.allclose(np.asarray(curve.get_ydata()), mean)
            assert np.asarray(level.get_ydata())[0] == pytest.approx(100 * float(shares.uniform[:, index].mean()))
            assert level.get_linestyle() == curve.get_linestyle()
        assert len({line.get_linestyle() for line in curves}) == len({line.get_marker() for line in curves}) == 3
        assert len(ax.collections) == 3
        assert "(%)" in ax.get_ylabel()
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [
            "function",
            "content",
            "punctuation",
            "range [3, 6]",
        ]
