"""Where the last token looks in the question, and on which kinds of words (paper §3.6).

May import `layers`, `stats`, `prompts`, `models`, `refusal`, `divergence`, `interventions` and `localization`.
"""
