"""Prints the parity table of docs/systems/encoders.md: how far our encoders are from transformers', case by case.

python tests/convert/encoder_table.py
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402 - found through the line above
import transformers  # noqa: E402
from test_encoders import CASES, difference, pair  # noqa: E402


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    print("| encoder | its size, fp32 | fp64 | smaller image, fp32 | larger image, fp32 |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            made = pair(case, Path(folder))
            size = made.config.image_size
            tries = [(size, torch.float32), (size, torch.float64), (16, torch.float32), (48, torch.float32)]
            print(f"| {name} | {' | '.join(f'{difference(made, *each):.0e}' for each in tries)} |", flush=True)


if __name__ == "__main__":
    main()
