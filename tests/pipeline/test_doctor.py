"""The doctor closes what nobody measures any more, and takes back what was called finished too early."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import examine, repair
from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.config import TrackingConfig
from pipeline.settings.errors import InputError
from pipeline.store import tracking

LOCAL = TrackingConfig(None, "spectral-kv")


@pytest.fixture
def store(outputs_in, tmp_path):
    """A client on an empty store, and its outputs folder."""
    outputs = outputs_in(tmp_path)
    return tracking.connect(LOCAL, outputs).MlflowClient(), outputs


def opened(client, **changed: str) -> str:
    """A run that is left RUNNING by this process, or by the one that the tags name."""
    tags = tracking.environment() | {name.replace("_", "."): value for name, value in changed.items()}
    return client.create_run(tracking.experiment_id(), tags=tags).info.run_id


def status(client, run_id: str) -> str:
    return client.get_run(run_id).info.status


def test_only_runs_whose_process_is_gone_are_closed(store):
    client, outputs = store
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = opened(client)
    killed = opened(client, process_pid=str(gone.pid))
    reused = opened(client, process_started="1.00")  # this process's id, given out again since
    elsewhere = opened(client, process_host="another-machine")
    findings = examine(LOCAL, outputs)
    assert {f.run_id: f.status for f in findings if f.status} == {killed: "KILLED", reused: "KILLED"}
    assert ["another-machine" in f.what for f in findings if not f.status] == [True]
    repair(findings)
    assert [status(client, r) for r in (mine, killed, reused, elsewhere)] == ["RUNNING", "KILLED", "KILLED", "RUNNING"]
    assert str(gone.pid) in client.get_run(killed).data.tags["failure"]
    assert [f.run_id for f in examine(LOCAL, outputs, all_hosts=True)] == [elsewhere]


def test_a_finished_run_without_its_rows_is_measured_again(run, tmp_path):
    first, other = run("method=random"), run("method=streaming")
    outputs = tmp_path / "outputs"
    assert examine(LOCAL, outputs) == []
    shutil.rmtree(outputs / "artifacts" / first.run_id)
    (finding,) = examine(LOCAL, outputs)
    assert finding.run_id == first.run_id and "lacks rows.json" in finding.what
    repair([finding])
    assert not run("method=random").reused and run("method=streaming").run_id == other.run_id


def test_a_run_that_was_left_open_is_never_taken_for_done(run, small):
    from pipeline import run as runs

    identity = runs.identity(prepare(composed([*small, "method=random"])))
    outputs = Path(next(o for o in small if o.startswith("outputs=")).removeprefix("outputs="))
    client = tracking.connect(LOCAL, outputs).MlflowClient()
    left = opened(client, identity=identity)
    first = run("method=random")
    assert not first.reused and first.run_id != left
    client.set_terminated(left, "KILLED")
    assert run("method=random").run_id == first.run_id


def test_damaged_cache_files_and_drafts_are_removed(run, tmp_path):
    run(
        "method=random", "document.tokens=210", "prefill_cache_least_s=0"
    )  # a length that no other test has left in memory
    outputs = tmp_path / "outputs"
    files = sorted((outputs / "cache" / "prefill").iterdir())
    assert len(files) == 3
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-10])
    (files[0].parent / "x.999999999.draft").write_bytes(b"half")
    (files[0].parent / f"y.{os.getpid()}.draft").write_bytes(b"in the making")
    findings = examine(LOCAL, outputs)
    assert {f.path.name for f in findings} == {files[0].name, "x.999999999.draft"}
    repair(findings)
    assert examine(LOCAL, outputs) == [] and len(list(files[0].parent.iterdir())) == 3


def test_exit_status_and_words(store, monkeypatch, capsys, tmp_path):
    client, outputs = store
    left = opened(client, process_pid="999999999")

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline.doctor", *arguments])
        with pytest.raises(SystemExit) as end:
            doctor.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    code, said = call(f"outputs={outputs}", "--look")
    assert code == 1 and left in said and socket.gethostname() in said and status(client, left) == "RUNNING"
    code, said = call(f"outputs={outputs}")
    assert code == 1 and "set to KILLED" in said and status(client, left) == "KILLED"
    assert call(f"outputs={outputs}")[0] == 0
    code, said = call(f"outputs={tmp_path / 'nowhere'}")
    assert code == 2 and "there is no store" in said
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "mlflow.db").write_bytes(b"not a database" * 1000)
    code, said = call(f"outputs={damaged}")
    assert code == 2 and "can't be used as an MLflow store" in said and "Traceback" not in said


def test_a_store_that_is_no_database_stops_a_run_with_a_sentence(small):
    outputs = Path(next(o for o in small if o.startswith("outputs=")).removeprefix("outputs="))
    (outputs / "mlflow.db").write_bytes(b"not a database" * 1000)
    from pipeline.run import execute

    with pytest.raises(InputError, match=r"mlflow\.db can't be used as an MLflow store .* set outputs="):
        execute(prepare(composed([*small, "method=random"])))
