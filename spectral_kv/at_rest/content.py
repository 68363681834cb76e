"""A cache at rest: bytes that stand for it, and say what they need to be read."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT = "spectral_kv cache at rest 2"


@dataclass(frozen=True)
class AtRest:
    """What a storage wrote down of one sequence.

    Parameters
    ----------
    header : dict
        What JSON can hold.
    tensors : dict of str to np.ndarray
    """

    header: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def part(self, name: str) -> dict[str, np.ndarray]:
        """Tensors whose names begin with `name` and a dot."""
        return {key.removeprefix(f"{name}."): x for key, x in self.tensors.items() if key.startswith(f"{name}.")}

    @property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode())
        for name, x in sorted(self.tensors.items()):
            digest.update(f"{name}{x.dtype}{x.shape}".encode())
            digest.update(np.ascontiguousarray(x))
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(x) for name, x in self.tensors.items()}
        said = {"format": FORMAT, "header": self.header, "digest": self._digest}
        return save(tensors, {"spectral_kv": json.dumps(said)})  # one entry, as several come in any order

    @classmethod
    def from_bytes(cls, content: bytes) -> "AtRest":
        """What `to_bytes` returned.

        Raises
        ------
        ValueError
            If it is something else, or has changed since.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            said = json.loads(metadata["spectral_kv"])
            found = cls(said["header"], load(content))
            written, right = said["format"], said["digest"] == found._digest
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"these bytes are no cache at rest ({error}): encode it again") from None
        if written != FORMAT:
            raise ValueError(f"these bytes are in format {written!r}, this version reads {FORMAT!r}: encode it again")
        if not right:
            raise ValueError("these bytes are not those that were written: encode the cache again")
        return found
