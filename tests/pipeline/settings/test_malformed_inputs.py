"""What malformed configurations, documents, model folders, stores and statistics print: docs/malformed_inputs.md.

Each is one sentence and exit status 2, and leaves no finished run. When a sentence changes on purpose, the failing test
says where the new table lies.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline import calibrate, compare
from pipeline.job import prepare
from pipeline.paper import __main__ as regenerate
from pipeline.run import execute
from pipeline.settings import cli
from pipeline.settings.compose import composed, outermost, spelled_out
from pipeline.store import tracking
from spectral_kv.calibration import QueryStatistics
from spectral_kv.codec.bases import Bases, Moments

TABLE = Path(__file__).parents[3] / "docs" / "malformed_inputs.md"
HEAD = """# Malformed inputs

What `python -m pipeline` prints, with exit status 2 and no finished run. `<folder>` stands for a path, `...` for the
words of another library. `tests/pipeline/settings/test_malformed_inputs.py` makes each of these and checks this table.

| input | what it prints |
|---|---|
"""


@dataclass
class Inputs:
    """Makes inputs in a folder from a whole checkpoint."""

    folder: Path
    checkpoint: Path
    settings: list[str]

    def model(self, **changed: bytes | None) -> str:
        """A copy of the checkpoint in which files have another content (None: are not there)."""
        copy = self.folder / "model"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.checkpoint, copy)
        for name, content in changed.items():
            path = copy / name.replace("__", ".")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
        return f"model.path={copy}"

    def config(self, **changed: object) -> str:
        config = json.loads((self.checkpoint / "config.json").read_text()) | changed
        return self.model(config__json=json.dumps({k: v for k, v in config.items() if v is not None}).encode())

    def text(self, content: bytes) -> str:
        path = self.folder / "text.txt"
        path.write_bytes(content)
        return f"document.path={path}"

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def statistics(self, bands: int) -> str:
        path = self.folder / "statistics.safetensors"
        QueryStatistics(np.ones((2, 4, bands), complex), np.ones((2, 4, bands))).save(path)
        return f"model.calibration={path}"

    def truncated_statistics(self) -> str:
        self.statistics(8)
        path = self.folder / "statistics.safetensors"
        path.write_bytes(path.read_bytes()[:-20])
        return f"model.calibration={path}"

    def bases(self, model: str = "0" * 64, damaged: bool = False) -> str:
        """Bases for the shape of the checkpoint, by default of other weights."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 128)).astype(np.float32)
        moments = Moments((0, 1))
        moments.add(x, x)
        path = self.folder / "bases.safetensors"
        Bases((moments.block(16),), 16, {"model": model}).save(path)
        if damaged:
            content = bytearray(path.read_bytes())
            content[-1000] ^= 1
            path.write_bytes(bytes(content))
        return f"storage.bases={path}"

    def tokenizer(self) -> str:
        """A checkpoint whose tokenizer has more tokens than its configuration."""
        described = json.loads((self.checkpoint / "tokenizer.json").read_text())
        described["added_tokens"].append(described["added_tokens"][0] | {"id": 8192, "content": "<more>"})
        return self.model(tokenizer__json=json.dumps(described).encode())

    def silent(self) -> str:
        """The address of a server that accepts and says nothing."""
        self.server = socket.create_server(("localhost", 0))
        return f"localhost:{self.server.getsockname()[1]}"

    def deleted_experiment(self) -> str:
        outputs = self.folder / "deleted"
        outputs.mkdir()
        mlflow = tracking.connect(tracking.TrackingConfig(None, "spectral-kv"), outputs)
        mlflow.delete_experiment(tracking.experiment_id())
        tracking._connected = None  # as in another process
        return f"outputs={outputs}"

    def lost_rows(self, settings: list[str]) -> list[str]:
        """A finished run whose artifacts were deleted."""
        outputs = self.folder / "lost"
        outputs.mkdir()
        execute(prepare(composed([*settings, f"outputs={outputs}"])))
        shutil.rmtree(outputs / "artifacts")
        return ["compare:", f"outputs={outputs}", "--against", "method=full"]

    def pickled(self) -> str:
        """A .pt file that would run code if it were unpickled."""
        import torch

        path = self.folder / "statistics.pt"
        torch.save({"metadata": {}, "stats": re.compile("x")}, path)
        return str(path)


