"""How much of the gap is harm? `python experiments/validity.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.validity import ValidityConfig, main

if __name__ == "__main__":
    run(main, ValidityConfig)
