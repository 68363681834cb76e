"""Where files that were measured on a model lie: in its folder, or beside that of the model that comes along."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATISTICS = "query_statistics.safetensors"
BASES = "bases.safetensors"


def reference_model() -> Path:
    """Folder of a small model with a tokenizer that is installed with the library."""
    return Path(__file__).parents[1] / "pipeline" / "reference_model" / "checkpoint"


def beside(model: "PreTrainedModel", name: str) -> Path:
    """Where a file of that name belongs."""
    if not model.config._name_or_path:  # made here, not read from a folder: the working directory is none of its
        return Path(f"the {name} of a {type(model).__name__} without a folder")
    folder = Path(model.config._name_or_path)
    shipped = folder.resolve() == reference_model().resolve()
    return (folder.parent if shipped else folder) / name


def bases_of(model: "PreTrainedModel", given: str | Path | None) -> str:
    """The file of a model's bases: the one that is given, or the one in its folder.

    Raises
    ------
    ValueError
        If there is none.
    """
    path = given or beside(model, BASES)
    if not Path(path).is_file():
        raise ValueError(
            f"{path} is not there: save spectral_kv.bases(model, windows) there, or do without bases of the model"
        )
    return str(path)
