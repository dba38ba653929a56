"""The docs site (`make docs`): the Markdown of this repository, with links as on GitHub, and the API reference."""

from __future__ import annotations

import inspect
import re
from typing import Any

from jaxroute import __version__

project = "jaxroute"
release = __version__

# The source folder is the repository, so that relative links between docs/, examples/ and benchmarks/ hold.
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md", "examples/README.md", "benchmarks/**.md"]
exclude_patterns = [".*", "build", "dist", "runs"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
default_role = "code"  # docstrings have names in single backticks
autodoc_default_options = {"member-order": "bysource", "exclude-members": "replace"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "jaxroute"
html_show_copyright = False
html_copy_source = False


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", process_docstring)


def process_docstring(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks: a `*` is no emphasis. A class's fields are described in
    comments beside them, which autodoc does not read, so they are added as a list."""
    lines[:] = [re.sub(r"(`[^`]*`)|\*", lambda match: match[1] or r"\*", line) for line in lines]
    if what == "class" and "__annotations__" in vars(subject):
        lines += ["", *(f"- ``{field}``: {comment}" for field, comment in described_fields(subject)), ""]


def described_fields(subject: type) -> list[tuple[str, str]]:
    """Name and comment of each field that has one: at the end of its line, or in the lines before it."""
    fields, above = [], []
    for line in inspect.getsource(subject).splitlines():
        if match := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
            comment = " ".join([*above, match[2] or ""]).strip()
            fields += [(match[1], comment)] if comment and "pyright" not in comment else []
        comment_line = re.match(r"    # (.*)$", line)
        above = [*above, comment_line[1]] if comment_line else []
    return fields
