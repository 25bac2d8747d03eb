"""Links from the pages to files of the repository, which lie beside docs/ and not in it.

On GitHub `../navit_jax/optim.py` is the file. On the site it is the reference page of that module; another file is a
link to the repository where mkdocs.yml has a `repo_url`, else its text alone. One that does not exist is a warning.
"""

import logging
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[([^\[\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, page: object, config: object, files: object) -> str:
    """The page with such links as the site has them."""

    def one(found: re.Match) -> str:
        text, path = found[1], found[2].removeprefix("../")
        if not (ROOT / path).exists():
            log.warning("docs/%s links to %s, which the repository does not have", page.file.src_uri, path)
            return text
        module = path.removesuffix(".py").removesuffix("/").removesuffix("/__init__").replace("/", ".")
        if files.get_file_from_path(f"reference/{module}.md"):
            return f"[{text}](reference/{module}.md)"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return markdown if page.file.src_uri.startswith("reference/") else LINK.sub(one, markdown)
