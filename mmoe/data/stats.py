"""One page about a data set: how long, how many images, which answers, what it looks like."""

import base64
import html
import io
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mmoe.data.document import BadSample
from mmoe.data.index import read_index, read_sample
from mmoe.data.shards import Sample, read_card

SHOWN = 24
"""Samples with their pictures on the page."""
TASKS = 30
"""Tasks with a histogram of their answers, the most frequent first."""
BARS = 12
"""Answers of a task that get a bar of their own."""


def report(path: Path, out_html: Path) -> None:
    """Write an HTML page with histograms and samples of a data set; nothing outside the file is referred to.

    Args:
        path: the data set's folder.
        out_html: the page; its folder is made.

    Raises:
        UserError: there is no data set, or its index is unreadable.
    """
    card, index = read_card(path), read_index(path)
    samples = len(index["key"])
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    categories: Counter[str] = Counter()
    shown: list[str] = []
    bad = 0
    for number in range(samples):
        try:
            sample = read_sample(path, index, number)
            category = f"{sample.record['category']}"
            given = [(f"{branch['task']}", f"{branch['answer']}") for branch in sample.record["branches"]]
            if number % max(1, samples // SHOWN) == 0 and len(shown) < SHOWN:
                shown.append(_shown(sample))
        except (
            BadSample,
            AttributeError,
            KeyError,
            TypeError,
        ):  # training skips and counts it, `mmoe data lint` says why
            bad += 1
            continue
        categories[category] += 1
        for task, answer in given:
            answers[task][answer] += 1
    facts = {
        "samples": samples,
        **({"bad samples, not counted below": bad} if bad else {}),
        "images": len(index["image_offset"]),
        "text tokens": int(index["prefix_tokens"].sum() + index["branch_tokens"].sum()),
        "licence": card["license"],
        "source": card["source"],
        "fingerprint": card["fingerprint"][:16],
    }
    rows = "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in facts.items())
    page = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(card["name"])}</title>
<style>body{{font:14px sans-serif;max-width:1100px;margin:2em auto}}th{{text-align:left;padding-right:1em}}
figure{{display:inline-block;vertical-align:top;width:330px;margin:8px}}figure img{{height:128px}}</style>
<h1>{html.escape(card["name"])}</h1><table>{rows}</table>
<img src="{_picture(_histograms(index, categories, answers))}">
<h2>Samples</h2>{"".join(shown)}
"""
    out_html.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which JSON lets through, is no UTF-8.
    out_html.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def _histograms(index: dict[str, np.ndarray], categories: Counter[str], answers: dict[str, Counter[str]]) -> Figure:
    tasks = sorted(sorted(answers, key=lambda task: -answers[task].total())[:TASKS])
    columns, panels = 3, 3 + len(tasks)
    rows = -(-panels // columns)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    axes[0].hist(index["prefix_tokens"].astype(np.int64) + index["branch_tokens"], bins=40)
    axes[0].set_title("text tokens a sample")
    _bars(axes[1], "images a sample", Counter(str(n) for n in np.diff(index["image_start"])))
    _bars(axes[2], "categories", categories)
    for axis, task in zip(axes[3:], tasks, strict=False):
        _bars(axis, f"answers: {task if task.isascii() and task.isprintable() else '?'}"[:40], answers[task])
    for axis in axes[panels:]:
        axis.axis("off")
    return figure


def _bars(axis, title: str, counter: Counter[str]) -> None:
    common = sorted(counter.most_common(BARS))
    # Captions in any script are shown by their number alone: the fonts at hand may not have them.
    names = [name.strip() if name.isascii() and len(name) < 16 else f"#{i}" for i, (name, _) in enumerate(common)]
    axis.bar(range(len(common)), [number for _, number in common])
    axis.set_xticks(range(len(common)), names, rotation=45, ha="right", fontsize=7, parse_math=False)
    axis.set_title(f"{title} ({len(counter)} kinds)" if len(counter) > BARS else title, parse_math=False)


def _picture(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _shown(sample: Sample) -> str:
    pictures = "".join(f'<img src="data:;base64,{base64.b64encode(content).decode()}">' for _, content in sample.images)
    lines = [html.escape(part["text"]) for part in sample.record["prefix"] if "text" in part]
    lines += [
        f"{html.escape(branch['prompt'])} <b>{html.escape(branch['answer'])}</b>"
        for branch in sample.record["branches"]
    ]
    return f"<figure>{pictures}<figcaption>{sample.key}<br>{'<br>'.join(lines)}</figcaption></figure>"
