"""Spectral scores of all layers at once on a GPU, and the kept rows of all layers."""

from functools import lru_cache

import numpy as np
import torch

from spectral_kv.engine.banded import STEP, TILE, Plan
from spectral_kv.rope import Rope


def _dtype(x: torch.Tensor):
    """What Triton calls the dtype of a tensor."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]


def _addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    host = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
    return host.to(tensors[0].device, non_blocking=True)


def suits(keys: list[torch.Tensor]) -> bool:
    """Whether the kernels can read keys `[kv_heads, tokens, dim]`, one a layer."""
    dim = keys[0].shape[-1]
    return dim >= 16 and dim & (dim - 1) == 0 and all(k.is_contiguous() and k.data_ptr() % 16 == 0 for k in keys)


class _Tables:
    """A plan on a device; made once for a length."""

    def __init__(self, chosen: Plan, device: torch.device):
        self.plan = chosen  # alive, so that its id stays its own
        self.matrices, self.kind, self.start, self.energy = (
            torch.from_numpy(np.ascontiguousarray(x, dtype=kind)).to(device)
            for x, kind in (
                (chosen.matrices, np.float32), (chosen.kind, np.int32), (chosen.start, np.int32),
                (chosen.energy, np.int32),
            )
        )  # fmt: skip
        self.index = self.gain = None
        if chosen.index is not None:
            self.index = torch.from_numpy(chosen.index.astype(np.int32)).to(device)
            self.gain = torch.from_numpy(np.ascontiguousarray(chosen.gain, dtype=np.float32)).to(device)


_tables: dict[tuple[int, str], _Tables] = {}


def _on_device(chosen: Plan, device: torch.device) -> _Tables:
    key = (id(chosen), str(device))
    if key not in _tables:
        while len(_tables) >= 4:
            _tables.pop(next(iter(_tables)))
        _tables[key] = _Tables(chosen, device)
    return _tables[key]


@lru_cache(maxsize=4)
def _waves(frequencies: bytes, scaling: float, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[tokens, bands]` that undo a rotation."""
    phases = np.arange(tokens)[:, None] * np.frombuffer(frequencies)
    cos, sin = (np.cos(phases) / scaling).astype(np.float32), (-np.sin(phases) / scaling).astype(np.float32)
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


def deviations(chosen: Plan, keys: list[torch.Tensor], rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations, and norms of keys, float32 `[layers * kv_heads, tokens]`, of rotated keys at positions from 0 on.

    Products are of float32 in three passes of the matrix units' 19-bit numbers: single passes would lose 1 kept token
    in 2,000.
    """
    import triton

    from spectral_kv.engine import scoring_kernels as kernels

    heads, tokens, dim = keys[0].shape
    device, layers = keys[0].device, len(keys)
    tables = _on_device(chosen, device)
    frequencies = np.ascontiguousarray(rope.inv_freq, dtype=np.float64).tobytes()
    cos, sin = _waves(frequencies, rope.attention_scaling, tokens, device)
    energy = torch.empty(layers * heads, chosen.energies, device=device)
    norms = torch.empty(layers * heads, tokens, device=device)
    pair = 2 if heads % 2 == 0 and dim <= 64 else 1
    kernels.filter_energies[(len(chosen.kind), layers, heads // pair)](
        _addresses(keys), cos, sin, tables.matrices, tables.kind, tables.start, tables.energy, energy, norms, tokens,
        chosen.energies, heads, WINDOW=chosen.matrices.shape[2], TILE=TILE, STEP=STEP, D=dim, PAIR=pair,
        DTYPE=_dtype(keys[0]), PRECISION="tf32x3", num_warps=8, num_stages=2,
    )  # fmt: skip
    if tables.index is None:
        return energy.sqrt_(), norms
    out = torch.empty_like(norms)
    reach = tables.gain.shape[1]
    kernels.to_tokens[(triton.cdiv(tokens, 64), 4)](
        energy, tables.index, tables.gain, out, tokens, chosen.energies, layers * heads, K=reach,
        KP=triton.next_power_of_2(reach), BT=64, num_warps=4,
    )  # fmt: skip
    return out, norms


def kept_rows(
    keys: list[torch.Tensor], values: list[torch.Tensor], kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `kept` `[layers, kv_heads, kept]` of keys and values `[kv_heads, tokens, dim]` of all layers.

    `[layers, kv_heads, kept, dim]` each.
    """
    import triton

    from spectral_kv.engine import scoring_kernels as kernels

    layers, heads, count = kept.shape
    tokens, dim = keys[0].shape[1:]
    out = [torch.empty(layers, heads, count, dim, dtype=keys[0].dtype, device=keys[0].device) for _ in range(2)]
    kernels.take_rows[(triton.cdiv(count, 64), layers * heads)](
        _addresses(keys), _addresses(values), kept.contiguous(), *out, tokens, count, heads, D=dim, BT=64,
        DTYPE=_dtype(keys[0]),
    )  # fmt: skip
    return out[0], out[1]
