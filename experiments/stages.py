"""What does the last token attend to before, in and after the safety layers? `python experiments/stages.py --help`"""

from safety_mech.commands.command_line import run
from safety_mech.commands.stages import StagesConfig, main

if __name__ == "__main__":
    run(main, StagesConfig)
