"""What the site says about code is taken from the code: a directive that puts generated text into a page.

    ```{generated} hooks
    ```

Each generator is a function without arguments, or of the words behind its name, that returns Markdown.
"""

from collections.abc import Callable
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from sitegen.api import api, home_of
from sitegen.commands import commands
from sitegen.hooks import hooks
from sitegen.reconciling import reconcile_table
from sitegen.settings import settings

GENERATORS: dict[str, Callable[..., str]] = {
    "api": api,
    "commands": commands,
    "hooks": hooks,
    "reconcile-table": reconcile_table,
    "settings": settings,
}


class Generated(SphinxDirective):
    """Puts what a generator returns in its place."""

    required_arguments = 1
    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        """Generates, and reads the text as a part of the page."""
        name, *words = self.arguments
        return self.parse_text_to_nodes(GENERATORS[name](*words), allow_section_headings=True)


def link_to_public_home(
    app: Sphinx, _environment: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Link a name to where it is documented: annotations know only the private module that it was defined in."""
    home = home_of(node.get("reftarget", ""))
    if home is None:
        return None
    domain = app.env.domains["py"]
    return domain.resolve_xref(app.env, node["refdoc"], app.builder, "obj", home, node, content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("generated", Generated)
    app.connect("missing-reference", link_to_public_home)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
