"""Commands besides training: `python -m navit_jax COMMAND --help`.

Each is a module, which is imported only when it is called, so listing them takes no second.
"""

import difflib
import importlib
import sys
from typing import NamedTuple

from input_pipeline.errors import UserError


class Command(NamedTuple):
    """module: has a `main(config)` for `cli`, or with own_flags a `main(arguments)` for `arguments`."""

    module: str
    about: str
    own_flags: bool = False


COMMANDS = {
    "show": Command("navit_jax.show", "draw packed rows of a config as a picture"),
    "predict": Command(
        "navit_jax.predict_command", "what a model says of images: lines, JSON, a picture", own_flags=True
    ),
    "convert": Command("navit_jax.convert", "write weights in another format, or say what they are", own_flags=True),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:10s} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m navit_jax COMMAND [flags]; COMMAND --help lists its flags", "", "Commands:", *lines, ""]
        + ["Training is `python train.py --config configs/navit_b16.py`."]
    )


def main() -> None:
    """Run the command that `sys.argv[1]` names, on the arguments behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        error = UserError(f"there is no command {name!r}. Did you mean {near[0]}? --help lists the commands.")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    command, sys.argv = COMMANDS[name], [f"navit_jax {name}", *sys.argv[2:]]
    if command.own_flags:
        from navit_jax import arguments

        arguments.run(importlib.import_module(command.module).main, sys.argv[1:])
        return
    from navit_jax import cli

    cli.run(importlib.import_module(command.module).main)


if __name__ == "__main__":
    main()
