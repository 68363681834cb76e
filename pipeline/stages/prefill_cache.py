"""Prefills on disk, so that a sweep that is taken up again, or another process, need not run the prompts anew."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from array_api_compat import is_torch_array
from safetensors import SafetensorError, safe_open

from spectral_kv.backends.base import Prefill

FORMAT = 1  # raise it when what a file holds changes
PARTS = ("keys", "values", "queries")

log = logging.getLogger(__name__)


class Damaged(ValueError):
    """A cache file does not hold what was written."""


def _checksum(tensors: dict) -> str:
    """Hash of names, dtypes, shapes and bytes of torch tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read(path: Path) -> tuple[dict, dict[str, str]]:
    """Torch tensors on the CPU and metadata of a cache file.

    Raises
    ------
    Damaged
        If it is truncated or altered.
    OSError
        If it is not there.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # clones: a mapped file is not aligned as arithmetic likes it, and may be replaced while it is in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    if metadata.get("checksum") != _checksum(tensors):
        raise Damaged(f"{path} is damaged (its checksum does not fit)")
    return tensors, metadata


@dataclass(frozen=True)
class PrefillCache:
    """Files of prefills in a folder, the least recently used removed when they outgrow a bound.

    It holds the prefills of torch models; those of other backends are not kept, and neither are logits or queries of
    the continuation, which take as many bytes as they take time.

    Parameters
    ----------
    folder : Path
    limit : int
        Bytes.
    least : float
        Seconds: prefills that took less are not worth a file.
    what : dict
        Everything but the prompt that determines a prefill: hash of the model, backend, device, dtypes, versions.
    """

    folder: Path
    limit: int
    least: float = 0.0
    what: dict = field(default_factory=dict)

    def path(self, prompt: np.ndarray) -> Path:
        """The file of the prefill of a prompt `[tokens]`."""
        digest = hashlib.sha256(json.dumps({**self.what, "format": FORMAT}, sort_keys=True).encode())
        digest.update(np.asarray(prompt, dtype="<i8").tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def files(self) -> list[Path]:
        """What is there, the least recently used first; files that another process removes meanwhile are left out."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:
                continue
        return [path for _, path in sorted(found)]

    def get(self, prompt: np.ndarray, observe: int, device: object) -> tuple[Prefill, float] | None:
        """The prefill of a prompt `[tokens]`, on a device, and the seconds that it took to compute.

        None if it is not there, or remembers fewer than `observe` queries. A damaged file is reported and removed.
        """
        path = self.path(prompt)
        try:
            tensors, metadata = read(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except Damaged as error:
            log.warning("%s: the prompt is run again", error)
            path.unlink(missing_ok=True)
            return None
        layers = int(metadata["layers"])
        keys, values, queries = ([tensors[f"{part}.{layer}"].to(device) for layer in range(layers)] for part in PARTS)
        if queries[0].shape[1] < observe:
            return None
        prefill = Prefill(np.asarray(prompt), keys, values, queries, tensors["logits"].to(device))
        return prefill, float(metadata["seconds"])

    def put(self, prefill: Prefill, seconds: float) -> None:
        """Write a prefill, whole or not at all; a full disk is no reason to stop."""
        path = self.path(prefill.tokens)
        if seconds < self.least or prefill.nbytes > self.limit or not is_torch_array(prefill.logits):
            return
        from safetensors.torch import save_file

        parts = {"keys": prefill.keys, "values": prefill.values, "queries": prefill.queries}
        tensors = {f"{part}.{layer}": x for part, arrays in parts.items() for layer, x in enumerate(arrays)}
        tensors = {name: x.cpu().contiguous() for name, x in (tensors | {"logits": prefill.logits}).items()}
        metadata = {"checksum": _checksum(tensors), "layers": str(len(prefill.keys)), "seconds": f"{seconds:.6f}"}
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        try:
            save_file(tensors, draft, metadata)
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            log.warning("the prefill can't be kept in %s (%s)", self.folder, str(error).splitlines()[0])
            draft.unlink(missing_ok=True)
        self._evict(path)

    def _evict(self, fresh: Path) -> None:
        sizes = {}
        for path in self.files():
            try:
                sizes[path] = path.stat().st_size
            except FileNotFoundError:
                continue
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total <= self.limit or path == fresh:
                return
            path.unlink(missing_ok=True)
            total -= size

    def damage(self) -> Iterator[tuple[Path, str]]:
        """Files that are damaged, and drafts that a killed process left, with what is wrong."""
        import psutil

        for path in self.files():
            try:
                read(path)
            except FileNotFoundError:
                continue
            except Damaged as error:
                yield path, str(error)
        for path in self.folder.glob("*.draft"):
            pid = path.suffixes[-2].removeprefix(".")
            if not (pid.isdigit() and psutil.pid_exists(int(pid))):
                yield path, f"{path} is a draft that its process never finished"
