"""The released Cambrian-1's arithmetic written out one image and one query at a time, in the dtype of its weights.

From the released names alone (cambrian-mllm/cambrian, cambrian/model/vision_sampler.py and cambrian_arch.py), without
a line of ours: windows, positions, LayerNorms, projections, one masked softmax.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
GELU = F.gelu


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.linear_2", GELU(linear(w, f"{name}.linear_1", x)))


def padding(side: int, height: int, width: int) -> Tensor:
    """bool [side, side] after ``unmask_attention_mask``; its two branches as they stand."""
    mask = torch.ones(side, side, dtype=torch.bool)
    if width / height > 1:
        cut = (side - int(height * (side / width))) // 2
        if cut > 0:
            mask[:cut] = False
            mask[-cut:] = False
    else:
        cut = (side - int(width * (side / height))) // 2
        if cut > 0:
            mask[:, :cut] = False
            mask[:, -cut:] = False
    return mask


def attention(
    w: Weights, name: str, q: Tensor, keys: Sequence[Tensor], suffixes, valid: Tensor, heads, scale
) -> Tensor:
    """One query [C] over the keys of all encoders given, [m², C] each; valid bool over all of them."""
    asked = linear(w, f"{name}.q_proj.1", norm(w, f"{name}.q_proj.0", q)).view(heads, -1)
    k, v = (
        torch.cat(
            [
                linear(w, f"{name}.{part}{s}.1", norm(w, f"{name}.{part}{s}.0", x))
                for x, s in zip(keys, suffixes, strict=True)
            ]
        ).view(len(valid), heads, -1)
        for part in ("k_proj", "v_proj")
    )
    scores = torch.einsum("hd,khd->hk", asked, k) * scale
    share = scores.masked_fill(~valid, -torch.inf).softmax(-1)
    return linear(w, f"{name}.o_proj", torch.einsum("hk,khd->hd", share, v).flatten())


def layer(w: Weights, name: str, query: Tensor, context: Tensor, windows, valids, *, heads, scale, joint) -> Tensor:
    """One query [q] with its windows [m², C] and masks [m²] of all encoders → [q]."""
    given = torch.cat((query, linear(w, f"{name}.proj_context", context)))
    start = linear(w, f"{name}.proj_in", given)
    valids = [valid if valid.any() else torch.ones_like(valid) for valid in valids]
    keys = [x + w[f"{name}.pos_embed_{i}"] if len(x) > 1 else x for i, x in enumerate(windows)]
    if joint:
        suffixes = [f"_{i}" for i in range(len(keys))]
        found = attention(w, f"{name}.cross_attn", start, keys, suffixes, torch.cat(valids), heads, scale)
    else:
        gate = mlp(w, f"{name}.weight_mlp", given).softmax(-1) if len(keys) > 1 else torch.ones(1, dtype=query.dtype)
        found = torch.zeros_like(start)
        for i, (x, valid) in enumerate(zip(keys, valids, strict=True)):
            place = f"{name}.aggregate_{i}.attention_layer"
            part = attention(w, place, start, [x], [""], valid, heads, scale) if len(x) > 1 else mlp(w, place, x[0])
            found = found + gate[i] * part
    return query + mlp(w, f"{name}.proj_out", norm(w, f"{name}.norm", start + found))


def bilinear(x: Tensor, side: int) -> Tensor:
    """[h, h, c] → [side, side, c]: cell centres in line, edges held."""
    place = ((torch.arange(side, dtype=x.dtype) + 0.5) * (len(x) / side) - 0.5).clamp(min=0)
    low = place.floor().long()
    high, part = (low + 1).clamp(max=len(x) - 1), (place - low)[:, None, None]
    rows = x[low] * (1 - part) + x[high] * part
    part = part.view(1, -1, 1)
    return rows[:, low] * (1 - part) + rows[:, high] * part


def image(w: Weights, maps, grids, sizes, *, grid, sides, layers, heads, scale, joint, masked) -> dict[str, Tensor]:
    """What the connector makes of one image: ``maps`` of every encoder [h, h, c]; ``sizes`` height and width."""
    features = []
    for i, (parts, side) in enumerate(zip(maps, grids, strict=True)):
        name, x = f"model.mm_projector_aux_{i}", torch.cat([bilinear(part, side) for part in parts], dim=-1)
        features.append(norm(w, f"{name}.3", linear(w, f"{name}.2", GELU(linear(w, f"{name}.0", x)))))
    context = features[0].flatten(0, 1).mean(0)
    masks = [padding(side, *sizes) if masked else torch.ones(side, side, dtype=torch.bool) for side in grids]

    def window(x: Tensor, side: int, row: int, column: int) -> Tensor:
        m = len(x) // side
        return x[row * m : (row + 1) * m, column * m : (column + 1) * m].flatten(0, 1)

    def ask(name: str, queries: Tensor, side: int) -> Tensor:
        out = torch.empty_like(queries)
        for row in range(side):
            for column in range(side):
                seen = [window(x, side, row, column) for x in features]
                valid = [window(mask, side, row, column) for mask in masks]
                out[row, column] = layer(
                    w, name, queries[row, column], context, seen, valid, heads=heads, scale=scale, joint=joint
                )
        return out

    groups = []
    for g, side in enumerate(sides):
        queries = w["model.vision_query"][g].expand(side, side, -1)
        for i in range(layers):
            queries = ask(f"model.vision_sampler_{g}.layers.{i}", queries, side)
        groups.append(bilinear(queries, grid))
    out = linear(w, "model.mm_projector.2", GELU(linear(w, "model.mm_projector.0", torch.cat(groups, -1))))
    rows = out
    if "model.image_newline" in w:
        rows = torch.cat((out, w["model.image_newline"].expand(grid, 1, -1)), dim=1)
    return {"rows": rows.flatten(0, 1), "ask": lambda name, queries: ask(name, queries, grid)}
