"""How far malicious and normal prompts diverge, layer by layer: residual streams, angles, gap, onset, controls.

Tensors in, tensors out; only `residuals` runs a model. May import `layers`, `stats`, `prompts`, `models` and `refusal`.
"""
