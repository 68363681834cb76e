"""Codes of fixed rate on a GPU, a group of layers by two kernels and one product.

The product is one of 16-bit numbers: rows and matrix are sums of a high and a low half each, of which the three
products that matter are taken at once. What is left out is 1e-5 of the components, where one in single precision takes
five times as long; it changes one byte of codes in ten thousand, and their error by nothing that can be seen.
"""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from spectral_kv.codec.fixed_rate import CELLS, OCTAVE, ZERO, Codes, FixedRate
from spectral_kv.engine.scoring import addresses, dtype_of
from spectral_kv.rope import Rope
from spectral_kv.xp import constant

PART = 2**15  # tokens that are rows at a time, six bytes a number
ROWS = 32  # of a program that writes them
TILE, WIDTH = 4, 32  # tokens and bytes that a program packs at a time


def _in_halves(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix `[columns, used]` for the product with rows in halves, bfloat16 `[3 * columns, used]`."""
    high = matrix.to(torch.bfloat16)
    return torch.cat([high, high, (matrix - high.float()).to(torch.bfloat16)])


class _Tables:
    """What the kernels read of a coder, on a device."""

    def __init__(self, coder: FixedRate, device: torch.device):
        self.matrix = _in_halves(torch.from_numpy(coder.analysis).to(device))
        self.mean = torch.from_numpy(np.asarray(coder.mean, dtype=np.float32)).to(device)
        ends = np.cumsum([c.nbytes for c in coder.classes])
        places = zip(coder.classes, ends, strict=True)
        table = [[c.bits, c.start, c.stop - c.start, end - c.nbytes] for c, end in places]
        self.classes = torch.tensor(table, dtype=torch.int32, device=device)
        self.bytes = int(ends[-1])
        self.cells = (2.0 ** ((torch.arange(256.0, device=device) - ZERO) / OCTAVE)) / CELLS
        self.tables = torch.from_numpy(coder.tables).to(device)


_tables: WeakKeyDictionary[FixedRate, dict[torch.device, _Tables]] = WeakKeyDictionary()
_halves: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of matrices in single precision


def _on_device(coder: FixedRate, device: torch.device) -> _Tables:
    found = _tables.setdefault(coder, {})
    if device not in found:
        found[device] = _Tables(coder, device)
    return found[device]


def suits(keys: list[torch.Tensor], values: list[torch.Tensor]) -> bool:
    """Whether the kernels can read keys and values `[..., kv_heads, tokens, dim]`, one a layer."""
    dim, first = keys[0].shape[-1], keys[0]
    if dim < 16 or dim & (dim - 1) or first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return all(
        x.dtype == first.dtype and x.device == first.device and x.stride() == kind[0].stride() and x.stride(-1) == 1
        and not any(place & 15 for place in (x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])))
        and not x.requires_grad
        for kind in (keys, values) for x in kind
    )  # fmt: skip


def _rows(keys: list, values: list, waves: list, mean: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Tokens `first` to `first + count` of `[kv_heads, tokens, dim]` a layer, bfloat16 `[count, 3 * columns]`."""
    from spectral_kv.engine import coding_kernels

    heads, _, dim = keys[0].shape
    out = torch.empty(count, 3 * len(mean), dtype=torch.bfloat16, device=mean.device)
    coding_kernels.centred_rows[(-(-count // ROWS), len(keys) * heads)](
        addresses([*keys, *values]), *waves, mean, out, first, count, *keys[0].stride()[:2], *values[0].stride()[:2],
        LAYERS=len(keys), HEADS=heads, D=dim, BT=ROWS, DTYPE=dtype_of(keys[0]), num_warps=4,
    )  # fmt: skip
    return out


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    if rows.is_cuda:
        return torch.mm(rows, matrix, out_dtype=torch.float32)
    return rows.float() @ matrix.float()


def encode(
    coder: FixedRate, keys: list[torch.Tensor], values: list[torch.Tensor], positions: np.ndarray, rope: Rope
) -> Codes:
    """Codes of rotated keys and values `[..., kv_heads, tokens, dim]` of the layers of a group; see `FixedRate`.

    Parameters
    ----------
    positions : np.ndarray of int, [tokens]
    """
    from spectral_kv.engine import coding_kernels

    *before, _, tokens, _ = keys[0].shape
    held = _on_device(coder, keys[0].device)
    waves = [constant(wave, keys[0]) for wave in rope.undoing(positions)]
    packed, gains = (
        torch.empty(*before, tokens, size, dtype=torch.uint8, device=keys[0].device)
        for size in (held.bytes, len(coder.classes))
    )
    rows = zip(*(x.flatten(0, -3).unbind() if before else [x] for x in (packed, gains)), strict=True)
    for row, (codes, scales) in enumerate(rows):
        own = [[x.flatten(0, -4)[row] if before else x for x in kind] for kind in (keys, values)]
        for first in range(0, tokens, PART):
            count = min(PART, tokens - first)
            y = _product(_rows(*own, waves, held.mean, first, count), held.matrix)
            coding_kernels.packed_codes[(-(-count // TILE), len(coder.classes))](
                y, held.classes, held.cells, held.tables, codes[first:], scales[first:], count, y.shape[1],
                len(coder.classes), held.bytes, BT=TILE, BJ=WIDTH, num_warps=4,
            )  # fmt: skip
    return Codes(packed, gains)


def _halves_of(matrix: np.ndarray, beside: torch.Tensor) -> torch.Tensor:
    """`_in_halves`, made once for a matrix that stays where it is."""
    own = constant(matrix, beside)
    if own not in _halves:
        _halves[own] = _in_halves(own)
    return _halves[own]


def analyse(
    analysis: np.ndarray, mean: np.ndarray, keys: list[torch.Tensor], values: list[torch.Tensor],
    waves: tuple[np.ndarray, np.ndarray], out: torch.Tensor,
) -> None:  # fmt: skip
    """Components of rotated keys and values `[kv_heads, tokens, dim]` of the layers of a group.

    Parameters
    ----------
    analysis : np.ndarray of float32, [columns, components]
    mean : np.ndarray of float32, [columns]
    waves : pair of np.ndarray
        See `Rope.undoing`.
    out : torch.Tensor of float32, [components, tokens]
        Where they are written.
    """
    matrix, waves = _halves_of(analysis, keys[0]).T, [constant(wave, keys[0]) for wave in waves]
    for first in range(0, out.shape[1], PART):
        own = out[:, first : first + PART]
        rows = _rows(keys, values, waves, constant(mean, keys[0]), first, own.shape[1]).T
        if rows.is_cuda:
            torch.mm(matrix, rows, out_dtype=torch.float32, out=own)
        else:
            torch.mm(matrix.float(), rows.float(), out=own)


def synthesise(components: torch.Tensor, synthesis: np.ndarray, mean: np.ndarray) -> torch.Tensor:
    """Columns, float32 `[tokens, columns]`, of components float32 `[components, tokens]` of a group.

    Parameters
    ----------
    synthesis : np.ndarray of float32, [components, columns]
    mean : np.ndarray of float32, [columns]
    """
    used, tokens = components.shape
    rows = components.new_empty((3, used, tokens), dtype=torch.bfloat16)
    rows[0].copy_(components)
    torch.sub(components, rows[0], out=rows[1])
    rows[2].copy_(rows[0])
    found = _product(rows.flatten(0, 1).T, _halves_of(synthesis, components))
    return found.add_(constant(mean, components))
