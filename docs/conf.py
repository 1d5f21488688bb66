"""How the site is built; `make docs` runs it with warnings as errors."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
# What is documented is what lies here, whatever else is installed.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "adapters")]

project = "tiepolicy"
author = "the authors of tiepolicy"
release = version_of("tiepolicy")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "generated",
]
exclude_patterns = ["sitegen"]
html_theme = "furo"
html_title = f"tiepolicy {release}"
html_show_copyright = False

# Pages are read on the site and in the repository: headings can be linked to in both.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

# Docstrings put code into single backticks; what is the name of something on the site becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
