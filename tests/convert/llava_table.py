"""Prints the parity table of docs/systems/llava.md: how far imported LLaVAs are from transformers', case by case.

python tests/convert/llava_table.py
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent)]

import torch  # noqa: E402 - found through the line above
import transformers  # noqa: E402
from test_llava import CASES, Made, logits, normalised  # noqa: E402

from mmoe.convert import verify  # noqa: E402
from mmoe.data.tokenizer import train_tokenizer  # noqa: E402


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    print("| model | logits, largest difference | tensors that a round trip changes |\n|---|---|---|")
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Path(folder) / "tokenizer.json"
            train_tokenizer(["how many zebras ?"], 300).save(str(tokenizer))
            made = Made(name, Path(folder), tokenizer)
            pixels = torch.randn(2, 3, made.size, made.size, generator=torch.Generator().manual_seed(1))
            difference = (logits(made, pixels) - normalised(made, pixels)).abs().max()
            print(f"| {name} | {difference:.0e} | {len(verify(made.checkpoint, made.back))} |", flush=True)


if __name__ == "__main__":
    main()
