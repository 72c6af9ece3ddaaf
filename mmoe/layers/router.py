"""The router of a zero-computation-expert layer: scores, selection bias, balance loss, counts for the controller."""

from typing import NamedTuple

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers.config import LongcatConfig
from mmoe.ops.router import RouterOutput, router
from mmoe.parallel import engine
from mmoe.parallel.collectives import sum_gradient
from mmoe.recipe.model import MoE


def balance_loss(counts: Tensor, group_probs: Tensor, tokens: Tensor, config: LongcatConfig) -> Tensor:
    """Device-level load-balance loss with the zero experts as one more group (arXiv 2509.01322, section 2.1.2).

        L = α Σ_j f_j P_j,   P_j = mean over tokens of the probability mass of group j

    The loss must be level, i.e. Σ_j f_j P_j must not depend on how probability moves between groups, when every FFN
    group gets the same load and FFN : zero selections stand as K_e : (k − K_e). With D FFN groups that load is
    count_j = K_e T / D each and count_zero = (k − K_e) T, so f_j = D count_j / (K_e T) and
    f_zero = count_zero / ((k − K_e) T) make every f equal to 1 there, and Σ_j 1·P_j = 1: no gradient.

    Where K_e = k there is no zero share to balance, and the zero group is left out.

    counts: int64 [N + Z] and tokens, fp32 scalar, of the whole micro-batch; group_probs: fp32 [D + 1], sums over the
    tokens of this rank, zero group last. The loss is linear in them: the ranks' results add up to the micro-batch's.
    """
    moe = config.moe
    if moe.balance_coefficient == 0:
        return group_probs.new_zeros(())
    groups, zero_share = moe.balance_groups, moe.top_k - moe.active_experts
    load = counts[: moe.experts].view(groups, -1).sum(1) * (groups / moe.active_experts)
    zero = counts[moe.experts :].sum() / zero_share if zero_share > 0 else load.new_zeros(())
    frequency = torch.cat((load, zero.view(1))) / tokens.clamp(min=1)
    return moe.balance_coefficient * (frequency * group_probs / tokens.clamp(min=1)).sum()


class Tally(NamedTuple):
    """What a router counts over the micro-batches of a step, without padding: views of one fp64 [..., :meth:`width`].

    selections [..., N + Z] per expert; tokens, FFN experts per token and their squares [...]; balance_loss [...], times
    loss tokens. Where the step measures gradients (:meth:`ZeroExpertRouter.measure`): loss_gradient [..., N + Z] and
    balance_gradient [..., D + 1], by expert and by group.
    """

    selections: Tensor
    tokens: Tensor
    active: Tensor
    active_squares: Tensor
    balance_loss: Tensor
    loss_gradient: Tensor
    balance_gradient: Tensor

    @staticmethod
    def width(moe: MoE) -> int:
        return 2 * (moe.experts + moe.zero_experts) + 4 + moe.balance_groups + 1

    @classmethod
    def of(cls, numbers: Tensor, moe: MoE) -> "Tally":
        slots = moe.experts + moe.zero_experts
        counts, sums, loss, balance = numbers.split((slots, 4, slots, moe.balance_groups + 1), dim=-1)
        tokens, active, squares, balance_loss = sums.unbind(-1)
        return cls(counts, tokens, active, squares, balance_loss, loss, balance)


CONTROLLER_STATE = ("bias_error_sum", "bias_error")
"""Buffers of the router that only training reads: in checkpoints, not in exports."""


