"""Changing weights: the one training loop, what is frozen, low-rank updates, model organisms, attacks, the methods that
should withstand them, what an attack costs, what skill is left, and the export to transformers. It may import from
every room above it, so neither from `reporting` nor from `commands`.
"""
