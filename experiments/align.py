"""Align the built-in model to refuse, in all layers or in some. `python experiments/align.py --help`"""

from safety_mech.commands.align import AlignRun, main
from safety_mech.commands.command_line import run

if __name__ == "__main__":
    run(main, AlignRun)
