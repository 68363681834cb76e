"""Attention kernels against float64, on a GPU or through Triton's interpreter."""

import numpy as np
import pytest
import torch

from spectral_kv.engine.rows import Coded, CodedRows, DenseRows
from spectral_kv.quantization.rotation import haar
from spectral_kv.quantization.turboquant import TurboQuant

SCALE = 0.3
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter's products know no bfloat16
TOLERANCE = {torch.float32: 1e-5, HALF: 5e-3}
MANY = 33_000  # rows
FILL = torch.nan  # behind the rows that count


def exact(q, keys, values, lengths):
    """Outputs in float64 for rows `[batch, kv_heads, rows, dim]`, of which `lengths` count in each head."""
    group = q.shape[1] // keys.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            n = int(lengths[b, h // group])
            k, v = keys[b, h // group, :n].double(), values[b, h // group, :n].double()
            out[b, h, 0] = (SCALE * k @ q[b, h, 0].double()).softmax(0) @ v
    return out


def error(got, want):
    return float((got.cpu().double() - want).norm() / want.norm())


def draw(rng, *shape, dtype):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype)


def launched(rows, device):
    """`rows` as their kernels compute them, on a CPU too."""
    from spectral_kv.engine import launch

    if device == "cpu":
        if isinstance(rows, DenseRows):
            rows.launch = launch.DenseLaunch(rows.keys, rows.query_heads)
        else:
            wide = rows.dtype == torch.float32
            code = rows.coded.key_codes
            rows.launch = launch.CodedLaunch(code, rows.keys.shape[-1], rows.coded.bits, rows.query_heads, wide, False)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("dim, query_heads, kv_heads", [(16, 6, 2), (64, 14, 2)])
