"""Time on a GPU or CPU, and where measured rows go: a table, a CSV file, MLflow."""

import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from spectral_kv.engine.captured import graph

Row = dict[str, object]


def milliseconds(run: Callable[[], object], repeats: int = 7, warmup: int = 2) -> list[float]:
    """Of single runs: by device events on a GPU, by the clock elsewhere."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def wall_milliseconds(run: Callable[[], object], repeats: int = 7, warmup: int = 2) -> list[float]:
    """Of single runs by the host's clock, until the device is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays what `run` did on the GPU."""
    return graph(run)[0].replay


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    count = 1 << 30 if torch.cuda.is_available() else 1 << 26
    source = torch.randn(count, device=device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * statistics.median(milliseconds(lambda: target.copy_(source), 9)))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def card() -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return middle, low, high


def report(name: str, rows: list[Row], path: str | None) -> None:
    """Print rows as a table, write them to a CSV file if a path is given, log them to MLflow where it is installed."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |")
    if path is not None:
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    try:
        import mlflow
    except ImportError:
        return
    outputs = Path("outputs").absolute()
    outputs.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{outputs}/mlflow.db")
    if mlflow.get_experiment_by_name("benchmarks") is None:  # else MLflow puts artifacts into a folder of its own
        mlflow.create_experiment("benchmarks", artifact_location=(outputs / "artifacts").as_uri())
    mlflow.set_experiment("benchmarks")
    with mlflow.start_run(run_name=name):
        mlflow.set_tags({"card": card(), "torch": torch.__version__})
        mlflow.log_table({key: [_text(row.get(key)) for row in rows] for key in columns}, f"{name}.json")


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
