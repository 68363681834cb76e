"""The attention that tokens receive, on a GPU."""

import torch

from spectral_kv.engine.kernels import LOG2E


def suits(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the kernels can read queries `[query_heads, count, dim]` and keys `[kv_heads, tokens, dim]`."""
    dim = keys.shape[-1]
    if queries.dtype == torch.float64 or keys.dtype == torch.float64 or queries.shape[1] == 0:
        return False
    return 16 <= dim <= 256 and dim & (dim - 1) == 0 and queries.stride(-1) == 1


def received(queries: torch.Tensor, keys: torch.Tensor, scaling: float, causal: bool) -> torch.Tensor:
    """As `spectral_kv.attention.attention_received`; products of 16-bit numbers are exact, their sums float32."""
    import triton

    from spectral_kv.engine import received_kernels as kernels

    if queries.dtype != keys.dtype or keys.dtype == torch.float32:
        queries, keys = queries.float(), keys.float()
    keys = keys.contiguous()
    (kv_heads, tokens, dim), (heads, count, _) = keys.shape, queries.shape
    log_masses = torch.empty(heads, count, device=keys.device)
    out = torch.empty(kv_heads, tokens, device=keys.device)
    shape = (count, tokens, tokens - count, queries.stride(1), queries.stride(0), scaling * LOG2E)
    meta = {
        "G": heads // kv_heads, "D": dim, "BQ": 64, "BT": 64 if dim <= 128 else 32, "CAUSAL": causal,
        "PRECISION": "tf32x3" if keys.dtype == torch.float32 else "ieee", "num_warps": 4,
        "num_stages": 3 if dim <= 64 else 2,
    }  # fmt: skip
    kernels.log_masses[(triton.cdiv(count, meta["BQ"]), heads)](queries, keys, log_masses, *shape, **meta)
    kernels.received[(triton.cdiv(tokens, meta["BT"]), kv_heads)](queries, keys, log_masses, out, *shape, **meta)
    return out