@pytest.mark.parametrize("kernel", [False, True], ids=["operator", "kernel"])
def test_dense_rows_of_every_head_have_their_own_number(rng, device, kernel, dim, query_heads, kv_heads, dtype):
    lengths = torch.tensor([[0, 1], [129, 200]])
    capacity = 210
    keys, values = (draw(rng, 2, kv_heads, capacity, dim, dtype=dtype) for _ in range(2))
    for b in range(2):
        for h in range(kv_heads):
            keys[b, h, lengths[b, h] :], values[b, h, lengths[b, h] :] = FILL, FILL
    q = draw(rng, 2, query_heads, 1, dim, dtype=dtype)
    k, v = (draw(rng, 2, kv_heads, 1, dim, dtype=dtype) for _ in range(2))
    where = device if kernel else "cpu"
    buffers = [x.clone().to(where) for x in (keys, values)]
    rows = DenseRows(*buffers, lengths.to(where), query_heads)
    if kernel:
        rows = launched(rows, device)
    out = rows.attend(q.to(where), k.to(where), v.to(where), SCALE)
    for b in range(2):
        for h in range(kv_heads):
            keys[b, h, lengths[b, h]], values[b, h, lengths[b, h]] = k[b, h, 0], v[b, h, 0]
    want = exact(q, keys.nan_to_num(), values.nan_to_num(), lengths + 1)
    assert error(out, want) < TOLERANCE[dtype]
    for buffer, expected in zip(buffers, (keys, values), strict=True):  # the new row is written, nothing else
        torch.testing.assert_close(buffer.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("codes", [False, True], ids=["dense", "coded"])
def test_queries_of_a_float32_model_are_not_rounded_to_a_narrower_cache(rng, device, codes):
    """As in the eager path, which widens the cache."""
    lengths = torch.full((2, 2), 70)
    q, k, v = (draw(rng, 2, heads, 1, 64, dtype=torch.float32) for heads in (6, 2, 2))
    if codes:
        none = torch.zeros_like(lengths)
        rows, _, (keys, values) = coded_rows(rng, 64, 2, 6, (4, 4), torch.float32, none, lengths, device, HALF)
    else:
        keys, values = (draw(rng, 2, 2, 80, 64, dtype=HALF) for _ in range(2))
        rows = DenseRows(keys.clone().to(device), values.clone().to(device), lengths.to(device), 6)
    out = launched(rows, device).attend(q.to(device), k.to(device), v.to(device), SCALE)
    keys[:, :, 70], values[:, :, 70] = k[:, :, 0].to(HALF), v[:, :, 0].to(HALF)
    assert error(out, exact(q, keys, values, lengths + 1)) < 1e-5


def coded_rows(rng, dim, kv_heads, query_heads, bits, dtype, coded, dense, where, cached=None):
    """Rows with `coded` and `dense` of them a head, and what they stand for."""
    capacity, room = int(coded.max()) + 5, int(dense.max()) + 3
    offset = 2 * draw(rng, 1, kv_heads, 1, dim, dtype=torch.float32)
    keys = draw(rng, 2, kv_heads, capacity, dim, dtype=torch.float32) + offset
    values = draw(rng, 2, kv_heads, capacity, dim, dtype=torch.float32)
    quantizers = [TurboQuant(bits[0], (0, 0, 0), "renorm", True), TurboQuant(bits[1], (0, 0, 1), "unbiased", False)]
    packed = [q.encode(x) for q, x in zip(quantizers, (keys, values), strict=True)]
    decoded = [q.decode(p) for q, p in zip(quantizers, packed, strict=True)]
    exact_rows = [draw(rng, 2, kv_heads, room, dim, dtype=cached or dtype) for _ in range(2)]
    turn = [torch.from_numpy(haar(dim, (0, 0, i))) for i in range(2)]
    state = Coded(
        packed[0].codes.to(where), packed[0].scale.to(where), packed[1].codes.to(where), packed[1].scale.to(where),
        packed[0].mean[:, :, 0].to(where), turn[0].T.contiguous().to(where), turn[1].contiguous().to(where), bits,
        coded.to(where),
    )  # fmt: skip
    rows = CodedRows(state, *(x.clone().to(where) for x in exact_rows), dense.to(where), query_heads, dtype)
    return rows, decoded, exact_rows


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [False, True], ids=["operator", "kernel"])
def test_coded_rows_count_as_the_vectors_that_they_stand_for(rng, device, kernel, bits, dtype):
    dim, kv_heads, query_heads = 64, 2, 6
    coded, dense = torch.tensor([[0, 1], [129, 140]]), torch.tensor([[3, 0], [70, 5]])
    where = device if kernel else "cpu"
    rows, decoded, exact_rows = coded_rows(rng, dim, kv_heads, query_heads, bits, dtype, coded, dense, where)
    if kernel:
        rows = launched(rows, device)
    q = draw(rng, 2, query_heads, 1, dim, dtype=dtype)
    k, v = (draw(rng, 2, kv_heads, 1, dim, dtype=dtype) for _ in range(2))
    out = rows.attend(q.to(where), k.to(where), v.to(where), SCALE)
    most = int((coded + dense).max()) + 1
    joined = [torch.zeros(2, kv_heads, most, dim, dtype=torch.float64) for _ in range(2)]
    for b in range(2):
        for h in range(kv_heads):
            n, m = int(coded[b, h]), int(dense[b, h])
            for side, new in ((0, k), (1, v)):
                parts = (decoded[side][b, h, :n], exact_rows[side][b, h, :m], new[b, h])
                joined[side][b, h, : n + m + 1] = torch.cat([x.double() for x in parts])
    want = exact(q, *joined, coded + dense + 1)
    assert error(out, want) < TOLERANCE[dtype]
    torch.testing.assert_close(rows.keys[1, 1, 5].cpu(), k[1, 1, 0], rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("bits", [None, (4, 4), (3, 2), (2, 3)], ids=str)
def test_heads_of_256_channels_fit_into_a_chip_at_any_length(rng, device, bits, dtype):
    """From 32K rows on tiles are larger."""
    many, few = torch.full((2, 1), MANY), torch.full((2, 1), 9)
    if bits is None:
        sides = [[draw(rng, 2, 1, MANY, 256, dtype=dtype)] for _ in range(2)]
        room = torch.zeros(2, 1, 5, 256, dtype=dtype)
        rows = DenseRows(*(torch.cat([x, room], dim=-2).to(device) for (x,) in sides), many.to(device), 3)
    else:
        rows, decoded, near = coded_rows(rng, 256, 1, 3, bits, dtype, many, few, device)
        sides = [[d[:, :, :MANY], x[:, :, :9]] for d, x in zip(decoded, near, strict=True)]
    q, k, v = (draw(rng, 2, heads, 1, 256, dtype=dtype) for heads in (3, 1, 1))
    out = rows.attend(q.to(device), k.to(device), v.to(device), SCALE)
    keys, values = (torch.cat([x.double() for x in (*side, new)], -2) for side, new in zip(sides, (k, v), strict=True))
    assert error(out, exact(q, keys, values, torch.full((2, 1), keys.shape[2]))) < TOLERANCE[dtype]


def test_nothing_imports_triton_until_it_is_used():
    import subprocess
    import sys

    code = "import sys, spectral_kv.engine.rows; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_split_until_the_chip_is_full_and_no_further():
    pytest.importorskip("triton")
    from spectral_kv.engine.launch import MOST_SPLITS, splits

    assert splits(2, 32768, 1, 128) == 66
    assert splits(2, 512, 2, 64) == 8
    assert splits(1024, 32768, 2, 64) == 1
    assert splits(1, 10**7, 8, 64) == MOST_SPLITS
    assert splits(2, 1, 2, 64) == 1
    assert np.all([splits(p, 4096, 2, 64) >= 1 for p in range(1, 300)])
