"""Run by tests/convert/conftest.py: uses an export as a stranger would, where importing mmoe is an error.

foreign.py EXPORT FOLDER: writes FOLDER/found.pt, and the models as transformers saves them beside EXPORT.
"""

import sys
from pathlib import Path


class Block:
    """Makes ``import mmoe`` fail."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmoe":
            raise ImportError("an export must not need mmoe")


sys.meta_path.insert(0, Block())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LongcatFlashForCausalLM,
)


@torch.no_grad()
def main(out: Path, folder: Path) -> None:
    found = {}
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    picture = Image.fromarray(pixels)

    language = LongcatFlashForCausalLM.from_pretrained(out / "language")
    ids = torch.arange(4, 44).view(2, 20)
    found["language"] = language(ids).logits
    found["language tokens"] = AutoTokenizer.from_pretrained(out / "language")("how many zebras ?")["input_ids"]

    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    one = processor(text="<image>how many zebras ?", images=folder / "picture.png")
    found["one"] = dict(one)
    found["led"] = dict(processor(text="one word .\n<image>how many zebras ?", images=picture))
    found["one logits"] = model(**one).logits
    found["generated"] = model.generate(**one, max_new_tokens=4, do_sample=False)
    found["beams"] = model.generate(**one, max_new_tokens=3, num_beams=2, do_sample=False)

    texts = ["<image>how many zebras ?", "a <image> left of <image> <eos>", "a frog"]
    several = processor(text=texts, images=[[picture], [picture, picture.rotate(90)], []])
    found["several"] = dict(several)
    found["several logits"] = model(**several).logits
    found["alone logits"] = [
        model(**processor(text=t, images=p)).logits
        for t, p in zip(texts, [picture, [picture, picture.rotate(90)], None], strict=True)
    ]
    both = {key: several[key] for key in ("input_ids", "pixel_values")}
    _, expanded = model._expand_inputs_for_generation(2, **both)
    found["expanded"] = expanded["pixel_values"]
    found["errors"] = [
        message(lambda: processor(text="<image> or <image>", images=picture)),
        message(lambda: processor(text="a frog", images=picture)),
        message(lambda: processor(images=picture)),
        message(lambda: model(input_ids=ids, pixel_values=one["pixel_values"])),
    ]

    half = AutoModelForCausalLM.from_pretrained(out.with_name("bf16"), dtype="auto", trust_remote_code=True)
    found["half types"] = {name: str(tensor.dtype) for name, tensor in half.state_dict().items()}
    found["half logits"] = half(**one).logits
    model.save_pretrained(out.with_name("again"))
    language.save_pretrained(out.with_name("again-language"))
    torch.save(found, folder / "found.pt")


def message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
