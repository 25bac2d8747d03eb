"""The commands: `python -m navit_jax COMMAND --help`.

Each is a module, which is imported only when it is called, so listing them takes no second. To train and to plan is
`train.py`, which takes over this process.
"""

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from input_pipeline.errors import UserError


class Command(NamedTuple):
    """module: has a `main(config)` for `cli`, or with own_flags a `main(arguments)` for `arguments`."""

    module: str
    about: str
    own_flags: bool = False


TRAIN = Path(__file__).parent.parent / "train.py"
SCRIPTS = {  # commands that are train.py
    "train": "train, resume or evaluate a run: train --config configs/navit_b16.py",
    "plan": "what a run takes on machines that are not here: plan v5e:16x16 --config CONFIG",
}
COMMANDS = {
    "show": Command("navit_jax.show", "draw packed rows of a config as a picture"),
    "predict": Command(
        "navit_jax.predict.command", "what a model says of images: lines, JSON, a picture", own_flags=True
    ),
    "convert": Command("navit_jax.convert", "write weights in another format, or say what they are", own_flags=True),
}


def usage() -> str:
    """The list of commands."""
    about = SCRIPTS | {name: command.about for name, command in COMMANDS.items()}
    lines = [f"  {name:10s} {text}" for name, text in about.items()]
    return "\n".join(
        ["usage: python -m navit_jax COMMAND [flags]; COMMAND --help lists its flags", "", "Commands:", *lines, ""]
        + ["A mistake is one line; --debug shows the traceback. `train` is the same as `python train.py`."]
    )


def main() -> None:
    """Run the command that `sys.argv[1]` names, on the arguments behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return
    try:
        if name in SCRIPTS:
            _become_train(name, sys.argv[2:])
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, [*SCRIPTS, *COMMANDS], n=1, cutoff=0.0)
            raise UserError(f"there is no command {name!r}. Did you mean {near[0]}? --help lists the commands.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    command, sys.argv = COMMANDS[name], [f"navit_jax {name}", *sys.argv[2:]]
    if command.own_flags:
        from navit_jax import arguments

        arguments.run(importlib.import_module(command.module).main, sys.argv[1:])
        return
    from navit_jax import cli

    cli.run(importlib.import_module(command.module).main)


def _become_train(name: str, arguments: list[str]) -> None:
    """train.py in place of this process, which has set up nothing yet. Raises UserError."""
    if name == "plan" and "--help" not in arguments:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("plan for which machines? Write plan v5e:16x16 --config CONFIG, or cpu:8 for eight devices")
        arguments = ["--plan", *arguments]
    if not TRAIN.is_file():
        raise UserError(f"there is no {TRAIN}: training needs the project's folder, not an installed package alone")
    os.execv(sys.executable, [sys.executable, str(TRAIN), *arguments])


if __name__ == "__main__":
    main()
