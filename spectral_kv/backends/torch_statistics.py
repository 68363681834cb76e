"""Query statistics in the file format of TriAttention's authors, which is torch's."""

import re
from pathlib import Path

import numpy as np
import torch

from spectral_kv.calibration import QueryStatistics


def read_pt(path: str | Path) -> QueryStatistics:
    """Read the file format of the authors' code.

    `{"metadata": {...}, "stats": {"layer00_head00": {"q_mean_real", "q_mean_imag", "q_abs_mean"}}}`, tensors
    `[dim / 2]` for every layer and query head. Nothing in the file is executed.

    Raises
    ------
    ValueError
        If the file holds anything but plain tensors, lacks a head, has heads of different sizes or of another
        rotation, or impossible statistics.
    """

    def refused(why: str) -> ValueError:
        return ValueError(f"{path} {why}")

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types: whatever a damaged file makes the unpickler stumble over
        raise refused(f"is not a file of plain tensors ({type(error).__name__}), and nothing else is opened") from None
    try:
        metadata = content["metadata"]
        style, dim = metadata.get("rope_style", "half"), metadata.get("head_dim")
        heads = {
            tuple(int(x) for x in re.fullmatch(r"layer(\d+)_head(\d+)", name).groups()): [
                entry[part].float().numpy() for part in ("q_mean_real", "q_mean_imag", "q_abs_mean")
            ]
            for name, entry in content["stats"].items()
        }
        layers, query_heads = (max(index) + 1 for index in zip(*heads, strict=True))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise refused(
            "does not hold `metadata` and, in `stats`, q_mean_real, q_mean_imag and q_abs_mean for every "
            f"layerLL_headHH ({type(error).__name__}: {error})"
        ) from None
    if style != "half":
        raise refused(f"was measured with rope_style={style}, and only half-split rotation is known here")
    grid = [(layer, head) for layer in range(layers) for head in range(query_heads)]
    missing = [f"layer{layer:02d}_head{head:02d}" for layer, head in grid if (layer, head) not in heads]
    if missing:
        raise refused(f"lacks {len(missing)} of {len(grid)} heads, {missing[0]} first")
    sizes = sorted({x.shape for parts in heads.values() for x in parts})
    if len(sizes) > 1 or len(sizes[0]) != 1 or dim not in (None, 2 * sizes[0][0]):
        raise refused(f"has tensors of sizes {', '.join(str(list(x)) for x in sizes)} for heads of dimension {dim}")
    real, imaginary, modulus = np.stack([heads[x] for x in grid], axis=1).reshape(3, layers, query_heads, -1)
    metadata = {k: str(v) for k, v in metadata.items() if k != "sampled_heads"}
    return QueryStatistics(real + 1j * imaginary, modulus, metadata).possible(path)
