"""The command line that every program here shares: one config, overridden field by field, and mistakes said plainly.

A mistake of the user ends in one message and exit status 2; a traceback means a defect. ml_collections does the
parsing, and its errors are explained afterwards, so nothing is checked twice where nothing is wrong.
"""

import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

import configs
from input_pipeline.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its argument behind a colon; --config.FIELD=VALUE overrides a field."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake.")

_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", ConfigDict: "one of its fields"}


def run(main: Callable[[ConfigDict], None]) -> None:
    """Parse `sys.argv` and call `main(config)`; define further absl flags at import, before this.

    Exits with 2 behind one message on stderr for a UserError, 130 when interrupted, 0 for --help.
    """
    if {"-h", "--help"} & set(sys.argv):
        print(usage(main))
        return
    try:
        main(_parse(sys.argv))
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def usage(main: Callable[[ConfigDict], None]) -> str:
    """What --help prints: the program's docstring, its flags and the configs that exist."""
    modules = dict.fromkeys([main.__module__, __name__])
    found = [flag for name in modules for flag in flags.FLAGS.get_flags_for_module(sys.modules[name])]
    lines = [f"  --{flag.name}: {flag.help}" for flag in sorted(found, key=lambda f: f.name) if "." not in flag.name]
    about = sys.modules[main.__module__].__doc__ or ""
    return "\n".join([about.strip(), "", "Flags:", *lines, "", "Configs:", *(f"  {p}" for p in _config_files())])


def _parse(argv: list[str]) -> ConfigDict:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error} --help lists the flags.".replace(" ?", "?")) from error
    except (flags.Error, OSError, LookupError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(_explain(error, argv)) from error
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value; --help lists them.")
    config = CONFIG.value
    if not isinstance(config, ConfigDict):  # a file that could not be read becomes an object that fails on use
        config = _load(_config_argument(argv))
    _check_tuples(argv)
    return config


def _explain(error: Exception, argv: list[str]) -> str:
    """A message for what ml_collections or absl refused. Raises the config file's own error, if it has one."""
    if type(error).__name__ == "FlagOrderError":  # not exported
        return f"{error}. Put --config=FILE before its overrides, and a group before its fields."
    config = _load(_config_argument(argv))
    fields = dict(_fields(config))
    for name in _overridden(argv):
        if name not in fields:
            return f"the config has no field {name!r}. Nearest: {', '.join(_nearest(name, fields))}."
    match = re.match(r"flag --config\.(\S+?)=(.*?): ", str(error), re.DOTALL)
    if match and match[1] in fields:
        name, value = match.groups()
        old = fields[name]
        expected = _EXPECTED.get(type(old), f"a value of type {type(old).__name__}")
        such_as = f"--config.{name}.{next(iter(old))}" if isinstance(old, ConfigDict) else repr(old)
        return f"--config.{name}={value}: expected {expected}, such as {such_as}."
    return str(error)


def _check_tuples(argv: list[str]) -> None:
    """Refuse overridden tuples whose members are of another kind than the default's: anything parses as a tuple."""
    given = {name: value for name, value in flags.FLAGS["config"].override_values.items() if isinstance(value, tuple)}
    fields = dict(_fields(_load(_config_argument(argv)))) if given else {}
    for name, value in given.items():
        kinds = {type(member) for member in fields[name]}
        kinds |= {int} if float in kinds else set()
        for member in value if kinds else ():
            if type(member) not in kinds:
                raise UserError(f"--config.{name}: {member!r} does not fit; expected values such as {fields[name]!r}.")


def _config_argument(argv: list[str]) -> str:
    for i, arg in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", arg)
        if match:
            value = match[1] if match[1] is not None else (argv[i + 1 : i + 2] or [""])[0]
            if value:
                return value
    raise UserError(f"no config is named. Give --config=FILE, one of:\n{_listing()}")


def _load(argument: str) -> ConfigDict:
    """The config that `path[:argument]` names; UserError where there is none."""
    path, *rest = argument.split(":", 1)
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, _config_files(), n=1, cutoff=0.8)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no config file {path!r}.{hint} There are:\n{_listing()}")
    if not path.endswith(".py"):
        raise UserError(f"the config file {path!r} is no Python file. There are:\n{_listing()}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config(). Configs that have one:\n{_listing()}")
    if rest and not inspect.signature(module.get_config).parameters:
        raise UserError(f"{path} takes no argument, found {rest[0]!r}: write --config={path}")
    try:
        return module.get_config(*rest)
    except ValueError as error:  # what a config says of its argument: it may import no UserError
        raise UserError(f"--config={argument}: {error}") from error


def _listing() -> str:
    return "\n".join(f"  {path}" for path in _config_files())


def _config_files() -> list[str]:
    """The configs that come with the code, as one would write them from here."""
    folder, here = Path(configs.__file__).parent, Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    parts = ("__init__.py", "base.py", "recipes.py")  # what configs are made of
    return [str(shown / path.name) for path in sorted(folder.glob("*.py")) if path.name not in parts]


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every field and group with its dotted name."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")


def _overridden(argv: list[str]) -> list[str]:
    matches = [re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv]
    return [match[1] for match in matches if match]


def _nearest(name: str, fields: dict[str, object]) -> list[str]:
    """Up to three fields, the likeliest first: a right name in the wrong group counts as nearly right."""

    def likeness(field: str) -> float:
        whole = difflib.SequenceMatcher(None, name, field).ratio()
        last = difflib.SequenceMatcher(None, name.split(".")[-1], field.split(".")[-1]).ratio()
        same_group = "." in name and field.split(".")[:-1] == name.split(".")[:-1]
        return max(whole, 0.95 * last, 1.5 * (last == 1)) + 0.3 * same_group

    ranked = sorted(fields, key=likeness, reverse=True)
    best = likeness(ranked[0])
    return [field for field in ranked[:3] if likeness(field) >= 0.85 * best]
