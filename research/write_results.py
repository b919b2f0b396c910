"""Write docs/results.md, and what `ether plan` rests on, from the files in docs/results.

`python -m research.write_results` in the repository; a test regenerates both and compares bytes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Write them. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with results/ (docs)")
    parser.add_argument("--curves", type=Path, help="file for ether plan (the package's own)")
    parsed = parser.parse_args(arguments)
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.evaluation.advice import CURVES_FILE
    from research.curves import curves_of
    from research.measured import Measured
    from research.page import results_page

    try:
        measured = Measured.read(parsed.docs / "results")
        page = results_page(measured, parsed.docs / "results")
        curves = json.dumps(curves_of(measured), indent=1, allow_nan=False)
        write_files(parsed.docs, {"results.md": page.encode()})
        target = parsed.curves or CURVES_FILE
        write_files(target.parent, {target.name: f"{curves}\n".encode()})
    except (ValueError, OSError) as error:
        print(f"write_results: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
