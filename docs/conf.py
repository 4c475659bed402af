"""Sphinx configuration: `make docs`."""

import os
import sys
import warnings
from pathlib import Path

import lortalib

DOCS = Path(__file__).parent
sys.path[:0] = [
    str(DOCS / "_ext"),
    str(DOCS.parent / "examples"),
]  # notebooks use examples/assets.py
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

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
    "messages",
    "pictures",
    "rooms",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_math_renderer = "mathml"
default_role = "any"
html_theme = "furo"
pygments_dark_style = "github-dark"  # the default underlines the names of modules, like links
html_title = f"lortalib {release}"
html_static_path = ["_static"]
html_css_files = ["lortalib.css"]
html_js_files = ["filter.js"]
exclude_patterns = ["_build", "notebooks"]
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
# A notebook runs where its page is missing or older than its text: in every fresh checkout.
sphinx_gallery_conf = {
    "examples_dirs": "notebooks",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "reading_order.position",
    "abort_on_example_error": True,
    "write_computation_times": False,
    "show_memory": False,
    "ignore_repr_types": r"matplotlib|torch\._C\.Generator",
    "min_reported_time": 1000,
    "plot_gallery": "True",
    "remove_config_comments": True,
    "download_all_examples": False,
    "thumbnail_size": (400, 280),
    "image_srcset": ["2x"],
}
suppress_warnings = ["ref.any", "ref.python"]
