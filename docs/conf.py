"""Sphinx: the pages of this folder as HTML, `make docs`."""

project = "trajstore"
copyright = "the trajstore authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"description": "A trajectory store for training dynamics", "fixed_sidebar": True}
