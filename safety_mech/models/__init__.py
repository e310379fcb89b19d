"""The only room that knows how a model is built and run.

`sources` finds a model's files without torch. `loading` and `conversion` build a HookedTransformer from them. `chat`
puts questions into the template. `forward` runs blocks on top of a cached prefix, and `generation` continues greedily.
`parameters` names the projections of a block. The room may import layers, stats and prompts.
"""
