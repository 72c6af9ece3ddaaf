"""An answer to a prompt about pictures, from a checkpoint or from a Hugging Face export; greedy texts are the same,
but that a LLaVA's processor, transformers' own, rounds pixels to 8 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe import reading
from mmoe.data.pixels import BadImage, open_image, preprocess, to_rgb
from mmoe.errors import UserError
from mmoe.recipe.tokens import IMAGE, OURS

PROCESSOR = "processor_config.json"
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
LANGUAGE_MODELS = ("LongcatFlashForCausalLM", "LlamaForCausalLM")
ARCHITECTURES = {
    "mmoe": "MmoeForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "longcat_flash": LANGUAGE_MODELS[0],
    "llama": LANGUAGE_MODELS[1],
}
LARGEST_INDEX = 1 << 26
"""Bytes of the export's JSON files."""


def generate(
    path: Path,
    prompt: str,
    images: list[Path],
    *,
    max_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    system_prompt: str = "",
) -> str:
    """The model's continuation of ``<bos>``, system prompt, images and prompt, up to ``<eos>`` or ``max_tokens``.

    Args:
        path: a checkpoint or a Hugging Face export.
        prompt: taken as it is.
        images: picture files, which stand before the prompt.
        max_tokens: the most tokens to add.
        temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
        seed: of the drawing.
        system_prompt: a text before the images, as a mixture's.

    Raises:
        UserError: nothing to load at ``path``, an unreadable picture, a negative temperature, or too long a sequence.
    """
    if temperature < 0 or max_tokens < 1:
        raise UserError("temperature must be 0 or more and max-tokens 1 or more", "", "correct the option")
    if IMAGE in prompt + system_prompt:
        raise UserError("the prompt holds <image>", "", "name the pictures with --image; they stand before the prompt")
    if not path.is_dir():
        raise UserError("no such checkpoint or export", str(path), "`mmoe train` and `mmoe convert to-hf` make one")
    pictures = [_read(file) for file in images]
    if (path / "config.json").is_file():
        return _from_export(path, (system_prompt, prompt), pictures, max_tokens, temperature, seed)
    return _from_checkpoint(path, (system_prompt, prompt), pictures, max_tokens, temperature, seed)


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
        to_rgb(open_image(data))
    except OSError as error:
        raise UserError(f"cannot read the image: {error.strerror}", str(file), "give a readable picture") from None
    except BadImage as error:
        raise UserError(f"cannot use the image: {error}", str(file), "give a JPEG, PNG, WebP, TIFF or BMP") from None
    return data


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BadImage as error:  # a long strip, padded to a square
        raise UserError(f"cannot use the image: {error}", "--image", "give a smaller one") from None


def next_token(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token from logits, fp32 ``[V]``."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.double() / temperature).softmax(-1), 1, generator=generator))


def _from_checkpoint(
    path: Path, texts: tuple[str, str], pictures: list[bytes], max_tokens: int, temperature: float, seed: int
) -> str:
    """``texts``: before the pictures, and behind them."""
    import mmoe

    model = mmoe.load(path)
    if pictures and not model.image_tokens:
        raise UserError("this model takes no pictures", str(path), "leave --image out")
    data = model.recipe.data
    with _told():
        views = [preprocess(picture, model.image_sizes, data.fit, data.interpolation) for picture in pictures]
    images = {
        side: torch.from_numpy(np.stack([view[side] for view, _ in views])) for side in model.image_sizes if views
    }
    sizes = torch.tensor([size for _, size in views])
    (front, prompt), special = map(model.tokenizer.encode, texts), model.tokenizer.special
    ids = [special.bos, *front, *[special.image] * (model.image_tokens * len(pictures)), *prompt]
    start, limit = len(ids), model.recipe.model.backbone.max_position
    if start + max_tokens > limit:
        what = f"{start} tokens of prompt and {max_tokens} new ones are more than the model's {limit} positions"
        raise UserError(what, "", "shorten the prompt or lower --max-tokens")
    generator = torch.Generator().manual_seed(seed)
    while len(ids) < start + max_tokens:
        logits = model.logits(torch.tensor([ids]), *((images, sizes) if views else ()))[0, -1].cpu()
        token = next_token(logits, temperature, generator)
        if token == special.eos:
            break
        ids.append(token)
    return model.tokenizer.decode(ids[start:]).strip()


def _check_places(path: Path) -> None:
    """Raises :class:`UserError` where transformers would read weights from elsewhere than the export's own files."""
    named: list[Any] = []
    try:
        config = reading.json_object(reading.text(path / "config.json", LARGEST_INDEX))
        named += [name for name in [config.get("transformers_weights")] if name is not None]
        if (path / INDEX).exists():
            weights = reading.json_object(reading.text(path / INDEX, LARGEST_INDEX)).get("weight_map")
            named += weights.values() if isinstance(weights, dict) else [weights]
    except (OSError, ValueError) as error:
        raise UserError(f"unreadable {INDEX} or config.json: {error}", str(path), "export the model again") from None
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"its weights are in {name!r}", str(path), "put its .safetensors files beside their index")
    if (path / ADAPTER).exists():
        raise UserError(f"{ADAPTER} names weights of elsewhere", str(path), "remove it, or merge the adapter")


