"""Two models' weights compared bit for bit."""

from pathlib import Path

import torch
from torch import Tensor

from mmoe.convert.ingest import read_hf


def verify(a: Path, b: Path) -> list[str]:
    """Compare the weights of two models, each a checkpoint or a Hugging Face directory.

    Where one of them is a language model alone, it is compared with the other one's language model.

    Returns:
        One line a difference, by name; empty when the models are the same.

    Raises:
        UserError: one of them cannot be read.
    """
    ours, theirs = _read(a), _read(b)
    if not (_has_vision(ours) and _has_vision(theirs)):
        ours, theirs = _language(ours), _language(theirs)
    findings = [f"{name}: only in {a}" for name in sorted(ours.keys() - theirs.keys())]
    findings += [f"{name}: only in {b}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        x, y = ours[name].cpu(), theirs[name].cpu()
        if x.shape != y.shape or x.dtype != y.dtype:
            findings.append(f"{name}: {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}")
        elif not torch.equal(_bytes(x), _bytes(y)):  # bytes, so that NaN equals itself and 0 does not equal −0
            findings.append(f"{name}: differs by up to {(x.double() - y.double()).abs().max().item():.3g}")
    return findings


def _read(path: Path) -> dict[str, Tensor]:
    if (path / "config.json").is_file():
        return read_hf(path).state
    from mmoe.checkpoint.load import state_dict

    return state_dict(path)[1]


def _has_vision(state: dict[str, Tensor]) -> bool:
    return not all(name.startswith("language.") for name in state)


def _language(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("language.")}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
