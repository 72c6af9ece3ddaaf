"""Two models' weights compared bit for bit."""

from contextlib import ExitStack
from pathlib import Path

from mmoe.checkpoint import layout
from mmoe.checkpoint.tensors import Part, Tensors, difference
from mmoe.convert.ingest import read_hf
from mmoe.progress import progress


def verify(a: Path, b: Path) -> list[str]:
    """Compare the weights of two models, each a checkpoint or a Hugging Face directory.

    Where one of them is a language model alone, it is compared with the other one's language model.

    Returns:
        One line a difference, by name; empty when the models are the same.

    Raises:
        UserError: one of them cannot be read.
    """
    with ExitStack() as checks:
        ours, theirs = _open(a, checks), _open(b, checks)
        if not (_has_vision(ours) and _has_vision(theirs)):
            ours, theirs = Part(ours, "language."), Part(theirs, "language.")
        findings = [f"{name}: only in {a}" for name in sorted(ours.keys() - theirs.keys())]
        findings += [f"{name}: only in {b}" for name in sorted(theirs.keys() - ours.keys())]
        both = sorted(ours.keys() & theirs.keys())
        with progress("verify", sum(ours.specs[name].nbytes for name in both)) as advance:
            for name in both:
                x, y = ours.specs[name], theirs.specs[name]
                if x != y:
                    findings.append(f"{name}: {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}")
                    advance(x.nbytes)
                elif (most := difference(ours, name, theirs, name, advance)) is not None:
                    findings.append(f"{name}: differs by up to {most:.3g}")
    return findings


def _open(path: Path, checks: ExitStack) -> Tensors:
    if (path / "config.json").is_file():
        return read_hf(path).state
    from mmoe.checkpoint.load import state_dict

    checks.enter_context(layout.verified(path))
    return state_dict(path)[1]


def _has_vision(state: Tensors) -> bool:
    return not all(name.startswith("language.") for name in state)
