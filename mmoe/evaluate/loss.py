"""The training objective on data that nothing was trained on: the mean loss of a next token, in nats.

Counted is what training counts (answers, each with its ``<eos>``, and texts marked ``"loss": true``): the sum of these
tokens' losses over their number, every token with the same weight, as in a training step.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from mmoe.data.batch import Illustrated, batches_from_documents, illustrate
from mmoe.data.decoders import build
from mmoe.data.document import BadSample
from mmoe.data.source import Source, name_of
from mmoe.data.tokenizer import Vocabulary
from mmoe.errors import UserError
from mmoe.evaluate.asked import PLAIN, Asking, as_seen, heading, progress, show
from mmoe.recipe import load_recipe
from mmoe.recipe.schema import Recipe
from mmoe.train import stages

TEXT = "text"
"""The task that the prefix's own texts count for."""
FIRST = "-"
"""In the place of a checkpoint: a recipe's first weights."""


class Model(Protocol):
    """What `mmoe.load` returns, as far as it is needed here."""

    recipe: Recipe
    tokenizer: Vocabulary
    image_tokens: int
    image_sizes: tuple[int, ...]

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """The batch of docs/architecture.md → losses, fp32 ``[n]``, of the places where ``loss_mask`` is 1."""
        ...


def measure(model: Model, source: Source, how: Asking = PLAIN) -> dict[str, Any]:
    """The loss of a data set, which is packed as its samples come.

    Args:
        model: see :class:`Model`.
        source: the data set.
        how: see :class:`Asking`.

    Returns:
        ``samples``, ``skipped`` (the bad samples and those that fit in no pack, named with the reason), ``tokens`` that
        count, their mean ``loss``, and both for each of ``tasks``.

    Raises:
        UserError: the data set has images and the model no encoder, or no token of it counts.
    """
    if source.images and how.images != "none" and not model.image_tokens:
        raise UserError("the data has images, but the model has no encoder", str(source.path), "add --no-images")
    data = model.recipe.data
    skipped: list[str] = []
    tasks: dict[str, list[str]] = {}
    count = min(len(source), how.limit or len(source))

    def stream() -> Iterator[Illustrated]:
        for number in progress(range(count)):
            key = source.key(number)
            try:
                sample = as_seen(source.read(number), how)
                item = illustrate(sample, model.tokenizer, model.image_tokens, key)
                tokens, pictures = len(item.document), len(item.document.images)
                if tokens > data.sequence_length or pictures > data.images_per_pack:
                    pack = f"{data.sequence_length} and {data.images_per_pack}"
                    raise BadSample(f"{tokens} tokens and {pictures} images fit in no pack of {pack}")
            except BadSample as error:
                skipped.append(f"{key}: {error}")
                continue
            tasks[key] = [TEXT, *(str(branch.get("task", TEXT)) for branch in sample.record.get("branches", []))]
            yield item

    batches = batches_from_documents(
        stream(),
        decoder=build(data, model.image_sizes),
        sequence_length=data.sequence_length,
        packs=model.recipe.train.micro_batch,
        images_per_pack=data.images_per_pack,
    )
    sums: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for batch in batches:
        skipped += batch["skipped"]
        if how.images == "blank":
            for pixels in batch["images"].values():
                pixels.zero_()
        rows, columns = batch["loss_mask"].bool().nonzero(as_tuple=True)
        where = (rows, batch["document"][rows, columns], batch["branch"][rows, columns])
        losses = model.losses(batch).double().tolist()
        for row, document, branch, loss in zip(*(part.tolist() for part in where), losses, strict=True):
            task = tasks[batch["samples"][row][document - 1]][branch]
            sums[task] += loss
            numbers[task] += 1
    if not numbers:
        raise UserError("no token of it carries loss", str(source.path), "give a data set with answers")
    return {
        "samples": count,
        "skipped": skipped,
        "tokens": numbers.total(),
        "loss": sums.total() / numbers.total(),
        "tasks": {task: {"tokens": numbers[task], "loss": sums[task] / numbers[task]} for task in sorted(numbers)},
    }


def table(result: dict[str, Any]) -> Table:
    """The result as a table, every task a row, all of them the last one."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "tokens", "loss"):
        made.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for task, row in [*result["tasks"].items(), ("all", result)]:
        made.add_row(task, f"{row['tokens']:,}", f"{row['loss']:.4f}")
    return made


def run(
    checkpoint: Path,
    data: Path,
    out: Path | None,
    how: Asking = PLAIN,
    *,
    recipe: str | None = None,
    stage: str | None = None,
) -> None:
    """`mmoe evaluate CHECKPOINT --suite loss`: print the table, write the numbers.

    Args:
        how: see :class:`Asking`.
        recipe: measure the model that a run of this recipe begins with: the checkpoint's weights as they are handed
            over to it, or, where :data:`FIRST` stands in the place of the checkpoint, its first ones.
        stage: of the recipe, where it has any.

    Raises:
        UserError: the checkpoint or the data set is missing or broken, the weights are another model's; see
            :func:`measure`.
    """
    import mmoe
    from mmoe.checkpoint.load import begin

    source = Source(data, name_of(data))
    model: Any
    if recipe is None:
        model = mmoe.load(checkpoint)
    else:
        model = begin(stages.one(load_recipe(recipe), stage), None if str(checkpoint) == FIRST else checkpoint)
    result = heading("loss", checkpoint, data, how)
    result |= {name: value for name, value in (("as", recipe), ("stage", stage)) if value}
    result |= measure(model, source, how)
    show(result, out, table(result))
