"""The documentation, built by ``make docs``; every warning fails the build."""

import pkgutil
from importlib import metadata
from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

project = "dflows"
author = "The dflows authors"
release = metadata.version("dflows")

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "api/generated/*/modules.rst"]
default_role = "code"
html_theme = "furo"
html_title = "dflows"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# One page a module, written anew at every build: a new module needs no page of its own.
apidoc_modules = [
    {
        "path": f"../{package}",
        "destination": f"api/generated/{package}",
        "separate_modules": True,
        "module_first": True,
    }
    for package in ("dflows", "datamodules", "lightning_modules")
]
# What a package re-exports is described where it is defined.
autodoc_default_options = {"ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# An override without a docstring is shown bare: what torch or Lightning say of it is theirs.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References into this project must resolve; those into other projects are not looked up, and
# private names have no page.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!(dflows|datamodules|lightning_modules)\.).*"),
    ("py:.*", r".*\._\w+"),
    ("py:.*", r".*\.[A-Z]"),  # type variables, which have none either
]


def resolve_reexport(
    app: Sphinx, env: BuildEnvironment, node: Element, content: Element
) -> Element | None:
    """Points a reference by the name that users import to where the object is described."""
    try:
        found: Any = pkgutil.resolve_name(node["reftarget"])
        target = f"{found.__module__}.{found.__qualname__}"
    except (ImportError, AttributeError, ValueError):
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )


def setup(app: Sphinx) -> None:
    """Registers what this file adds to Sphinx."""
    app.connect("missing-reference", resolve_reexport)
