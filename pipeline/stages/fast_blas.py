"""A fast BLAS for MLX on Linux CPUs.

The CPU wheel of MLX computes matrix products with the reference BLAS: one thread, no vector instructions. It asks for
three functions by name, so a library that is loaded first and offers them to the whole process wins.
"""

import ctypes
import ctypes.util
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# SciPy's wheels carry OpenBLAS with its functions under other names; forwarding takes a compiler
FORWARD = """
#define REAL(T, NAME) \\
  void scipy_##NAME(int, int, int, int, int, int, T, const T*, int, const T*, int, T, T*, int); \\
  void NAME(int o, int s, int t, int m, int n, int k, T x, const T* a, int i, const T* b, int j, T y, T* c, int l) \\
  { scipy_##NAME(o, s, t, m, n, k, x, a, i, b, j, y, c, l); }
#define COMPLEX(NAME) \\
  void scipy_##NAME(int, int, int, int, int, int, const void*, const void*, int, const void*, int, const void*, \\
                    void*, int); \\
  void NAME(int o, int s, int t, int m, int n, int k, const void* x, const void* a, int i, const void* b, int j, \\
            const void* y, void* c, int l) \\
  { scipy_##NAME(o, s, t, m, n, k, x, a, i, b, j, y, c, l); }
REAL(float, cblas_sgemm)
REAL(double, cblas_dgemm)
COMPLEX(cblas_cgemm)
"""


def fast_blas() -> str | None:
    """Load the system's OpenBLAS, or SciPy's where there is a C compiler; call it before anything imports MLX.

    Returns
    -------
    str or None
        The library that MLX will compute with; None if it stays with its own: not Linux, nothing found, or too late.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    try:
        return _system() or _scipy()
    except (OSError, subprocess.CalledProcessError):
        return None


def _system() -> str | None:
    name = ctypes.util.find_library("openblas")
    if name is None or not hasattr(ctypes.CDLL(name), "cblas_sgemm"):
        return None
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return name


def _scipy() -> str | None:
    compiler, scipy = shutil.which("cc"), find_spec("scipy")
    if compiler is None or scipy is None:
        return None
    found = sorted((Path(scipy.origin).parents[1] / "scipy.libs").glob("libscipy_openblas-*.so"))
    if not found:
        return None
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file is not needed any more
        source, made = Path(folder) / "forward.c", Path(folder) / "forward.so"
        source.write_text(FORWARD)
        command = [compiler, "-shared", "-fPIC", "-o", made, source, found[0], f"-Wl,-rpath,{found[0].parent}"]
        subprocess.run(command, check=True, capture_output=True)
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    return found[0].name
