"""The directive ``picture``: code, and below it the picture that the code makes.

    ```{picture}
    plot.ranks(table)
    ```

The blocks of a page share their names. The value of the last line is an object of matplotlib that has a
figure, or one that draws itself as SVG.
"""

from __future__ import annotations

import ast
import io
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def value_of(code: str, names: dict[str, Any]) -> Any:
    """Run code and return the value of its last line."""
    *first, last = ast.parse(code).body
    exec(compile(ast.Module(first, []), "<picture>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<picture>", "eval"), names)


def as_svg(value: Any) -> str:
    """The picture as SVG within a page."""
    if hasattr(value, "_repr_svg_"):
        return str(value._repr_svg_())
    from matplotlib import pyplot

    written = io.StringIO()
    # Without a date and with fixed names, so that a build of the same pages writes the same bytes.
    with pyplot.rc_context({"svg.hashsalt": "lortalib", "svg.fonttype": "none"}):
        value.figure.savefig(written, format="svg", metadata={"Date": None})
    pyplot.close(value.figure)
    return re.sub(r"^.*?(?=<svg)", "", written.getvalue(), flags=re.S)


class Picture(SphinxDirective):
    """``{picture}``: its body is the code."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The code and the figure."""
        import matplotlib

        matplotlib.use("agg")
        code = "\n".join(self.content)
        names = self.env.temp_data.setdefault("names of pictures", {})
        figure = f'<figure class="picture">{as_svg(value_of(code, names))}</figure>'
        return [
            nodes.literal_block(code, code, language="python"),
            nodes.raw("", figure, format="html"),
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
