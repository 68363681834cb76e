"""Spectral scores of all layers at once on a GPU, the tokens of highest scores, and their rows."""

from collections.abc import Callable
from functools import lru_cache, reduce
from operator import or_

import numpy as np
import torch

from spectral_kv.engine.banded import STEP, TILE, Plan
from spectral_kv.rope import Rope
from spectral_kv.selection import not_numbers

ROWS_WHOLE = 32768  # scores of a row that one program can hold
TILE_OF_MANY = 8192  # scores that it reads at a time where there are more


def dtype_of(x: torch.Tensor):
    """What Triton calls the dtype of a tensor."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]


def on_host(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Addresses of tensors, in the host's memory."""
    return torch.from_numpy(np.array([*map(torch.Tensor.data_ptr, tensors)], dtype=np.int64))


def addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Where tensors lie, so that one launch can read all of them."""
    return on_host(tensors).to(tensors[0].device, non_blocking=True)


def suits(keys: list[torch.Tensor]) -> bool:
    """Whether the kernels can read keys `[kv_heads, tokens, dim]`, one a layer."""
    dim = keys[0].shape[-1]
    if dim < 16 or dim & (dim - 1) or keys[0].dtype == torch.float64:
        return False
    devices = {*map(torch.Tensor.get_device, keys)}  # numbers, quicker to compare; all that is on no GPU shares one
    if len(devices) > 1 or (devices == {-1} and len({k.device for k in keys}) > 1):
        return False
    return all(map(torch.Tensor.is_contiguous, keys)) and not reduce(or_, map(torch.Tensor.data_ptr, keys)) & 15


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
        if chosen.smooth is not None:
            self.down, self.up = (torch.from_numpy(x).to(device) for x in (chosen.smooth.down, chosen.smooth.up))


_tables: dict[tuple[int, str], _Tables] = {}


def _on_device(chosen: Plan, device: torch.device) -> _Tables:
    key = (id(chosen), str(device))
    if key not in _tables:
        while len(_tables) >= 16:
            _tables.pop(next(iter(_tables)))
        _tables[key] = _Tables(chosen, device)
    return _tables[key]


@lru_cache(maxsize=4)
def _waves(frequencies: bytes, scaling: float, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    phases = np.arange(tokens)[:, None] * np.frombuffer(frequencies)
    cos, sin = (np.cos(phases) / scaling).astype(np.float32), (-np.sin(phases) / scaling).astype(np.float32)
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


def waves(rope: Rope, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[tokens, bands]` that undo a rotation at positions from 0 on."""
    frequencies = np.ascontiguousarray(rope.inv_freq, dtype=np.float64).tobytes()
    return _waves(frequencies, rope.attention_scaling, tokens, device)


