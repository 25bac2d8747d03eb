"""The API reference: a page a module, made of its docstrings, and a warning for every public name without one.

MkDocs calls `on_files` before it builds; under --strict a warning fails the build. The code is read, not imported, so
this needs neither jax nor a second of its start. Public is every module, class, function and method whose name has no
underscore in front. A method needs no docstring of its own where a documented Protocol has one of that name: what
`Source.text` means is said once.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGES = ("navit_jax", "input_pipeline", "configs")
log = logging.getLogger("mkdocs.hooks.reference")


def load(name: str) -> griffe.Module:
    """A package with all of its modules, from the files."""
    return griffe.load(name, search_paths=[str(ROOT)], allow_inspection=False)


def walk(found: griffe.Object) -> Iterator[griffe.Object]:
    """Every public module, class and function below, itself included."""
    yield found
    for name, member in found.members.items():
        if name.startswith("_") or member.is_alias:
            continue
        if member.is_module or member.is_class:
            yield from walk(member)
        elif member.is_function:
            yield member


def undocumented(packages: list[griffe.Module]) -> list[str]:
    """`path (file:line)` of every public name without a docstring; see the top."""
    names = [name for package in packages for name in walk(package)]
    protocols = [x for x in names if x.is_class and any(str(base).endswith("Protocol") for base in x.bases)]
    said = {n for protocol in protocols for n, member in protocol.members.items() if member.has_docstring}
    missing = [x for x in names if not x.has_docstring]
    missing = [x for x in missing if not (x.is_function and x.parent.is_class and x.name in said)]
    return [f"{x.path} ({x.filepath.relative_to(ROOT)}:{x.lineno or 1})" for x in missing]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and warns."""
    packages = [load(name) for name in PACKAGES]
    for name in undocumented(packages):
        log.warning("%s is public and has no docstring", name)
    modules = [[x for x in walk(package) if x.is_module] for package in packages]
    pages = {f"reference/{x.path}.md": f"# {x.path}\n\n::: {x.path}\n" for group in modules for x in group}
    pages["reference/index.md"] = index(modules)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    nav = [{group[0].path: [f"reference/{x.path}.md" for x in group]} for group in modules]
    at = next(i for i, entry in enumerate(config.nav) if "Reference" in entry)
    config.nav[at] = {"Reference": ["reference/index.md", *nav]}
    return files


def index(modules: list[list[griffe.Module]]) -> str:
    """The first sentence of every module."""
    lines = ["# Reference", "", "Made from the docstrings; every page shows its source."]
    for group in modules:
        lines += ["", f"## {group[0].path}", "", "| module | |", "| --- | --- |"]
        lines += [f"| [{x.path}]({x.path}.md) | {_first(x).replace('|', chr(92) + '|')} |" for x in group]
    return "\n".join(lines) + "\n"


def _first(module: griffe.Module) -> str:
    """The first line of a docstring's first paragraph, to the end of its sentence."""
    text = " ".join(module.docstring.value.split("\n\n")[0].split()) if module.has_docstring else ""
    return text.split(". ")[0].removesuffix(":").removesuffix(".")
