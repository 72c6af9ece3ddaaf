"""Greedy answers to many prompts at once: what `mmoe generate` says to each of them, a batch of rows at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmoe.data.batch import Illustrated, collate, pictures
from mmoe.data.decoders import Decoder
from mmoe.evaluate.scenes import Model


@dataclass(frozen=True)
class Said:
    """One prompt's answer.

    Attributes:
        text: decoded, without blanks around it; ``""`` where there is a problem.
        problem: why the prompt's image is bad, or ``""``.
        whole: False where the answer had not ended after the most tokens.
    """

    text: str
    problem: str = ""
    whole: bool = True


@torch.no_grad()
def answers(
    model: Model, prompts: Sequence[Illustrated], decoder: Decoder, *, max_tokens: int, blank: bool = False
) -> list[Said]:
    """The likeliest token after each prompt, and again, up to ``<eos>`` or ``max_tokens``.

    A prompt takes a row of its own, and leaves the batch when its answer has ended.

    Args:
        model: see :class:`Model`.
        prompts: documents that end where the answer begins; as many as one batch can hold.
        decoder: of the prompts' images.
        max_tokens: the most tokens of an answer.
        blank: put a uniform grey picture in the place of every image.
    """
    length = torch.tensor([len(prompt.document) for prompt in prompts])
    rows = [[prompt] for prompt in prompts]
    batch, problems = collate(rows, int(length.max()) + max_tokens, decoder(pictures(rows)))
    if blank:
        for pixels in batch["images"].values():
            pixels.zero_()
    owner = torch.tensor([row for row, prompt in enumerate(prompts) for _ in prompt.document.images], dtype=torch.long)
    start = length.clone()
    ended = torch.tensor([bool(problem) for problem in problems])
    eos = model.tokenizer.special.eos
    for _ in range(max_tokens):
        active = (~ended).nonzero().flatten()
        if not len(active):
            break
        place = length[active] - 1
        logits = model.forward_batch(_part(batch, active, owner, int(length[active].max())))
        token = logits[torch.arange(len(active), device=logits.device), place.to(logits.device)].argmax(-1).cpu()
        ended[active] = token == eos
        row, token, place = (part[token != eos] for part in (active, token, place))
        batch["tokens"][row, place + 1] = token
        batch["position"][row, place + 1] = batch["position"][row, place] + 1
        for name in ("document", "branch"):
            batch[name][row, place + 1] = batch[name][row, place]
        length[row] += 1
    said = []
    for row, problem in enumerate(problems):
        ids = batch["tokens"][row, int(start[row]) : int(length[row])].tolist()
        text = "" if problem else model.tokenizer.decode(ids).strip()
        said.append(Said(text, problem, bool(ended[row])))
    return said


def _part(batch: dict, rows: Tensor, owner: Tensor, end: int) -> dict:
    """Some rows of a batch up to ``end``, with their images; ``owner`` names each image's row."""
    cut = {name: batch[name][rows, :end] for name in ("tokens", "loss_mask", "position", "document", "branch")}
    mine = torch.isin(owner, rows)
    images = {side: pixels[mine.to(pixels.device)] for side, pixels in batch["images"].items()}
    return cut | {"images": images, "original_sizes": batch["original_sizes"][mine]}