def _architecture(path: Path) -> str:
    """Which model an export is, by its own word."""
    from mmoe.convert.families import cambrian, llava_llama

    config = reading.json_object(reading.text(path / "config.json", LARGEST_INDEX))
    kind = config.get("model_type")
    if kind == cambrian.MODEL_TYPE or llava_llama.is_release(config):
        fix = f"mmoe convert from-hf {path} OUT (from-parts, where its encoders are elsewhere), then generate from "
        fix += "OUT/checkpoints/step_00000000"
        raise UserError("it is in the layout of a release, for that release's code", str(path), fix)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"model_type is {kind!r}", str(path / "config.json"), f"give one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def _from_export(
    path: Path, texts: tuple[str, str], pictures: list[bytes], max_tokens: int, temperature: float, seed: int
) -> str:
    _check_places(path)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    architecture = _architecture(path)
    if pictures and architecture in LANGUAGE_MODELS:
        raise UserError("this model takes no pictures", str(path), "leave --image out")
    kind: Any = getattr(transformers, architecture, None)
    if architecture in LANGUAGE_MODELS:
        processor: Any = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        ids = [
            processor.bos_token_id,
            *(token for text in texts for token in processor.encode(text, add_special_tokens=False)),
        ]
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    elif architecture == "LlavaForConditionalGeneration":
        try:
            processor = transformers.LlavaProcessor.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"no processor can be made: {error}", str(path), "export the model again") from None
        shown = [to_rgb(open_image(picture)) for picture in pictures]
        text = texts[0] + processor.image_token * len(shown) + texts[1]
        inputs = dict(processor(text=text, images=shown or None, return_tensors="pt"))
    else:
        # Our own classes: the copies of them in the directory are not run, whatever stands there.
        from mmoe.convert.hf.modeling_mmoe import MmoeForConditionalGeneration
        from mmoe.convert.hf.processing_mmoe import MmoeImageProcessor, MmoeProcessor

        try:
            fields = reading.json_object(reading.text(path / PROCESSOR, 1 << 20))
            tokens, image = int(fields["image_tokens"]), int(fields.get("image_token_id", OURS.image))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"unreadable {PROCESSOR}: {error}", str(path), "export the model again") from None
        processor = MmoeProcessor(
            MmoeImageProcessor.from_pretrained(path),
            transformers.PreTrainedTokenizerFast.from_pretrained(path),
            image_tokens=tokens,
            image_token_id=image,
        )
        with _told():
            inputs = dict(processor(text=texts[0] + IMAGE * len(pictures) + texts[1], images=pictures))
        kind = MmoeForConditionalGeneration
    try:
        model = kind.from_pretrained(path, use_safetensors=True).eval()
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # the sentence of transformers
            raise
        fix = "export it again, a LongCat-Flash without --zero-experts drop"
        raise UserError(f"transformers cannot load it: {error}", str(path), fix) from None
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(**inputs, max_new_tokens=max_tokens, **drawn)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
