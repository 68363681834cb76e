"""Numbers that stay as they are, in fewer bytes: exponents are alike and coded by their frequencies, mantissas are not.

The bytes of a number are taken apart. The one with the sign and the first seven bits of the exponent (or what stands
there in 16 bits) is coded, the others are stored, and those that are zero in all numbers are left out.
"""

import numpy as np
import torch

from spectral_kv.at_rest import ans
from spectral_kv.at_rest.counting import counts
from spectral_kv.at_rest.entropy import CAP, WIDTH, Tables, folded

LANE = 512  # numbers of a lane, where `LANES` suffice
LANES = 2**14  # at most: a GPU has all of them in one program, which could not be of more than 2**20
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def encode(arrays: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors, by name, that stand for arrays of floating-point numbers of one dtype; each array is a context."""
    numbers = torch.cat([x.flatten() for x in arrays])
    planes = numbers.view(torch.uint8).reshape(-1, numbers.element_size())
    kept = np.flatnonzero(planes[:, :-1].any(dim=0).cpu().numpy())
    top = planes[:, -1].to(torch.int32)
    signed = ((top & 127) + 1) * (1 - (top >> 7) * 2)
    contexts = _contexts([x.numel() for x in arrays], numbers)
    lanes = min(max(1, -(-len(numbers) // LANE)), LANES)
    rows = _in_lanes(contexts * WIDTH + CAP + signed, len(arrays) * WIDTH + CAP, lanes)
    met = counts(rows, (len(arrays) + 1) * WIDTH).reshape(-1, WIDTH)[:-1]
    tables = Tables.of(folded(met))
    words, _, states = ans.encode(rows, tables)
    stored = planes.T[torch.from_numpy(kept).to(planes.device)].cpu().numpy()
    return {
        "words": words,
        "states": states,
        "codes": tables.codes,
        "lengths": tables.lengths,
        "planes": np.concatenate([kept.astype(np.uint8), stored.ravel()]),
        "dtype": np.array([DTYPES.index(numbers.dtype), len(kept)], dtype=np.uint8),
    }


def decode(tensors: dict[str, np.ndarray], shapes: list[tuple[int, ...]], beside: torch.Tensor) -> list[torch.Tensor]:
    """The arrays of such shapes that the tensors stand for, on the device of `beside`."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    index, count = (int(x) for x in tensors["dtype"])
    dtype = DTYPES[index]
    planes = torch.zeros((sum(sizes), dtype.itemsize), dtype=torch.uint8, device=beside.device)
    stored = torch.from_numpy(tensors["planes"][count:].reshape(count, len(planes))).to(beside.device)
    for row, plane in zip(tensors["planes"][:count], stored, strict=True):
        planes[:, int(row)] = plane
    decoder = ans.decoder(tensors["words"], np.zeros(1, dtype=np.int64), tensors["states"], beside)
    contexts = _in_lanes(_contexts(sizes, beside), len(sizes), tensors["states"].shape[1])
    found = decoder(contexts, Tables(tensors["codes"], tensors["lengths"])).flatten()[: len(planes)]
    planes[:, -1] = ((found.abs() - 1) | (found < 0).to(torch.int16) << 7).to(torch.uint8)
    numbers = planes.view(dtype).flatten()
    return [x.reshape(shape) for x, shape in zip(numbers.split(sizes), shapes, strict=True)]


def _contexts(sizes: list[int], beside: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)).to(beside.device)


def _in_lanes(x: torch.Tensor, nothing: int, lanes: int) -> torch.Tensor:
    """Numbers `[n]` as one stream, `[rows, 1, 1, lanes]`, with `nothing` behind the last."""
    return torch.cat([x, x.new_full((-len(x) % lanes,), nothing)]).reshape(-1, 1, 1, lanes)
