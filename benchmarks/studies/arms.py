"""The studies: which choice each is about, and what its sides set in the quickstart's recipe."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One side of a study: what it sets in the recipe."""

    name: str
    settings: tuple[str, ...]
    rate: float = 0.0
    """The learning rate, where the study sweeps it."""


@dataclass(frozen=True)
class Study:
    title: str
    question: str
    arms: tuple[Arm, ...]
    steps: int
    settings: tuple[str, ...] = ()
    """Common to its arms."""
    test: str = ""
    """The data set, within the prepared data, whose questions the trained models are asked."""

    @property
    def sweeps(self) -> bool:
        return any(arm.rate for arm in self.arms)


def _sweep() -> Iterator[Arm]:
    for name, settings in (
        ("32 wide", ("model.backbone.hidden_size=32",)),
        ("128 wide, transferred", ("model.backbone.hidden_size=128", "transfer.base_width=32")),
        ("128 wide, as it is", ("model.backbone.hidden_size=128",)),
    ):
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
            yield Arm(name, (*settings, f"optimizer.lr={rate}", f"optimizer.min_lr={rate / 20}"), rate)


STUDIES = {
    "zero_experts": Study(
        "Zero experts",
        "Do 3 slots over 8 FFN and 4 zero experts, steered to 2 FFN experts a token, beat always 2 of 8? "
        "The gates of a token add up to 0.75 at the start in both (3 of 12 and 2 of 8 shares of a softmax, times 3).",
        (
            Arm("zero experts, K_e = 2 of 3", ("model.moe.top_k=3", "model.moe.zero_experts=4")),
            Arm("plain top-2", ("model.moe.top_k=2", "model.moe.zero_experts=0")),
        ),
        300,
        ("model.moe.active_experts=2.0",),
    ),
    "order": Study(
        "Shortcut",
        "Does the shortcut (ScMoE), which lets communication hide, cost anything against the ordinary order?",
        (
            Arm("shortcut", ("model.moe.order=shortcut",)),
            Arm("ordinary order", ("model.moe.order=sequential",)),
        ),
        300,
    ),
    "transfer": Study(
        "Transfer of the learning rate",
        "Is the best learning rate of a narrow proxy the best of a model four times as wide?",
        tuple(_sweep()),
        200,
    ),
    "connector": Study(
        "SVA against an MLP",
        "Does the Spatial Vision Aggregator beat an MLP at equal image tokens? Each makes 16 tokens of the same two "
        "encoders' 8 × 8 maps: the MLP (LLaVA-1.5's, two layers) reads the mean of each 2 × 2 window, SVA attends to "
        "its cells. The quickstart's SVA is 96 wide; 32 wide it has about as many parameters as the MLP.",
        (
            Arm("MLP", ('model.connector={type="mlp", grid=4}',)),
            Arm("SVA, 96 wide", ("model.connector.width=96",)),
            Arm("SVA, 32 wide", ("model.connector.width=32",)),
        ),
        300,
        test="scenes/test",
    ),
}
