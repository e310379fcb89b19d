"""Does a locator give the same range again? `python experiments/stability.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.stability import StabilityConfig, main

if __name__ == "__main__":
    run(main, StabilityConfig)
