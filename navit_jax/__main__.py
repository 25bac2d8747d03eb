"""Commands besides training: `python -m navit_jax COMMAND --help`.

Each is a module with a `main(config)`, or where it takes no config a `command(arguments)`; it is imported only when it
is called, so listing them takes no second.
"""

import difflib
import importlib
import sys

from input_pipeline.errors import UserError


COMMANDS = {
    "show": ("navit_jax.show", "draw packed rows of a config as a picture"),
    "predict": ("navit_jax.predict_command", "what a model says of images, as lines, JSON or a picture"),
    "convert": ("navit_jax.convert", "write weights in another format, or say what they are"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:10s} {about}" for name, (_, about) in COMMANDS.items()]
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
    from navit_jax import cli

    module = importlib.import_module(COMMANDS[name][0])
    sys.argv = [f"navit_jax {name}", *sys.argv[2:]]
    if not hasattr(module, "command"):
        cli.run(module.main)
        return
    with cli.mistakes():
        module.command(sys.argv[1:])


if __name__ == "__main__":
    main()
