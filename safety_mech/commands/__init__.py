"""What each command line does: its frozen config, its checks, its run. This last room may import from every other.

A module named as its command (`locate`, `sppft`, `align`, `stages`) holds the config and the checks and imports no
torch, so that `--help` and a refused flag answer at once. The run is in a module beside it. `experiments/NAME.py` calls
`main`.
"""
