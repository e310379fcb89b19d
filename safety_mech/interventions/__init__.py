"""Change a model for a while: scale layers, ablate or add a direction, put the base model's weights in.

Every intervention is a context manager that restores the model bit for bit on leaving. May import `layers`, `stats`,
`prompts`, `models`, `refusal` and `divergence`.
"""
