"""From a folder of `vllm-specbranch train-head` to a result: its report without the places of this machine, and its picture.

    python benchmarks/head_results.py DIR --out head.json --picture head.png --title "The shipped pair"

Owns the copy alone: nothing is computed anew.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.portable import portable
from vllm_specbranch.head_pictures import draw_report
from vllm_specbranch.train_head import REPORT_NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Copy; return 2 if there is no report."""
    parser = argparse.ArgumentParser(description="The report of train-head as a result.")
    parser.add_argument("folder", type=Path, help="--out of train-head")
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON")
    parser.add_argument("--picture", type=Path, help="file for the picture")
    parser.add_argument("--title", default="", help="the pair, for the picture")
    args = parser.parse_args(argv)
    try:
        report = portable(json.loads((args.folder / REPORT_NAME).read_text()))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"head_results: {error}\n")
        return 2
    args.out.write_text(json.dumps(report) + "\n")
    if args.picture:
        draw_report(report["figures"], args.picture, args.title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
