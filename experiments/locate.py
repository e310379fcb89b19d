"""Where are the safety layers of a model? `python experiments/locate.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.locate import LocateConfig, main

if __name__ == "__main__":
    run(main, LocateConfig)
