"""How the documentation is built: by `scripts/docs`, warnings as errors, notebooks executed."""

import re
from importlib.metadata import version as version_of
from pathlib import Path

project = "training-dynamics"
author = "The training-dynamics authors"
copyright = "the training-dynamics authors"
version = release = version_of("training-dynamics")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
suppress_warnings = ["ref.python"]  # attributes called alike in two classes
nitpicky = True  # with "warnings are errors" no link to a page, heading, picture or function is broken
nitpick_ignore_regex = [("py:(class|exc)", ".*")]  # of docstrings: other libraries' and short names
html_theme = "furo"
html_title = "training-dynamics"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 1800  # seconds a cell, on a busy machine
nb_execution_in_temp = True
nb_execution_cache_path = str(Path(__file__).parents[1] / "build/docs/notebooks")
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
nb_execution_show_tb = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in single backticks; Sphinx reads reStructuredText."""
    for i, line in enumerate(lines):
        parts = line.split("`")
        if len(parts) % 2 == 0:
            parts[-2:] = ["`".join(parts[-2:])]
        parts[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
        lines[i] = "``".join(parts)


def setup(app):
    """Before napoleon takes the sections apart."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