def located(inputs: Inputs) -> str:
    """Hash of the checkpoint."""
    return prepare(composed([*inputs.settings])).checkpoint.hash


MALFORMED = {
    # configurations
    "a budget of no tokens": lambda i: ["budget=0"],
    "a budget that is a word": lambda i: ["budget.tokens=many"],
    "a share above one": lambda i: ["budget.ratio=1.5"],
    "a misspelt setting": lambda i: ["method=wavelet", "method.levles=3"],
    "an option that does not exist": lambda i: ["method=wavlet"],
    "an override that can't be parsed": lambda i: ["method=["],
    "fewer tokens after the prompt than a phase needs": lambda i: ["document.continuation=30"],
    "a device that does not exist": lambda i: ["backend.device=tpu"],
    "a cache of less than nothing": lambda i: ["prefill_cache_gb=-1"],
    "a request to run code of checkpoints": lambda i: ["+backend.trust_remote_code=true"],
    "a launcher that does not exist": lambda i: ["hydra/launcher=sulrm"],
    "several values without -m": lambda i: ["budget=60,1e3"],
    "a list of budgets": lambda i: ["budget=[60,80]"],
    "a setting of a phase that was not chosen": lambda i: ["phase=[memory,perturbation]", "phase.perplexity.tokens=16"],
    "a phase given twice": lambda i: ["phase=[memory,memory]"],
    "a phase that does not exist": lambda i: ["phase=[memory,memry]"],
    "a group that does not exist": lambda i: ["metod=wavelet"],
    "a negative seed": lambda i: ["seed=-1"],
    "a negative seed of documents": lambda i: ["document=needles", "document.seed=-1"],
    "a grid that is a number": lambda i: ["grid=5"],
    "a grid with an open quote": lambda i: ["grid='\"method=tri'"],
    "a launcher without processes": lambda i: ["hydra/launcher=local_joblib", "hydra.launcher.n_jobs=0", "-m"],
    "bytes that are no number": lambda i: ["budget.bytes=nan"],
    "bytes without end": lambda i: ["budget.bytes=inf"],
    "more tokens than a prompt has": lambda i: ["budget=1000000"],
    "waves longer than the prompt": lambda i: ["method=wavelet", "method.levels=99"],
    "seconds that are no number": lambda i: ["prefill_cache_least_s=nan"],
    "nats that are no number": lambda i: ["phase.perplexity.dependent=nan"],
    "TurboQuant without its storage": lambda i: ["method=turboquant", "storage=dense"],
    "an oracle that would see less than it should": lambda i: ["method=oracle_mass", "document.continuation=40"],
    "a range of nothing": lambda i: ["budget=range(300,100,50)", "-m"],
    "a pattern that fits nothing": lambda i: ["method=glob(zzz*)", "-m"],
    "taking away what is not there": lambda i: ["compare:", "~variant.x", "--against", "method=random"],
    "a variant of another method": lambda i: ["variant=wavelet_haar", "method=tri"],
    "letters that need quotes": lambda i: ["document=file", "document.path=naïve.txt"],
    # documents
    "a text file that is not there": lambda i: ["document=file", f"document.path={i.folder / 'nothing.txt'}"],
    "a text file that is no text": lambda i: ["document=file", i.text(b"\xff\xfe\x00\x80" * 5000)],
    "a text that is too short": lambda i: ["document=file", i.text(b"Too short.")],
    "more windows than there are": lambda i: ["document.count=100000"],
    # model folders
    "a model folder that is not there": lambda i: [f"model.path={i.folder / 'nowhere'}"],
    "weights in a pickle alone": lambda i: [i.model(model__safetensors=None, pytorch_model__bin=b"\x80\x02")],
    "a configuration that is not JSON": lambda i: [i.model(config__json=b"{")],
    "a configuration without layers": lambda i: [i.config(num_hidden_layers=None)],
    "a tokenizer that is damaged": lambda i: [i.model(tokenizer__json=b"{}")],
    "weights that are cut off": lambda i: [
        i.model(model__safetensors=(i.checkpoint / "model.safetensors").read_bytes()[:5000])
    ],
    "a model that needs code of its own": lambda i: [
        i.config(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    ],
    "a configuration with a word for a number": lambda i: [i.config(num_attention_heads="four")],
    "a configuration without heads": lambda i: [i.config(num_attention_heads=0)],
    "KV heads that do not divide the heads": lambda i: [i.config(num_key_value_heads=3)],
    "a vocabulary that the weights do not have": lambda i: [i.config(vocab_size=9000)],
    "a tokenizer larger than the model": lambda i: [i.tokenizer()],
    "a first token that does not exist": lambda i: [i.config(bos_token_id=99999)],
    # stores
    "outputs without a name": lambda i: ["outputs="],
    "outputs that no database can lie in": lambda i: [f"outputs='{i.folder}/a?b#c'"],
    "outputs where nobody can write": lambda i: ["outputs=/proc/nobody"],
    "folders of runs where nobody can write": lambda i: ["hydra.run.dir=/proc/nobody"],
    "a database that nobody serves": lambda i: ["tracking.uri=postgresql://localhost:9/runs"],
    "a database server that is silent": lambda i: [f"tracking.uri=postgresql://{i.silent()}/runs"],
    "a server that accepts and is silent": lambda i: [f"tracking.uri=http://{i.silent()}"],
    "an experiment that was deleted": lambda i: [i.deleted_experiment()],
    "an experiment without a name": lambda i: ["tracking.experiment="],
    "locks that are a file": lambda i: [f"outputs={i.file('locked/locks', b'').parent}", "seed=1"],
    "a cache that is a file": lambda i: [f"outputs={i.file('cached/cache', b'').parent}", "prefill_cache_least_s=0"],
    "rows that were deleted": lambda i: i.lost_rows(i.settings),
    "no section": lambda i: ["paper:", "--sections", ""],
    "a section without a name": lambda i: ["paper:", "--sections", "budgets,"],
    "a store that is no database": lambda i: [f"outputs={i.file('damaged/mlflow.db', b'no database' * 999).parent}"],
    "a server that does not answer": lambda i: ["tracking.uri=http://localhost:9"],
    "a store of unknown kind": lambda i: ["tracking.uri=nonsense://x"],
    "outputs that are a file": lambda i: [f"outputs={i.file('file', b'')}"],
    # statistics files
    "no statistics for a method that needs them": lambda i: ["method=tri", "model.calibration=null"],
    "statistics of another model": lambda i: ["method=tri", i.statistics(bands=5)],
    "statistics that are cut off": lambda i: ["method=tri", i.truncated_statistics()],
    # bases of the storage that codes layers in common
    "a storage whose bases the model has not got": lambda i: ["method=full", "storage=spectral"],
    "bases that are not there": lambda i: ["method=full", "storage=spectral", f"storage.bases={i.folder / 'nothing'}"],
    "bases that are text": lambda i: ["method=full", "storage=spectral", f"storage.bases={i.file('t.txt', b'text')}"],
    "bases of another model": lambda i: ["method=full", "storage=spectral", i.bases()],
    "bases that are damaged": lambda i: ["method=full", "storage=spectral", i.bases(located(i), damaged=True)],
    "an evicting method in a storage that keeps all": lambda i: ["storage=spectral", i.bases()],
    "a ratio below 1": lambda i: ["method=full", "storage=spectral", "storage.ratio=0.5", i.bases()],
    "a ratio at rest that the exact tokens rule out": lambda i: [
        "method=full",
        "storage=spectral_at_rest",
        "storage.ratio=100",
        i.bases(located(i)),
    ],
    "two targets at rest": lambda i: ["method=full", "storage=spectral_at_rest", "storage.step=1", i.bases()],
    "a ratio and bits": lambda i: ["method=full", "storage=spectral", "storage.bits=2", i.bases()],
    "a ratio that the exact tokens rule out": lambda i: [
        "method=full",
        "storage=spectral",
        "storage.ratio=100",
        i.bases(located(i)),
    ],
    "coded bytes without any bits": lambda i: [
        "method=full",
        "storage=spectral",
        "storage.ratio=null",
        "storage.bits=0.01",
        i.bases(located(i)),
    ],
    "statistics in a pickle with code": lambda i: ["--from-pt", i.pickled(), "--out", str(i.folder / "o.safetensors")],
}
PROGRAMS = {"pipeline.calibrate": calibrate.main, "pipeline.compare": compare.main, "pipeline.paper": regenerate.main}
FOREIGN = (
    (r"run [0-9a-f]{32} ", "run <run> "),
    (r"localhost:\d{4,5}", "localhost:<port>"),
    (r"(choose among ).*", r"\1..."),  # words of other libraries, which change with their versions
    (r"(can't be (?:used|loaded|read)[^()]*)\(.*\)(: )", r"\1(...)\2"),
    (r"(can't be loaded: ).*", r"\1..."),
    (r"(as UTF-8 text )\(.*\)", r"\1(...)"),
    (r"(does not hold query statistics )\(.*\)", r"\1(...)"),
    (r"(does not hold bases of caches )\(.*\)", r"\1(...)"),
    (r"(can't be used: ).*", r"\1..."),
    (r"\(\d+ tokens, \d+ windows\)", "(...)"),  # of a text that differs between versions of Python
    (r"(plain tensors )\(\w+\)", r"\1(...)"),
)


def as_in_the_table(sentence: str, *folders: Path) -> str:
    """A sentence without what differs between machines."""
    for pattern, words in FOREIGN:
        sentence = re.sub(pattern, words, sentence)
    for folder in folders:
        sentence = sentence.replace(str(folder), "<folder>")
    return sentence.replace("|", "\\|").replace("`", "'")


def run_here(arguments: list[str]) -> None:
    """What `python -m pipeline` does; where Hydra's start adds nothing, without it: it composes everything twice."""
    elsewhere = sum(word.startswith("outputs=") for word in arguments) > 1  # Hydra writes there first
    if elsewhere or any(word == "-m" or word.startswith(("hydra", "grid=")) for word in arguments):
        cli.main()
    words = outermost(spelled_out(arguments))
    with cli.reporting(words):
        job = prepare(composed(words))
        tracking.refuse_unusable(job.settings.tracking, job.settings.outputs)
        execute(job)


def call(settings: list[str], arguments: list[str]) -> tuple[str, list[str]]:
    """The program that is asked, and what it is given."""
    if "--from-pt" in arguments:
        return "pipeline.calibrate", arguments
    program = {"compare:": "pipeline.compare", "paper:": "pipeline.paper"}.get(arguments[0], "pipeline")
    given = [word for word in arguments if word not in ("compare:", "paper:")]
    return program, given if program == "pipeline.paper" else [*settings, *given]


def printed(monkeypatch, capsys, settings: list[str], arguments: list[str]) -> str:
    """The sentence that a call with these arguments ends with."""
    program, given = call(settings, arguments)
    monkeypatch.setattr(sys, "argv", [program, *given])
    with pytest.raises(SystemExit) as end:
        PROGRAMS.get(program, lambda: run_here(given))()
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def test_malformed_inputs_print_what_the_table_says(small, checkpoint, monkeypatch, capsys, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    inputs, rows = Inputs(made, checkpoint, [*small, "method=random"]), []
    monkeypatch.setattr(tracking, "PATIENCE", 0.3)
    for name, make in MALFORMED.items():
        sentence = printed(monkeypatch, capsys, [*small, "method=random"], make(inputs))
        rows.append(f"| {name} | `{as_in_the_table(sentence, made, tmp_path, checkpoint)}` |")
    outputs = Path(next(o for o in small if o.startswith("outputs=")).removeprefix("outputs="))
    mlflow = tracking.connect(tracking.TrackingConfig(None, "spectral-kv"), outputs)
    runs = mlflow.MlflowClient().search_runs([tracking.experiment_id()])
    assert {run.info.status for run in runs} <= {"FAILED"}
    table = tmp_path / TABLE.name
    table.write_text(HEAD + "\n".join(rows) + "\n")
    assert table.read_text() == TABLE.read_text(), f"if the new sentences are right: cp {table} {TABLE}"


@pytest.mark.slow
@pytest.mark.parametrize("name", MALFORMED)
def test_a_fresh_process_prints_what_the_table_says(small, checkpoint, tmp_path, name):
    """With `-s` it says what the refusal took: seconds, and seconds of a processor."""
    made = tmp_path / "made"
    made.mkdir()
    settings = [*small, "method=random"]
    program, given = call(settings, MALFORMED[name](Inputs(made, checkpoint, settings)))
    start, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-m", program, *given], capture_output=True, text=True, timeout=120)
    took, after = time.perf_counter() - start, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"\n{took:6.2f} s, {processor:6.2f} s of a processor: {name}")
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    row = f"| {name} | `{as_in_the_table(lines[0], made, tmp_path, checkpoint)}` |"
    assert row in TABLE.read_text().splitlines()
