"""The pages as HTML, with the reference made of the docstrings: sphinx-build -W -b html docs build/html"""

import re

project = "diffusion-solvers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = project
html_show_copyright = False
smartquotes_action = "D"  # dashes alone: "noise" is to be copied
highlight_language = "none"  # of displayed formulas; code says that it is python
toc_object_entries_show_parents = "hide"
myst_heading_anchors = 3  # as GitHub has them, for [..](methods.md#stochastic)

default_role = "py:obj"  # `run` in a docstring is a link, `eta = 1` is code
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
# fields as a list like Args, and so not twice
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False  # types stand in the signature

# Docstrings are plain text: code in backquotes, displayed formulas after ::, and the stars of [B, *D] and bars of |x| no markup.
PLAIN = re.compile(r"`+[^`]+`+|::\n\n( +).*(?:\n+\1.*)*|([*|]|_(?!\w))")


def escape(app, what, name, obj, options, lines):
    """What reStructuredText would take for emphasis, substitutions or links, outside code and displayed formulas."""
    text = PLAIN.sub(lambda found: f"\\{found[2]}" if found[2] else found[0], "\n".join(lines))
    lines[:] = text.split("\n")


def shorten(app, what, name, obj, options, signature, returned):
    """Defaults that dataclasses make anew, which no parser of signatures can read."""
    return signature and signature.replace("<factory>", "..."), returned


def setup(app):
    """Before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-signature", shorten)
