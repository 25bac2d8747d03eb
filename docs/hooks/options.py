"""The tables of options in docs/*.md, made from configs/base.py: its fields, their defaults and their comments.

    python docs/hooks/options.py          # writes them anew, between the comments `fields: GROUP` and `end of fields`

They stand in the pages, so that they are there without MkDocs too; a build or a test finds one that is old.
"""

import ast
import logging
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs" / "base.py"
MARKED = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)
log = logging.getLogger("mkdocs.hooks.options")


def fields(group: str) -> list[tuple[str, str, str]]:
    """(names, defaults, comment) of each line of a group, a function of configs/base.py, that sets fields."""
    source = BASE.read_text()
    lines = source.splitlines()
    groups = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    if group not in groups:
        raise ValueError(f"configs/base.py has no function {group!r}; it has {', '.join(groups)}")
    found = []
    for node in groups[group].body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Tuple):
            pairs = _pairs(node)
            comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            if pairs:
                names, values = ([f"`{text}`" for text in column] for column in zip(*pairs, strict=True))
                values = values[:1] if len(set(values)) == 1 else values
                found.append((", ".join(names), ", ".join(values), comment))
    return found


def _pairs(node: ast.Assign) -> list[tuple[str, str]]:
    """(name, default) of each field that a line sets; none for groups, which have tables of their own."""
    target, value = node.targets[0], node.value
    many = isinstance(target, ast.Tuple)
    pairs = []
    for name, one in zip(target.elts if many else [target], value.elts if many else [value], strict=True):
        if isinstance(one, ast.Call):  # ConfigDict(dict(kind=...)), or the group that a function makes
            inside = one.args[0].keywords if one.args and isinstance(one.args[0], ast.Call) else []
            pairs += [(f"{name.attr}.{word.arg}", _text(word.value)) for word in inside]
        else:
            pairs.append((name.attr, _text(one)))
    return pairs


def _text(value: ast.expr) -> str:
    return ast.unparse(value).replace("'", '"')


def table(group: str) -> str:
    """The table of a group in markdown."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in fields(group)]
    lines = ["| field | default | |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Warns of a table that is old, and of fields that no comment explains."""
    for group in {found[2] for found in MARKED.finditer(markdown)}:
        for name in [names for names, _, comment in fields(group) if not comment]:
            log.warning("configs/base.py: %s of %s has no comment", name, group)
    made = render(markdown)
    if made != markdown:
        log.warning("docs/%s: a table of options is old: python docs/hooks/options.py", page.file.src_uri)
    return made


def main() -> int:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        made = render(text)
        if made != text:
            page.write_text(made)
            print(f"{page.relative_to(ROOT)}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
