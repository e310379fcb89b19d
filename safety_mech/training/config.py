"""The settings of a fine-tuning run. This module imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a fine-tuning run, with its default. Lengths in tokens, `batch_size` in examples."""

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 4
    accumulate: int = 1
    """Batches a step: a step sees batch_size x accumulate examples."""
    warmup_steps: int = 100
    cap_warmup: bool = True
    """Warm up for a tenth of the steps at most: 100 steps would be all of a short run. The paper does not."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_tokens: int = 256
    """Longer examples are cut at the end (and counted in the record)."""
    whole_sequence: bool = False
    """Loss on prompt and answer, as in the authors' code; default: on the answer only."""
    freeze_norms: bool = False
    train_embeddings: bool = False
    bfloat16: bool = False
    """Products in bfloat16 (autocast); weights and optimizer stay float32."""
    template: str = "own"
    seed: int = 0
    checkpoint_every: int = 50
    """Steps between checkpoints, if a checkpoint file is given."""


DEFAULTS = TrainConfig()
