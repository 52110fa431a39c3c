"""`python -m scripts.dashboards [--root FOLDER]`: write every file that the registry determines."""

import argparse
from pathlib import Path

from scripts.dashboards.product import Product

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Write the files below a folder."""
    parser = argparse.ArgumentParser(prog="python -m scripts.dashboards", description=__doc__)
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="where to write")
    root = parser.parse_args().root
    for path, content in Product().files().items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)


if __name__ == "__main__":
    main()
