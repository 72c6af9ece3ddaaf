"""What a run writes about itself: metrics.jsonl, TensorBoard, and lines or a progress bar on the terminal."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mmoe.ending import say
from mmoe.layers.router import Tally
from mmoe.recipe.model import MoE
from mmoe.recipe.schema import Recipe, Train
from mmoe.train.step import Outcome


def routing(tallies: Tensor, moe: MoE) -> dict[str, Any]:
    """Scalars and shares from the tallies of one step, fp64 [layers, Tally.width].

    ``active_experts_mean`` and ``_std`` are over tokens and layers; ``expert_load_max`` is the busiest FFN expert's
    load over its layer's mean (1 = even); ``expert_load`` holds a list per layer, each expert's share of selections.
    """
    tally = Tally.of(tallies, moe)
    counts = tally.selections
    selections = counts.sum(1, keepdim=True).clamp(min=1)
    total = float(tally.tokens.sum()) or 1.0
    mean = float(tally.active.sum()) / total
    ffn = counts[:, : moe.experts]
    return {
        "zero_expert_share": float(counts[:, moe.experts :].sum() / selections.sum()),
        "active_experts_mean": mean,
        "active_experts_std": math.sqrt(max(0.0, float(tally.active_squares.sum()) / total - mean * mean)),
        "expert_load_max": float((ffn.max(1).values / ffn.mean(1).clamp(min=1e-9)).max()),
        "expert_load": [[round(share, 5) for share in layer] for layer in (counts / selections).tolist()],
    }


def gradient_ratio(tallies: Tensor, moe: MoE) -> float:
    """R_g = ‖∇_P α L_LB‖ / ‖∇_P L_LM‖ over the N + Z mean probabilities P, the largest of all layers'; to be kept below
    0.1 (arXiv 2509.01322, on router stability).

    tallies: fp64 [layers, Tally.width] of a step that measured gradients.
    """
    tally = Tally.of(tallies, moe)
    # A group's probability is the sum of its experts': each of them has the group's gradient.
    members = tally.balance_gradient.new_tensor([moe.experts / moe.balance_groups] * moe.balance_groups)
    members = torch.cat((members, members.new_tensor([moe.zero_experts])))
    balance = (tally.balance_gradient.square() * members).sum(1).sqrt()
    return float((balance / tally.loss_gradient.norm(dim=1)).max())


def is_logged(train: Train, step: int) -> bool:
    """Whether step ``step``, from 1, is one whose details are recorded."""
    return step % train.log_every == 0 or step == train.steps


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the JSON lines of ``path`` behind ``step``, which it returns: a run that goes on from a checkpoint writes
    them again."""
    if not path.exists():
        return []
    kept, dropped = [], []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(line)
            else:
                dropped.append(row)
        except (ValueError, KeyError, TypeError):
            continue  # the half-written last line of a killed run
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)
    return dropped


class Recorder:
    """Writes on the first rank only; on the others its methods do nothing, but for :meth:`skipped`."""

    def __init__(self, recipe: Recipe, run: Path, first_rank: bool, done: int) -> None:
        self.recipe, self.active = recipe, first_rank
        self.skip_file = run / "skipped.jsonl"
        self.lost: dict[str, float] = {"lost_steps": 0, "lost_seconds": 0.0}
        """Steps that the process before did behind its last checkpoint, on the first rank."""
        if not first_rank:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        path = run / "metrics.jsonl"
        dropped = keep_until(path, done)
        self.lost = {"lost_steps": len(dropped), "lost_seconds": sum(row.get("seconds", 0.0) for row in dropped)}
        keep_until(self.skip_file, done)
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.progress.start()
        self.bar = self.progress.add_task(recipe.name, total=recipe.train.steps, completed=done, state="")

    def record(self, step: int, outcome: Outcome, rate: float, seconds: float) -> None:
        """One line for step ``step`` (from 1); ``seconds`` is its wall time."""
        if not self.active:
            return
        moe = self.recipe.model.moe
        shares = routing(outcome.tallies, moe) if moe else {}
        load = shares.pop("expert_load", None)
        row = {
            "step": step,
            "loss": outcome.loss,
            "lr": rate,
            "grad_norm": outcome.grad_norm,
            "tokens": outcome.tokens,
            "samples": outcome.samples,
            "seconds": seconds,
            **shares,
            **({"balance_loss": outcome.balance_loss, "bias_norm": outcome.bias_norm} if moe else {}),
            "skipped_samples": outcome.skipped_samples,
            "skipped_step": not outcome.taken,
        }
        if self.recipe.model.backbone.hidden_z_coefficient:
            row["hidden_z_loss"] = outcome.hidden_z_loss
        if self.recipe.model.mtp:
            row["mtp_loss"] = outcome.mtp_loss
        often = is_logged(self.recipe.train, step)
        if often and moe:
            ratio = gradient_ratio(outcome.tallies, moe)
            row |= {"router_gradient_ratio": ratio, "router_row_similarity": outcome.row_similarity}
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        if often and moe:
            row["expert_load"] = load
        self.file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(f"train/{name}", value, step)
        if often and moe:
            for layer, values in enumerate(Tally.of(outcome.tallies, moe).selections):
                self.board.add_histogram(f"expert_load/layer_{layer}", values / values.sum().clamp(min=1), step)
        state = f"loss {outcome.loss:.3f} · {outcome.tokens / seconds:,.0f} tokens/s"
        state += f" · {shares['active_experts_mean']:.2f} active" if moe else ""
        self.progress.update(self.bar, completed=step, state=state)
        if often and not self.console.is_terminal:
            say(f"step {step}/{self.recipe.train.steps} · {state}")

    def saved(self, step: int, stall: float, seconds: float) -> None:
        """A checkpoint, the seconds that the training stood still for it and those until it was whole."""
        if self.active:
            self.board.add_scalar("checkpoint/stall_seconds", stall, step)
            self.board.add_scalar("checkpoint/seconds", seconds, step)

    def pictures(self, step: int, images: dict[int, Tensor], names: list[str]) -> None:
        """Up to eight pictures of a batch, fp32 [n, 3, side, side] for each side, for TensorBoard: the largest."""
        largest = images[max(images)] if images else torch.zeros(0)
        if self.active and largest.size(0):
            self.board.add_images("samples", (largest[:8].float().cpu() / 4 + 0.5).clamp(0, 1), step)
            self.board.add_text("samples", ", ".join(names[:8]), step)

    def skipped(self, step: int, reasons: list[str]) -> None:
        """Names bad samples in skipped.jsonl, whichever rank met them."""
        if reasons:
            # One write a call: lines of several ranks do not mix (O_APPEND).
            lines = "".join(json.dumps({"step": step, "sample": reason}) + "\n" for reason in reasons)
            with self.skip_file.open("a") as file:
                file.write(lines)

    def say(self, line: str) -> None:
        """A line for the user, on the first rank."""
        if self.active:
            self.console.print(line, highlight=False)

    def close(self) -> None:
        if self.active:
            self.progress.stop()
            self.board.close()
            os.fsync(self.file.fileno())
            self.file.close()
