"""Does freezing the safety layers protect them? `python experiments/sppft.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.sppft import SppftConfig, main

if __name__ == "__main__":
    run(main, SppftConfig)
