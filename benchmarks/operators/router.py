"""Routing from logits on. The peers from elsewhere give weights and ids alone: no counts, no sums for the balance."""

from functools import partial

import torch

from benchmarks import peers
from benchmarks.case import MOE, QUICK_MOE, Case, Floor, MoeShape, Workload
from benchmarks.measure import Side, draw, size_of
from mmoe.ops.router import router
from mmoe.reference import router as reference
from mmoe.reference.router import RouterOutput


def cases(quick: bool) -> list[Case]:
    shapes = QUICK_MOE if quick else MOE
    return [Case("router", shape.name, torch.float32, partial(build, shape)) for shape in shapes]


def build(shape: MoeShape) -> Workload:
    columns = shape.experts + shape.zero_experts
    logits, bias = draw(shape.tokens, columns), 1e-3 * torch.randn(columns)
    options = {"zero_experts": shape.zero_experts, "top_k": shape.top_k, "scaling": shape.scaling, "balance_groups": 8}
    compiled = peers.compiled(reference.router)
    transformers = peers.transformers_routing(shape, bias)
    route = peers.megatron().topk_routing_with_score_function
    out = router(logits, bias, **options)
    results = size_of(out)
    return Workload(
        Side(lambda: differentiable(router(logits, bias, **options)), [logits]),
        {
            "eager": Side(lambda: differentiable(reference.router(logits, bias, **options)), [logits]),
            "compile": Side(lambda: differentiable(compiled(logits, bias, **options)), [logits]),
            "transformers": Side(lambda: transformers(logits), [logits]),
            "Megatron-Core": Side(
                lambda: route(logits, shape.top_k, use_pre_softmax=True, scaling_factor=shape.scaling)[0], [logits]
            ),
        },
        # Backward: logits, ids and the gradients of the other results come in, the gradient of the logits goes out.
        Floor(forward=logits.nbytes + bias.nbytes + results, backward=2 * logits.nbytes + results - out.counts.nbytes),
    )


def differentiable(out: RouterOutput) -> list[torch.Tensor]:
    return [out.weights, out.identity, out.group_probs]