def energies(
    chosen: Plan, keys: list[torch.Tensor], rope: Rope, keep: bool = False, where: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Energies of a plan's filters, norms of keys, and what the filters leave of the keys before their rotation.

    Float32 `[layers * kv_heads, energies]`, `[layers * kv_heads, tokens]` and, if `keep`, `[layers * kv_heads,
    energies, dim]`. `where` are the `addresses` of the keys, if they are on the device already.

    Products are of float32 in three passes of the matrix units' 19-bit numbers: single passes would lose 1 kept token
    in 2,000.
    """
    from spectral_kv.engine import scoring_kernels as kernels

    heads, tokens, dim = keys[0].shape
    device, layers = keys[0].device, len(keys)
    tables = _on_device(chosen, device)
    cos, sin = waves(rope, tokens, device)
    energy = torch.empty(layers * heads, chosen.energies, device=device)
    norms = torch.empty(layers * heads, tokens, device=device)
    filtered = torch.empty(*energy.shape, dim, device=device) if keep else None
    pair = 2 if heads % 2 == 0 and dim <= 64 else 1
    kernels.filter_energies[(len(chosen.kind), layers, heads // pair)](
        addresses(keys) if where is None else where, cos, sin, tables.matrices, tables.kind, tables.start,
        tables.energy, energy, norms, filtered if keep else energy, tokens, tokens, chosen.energies, heads,
        WINDOW=chosen.matrices.shape[2], TILE=TILE, STEP=STEP, D=dim, PAIR=pair, TURN=True, NORMS=True, WRITE=keep,
        DTYPE=dtype_of(keys[0]), PRECISION="tf32x3", num_warps=4, num_stages=2,
    )  # fmt: skip
    return energy, norms, filtered


def energies_of(chosen: Plan, x: torch.Tensor, first: int, out: torch.Tensor) -> None:
    """Energies of a plan's filters on rows of a float32 signal: `[rows, from first on, dim]` of `x`, into `out`.

    `out` is `[rows, from first on]` of the energies of `x`.
    """
    from spectral_kv.engine import scoring_kernels as kernels

    rows, stride, dim = x.shape
    tables = _on_device(chosen, x.device)
    pair = 2 if rows % 2 == 0 and dim <= 64 else 1
    part, where = out[:, first:], x[:, first:]
    kernels.filter_energies[(len(chosen.kind), 1, rows // pair)](
        addresses([where]), x, x, tables.matrices, tables.kind, tables.start, tables.energy, part, part, part,
        chosen.energies, stride, out.shape[1], rows, WINDOW=chosen.matrices.shape[2], TILE=TILE, STEP=STEP, D=dim,
        PAIR=pair, TURN=False, NORMS=False, WRITE=False, DTYPE=dtype_of(x), PRECISION="tf32x3", num_warps=4,
        num_stages=2,
    )  # fmt: skip


def at_tokens(chosen: Plan, energy: torch.Tensor, tokens: int) -> torch.Tensor:
    """Deviations `[rows, tokens]` of energies `[rows, energies]`, which it may overwrite."""
    import triton

    from spectral_kv.engine import scoring_kernels as kernels

    tables = _on_device(chosen, energy.device)
    if tables.index is None:
        return energy.sqrt_()
    out = torch.empty(energy.shape[0], tokens, device=energy.device)
    reach = tables.gain.shape[1]
    kernels.to_tokens[(triton.cdiv(tokens, 64), 4)](
        energy, tables.index, tables.gain, out, tokens, energy.shape[1], len(energy), K=reach,
        KP=triton.next_power_of_2(reach), BT=64, num_warps=4,
    )  # fmt: skip
    return out


def deviations(
    chosen: Plan, keys: list[torch.Tensor], rope: Rope, where: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations, and norms of keys, float32 `[layers * kv_heads, tokens]`, of rotated keys at positions from 0 on."""
    if chosen.smooth is not None:
        return _without_smooth(chosen, keys, rope, where)
    energy, norms, _ = energies(chosen, keys, rope, where=where)
    return at_tokens(chosen, energy, keys[0].shape[1]), norms


def _without_smooth(
    chosen: Plan, keys: list[torch.Tensor], rope: Rope, where: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`deviations` where a smooth part is known, products as those of `energies`."""
    import triton

    from spectral_kv.engine import scoring_kernels as kernels

    heads, tokens, dim = keys[0].shape
    device, layers = keys[0].device, len(keys)
    tables = _on_device(chosen, device)
    cos, sin = waves(rope, tokens, device)
    left, norms = torch.empty(2, layers * heads, tokens, device=device)
    pair = 2 if heads % 2 == 0 and dim <= 64 else 1
    _, rank, half = tables.down.shape
    half_tile = tables.up.shape[1]
    kernels.without_smooth[(triton.cdiv(tokens, 2 * half_tile), layers, heads // pair)](
        addresses(keys) if where is None else where, cos, sin, tables.down, tables.up, left, norms, tokens, heads,
        HALF_WINDOW=half, HALF_TILE=half_tile, RANK=rank, STEP=STEP, D=dim, PAIR=pair, DTYPE=dtype_of(keys[0]),
        PRECISION="tf32x3", num_warps=2, num_stages=2,
    )  # fmt: skip
    return left, norms


def constants(chosen: Plan, rope: Rope, tokens: int, device: torch.device) -> list:
    """What `deviations` reads beside keys: as long as it lives, a captured pass finds it where it was."""
    return [_on_device(chosen, device), *waves(rope, tokens, device)]


def unrotated(keys: list[torch.Tensor], rope: Rope) -> torch.Tensor:
    """Keys before their rotation at positions from 0 on, float32 `[layers * kv_heads, tokens, dim]`."""
    import triton

    from spectral_kv.engine import scoring_kernels as kernels

    heads, tokens, dim = keys[0].shape
    cos, sin = waves(rope, tokens, keys[0].device)
    out = torch.empty(len(keys) * heads, tokens, dim, device=keys[0].device)
    kernels.unrotated_rows[(triton.cdiv(tokens, 64), len(out))](
        addresses(keys), cos, sin, out, tokens, heads, D=dim, BT=64, DTYPE=dtype_of(keys[0])
    )
    return out


def blended(
    deviation: torch.Tensor, norms: torch.Tensor, recency: torch.Tensor, evictable: slice, weights: tuple, sign: int
) -> torch.Tensor:
    """What `Spectral.blend` makes of deviations and norms `[rows, tokens]`, from three weights."""
    from spectral_kv.engine import selection_kernels as kernels

    rows, tokens = deviation.shape
    start, stop, _ = evictable.indices(tokens)
    out = torch.empty_like(deviation)
    kernels.blend_rows[(rows,)](
        deviation, norms, recency, out, tokens, start, stop, *weights, SIGN=float(sign), BT=4096, num_warps=16
    )
    return out


def select_into(scores: torch.Tensor, evictable: slice, quota: int, kept: torch.Tensor, bad: torch.Tensor) -> None:
    """What `selection.select` keeps of scores float32 `[rows, tokens]`, into `[rows, kept]`; ones into `bad` `[rows]`.

    They stand where a score that decided was not a number.
    """
    import triton

    from spectral_kv.engine import selection_kernels as kernels

    rows, tokens = scores.shape
    start, stop, _ = evictable.indices(tokens)
    whole = stop - start <= ROWS_WHOLE
    tile = max(64, triton.next_power_of_2(stop - start)) if whole else TILE_OF_MANY
    kernels.select_rows[(rows,)](
        scores, kept, bad, tokens, start, stop, quota, WHOLE=whole, BT=tile,
        num_warps=32 if tile >= 8192 else 8 if tile >= 1024 else 4,
    )  # fmt: skip


def highest(scores: torch.Tensor, evictable: slice, quota: int) -> tuple[torch.Tensor, Callable[[], None]]:
    """What `selection.select` keeps of scores float32 `[rows, tokens]`: `[rows, kept]`.

    And a question to the device, which raises if a score that decided was not a number.
    """
    rows, tokens = scores.shape
    start, stop, _ = evictable.indices(tokens)
    kept = torch.empty(rows, start + quota + tokens - stop, dtype=torch.int64, device=scores.device)
    bad = torch.empty(rows, dtype=torch.int32, device=scores.device)
    select_into(scores, evictable, quota, kept, bad)

    answer = torch.empty(rows, dtype=torch.int32, pin_memory=scores.is_cuda)
    answer.copy_(bad, non_blocking=True)  # it comes while the host goes on
    stream = torch.cuda.current_stream(scores.device) if scores.is_cuda else None

    def question() -> None:
        if stream is not None:
            stream.synchronize()
        if any(answer.tolist()):
            raise not_numbers()

    return kept, question


def take_into(where: torch.Tensor, first: torch.Tensor, layers: int, kept: torch.Tensor) -> None:
    """Rows `kept` of keys and values of all layers, into `[keys, then values of every layer, ..., dim]`.

    `where` are the addresses of all keys, all values and the result, `first` is the first of the keys, `[kv_heads,
    tokens, dim]`, and `kept` is contiguous, `[layers, kv_heads, kept]` in whatever shape.
    """
    import triton

    from spectral_kv.engine import scoring_kernels as kernels

    heads, tokens, dim = first.shape
    count = kept.numel() // (layers * heads)
    kernels.take_rows[(triton.cdiv(count, 64), layers * heads)](
        where, kept, tokens, count, layers, heads, D=dim, BT=64, DTYPE=dtype_of(first)
    )


def kept_rows(keys: list[torch.Tensor], values: list[torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
    """Rows `kept` `[layers, kv_heads, kept]` of keys and values `[kv_heads, tokens, dim]` of all layers.

    `[2 * layers, 1, kv_heads, kept, dim]`, those of the keys first.
    """
    layers, heads, count = kept.shape
    out = torch.empty(2 * layers, 1, heads, count, keys[0].shape[-1], dtype=keys[0].dtype, device=keys[0].device)
    take_into(addresses([*keys, *values, out]), keys[0], layers, kept.contiguous())
    return out
