"""Command lines that take no config: `argparse`, with mistakes said as everywhere.

For commands that run on a trained model, which need none of a config's fields; `cli` is for those that do.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from input_pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """Of `python -m navit_jax NAME`; a mistake is a UserError, and `--debug` shows its traceback."""

    def __init__(self, name: str, about: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m navit_jax {name}", description=about, formatter_class=raw, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of a mistake")

    def error(self, message: str) -> NoReturn:
        """What `argparse` calls for a mistake. Raises UserError."""
        raise UserError(f"{message}. --help lists the arguments.")


def run(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """main(arguments). Exits with 2 behind one message on stderr for a UserError, 130 when interrupted, and 1 where
    whoever reads the output, such as `head`, has left."""
    try:
        main(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        sys.exit(1)
