"""Ranges of layers. Layer 0 is the first block; a range includes BOTH of its ends."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class LayerRange:
    """Layers `start`..`end`, both inside: `LayerRange(6, 12)` is seven layers, the paper's [6, 12].

    Raises ValueError for a negative start or an end before the start.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.end < self.start:
            raise ValueError(f"layer range [{self.start}, {self.end}]: expected 0 <= start <= end (both ends included)")

    @classmethod
    def parse(cls, text: str) -> "LayerRange":
        """`"6-12"`, `"6,12"` or `"[6, 12]"` -> LayerRange(6, 12); `"7"` -> LayerRange(7, 7)."""
        parts = text.strip().strip("[]").replace("-", ",").split(",")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise ValueError(f"layer range {text!r}: expected START-END, like 6-12 (both ends included)")
        return cls(numbers[0], numbers[-1])

    @property
    def width(self) -> int:
        """Number of layers."""
        return self.end - self.start + 1

    @property
    def centre(self) -> float:
        """Middle of the range, in layers; a half for an even width."""
        return (self.start + self.end) / 2

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer <= self.end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end + 1))

    def __len__(self) -> int:
        return self.width

    def __str__(self) -> str:
        return f"[{self.start}, {self.end}]"

    def iou(self, other: "LayerRange") -> float:
        """Intersection over union of the two sets of layers, in [0, 1]."""
        shared = max(0, min(self.end, other.end) - max(self.start, other.start) + 1)
        return shared / (self.width + other.width - shared)

    def check_inside(self, n_layers: int) -> "LayerRange":
        """Return self, or raise ValueError if the model with `n_layers` blocks does not have these layers."""
        if self.end >= n_layers:
            raise ValueError(f"layer range {self}: the model has {n_layers} layers, so the last is {n_layers - 1}")
        return self
