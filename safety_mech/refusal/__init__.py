"""Whether a model refuses: by its answer's text, by the probability of refusal phrases, by prompt token, by a judge.

`patterns`, `text` and `degenerate` read text without a model; `log_odds` and `attribution` read probabilities; `rates`
counts over prompts; `harmfulness` asks a judge. May import `layers`, `stats`, `prompts` and `models`.
"""
