"""Prints the parity table of docs/conversion.md: how far we are from transformers' LongCat-Flash, shape by shape.

python tests/convert/table.py
"""

import copy
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "layers")]

import torch  # noqa: E402 - found through the line above
from small import batch  # noqa: E402
from test_parity import SHAPES, Pair, as_theirs, gradients, random_model, their_loss, tokens  # noqa: E402

from mmoe.checkpoint.load import fill, weights  # noqa: E402
from mmoe.convert.ingest import read_hf  # noqa: E402
from mmoe.models.multimodal import build  # noqa: E402
from mmoe.parallel import engine  # noqa: E402
from mmoe.recipe.schema import Parallel  # noqa: E402


def main() -> None:
    print("| shape | logits, largest difference | gradients, worst parameter: ours; theirs |\n|---|---|---|")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            theirs = random_model(shape)
            theirs.save_pretrained(folder)
            imported = read_hf(Path(folder))
        engine.start(Parallel(), seed=0, alone=True)
        ours = build(imported.recipe).eval()
        fill(ours, imported.state)
        pair = Pair(theirs, ours, imported.recipe.model, Path(folder))
        ids = tokens(pair)
        with torch.no_grad():
            logits = (ours.logits(batch(ids)) - theirs(ids).logits).abs().max()
        exact = copy.deepcopy(theirs).double()
        truth = gradients(exact, their_loss(exact, ids))
        plain = gradients(theirs, their_loss(theirs, ids))
        found = gradients(ours, ours(batch(ids[:, :-1], labels=ids[:, 1:])).mean())
        worst = [
            max(float((side[key].double() - value).norm() / value.norm()) for key, value in truth.items())
            for side in (as_theirs(pair, weights(ours) | found), plain)
        ]
        print(f"| {name} | {logits:.0e} | {worst[0]:.0e}; {worst[1]:.0e} |")


if __name__ == "__main__":
    main()
