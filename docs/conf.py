"""Sphinx configuration: `make docs`."""

import lortalib

project = "lortalib"
copyright = "2026, the lortalib authors"
version = release = lortalib.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "any"
html_theme = "furo"
exclude_patterns = ["_build"]
suppress_warnings = ["ref.any", "ref.python"]
