"""Where the package and its configuration files lie, and how those files refer to them."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> str:
    """The configuration folder: beside the package in a checkout, inside it in an installed wheel."""
    shipped = PACKAGE / "conf"
    return str(shipped if shipped.is_dir() else PACKAGE.parent / "conf")


def bits(keys: int, values: int) -> str:
    """`4bit`, or `4+2bit` where keys and values have codes of different length."""
    return f"{keys}bit" if keys == values else f"{keys}+{values}bit"


def gpus() -> int:
    """How many GPUs there are."""
    from pipeline.settings.gpus import visible  # the help text needs none of it

    return len(visible())


def register_resolvers() -> None:
    """What configuration files may write.

    `${shipped:x}` is the path of a file that comes with the package, `${bits:4,2}` the length of codes in words,
    `${gpus:}` the number of GPUs that there are.
    """
    from omegaconf import OmegaConf  # the help text needs none of it

    OmegaConf.register_new_resolver("shipped", lambda path: str(PACKAGE / path), replace=True)
    OmegaConf.register_new_resolver("bits", bits, replace=True)
    OmegaConf.register_new_resolver("gpus", gpus, replace=True)
