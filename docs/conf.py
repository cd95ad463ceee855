"""Sphinx: the pages of this folder as a site, by `make docs` into build/docs; GitHub shows the same files."""

from importlib.metadata import version as installed

project = "livt_scale"
author = "the livt_scale team"
copyright = author
release = version = installed("livt-scale")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["results", "pictures"]

# Headings are link targets by GitHub's rule, so that the same links work there and here.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "colon_fence"]
suppress_warnings = ["myst.xref_ambiguous"]
nitpicky = False

default_role = "code"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "livt_scale"
html_static_path: list[str] = []
copybutton_prompt_text = "$ "
