import subprocess
import sys

import pytest

from pipeline.stages import fast_blas as module
from pipeline.stages.fast_blas import fast_blas
from tests.conftest import REFERENCE

ROOT = REFERENCE.parents[2]
PRODUCT = """
import time, numpy as np, mlx.core as mx
a, b = (np.random.default_rng(i).normal(size=(2, 300, 400)).astype(np.float32) for i in range(2))
x, y = mx.array(a), mx.array(b).swapaxes(-1, -2)
assert np.allclose(np.asarray(x @ y), a @ b.swapaxes(-1, -2), atol=1e-3)
z = (a[0] + 1j * a[1]).astype(np.complex64)
assert np.allclose(np.asarray(mx.array(z) @ mx.array(z.T)), z @ z.T, atol=1e-2)
big = mx.array(np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32))
seconds = []
for _ in range(3):
    start = time.process_time()
    mx.eval(big @ (big + 1))
    seconds.append(time.process_time() - start)
print(loaded, min(seconds))
"""


def outcome(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_products_are_right_and_several_times_faster():
    pytest.importorskip("mlx.core")
    name, fast = outcome("from pipeline.stages.fast_blas import fast_blas\nloaded = fast_blas()" + PRODUCT)
    if name == "None":
        pytest.skip("no OpenBLAS to be found here")
    _, slow = outcome("loaded = None" + PRODUCT)
    assert float(fast) < float(slow) / 2


@pytest.mark.parametrize(
    "hindrance",
    ["module.sys = types.SimpleNamespace(platform='darwin', modules={})", "module._system = module._scipy = broken"],
)
def test_without_it_nothing_is_said(hindrance):
    code = f"""
import types
from pipeline.stages import fast_blas as module
def broken(): raise OSError
{hindrance}
print(module.fast_blas())
"""
    assert outcome(code) == ["None"]


def test_a_missing_compiler_and_a_failing_one_are_no_error(monkeypatch):
    monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: None)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    for compiler in (None, "false"):
        monkeypatch.setattr(module.shutil, "which", lambda name, compiler=compiler: compiler)
        assert fast_blas() is None


def test_once_mlx_is_there_it_is_too_late(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", module)
    monkeypatch.setattr(module, "_system", lambda: "openblas")
    assert fast_blas() is None
