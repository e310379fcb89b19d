"""How much does the located range depend on how one looks? `python experiments/ranges.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.ranges import RangesConfig, main

if __name__ == "__main__":
    run(main, RangesConfig)
