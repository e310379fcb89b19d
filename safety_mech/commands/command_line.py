"""What all experiment scripts share: a CLI made from the config dataclass, and errors that are one line."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def run(main: Callable[[Config], object], config_type: type[Config], arguments: list[str] | None = None) -> None:
    """Parse the command line into `config_type`, call `main`, and turn a ValueError into one line and status 2.

    Ctrl-C ends with status 130; runs are written whole or not at all (results.py), so nothing is left half done.
    """
    config = tyro.cli(config_type, args=arguments)
    try:
        main(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing half-written was left behind", file=sys.stderr)
        sys.exit(130)
