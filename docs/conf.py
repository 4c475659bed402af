"""Sphinx configuration: `make docs`."""

import sys
from pathlib import Path

import lortalib

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lortalib"
copyright = "2026, the lortalib authors"
version = release = lortalib.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "complete",
    "legs",
    "mathml",
    "pictures",
    "rooms",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_math_renderer = "mathml"
default_role = "any"
html_theme = "furo"
html_title = f"lortalib {release}"
html_static_path = ["_static"]
html_css_files = ["lortalib.css"]
html_js_files = ["filter.js"]
exclude_patterns = ["_build"]
suppress_warnings = ["ref.any", "ref.python"]
