"""Make the links of README.md absolute, because a package index shows the page without the repository.

python .ci/absolute_links.py https://github.com/OWNER/NAME v1.2.3
"""

import re
import sys
from pathlib import Path


def absolute(text: str, repository: str, revision: str) -> str:
    """Return the text with absolute addresses for links and pictures within the repository.

    Args:
        text: a page in Markdown that stands at the top of the repository.
        repository: the address of the repository.
        revision: a branch, tag or commit.
    """

    def address(match: re.Match) -> str:
        picture, words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository}/{kind}/{revision}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", address, text)


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "README.md"
    page.write_text(absolute(page.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
