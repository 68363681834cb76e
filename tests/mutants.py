"""Do the tests notice? Small errors are made in a copy of the library, one at a time, and the tests named must fail.

`python -m tests.mutants` runs all, `python -m tests.mutants wavelet` those whose file has that in its path.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/spectral_kv"


@dataclass(frozen=True)
class Mutant:
    """An error: `old`, which `file` has once, becomes `new`; `tests` (files, or tests in them) must then fail."""

    file: str
    old: str
    new: str
    tests: str


BASELINES = "scorers/test_baselines.py"
SPECTRAL = "scorers/test_spectral.py"
MUTANTS = [
    Mutant("scorers/wavelet.py", "self.level_decay**j /", "1.0 /", f"{SPECTRAL}::test_a_small_decay"),
    Mutant("storage/turboquant.py", '"renorm"', '"plain"', "storage/test_storage.py::test_keys_keep_their_norm"),
    Mutant("storage/turboquant.py", '"unbiased"', '"renorm"', "storage/test_storage.py::test_values_keep_their_share"),
    Mutant("storage/turboquant.py", "layer, 1)", "layer, 0)", "storage/test_storage.py::test_keys_and_values_rotate"),
    Mutant(
        "scorers/wavelet_fourier.py",
        "segments: int = SEGMENTS",
        "segments: int = 2",
        f"{SPECTRAL}::test_nonstationarity",
    ),
    Mutant(
        "scorers/expected_attention.py",
        "turns = turns * layer.rope.attention_scaling",
        "turns = turns * 1.0",
        f"{BASELINES}::test_expected_attention",
    ),
    Mutant("scorers/expected_attention.py", "layer.scaling**2 / 2", "layer.scaling / 2", f"{BASELINES}::test_expected"),
    Mutant("scorers/snapkv.py", "layer.scaling", "0.01", f"{BASELINES}::test_snapkv"),
    Mutant("scorers/tova.py", "layer.scaling", "0.01", f"{BASELINES}::test_tova"),
    Mutant("scorers/h2o.py", "layer.scaling", "0.01", f"{BASELINES}::test_h2o"),
    Mutant("scorers/oracle_mass.py", "layer.scaling", "0.01", "scorers/test_oracles.py::test_mass"),
    Mutant("scorers/observed_attention.py", "return mass / saw", "return mass", f"{BASELINES}::test_observed"),
    Mutant("scorers/keydiff.py", "keys: -xp.sum", "keys: xp.sum", f"{BASELINES}::test_keydiff"),
    Mutant("scorers/knorm.py", "-layer.key_norms", "layer.key_norms", f"{BASELINES}::test_knorm"),
    Mutant("scorers/spectral.py", "deviation = -deviation", "pass", f"{SPECTRAL}::test_sign"),
    Mutant("scorers/tri.py", "modulus - np.abs(mu)", "modulus", "scorers/test_tri.py::test_spread"),
    Mutant("scorers/tri.py", "int(layer.positions.max()) + 1", "layer.tokens", "scorers/test_tri.py::test_the_next"),
    Mutant("transforms/fourier.py", "1.0 - gain if stop", "gain if stop", "transforms/test_fourier.py::test_passes"),
    Mutant("transforms/wavelet.py", "ahead, count = 1,", "ahead, count = 0,", "transforms/test_wavelet.py::test_eq"),
    Mutant(
        "at_rest/ans.py",
        "np.subtract(own.most[step], state",
        "np.subtract(state, own.most[step]",
        "at_rest/test_ans.py::test_words",
    ),
    Mutant("at_rest/ans.py", "for x in reversed(found)", "for x in found", "at_rest/test_ans.py::test_what_is_read"),
    Mutant("at_rest/ans_kernels.py", "+ tl.cumsum(there, 0) - 1", "", "at_rest/test_ans.py::test_kernels"),
    Mutant("at_rest/ans_kernels.py", " - (rest < 0).to(tl.int32)", "", "at_rest/test_ans.py::test_kernels"),
    Mutant(
        "at_rest/along_tokens.py",
        "return_inverse=True)[1]",
        "return_inverse=True)[1] * 0",
        "at_rest/test_along_tokens.py::test_it_does",
    ),
    Mutant("at_rest/rounding.py", "< CONTEXTS - GAIN", "<= CONTEXTS - GAIN", "at_rest/test_rounding.py::test_contexts"),
    Mutant(
        "at_rest/entropy.py",
        "weights[:, CAP] *= 2",
        "weights[:, CAP] *= 1",
        "at_rest/test_entropy.py::test_frequencies",
    ),
    Mutant(
        "at_rest/rounding_kernels.py",
        "tl.where(value < 0, -number, number)",
        "number",
        "at_rest/test_rounding.py::test_the_kernels",
    ),
    Mutant(
        "at_rest/rounding.py",
        "np.lexsort((token, row, token // chunk))",
        "np.lexsort((token, row))",
        "at_rest/test_variable_rate.py::test_a_chunk",
    ),
    Mutant("quantization/packing.py", "full_like(high, split))", "full_like(high, 1))", "quantization/test_packing.py"),
    Mutant("quantization/codebook.py", "1.5104176", "1.6104176", "quantization/test_codebook.py"),
    Mutant(
        "quantization/turboquant.py",
        "return x if packed.mean is None else x + float32(packed.mean)",
        "return x",
        "quantization/test_turboquant.py::test_a_zero",
    ),
    Mutant("selection.py", "largest(candidates", "largest(-candidates", "test_selection.py::test_keeps"),
    Mutant(
        "selection.py",
        "budget.tokens - budget.sinks - budget.recent",
        "budget.tokens - budget.recent",
        "test_selection.py::test_keeps",
    ),
    Mutant(
        "selection.py",
        "sum(descending) / heads",
        "sum(layer) / heads",
        "test_allocations.py::test_allocations",
    ),
    Mutant(
        "selection.py", "safe = int(budget.safeguard * each)", "safe = 0", "test_allocations.py::test_the_safeguard"
    ),
    Mutant("scorers/kvzip.py", "most = xp.maximum(", "most = xp.minimum(", "scorers/test_rivals.py::test_kvzip_is"),
    Mutant(
        "scorers/kvzip.py",
        "seen.scaling, causal=True",
        "seen.scaling, causal=False",
        "scorers/test_rivals.py::test_kvzip_is",
    ),
    Mutant(
        "scorers/defensive.py",
        "xp.maximum(most, xp.mean(",
        "xp.minimum(most, xp.mean(",
        "scorers/test_rivals.py::test_def",
    ),
    Mutant("scorers/compactor.py", "keys - xp.mean(", "keys + xp.mean(", "scorers/test_rivals.py::test_compactor"),
    Mutant("refit.py", "there + count)", "there)", "test_refit.py::test_reference"),
    Mutant(
        "refit.py",
        "common = held @ (held + evicted) / max(held @ held, 1e-30)",
        "common = 1.0",
        "test_refit.py::test_what",
    ),
    Mutant(
        "scorers/kvzip.py",
        "tokens[max(start, self.sinks)",
        "tokens[max(start, 0)",
        "scorers/test_rivals.py::test_kvzip_has",
    ),
    Mutant("refit.py", "@ values - shares @ there", "@ values + shares @ there", "test_refit.py::test_a_refit"),
    Mutant("backends/torch_runs.py", "tril(rows - new)", "tril(0)", "backends/test_torch_runs.py::test_a_ragged"),
    Mutant("engine/rows.py", "counts[0]] = row", "counts[0] - 1] = row", "engine/test_decoding.py::test_greedy_tokens"),
    Mutant(
        "engine/rows.py", "torch.addcmul(shift,", "torch.addcmul(-shift,", "engine/test_decoding.py::test_greedy_tokens"
    ),
    Mutant(
        "backends/torch_runs.py",
        ".repeat(group, 1)",
        ".repeat_interleave(group, 0)",
        "backends/test_torch_runs.py::test_a_ragged",
    ),
    Mutant("backends/unplanned.py", "_inside += 1", "_inside = 1", "backends/test_unplanned.py::test_kernels"),
    Mutant(
        "backends/torch.py", "ids.shape[1] <= SHORT", "ids.shape[1] > SHORT", "backends/test_unplanned.py::test_few"
    ),
    Mutant("engine/banded.py", "LEFT_OUT = 1e-5", "LEFT_OUT = 1e-3", "engine/test_banded.py::test_few_numbers"),
    Mutant("engine/banded.py", "outer - inner[:, ::-1]", "outer - inner", "engine/test_banded.py::test_what_a_filter"),
    Mutant(
        "engine/scoring_kernels.py",
        "sum_a - difference_a",
        "sum_a + difference_a",
        "engine/test_scoring.py::test_deviations",
    ),
    Mutant("attention.py", "> own", ">= own", "test_attention.py::test_causal"),
    Mutant("rope.py", "self._turn(x, positions, -1.0,", "self._turn(x, positions, 1.0,", "test_rope.py::test_rotates"),
    Mutant("rope.py", "1.0 / self.attention_scaling, tokens", "1.0, tokens", "test_rope.py::test_rotates"),
    Mutant("backends/torch_cache.py", "return self.seen\n", "return self.held\n", "backends/test_torch.py::test_new"),
]


def mutated(text: str, mutant: Mutant) -> str:
    """The text of the file with the error in it."""
    if (found := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.file} has {mutant.old!r} {found} times, not once: bring the table up to date")
    return text.replace(mutant.old, mutant.new)


def run(folder: Path, selections: list[str]) -> subprocess.CompletedProcess[str]:
    """Tests in a copy of the project; a selection `file::start` names the tests in a file that start so."""
    files = sorted({f"{TESTS}/{selection.split('::')[0]}" for selection in selections})
    starts = {selection.split("::")[1] for selection in selections if "::" in selection}
    chosen = ["-k", " or ".join(sorted(starts))] if starts else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *chosen, *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def copy(folder: Path) -> None:
    """What the tests of the library need of the project."""
    for name in ("spectral_kv", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pipeline", "conf", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)


def main(wanted: str = "") -> int:
    """How many of the errors nobody noticed."""
    mutants = [mutant for mutant in MUTANTS if wanted in mutant.file]
    for mutant in mutants:
        mutated((ROOT / "spectral_kv" / mutant.file).read_text(), mutant)
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        plain = run(folder, [mutant.tests for mutant in mutants if "::" in mutant.tests])
        if plain.returncode:
            raise SystemExit(f"tests fail before any error is made:\n{plain.stdout}{plain.stderr}")
        for mutant in mutants:
            file = folder / "spectral_kv" / mutant.file
            text = file.read_text()
            file.write_text(mutated(text, mutant))
            shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
            result = run(folder, [mutant.tests])
            file.write_text(text)
            shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
            failed = [line.split(" - ")[0] for line in result.stdout.splitlines() if line.startswith("FAILED")]
            survived = result.returncode != 1 or not failed  # nothing collected, or an error, is no failing test
            survivors += survived
            print("SURVIVED" if survived else "killed", mutant.file, f"{mutant.old!r} -> {mutant.new!r}", *failed)
            sys.stdout.flush()
    return survivors


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
