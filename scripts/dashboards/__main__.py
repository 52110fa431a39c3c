"""`python -m scripts.dashboards`: write every file that the registry determines.

With `--root` they go below another folder, with `--docs-url` they link to another copy of docs/.
"""

import argparse
from pathlib import Path

from scripts.dashboards.board import DOCS_URL
from scripts.dashboards.product import Product

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Write the files below a folder."""
    parser = argparse.ArgumentParser(prog="python -m scripts.dashboards", description=__doc__)
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="where to write")
    parser.add_argument("--docs-url", default=DOCS_URL, help="where docs/ can be read")
    arguments = parser.parse_args()
    for path, content in Product().files().items():
        target = arguments.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content.replace(DOCS_URL, arguments.docs_url.rstrip("/")))


if __name__ == "__main__":
    main()
