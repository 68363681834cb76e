"""A store that several processes write to at once."""

from collections.abc import Callable
from typing import Any


def insert(call: Callable[..., Any], *given: Any) -> None:
    """Write what another process may be writing, too: a server's database refuses the second of two, once.

    Raises
    ------
    mlflow.MlflowException
        If the store refuses again.
    """
    from mlflow.exceptions import MlflowException

    try:
        call(*given)
    except MlflowException:
        call(*given)
