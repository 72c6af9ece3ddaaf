"""Prints the parity table of docs/systems/yi_vl.md: how far Yi-VL is from parts of transformers, before and after its
pictures grow.

python tests/convert/yi_vl_table.py
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent)]

import transformers  # noqa: E402 - found through the line above
from test_yi_vl import Pair  # noqa: E402


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    print("| pictures | image tokens | logits, largest difference |\n|---|---|---|")
    for stage in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(stage, Path(folder))
            print(
                f"| {pair.encoder.image_size} pixels | {pair.ours.image_tokens} | {pair.difference():.0e} |", flush=True
            )


if __name__ == "__main__":
    main()
