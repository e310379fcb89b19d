"""Does a locator find the layers where refusals were planted? `python experiments/planted.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.planted import PlantedConfig, main

if __name__ == "__main__":
    run(main, PlantedConfig)
