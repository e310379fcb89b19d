"""From interventions to a range: which layers do the refusals depend on?

`range_sweep` measures many ranges of one model and does their common work once. `search`, `alpha` and `safety_layers`
are the paper's localisation (§3.4, A.3.4). `locators` lists all ways to locate under one signature; `measurements` has
what they look at and share; `segments`, `patching`, `slopes` and `sufficiency` are their parts. This room may import
layers, stats, prompts, models, refusal, divergence and interventions.
"""