class ZeroExpertRouter(MegatronModule):
    """Softmax over N FFN and Z zero experts; top-k of score + bias; weights are the unbiased scores × scaling.

    ``e_score_correction_bias`` fp32 [N + Z] takes no gradient: the controller moves it (:mod:`mmoe.train.controller`),
    by its error of the last step, ``bias_error``, and the sum of all, ``bias_error_sum``, both fp32 [N].
    ``tally`` fp64 is a :class:`Tally` of what went through since it was last emptied; it has gradients in it only where
    ``measures`` is set.
    """

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        moe = config.moe
        outputs = moe.experts + moe.zero_experts
        self.weight = torch.nn.Parameter(torch.empty(outputs, config.hidden_size, dtype=torch.float32))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)
        self.register_buffer("e_score_correction_bias", torch.zeros(outputs, dtype=torch.float32))
        for name in CONTROLLER_STATE:
            self.register_buffer(name, torch.zeros(moe.experts, dtype=torch.float32))
        self.register_buffer("tally", torch.zeros(Tally.width(moe), dtype=torch.float64), persistent=False)
        self.measures = False
        self.e_score_correction_bias: Tensor
        self.bias_error_sum: Tensor
        self.bias_error: Tensor
        self.tally: Tensor

    def forward(self, x_TD: Tensor, valid_T: Tensor) -> tuple[RouterOutput, Tensor]:
        """The routing of T tokens and the balance loss (fp32 scalar)."""
        moe = self.config.moe
        weight = self.weight
        if not self.config.sequence_parallel:
            # Each tensor-parallel rank routes its part of the tokens; sequence parallelism sums such gradients itself.
            weight = sum_gradient(weight, engine.tensor_group())
        logits = torch.nn.functional.linear(x_TD.float(), weight)
        routed = router(
            logits,
            self.e_score_correction_bias,
            zero_experts=moe.zero_experts,
            top_k=moe.top_k,
            scaling=moe.routed_scaling_factor * moe.variance_factor,
            balance_groups=moe.balance_groups,
            valid=valid_T,
            identity=moe.identity,
        )
        return routed, self._balance_loss(routed, valid_T.sum())

    def _balance_loss(self, routed: RouterOutput, tokens: Tensor) -> Tensor:
        """This rank's part of the micro-batch's loss; the frequencies are those of the whole micro-batch."""
        group, counts = engine.micro_batch_group(), routed.counts
        if self.config.moe.balance_coefficient and group.size() > 1:
            both = torch.cat((counts, tokens.view(1)))
            torch.distributed.all_reduce(both, group=group)
            counts, tokens = both[:-1], both[-1]
        return balance_loss(counts, routed.group_probs, tokens.float(), self.config)

    @torch.no_grad()
    def count(self, routed: RouterOutput, valid_T: Tensor, weighted_loss: Tensor) -> None:
        """Adds a micro-batch to ``tally``."""
        tally = Tally.of(self.tally, self.config.moe)
        active = ((routed.ids < self.config.moe.experts).sum(1) * valid_T).double()
        tally.selections.add_(routed.counts)
        tally.tokens.add_(valid_T.sum())
        tally.active.add_(active.sum())
        tally.active_squares.add_(active.square().sum())
        tally.balance_loss.add_(weighted_loss)

    def measure(self, routed: RouterOutput, valid_T: Tensor) -> None:
        """Has the coming backward add to ``tally`` what the losses ask of P, the mean of the tokens' probabilities p_t:
        ∇_P L = Σ_t ∂L/∂p_t, by expert for the loss of the experts' outputs and by group for the balance loss.

        What arrives at the outputs is the language model's loss and, far smaller, the auxiliary losses of the layers
        behind.
        """
        moe = self.config.moe
        tally, scaling = Tally.of(self.tally, moe), moe.routed_scaling_factor * moe.variance_factor
        # A hook that held ``routed`` would hold its own tensor, and through it the whole graph, for ever.
        ids = routed.ids.detach()
        score_in_identity = {"scaled": scaling, "unscaled": 1.0, "copy": 0.0, "drop": 0.0}[moe.identity]

        def by_expert(grad_Tk: Tensor) -> None:
            tally.loss_gradient.index_add_(0, ids.flatten(), grad_Tk.flatten().double())

        def of_weights(grad_Tk: Tensor) -> None:
            by_expert(grad_Tk * scaling)

        def of_identity(grad_T: Tensor) -> None:
            by_expert(grad_T.unsqueeze(1) * (ids >= moe.experts) * score_in_identity)

        def of_groups(grad: Tensor) -> None:
            tally.balance_gradient.add_(grad.double() * valid_T.sum())

        routed.weights.register_hook(of_weights)
        if score_in_identity:
            routed.identity.register_hook(of_identity)
        if moe.balance_coefficient and self.weight.requires_grad:
            routed.group_probs.register_hook(of_groups)
