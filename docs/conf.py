"""Sphinx settings; ``make docs`` builds the site into docs/_build/html."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent.parent))

import sb3_dsrl


def modules() -> Iterator[tuple[str, ModuleType]]:
    """The modules of the package; without an extra those that need it are missing."""
    for module in walk_packages(sb3_dsrl.__path__, "sb3_dsrl.", onerror=lambda name: None):
        try:
            yield module.name, import_module(module.name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("sb3_dsrl"):
                raise


MODULES = dict(modules())

project = "sb3_dsrl"
author = "The sb3_dsrl authors"
copyright = author
release = version = sb3_dsrl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
# The inventories of other projects would need a net.
nitpick_ignore_regex = [(r"py:.*", r"(collections|gymnasium|gym|numpy|np|pathlib|stable_baselines3|torch|th|typing)\..*")]

# Markdown
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is kept with its pictures; a test runs it

# Docstrings
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
copybutton_exclude = ".linenos, .gp, .go"

# Looks
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False
smartquotes_action = "De"  # no curly quotes: those in docstrings are Python's
toc_object_entries_show_parents = "hide"


def existing(name: str, context: dict[str, Any]) -> Any:
    """
    What a docstring refers to.

    :param name: with or without its module
    :param context: module and class that the docstring belongs to
    :return: the object, None if there is none of that name
    """
    module = next((path for path in sorted(MODULES, reverse=True) if f"{name}.".startswith(f"{path}.")), None)
    if module is not None or name.startswith("sb3_dsrl."):
        module = module or "sb3_dsrl"
        start, path = MODULES.get(module, sb3_dsrl), name[len(module) + 1 :]
        places = [(start, path)]
    else:
        owner = context.get("py:class")
        classes = [getattr(place, owner) for place in (sb3_dsrl, *MODULES.values()) if owner and hasattr(place, owner)]
        places = [(place, name) for place in (*classes, *MODULES.values())]
    for place, path in places:
        for part in filter(None, path.split(".")):
            place = getattr(place, part, None)
        if place is not None:
            return place
    return None


def link(app: Sphinx, env: Any, node: pending_xref, contnode: nodes.TextElement) -> nodes.Element | None:
    """Links to a name's public place. A name that exists but has no page is text; one that does not is a warning."""
    found = existing(node["reftarget"], node.attributes)
    if found is None:
        return None
    domain, name = env.get_domain("py"), f"sb3_dsrl.{getattr(found, '__qualname__', '')}"
    if name not in domain.objects:
        return contnode
    entry = domain.objects[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", link)
