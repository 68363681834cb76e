"""Spectral deviations on a CPU, where the transform is a band of short filters: matrix products, and little else.

A stretch of one head at a time is un-rotated, multiplied and summed up in the same few buffers. What a core's cache
holds is not fetched again, and no memory is asked for that the system would have to clear first.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from spectral_kv.engine.banded import Plan, bands, levels_of
from spectral_kv.rope import Rope
from spectral_kv.scorers.spectral import Spectral
from spectral_kv.scorers.wavelet import Wavelet

TILE = 32  # tokens of a matrix product, of which one call makes many
STRETCH = 2048  # tokens: in float32, with 64 channels, a quarter of a core's cache
READ = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Stretch:
    """Tokens from `start` to before `stop`, those beyond an end reflected, and the products that see no others.

    `runs` are blocks of filters that share a matrix and lie a tile apart: the matrix, the first block, their number,
    and the first token that they see.
    """

    start: int
    stop: int
    runs: list[tuple[int, int, int, int]]

    def rows(self, tokens: int) -> slice | torch.Tensor:
        """Where its rows are in a sequence of so many tokens."""
        if self.start >= 0 and self.stop <= tokens:
            return slice(self.start, self.stop)
        seen = np.abs(np.arange(self.start, self.stop))
        return torch.from_numpy(np.abs(np.where(seen < tokens, seen, 2 * tokens - 2 - seen)))


@dataclass(frozen=True)
class Products:
    """What is multiplied with the keys of a head.

    Parameters
    ----------
    matrices : float32 [kinds, TILE, window]
    stretches : list of Stretch
    blocks : int
    order : int [energies]
        Where in `[blocks * TILE]` results an energy lies.
    levels : list of int
        How many energies each level of a wavelet transform has; a filter is one level.
    """

    matrices: torch.Tensor
    stretches: list[Stretch]
    blocks: int
    order: torch.Tensor
    levels: list[int]


def _stretches(plan: Plan) -> list[Stretch]:
    found: list[Stretch] = []
    window = plan.matrices.shape[2]
    for block, (kind, start) in enumerate(zip(plan.kind.tolist(), plan.start.tolist(), strict=True)):
        if not found or abs(start - found[-1].start) > STRETCH:
            found.append(Stretch(start, start + window, []))
        last = found[-1]
        last.start, last.stop = min(last.start, start), max(last.stop, start + window)
        if last.runs and last.runs[-1][0] == kind:
            last.runs[-1] = (kind, last.runs[-1][1], last.runs[-1][2] + 1, last.runs[-1][3])
        else:
            last.runs.append((kind, block, 1, start))
    return found


@lru_cache(maxsize=16)
def products(scorer: Spectral, tokens: int) -> Products | None:
    """Those that make a scorer's energies of so many tokens, or None where its transform is no band."""
    plan = bands(scorer, tokens, TILE)
    if plan is None:
        return None
    order, where = np.empty(plan.energies, dtype=np.int64), plan.energy.ravel()
    order[where[where >= 0]] = np.flatnonzero(where >= 0)
    levels = levels_of(scorer, tokens) if isinstance(scorer, Wavelet) else [tokens]
    matrices, order = torch.from_numpy(plan.matrices), torch.from_numpy(order)
    return Products(matrices, _stretches(plan), len(plan.kind), order, levels)


def suits(keys: list[torch.Tensor]) -> bool:
    """Whether keys `[kv_heads, tokens, dim]`, one a layer, can be read here."""
    return all(k.device.type == "cpu" and k.dtype in READ and not k.requires_grad for k in keys)


def energies(made: Products, keys: list[torch.Tensor], rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of the filters on un-rotated keys at positions from 0 on, and norms of the keys.

    Float32 `[layers * kv_heads, energies]` and `[layers * kv_heads, tokens]`.
    """
    (heads, tokens, dim), half = keys[0].shape, keys[0].shape[-1] // 2
    window, found = made.matrices.shape[2], torch.empty(len(keys) * heads, made.blocks, TILE)
    norms = torch.empty(len(keys) * heads, tokens)
    rows = max(stretch.stop - stretch.start for stretch in made.stretches)
    exact, turned = torch.empty(rows, dim), torch.empty(rows, dim)
    product = torch.empty(max(run[2] for stretch in made.stretches for run in stretch.runs), TILE, dim)
    waves = [torch.from_numpy(wave) for wave in rope.unrotation(tokens)]
    for stretch in made.stretches:
        where, start, count = stretch.rows(tokens), stretch.start, stretch.stop - stretch.start
        cos, sin = (wave[where] for wave in waves)
        inside = slice(max(start, 0), min(stretch.stop, tokens))
        x, y = exact[:count], turned[:count]
        own = x[inside.start - start : inside.stop - start]
        (a, b), (c, d) = x.split(half, -1), y.split(half, -1)
        calls = []
        for kind, block, number, first in stretch.runs:
            seen = y[first - start : first - start + (number - 1) * TILE + window].unfold(0, window, TILE).mT
            calls.append((made.matrices[kind].expand(number, TILE, window), seen, product[:number], block))
        for row, head in enumerate(head for layer in keys for head in layer):
            x.copy_(head[where])
            torch.linalg.vector_norm(own, dim=-1, out=norms[row, inside])
            torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
            torch.mul(b, cos, out=d).addcmul_(a, sin)
            for matrix, seen, out, block in calls:
                torch.bmm(matrix, seen, out=out)
                torch.linalg.vector_norm(out, dim=-1, out=found[row, block : block + len(out)])
    return found.square_().flatten(1).index_select(1, made.order), norms


def deviations(
    scorer: Spectral, made: Products, keys: list[torch.Tensor], rope: Rope
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations, and norms of keys, float32 `[layers * kv_heads, tokens]`, of rotated keys at positions from 0 on."""
    energy, norms = energies(made, keys, rope)
    return scorer.deviation(list(energy.split(made.levels, -1)), norms.shape[-1]), norms
