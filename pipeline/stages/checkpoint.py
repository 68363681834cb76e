"""What a model is loaded from: a local folder, a snapshot of a hub repository, or its parameters alone."""

import hashlib
import json
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from pipeline.documents.chat import Chat
from pipeline.settings.config import ModelConfig, SyntheticConfig
from pipeline.settings.errors import InputError
from pipeline.stages.digest import digest, unchanged
from pipeline.stages.gguf import CONVERTER, converted
from pipeline.synthetic.model import SyntheticModel
from spectral_kv.backends.base import ModelShape

FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
]


@lru_cache(maxsize=4)
def _tokenizer(path: Path, changed: int, size: int) -> Tokenizer:
    return Tokenizer.from_file(str(path))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that has what a run needs."""

    folder: Path
    gguf: Path | None = None  # what the folder was made from

    @property
    def source(self) -> str:
        """What a backend loads."""
        return str(self.folder)

    @cached_property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def shape(self) -> ModelShape:
        """The sizes that the configuration names."""
        config = self.config
        heads = config["num_attention_heads"]
        return ModelShape(
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config.get("vocab_size", 0),
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return _tokenizer(*unchanged(self.folder / "tokenizer.json"))

    @cached_property
    def hash(self) -> str:
        """Hash of the configuration, the tokenizer and the weights.

        Of a converted file, of that file: a conversion writes the versions of packages beside the weights.
        """
        if self.gguf is not None:
            return hashlib.sha256(f"{digest(self.gguf)} {CONVERTER}".encode()).hexdigest()[:16]
        whole = hashlib.sha256()
        for path in [
            self.folder / "config.json",
            self.folder / "tokenizer.json",
            *sorted(self.folder.glob("*.safetensors")),
        ]:
            whole.update(bytes.fromhex(digest(path)))
        return whole.hexdigest()[:16]

    @cached_property
    def chat(self) -> Chat | None:
        """The chat template that comes with the tokenizer."""
        try:
            described = json.loads((self.folder / "tokenizer_config.json").read_text())
        except (OSError, ValueError):
            described = {}
        template = described.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        if (file := self.folder / "chat_template.jinja").is_file():
            template = file.read_text()
        if not isinstance(template, str):
            return None
        special = {k: v["content"] if isinstance(v, dict) else v for k, v in described.items() if k.endswith("_token")}
        return Chat(template, tuple(sorted((k, v) for k, v in special.items() if isinstance(v, str))))

    def bos(self) -> int:
        """The BOS token that the configuration names."""
        bos, vocabulary = self.config.get("bos_token_id"), self.shape.vocabulary
        if not isinstance(bos, int):
            raise InputError(f"model.bos=true but {self.folder}/config.json names no bos_token_id: set model.bos=false")
        if vocabulary and not 0 <= bos < vocabulary:
            raise InputError(
                f"model.bos=true but bos_token_id={bos} of {self.folder}/config.json is none of its {vocabulary} "
                "tokens: set model.bos=false"
            )
        return bos


@dataclass(frozen=True)
class Weightless:
    """In the place of a checkpoint, the parameters of a model that is nothing but them."""

    source: SyntheticModel

    tokenizer: ClassVar[None] = None
    chat: ClassVar[None] = None

    @property
    def shape(self) -> ModelShape:
        return self.source.shape

    @property
    def hash(self) -> str:
        """Hash of the parameters."""
        return hashlib.sha256(repr(self.source).encode()).hexdigest()[:16]


def reachable(endpoint: str) -> bool:
    """Whether something listens at a URL, within a second; what stands behind a proxy is taken to."""
    url = urlparse(endpoint)
    if url.scheme in getproxies() and not proxy_bypass(url.hostname):
        return True
    try:
        with socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=1):
            return True
    except OSError:
        return False


def _whole(snapshot: Path) -> bool:
    """Whether a snapshot has a configuration, a tokenizer and all the weights that its index names.

    An interrupted download leaves fewer files.
    """
    if not all((snapshot / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    weights = {path.name for path in snapshot.glob("*.safetensors") if path.is_file()}
    index = next(snapshot.glob("*.safetensors.index.json"), None)
    if index is None:
        return bool(weights) and not any(re.search(r"-\d+-of-\d+\.", name) for name in weights)
    try:
        return set(json.loads(index.read_text())["weight_map"].values()) <= weights
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def hub_snapshot(model: ModelConfig) -> Path:
    """The local folder of a hub repository, downloaded if it is not there or only a part of it is."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    there = "is not"
    try:
        found = Path(snapshot_download(model.id, revision=model.revision, allow_patterns=FILES, local_files_only=True))
        if _whole(found):
            return found
        there = "is only in part"
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise InputError(f"model.id={model.id} is not the name of a hub repository: write owner/name") from None
    if os.environ.get("HF_HUB_OFFLINE") or not reachable(constants.ENDPOINT):
        raise InputError(
            f"model.id={model.id} {there} in the local Hugging Face cache and {constants.ENDPOINT} can't be reached: "
            "connect to a network, or set model.path=<checkpoint folder>"
        )
    try:
        return Path(snapshot_download(model.id, revision=model.revision, allow_patterns=FILES))
    except Exception as error:  # of the hub, of the transport, of the disk: they share no base
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model.id={model.id} can't be downloaded ({reason}): check the name, or set model.path=<checkpoint folder>"
        ) from None


