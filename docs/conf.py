"""Sphinx configuration: `make docs` builds offline and treats every warning as an error."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

project = "MDM"
author = copyright = "the MDM authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docs.docstrings",
    "docs.generate",
    "docs.mathml",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

html_theme = "furo"
html_title = "MDM"
html_static_path = ["_static"]
html_css_files = ["mdm.css"]
html_math_renderer = "mathml"
html_copy_source = False

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
highlight_language = "none"

autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

# Short names in docstrings ("Raises: StoreError") may match two re-exports of one class.
suppress_warnings = ["ref.python"]
# No inventories of other projects: the build is offline. Everything of ours must resolve, except
# private names and type variables, which have no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!mdm\.).*"),
    (r"py:.*", r"mdm\.(.*\.)?_.*"),
    (r"py:.*", r"mdm\.(.*\.)?[A-Z]"),
]
