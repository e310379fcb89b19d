"""LayerRange: both ends are inside."""

import pytest

from safety_mech.layers import LayerRange


def test_both_ends_are_inside():
    layers = LayerRange(6, 12)
    assert list(layers) == [6, 7, 8, 9, 10, 11, 12]
    assert (layers.width, len(layers)) == (7, 7)
    assert 6 in layers
    assert 12 in layers
    assert 5 not in layers
    assert 13 not in layers


def test_one_layer_is_a_range():
    assert list(LayerRange(0, 0)) == [0]
    assert LayerRange(0, 0).width == 1


@pytest.mark.parametrize(("start", "end", "centre"), [(6, 12, 9.0), (6, 11, 8.5), (4, 4, 4.0), (0, 1, 0.5)])
def test_centre(start, end, centre):
    assert LayerRange(start, end).centre == centre


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (5, 4), (-2, -1)])
def test_impossible_ranges_are_refused(start, end):
    with pytest.raises(ValueError, match=r"expected 0 <= start <= end \(both ends included\)"):
        LayerRange(start, end)


@pytest.mark.parametrize(
    ("one", "other", "iou"),
    [
        ((6, 12), (6, 12), 1.0),
        ((6, 12), (8, 14), 5 / 9),  # 8..12 shared, 6..14 together
        ((0, 9), (3, 4), 2 / 10),  # one inside the other
        ((0, 3), (4, 7), 0.0),  # side by side: ends are inside, so nothing is shared
        ((0, 4), (4, 7), 1 / 8),
        ((0, 1), (20, 30), 0.0),
    ],
)
def test_iou_by_hand(one, other, iou):
    assert LayerRange(*one).iou(LayerRange(*other)) == iou
    assert LayerRange(*other).iou(LayerRange(*one)) == iou


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6-12", (6, 12)),
        ("6,12", (6, 12)),
        ("[6, 12]", (6, 12)),
        ("  [ 6 - 12 ] ", (6, 12)),
        ("7", (7, 7)),
        ("0-0", (0, 0)),
    ],
)
def test_parse(text, expected):
    assert LayerRange.parse(text) == LayerRange(*expected)


@pytest.mark.parametrize("layers", [LayerRange(6, 12), LayerRange(0, 0), LayerRange(3, 31)])
def test_parse_reads_what_str_writes(layers):
    assert LayerRange.parse(str(layers)) == layers


@pytest.mark.parametrize("text", ["", "six", "6-", "-6", "6-12-13", "6:12", "1.5-3", "[]", "12-6"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"layer range .*both ends included"):
        LayerRange.parse(text)


def test_check_inside():
    layers = LayerRange(10, 29)
    assert layers.check_inside(30) is layers
    with pytest.raises(ValueError, match=r"\[10, 29\]: the model has 29 layers, so the last is 28"):
        layers.check_inside(29)


def test_ranges_are_frozen_hashable_and_ordered():
    layers = LayerRange(1, 2)
    with pytest.raises(AttributeError):
        layers.start = 0  # pyright: ignore[reportAttributeAccessIssue]
    assert {layers, LayerRange(1, 2)} == {layers}
    assert sorted([LayerRange(2, 2), LayerRange(1, 5), LayerRange(1, 2)]) == [
        LayerRange(1, 2),
        LayerRange(1, 5),
        LayerRange(2, 2),
    ]