def _fits_context(name: str, context: int | None, prompt: int, continuation: int) -> None:
    if context is not None and prompt + continuation > context:
        raise InputError(
            f"document.tokens={prompt} plus document.continuation={continuation} "
            f"exceed the {context} positions of model={name}: ask for shorter documents"
        )


def _given(model: ModelConfig) -> Path:
    """The file or folder that `model.path` names, as it should be."""
    path = Path(model.path).expanduser()
    if model.package is not None and not (path.is_file() and digest(path) == model.sha256):
        reason = "is not the file that was published" if path.exists() else "is not there yet"
        raise InputError(
            f"model={model.name}: {path} {reason}: run `python -m pipeline.fetch {model.name}`, "
            "or choose another option of model for another checkpoint"
        )
    if not path.is_dir() and path.suffix != ".gguf":
        raise InputError(
            f"model.path={model.path} is not a folder: give the folder of a Hugging Face checkpoint, or a .gguf file"
        )
    if not path.exists():
        raise InputError(f"model.path={model.path} is not there: give a .gguf file, or a checkpoint folder")
    return path


SIZES = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


def _plausible(folder: Path, config: dict) -> None:
    """Refuse sizes that no decoder has."""
    for name in SIZES:
        size = config.get(name)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InputError(
                f"{folder}/config.json: {name}={size} must be a whole number above 0: save the checkpoint again"
            )
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise InputError(
            f"{folder}/config.json: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}: "
            "save the checkpoint again"
        )


@lru_cache(maxsize=4)  # the jobs of a sweep ask for the same
def _last_token(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values(), default=0)


def _same_vocabulary(checkpoint: Checkpoint, last: int) -> None:
    """Refuse a tokenizer whose `last` token, or weights whose embedding, the configuration does not know."""
    size, folder = checkpoint.config.get("vocab_size"), checkpoint.folder
    if size is None:
        return
    if last >= size:
        raise InputError(
            f"{folder}/tokenizer.json has tokens up to {last} and config.json a vocab_size={size}: "
            "take both from one model"
        )
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError, OSError), safe_open(path, "numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                if name.endswith("embed_tokens.weight") and (rows := weights.get_slice(name).get_shape()[0]) != size:
                    raise InputError(
                        f"{path} embeds {rows} tokens and config.json has vocab_size={size}: take both from one model"
                    )


def locate(
    model: ModelConfig | SyntheticConfig, checkpoints: Path, prompt: int, continuation: int
) -> Checkpoint | Weightless:
    """What a model is loaded from, checked for what a run of `prompt + continuation` tokens needs.

    A GGUF file is converted to a folder under `checkpoints` first.

    Raises
    ------
    InputError
        If it is missing, incomplete, not reachable, or too short of context.
    """
    if isinstance(model, SyntheticConfig):
        _fits_context(model.name, model.source.context, prompt, continuation)
        return Weightless(model.source)
    if model.path is None or model.package is not None:  # a path of the user's own may lead to another model
        _fits_context(model.name, model.context, prompt, continuation)
    gguf = None
    if model.path is not None:
        folder = _given(model)
        if folder.is_file():
            gguf, folder = folder, converted(folder, checkpoints)
    elif model.id is not None:
        folder = hub_snapshot(model)
    else:
        raise InputError(
            "the model has neither path nor id: set model.path=<checkpoint folder> or model.id=<hub repository>"
        )
    for pattern in ("config.json", "tokenizer.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{folder} holds no {pattern}: "
                "a Hugging Face checkpoint folder has config.json, tokenizer.json and *.safetensors"
            )
    checkpoint = Checkpoint(folder, gguf)
    try:
        missing = {"num_hidden_layers", "num_attention_heads", "hidden_size"} - set(checkpoint.config)
    except ValueError:
        raise InputError(f"{folder}/config.json is not valid JSON: save the checkpoint again") from None
    if missing:
        raise InputError(
            f"{folder}/config.json names no {sorted(missing)[0]}: it is not the configuration of a decoder"
        )
    _plausible(folder, checkpoint.config)
    try:
        last = _last_token(checkpoint.tokenizer)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{folder}/tokenizer.json can't be read ({error}): save the tokenizer again") from None
    _same_vocabulary(checkpoint, last)
    _fits_context(model.name, checkpoint.config.get("max_position_embeddings"), prompt, continuation)
    return checkpoint
