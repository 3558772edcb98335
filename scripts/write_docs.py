"""Write what README and docs say of the results: every table, its sentences and the picture.

    python scripts/write_docs.py

They come from the results.json below model_cards/ and stand between the markers
`<!-- table: NAME -->` and `<!-- end -->`; `comparison/documents.py` has the names. The test suite
fails when a document says something else than the results.
"""

import argparse
import sys
from pathlib import Path

from comparison.documents import MARKED, Evidence, drawn, written
from comparison.plots import draw_beside_each_other
from support.command_line import UsageError

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "three_tasks.png"


def documents() -> list[Path]:
    """Return the documents that have tables."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "model_cards" / "README.md"]
    return sorted(path for path in found if MARKED.search(path.read_text(encoding="utf-8")))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        evidence = Evidence(ROOT / "model_cards")
        for path in documents():
            text = path.read_text(encoding="utf-8")
            new = written(text, evidence)
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {'as it was' if new == text else 'written'}")
        draw_beside_each_other(drawn(evidence), PICTURE)
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{PICTURE.relative_to(ROOT)}: drawn")


if __name__ == "__main__":
    main()
