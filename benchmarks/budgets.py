"""What a sweep over methods and budgets costs beside one run on the same documents: seconds of both, in fresh stores.

    python benchmarks/budgets.py
    python benchmarks/budgets.py document.count=4

Settings are those of `python -m pipeline`. One run is `experiment=budgets` with one method and one budget; the sweep
has six methods and five budgets. Both are whole commands, start and all, and take turns, so that both see the same
machine; the medians of three repeats are compared.
"""

import statistics
import subprocess
import sys
import time
from tempfile import TemporaryDirectory

REPEATS = 3
ONE = ["method=wavelet", "budget.tokens=512"]


def seconds(overrides: list[str]) -> float:
    """Wall time of `experiment=budgets` with overrides, in an outputs folder of its own."""
    with TemporaryDirectory() as outputs:
        start = time.perf_counter()
        command = [sys.executable, "-m", "pipeline", "experiment=budgets", f"outputs={outputs}", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main(overrides: list[str]) -> None:
    one, sweep = [], []
    for _ in range(REPEATS):
        one.append(seconds([*ONE, *overrides]))
        sweep.append(seconds(overrides))
    alone, together = statistics.median(one), statistics.median(sweep)
    print(f"one run {alone:.1f} s, the sweep {together:.1f} s: {together / alone:.2f} times as long")
    print(f"repeats: {', '.join(f'{b:.1f} / {a:.1f} s' for a, b in zip(one, sweep, strict=True))}")


if __name__ == "__main__":
    main(sys.argv[1:])
