"""How the kernels are started: splits, tile sizes, and workspaces that outlive a captured graph."""

import torch
import triton

from spectral_kv.engine import kernels

MULTIPROCESSORS = 132  # of an H100 or H200; only how rows are split depends on it
MOST_SPLITS = 512


def splits(programs: int, rows: int, each: int, smallest: int) -> int:
    """How many programs share the rows of a head: `each` a multiprocessor, none with fewer than `smallest` rows."""
    return max(1, min(-(-MULTIPROCESSORS * each // programs), -(-rows // smallest), MOST_SPLITS))


def _group(query_heads: int, kv_heads: int) -> tuple[int, int]:
    """Query heads of a KV head, and the rows that a matrix product takes for them."""
    group = query_heads // kv_heads
    return group, max(16, triton.next_power_of_2(group))


class DenseLaunch:
    """Attention to dense rows `[batch, kv_heads, capacity, dim]` with its workspaces."""

    def __init__(self, keys: torch.Tensor, query_heads: int):
        batch, kv_heads, capacity, dim = keys.shape
        self.tile, each = (128, 1) if capacity >= 32768 and dim <= 128 else (64, 2)  # what shared memory holds
        self.splits = splits(batch * kv_heads, capacity, each, self.tile)
        self.group, self.padded = _group(query_heads, kv_heads)
        shape = (batch * kv_heads, self.splits, self.group)
        self.parts = torch.empty(*shape, dim, device=keys.device)
        self.weights = torch.empty(shape, device=keys.device)

    def __call__(self, q, new_k, new_v, keys, values, lengths, scale: float) -> torch.Tensor:
        batch, kv_heads, capacity, dim = keys.shape
        out = torch.empty_like(q)
        wide = torch.float32 in (q.dtype, keys.dtype)  # twice the shared memory, products not in tiles
        kernels.dense_split[(self.splits, batch * kv_heads)](
            q, new_k, new_v, keys, values, lengths, self.parts, self.weights, capacity, scale * kernels.LOG2E,
            self.splits, G=self.group, GP=self.padded, D=dim, BT=32 if wide else self.tile, num_warps=4,
            num_stages=3,
        )  # fmt: skip
        kernels.dense_merge[(batch * kv_heads * self.group,)](
            self.parts, self.weights, out, self.splits, G=self.group, D=dim,
            SP=triton.next_power_of_2(self.splits), num_warps=2 if self.splits <= 64 else 4,
        )  # fmt: skip
        return out


class CodedLaunch:
    """Attention to rows in TurboQuant codes and to dense ones beside them, with its workspaces."""

    def __init__(
        self, key_codes: torch.Tensor, dim: int, bits: tuple[int, int], query_heads: int, wide: bool, ptx: bool
    ):
        batch, kv_heads, capacity, _ = key_codes.shape
        self.bits, self.wide, self.ptx = bits, wide, ptx and not wide
        self.tile, self.warps, self.stages = (32, 4, 1) if wide else (128, 4, 3)
        if dim == 64 and min(bits) < 4 and not wide:  # tiles of a quarter of the channels are too narrow for four warps
            self.warps = 2
        self.width, self.merged = min(dim, 64), 128  # channels and splits that a program of the merge takes at a time
        programs = batch * kv_heads
        each = 8 if programs > 16 else 2
        self.splits = 1 << splits(programs, capacity, each, 128).bit_length() - 1  # cuts most lengths evenly
        self.group, self.padded = _group(query_heads, kv_heads)
        shape = (programs, self.splits + 1, self.group)
        self.parts = torch.empty(*shape, dim, device=key_codes.device)
        self.weights = torch.empty(shape, device=key_codes.device)

    def __call__(self, q, new_k, new_v, coded, dense, lengths, scale: float) -> torch.Tensor:
        """`coded` and `dense` are those of `CodedRows`."""
        keys, values = dense
        batch, kv_heads, capacity, _ = coded.key_codes.shape
        dim = q.shape[-1]
        out = torch.empty_like(q)
        kernels.coded_split[(self.splits + 1, batch * kv_heads)](
            q, new_k, new_v, coded.key_codes, coded.key_scales, coded.value_codes, coded.value_scales, coded.mean,
            coded.key_rotation, *coded.tables, coded.lengths, keys, values, lengths, self.parts, self.weights, capacity,
            keys.shape[-2], scale * kernels.LOG2E, self.splits, G=self.group, GP=self.padded, D=dim, KB=self.bits[0],
            VB=self.bits[1], BT=self.tile, BD=32 if self.wide else 64, PTX=self.ptx, WIDE=self.wide,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip
        kernels.coded_merge[(batch * kv_heads * self.group, dim // self.width)](
            self.parts, self.weights, coded.value_rotation, out, self.splits, G=self.group, D=dim, W=self.width,
            SB=min(self.merged, triton.next_power_of_2(self.splits)), num_warps=4,
        )  # fmt: skip
        return out
