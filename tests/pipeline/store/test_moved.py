"""A store that is copied or moved, and what git and MLflow say about a run."""

import shutil
import subprocess
from pathlib import Path

from pipeline.compare import documents
from pipeline.job import prepare
from pipeline.run import execute
from pipeline.settings.compose import composed
from pipeline.store import tracking
from pipeline.store.record import tracked


def test_artifacts_of_a_moved_store_are_in_the_new_place(small, tmp_path):
    outputs = Path(next(o for o in small if o.startswith("outputs=")).removeprefix("outputs="))
    first = execute(prepare(composed([*small, "method=random"])))
    moved = tmp_path / "elsewhere"
    shutil.move(outputs, moved)
    settings = [*small, f"outputs={moved}"]
    again = execute(prepare(composed([*settings, "method=random"])))
    assert again.reused and again.run_id == first.run_id
    assert len(documents(again)) == 3  # its rows are found
    fresh = execute(prepare(composed([*settings, "method=streaming"])))
    assert list((moved / "artifacts" / fresh.run_id).rglob("rows.json"))
    assert not outputs.exists()


def test_a_copy_leaves_the_original_alone(small, tmp_path):
    outputs = Path(next(o for o in small if o.startswith("outputs=")).removeprefix("outputs="))
    first = execute(prepare(composed([*small, "method=random"])))
    copy = tmp_path / "copy"
    shutil.copytree(outputs, copy)
    execute(prepare(composed([*small, f"outputs={copy}", "method=random", "force=true"])))
    assert [path.name for path in (outputs / "artifacts").iterdir()] == [first.run_id]
    assert len(list((copy / "artifacts").iterdir())) == 2


def test_hundreds_of_parameters_are_logged(outputs_in, tmp_path):
    mlflow = tracking.connect(tracking.TrackingConfig(None, "spectral-kv"), outputs_in(tmp_path))
    with tracked(mlflow, "many", {f"p{i}": i for i in range(250)}, {}) as record:
        pass
    assert len(mlflow.get_run(record.run_id).data.params) == 250


def test_untracked_files_are_no_change(tmp_path):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "known.py").write_text("1\n")
    git("add", "known.py")
    git("commit", "-m", "one")
    tracking.revision.cache_clear()
    (tmp_path / "notes.txt").write_text("of mine")
    clean = tracking.revision(tmp_path)
    assert clean["git.changed"] == "false"
    assert len(clean["git.revision"]) == 40 and clean["mlflow.source.git.commit"] == clean["git.revision"]
    (tmp_path / "known.py").write_text("2\n")
    tracking.revision.cache_clear()
    assert tracking.revision(tmp_path)["git.changed"] == "true"
