"""RoPE of mlx-lm models, brought to exactly the frequencies that transformers computes for the same checkpoint."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spectral_kv.backends.suitable import depends_on_length
from spectral_kv.rope import Rope

TOLERANCE = 1e-4  # relative; frequencies computed in single precision differ by 1e-6, those of another base by far more


class ExactRope(nn.Module):
    """Half-split rotation by given frequencies.

    `mx.fast.rope(base=...)` computes its own, and at position 8191 they are 1e-3 radians off those of transformers.
    """

    def __init__(self, rope: Rope):
        super().__init__()
        self._periods = mx.array((1.0 / rope.inv_freq).astype(np.float32))
        self._scale = rope.attention_scaling

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        dim = 2 * self._periods.shape[0]
        x = x if self._scale == 1.0 else x * self._scale
        return mx.fast.rope(x, dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods)


def rotation(config: PreTrainedConfig, folder: str) -> Rope:
    """The rotation that the configuration of a checkpoint describes.

    Raises
    ------
    ValueError
        If it describes none, or one that depends on the length of the prompt.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise ValueError(f"{folder} is of type {config.model_type}, which has no rotary position embedding of one base")
    depends_on_length(parameters["rope_type"], folder)
    rotary = LlamaRotaryEmbedding(config)  # the formulas are the same in all models with one rotation
    return Rope(rotary.inv_freq.double().numpy(), float(rotary.attention_scaling))


def flattened(config: PreTrainedConfig) -> dict:
    """The settings of the rotation under the names that mlx-lm knows.

    transformers 5 writes `rope_parameters`, which most models of mlx-lm don't read: they fall back to a base of their
    own without a word.
    """
    parameters = dict(config.rope_parameters)
    flat = {"rope_theta": parameters.pop("rope_theta")}
    if parameters["rope_type"] != "default":
        flat["rope_scaling"] = parameters
    return flat


def _frequencies(rope: nn.Module) -> np.ndarray | None:
    """What a rotation of mlx-lm turns by, in radians a token, or None for one that is not half-split."""
    if getattr(rope, "traditional", False):
        return None
    if isinstance(rope, nn.RoPE):
        return rope.scale * rope.base ** -(np.arange(0, rope.dims, 2) / rope.dims)
    return 1.0 / np.asarray(rope._freqs, dtype=np.float64) if hasattr(rope, "_freqs") else None


def make_exact(layers: list[nn.Module], rope: Rope, folder: str) -> None:
    """Let every attention layer rotate by exactly `rope`.

    Raises
    ------
    ValueError
        If a layer was built to rotate in another way: its settings were not understood, and it would predict nonsense
        without an error.
    """
    for index, layer in enumerate(layers):
        own = getattr(getattr(layer, "self_attn", None), "rope", None)
        frequencies = None if own is None else _frequencies(own)
        if frequencies is None:
            raise ValueError(f"{folder} rotates keys of layer {index} in another way than Llama and Qwen do")
        if frequencies.shape != rope.inv_freq.shape or not np.allclose(frequencies, rope.inv_freq, rtol=TOLERANCE):
            raise ValueError(
                f"mlx-lm built layer {index} of {folder} with other RoPE frequencies than config.json describes "
                f"(lowest {frequencies[-1]:.4g} instead of {rope.inv_freq[-1]:.4g} radians a token): "
                "use the torch backend"
            )
        layer.self_attn.rope = ExactRope(rope)
