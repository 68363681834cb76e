"""A model without weights: keys, values and queries of known structure, with planted tokens that matter."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.synthetic.backgrounds import BACKGROUNDS
from spectral_kv.backends.base import ModelShape
from spectral_kv.calibration import QueryStatistics
from spectral_kv.rope import Rope

TOPICS = 2  # kinds of planted tokens: a prompt asks for one of them, what follows it for all
FREQUENCIES = (0.01, 0.06)  # cycles a token of tones, lowest and highest


@dataclass(frozen=True)
class SyntheticModel:
    """What a prompt's tokens stand for; equal tokens give equal arrays, and other tokens other ones.

    Keys before RoPE are a background (layer 0 a tone, 1 a chirp, 2 bursts, 3 a drift, 4 a tone again, ...), noise, and
    at the planted tokens an abrupt change along the direction of the token's topic. Planted tokens are the same in all
    layers and heads; half of them belong to each of two topics. Their values are long, and half alike.

    Queries are the sum of the directions of the topics that they look for, plus noise. Those of the continuation look
    for both topics, those of the prompt for one of them, drawn from the prompt: what the prompt looked at tells of half
    the planted tokens. Directions lie in the rotation bands that turn by less than a quarter over the whole context, as
    in trained models: a query finds nothing far away in the others. Each topic has bands of its own.

    Frequencies and directions belong to the model, as weights would; phases, noise and planted places to the prompt.

    Parameters
    ----------
    layers, query_heads, kv_heads, dim : int
    theta : float
        Base of RoPE.
    context : int
        Most tokens of prompt and continuation.
    snr_db : float
        Power of the background over that of the noise, in dB; infinite for no noise.
    planted : float
        Share of the prompt's tokens that are planted.
    deviation : float
        Length of the change of a planted key, in lengths of the background.
    value : float
        Length of a planted value, in lengths of the others.
    share : float
        Share of the continuation's attention that falls on planted tokens, about.
    query_noise : float
        Length of a query's noise, in lengths of the direction of a topic.
    seed : int
        Of frequencies and directions.

    Raises
    ------
    ValueError
        If the parameters describe no model.
    """

    layers: int = 4
    query_heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    theta: float = 10_000.0
    context: int = 8192
    snr_db: float = 20.0
    planted: float = 0.015625
    deviation: float = 1.0
    value: float = 3.0
    share: float = 0.75
    query_noise: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "query_heads", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"model.query_heads={self.query_heads} must be a multiple of model.kv_heads={self.kv_heads}"
            )
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"model.dim={self.dim} must be even: RoPE turns channels in pairs")
        if not 0 < self.planted <= 0.25:
            raise ValueError(f"model.planted={self.planted} must lie above 0 and at most at 0.25")
        if not self.planted < self.share < 1:
            raise ValueError(f"model.share={self.share} must lie between model.planted={self.planted} and 1")
        if not (self.theta > 1 and self.deviation > 0 and self.value > 0):
            raise ValueError(
                f"model.theta={self.theta} must be above 1, "
                f"model.deviation={self.deviation} and model.value={self.value} above 0"
            )
        if self.query_noise < 0 or not self.snr_db > -np.inf:
            raise ValueError(
                f"model.query_noise={self.query_noise} can't be negative, "
                f"and model.snr_db={self.snr_db} must be a number, or inf for no noise"
            )
        if len(self.slow_bands) < TOPICS:
            raise ValueError(
                f"model.context={self.context} is too long for queries to find anything across it with "
                f"model.theta={self.theta:g} and model.dim={self.dim}: lower the first, or raise one of the others"
            )

    @property
    def shape(self) -> ModelShape:
        """The sizes; there is no vocabulary, because nothing is predicted."""
        return ModelShape(self.layers, self.query_heads, self.kv_heads, self.dim, 0)

    @cached_property
    def rope(self) -> Rope:
        return Rope(self.theta ** (-np.arange(self.dim // 2) / (self.dim // 2)))

    @property
    def scaling(self) -> float:
        return self.dim**-0.5

    @property
    def slow_bands(self) -> np.ndarray:
        """Bands of the rotation that turn by less than a quarter over the context."""
        return np.flatnonzero(self.rope.inv_freq * self.context < np.pi / 2)

    @staticmethod
    def kind(layer: int) -> str:
        """Name of a layer's background."""
        return list(BACKGROUNDS)[layer % len(BACKGROUNDS)]

    def _rng(self, *what: object, tokens: np.ndarray = ()) -> np.random.Generator:
        """A generator for one thing of the model, or of a prompt."""
        text = np.asarray(tokens, dtype="<i8").tobytes()
        digest = hashlib.sha256(f"{self.seed} {what} ".encode() + text).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def frequency(self, layer: int, head: int) -> float:
        """Of the background of one KV head, in cycles a token; evenly spread in octaves."""
        return float(np.exp(self._rng("frequency", layer, head).uniform(*np.log(FREQUENCIES))))

    def directions(self, layer: int) -> np.ndarray:
        """Unit vectors `[kv_heads, topics, dim]`, un-rotated: where planted keys of each topic deviate to."""
        half = self.dim // 2
        found = np.zeros((self.kv_heads, TOPICS, self.dim))
        for head in range(self.kv_heads):
            rng = self._rng("directions", layer, head)
            for topic in range(TOPICS):
                bands = self.slow_bands[topic::TOPICS]
                vector = rng.standard_normal(2 * len(bands))
                found[head, topic, np.concatenate([bands, half + bands])] = vector / np.linalg.norm(vector)
        return found

    def planted_tokens(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ascending positions and topics, `[planted]` each, of the planted tokens of a prompt."""
        rng = self._rng("planted", tokens=tokens)
        count = max(1, round(self.planted * len(tokens)))
        return np.sort(rng.choice(len(tokens), size=count, replace=False)), rng.permutation(count) % TOPICS

    def asked(self, tokens: np.ndarray) -> int:
        """The topic that the prompt's own queries look for."""
        return int(self._rng("asked", tokens=tokens).integers(TOPICS))

    def keys(self, tokens: np.ndarray, layer: int) -> np.ndarray:
        """Un-rotated keys of a prompt, float32 `[kv_heads, tokens, dim]`."""
        positions, topics = self.planted_tokens(tokens)
        changes = self.deviation * np.sqrt(self.dim) * self.directions(layer)
        heads = []
        for head in range(self.kv_heads):
            rng = self._rng("keys", layer, head, tokens=tokens)
            x = BACKGROUNDS[self.kind(layer)](rng, len(tokens), self.dim, self.frequency(layer, head))
            x += 10.0 ** (-self.snr_db / 20.0) * rng.standard_normal(x.shape)
            x[positions] += changes[head, topics]
            heads.append(x)
        return np.stack(heads).astype(np.float32)

    def values(self, tokens: np.ndarray, layer: int) -> np.ndarray:
        """Values of a prompt, float32 `[kv_heads, tokens, dim]`.

        Those of planted tokens have half their length along one direction of the head. Were they independent, many of
        them would sum to little, and a cache with none of them would perturb attention less than one with a few.
        """
        rng = self._rng("values", layer, tokens=tokens)
        positions, _ = self.planted_tokens(tokens)
        x = rng.standard_normal((self.kv_heads, len(tokens), self.dim), dtype=np.float32)
        common = self._rng("common value", layer).standard_normal((self.kv_heads, 1, self.dim))
        x[:, positions] = self.value * (0.5 * common + np.sqrt(0.75) * x[:, positions])
        return x

    def query_length(self, positions: np.ndarray) -> np.ndarray:
        """Length `[tokens]` of the part of a query that looks for a topic, such that planted tokens get their share.

        Background and noise raise the weight of planted and other tokens alike, so the gap between their logits alone
        decides. The rotation shrinks it, by the mean cosine over the distances that a query sees.
        """
        gap = np.log(self.share / (1 - self.share) * (1 - self.planted) / self.planted)
        turned = np.sinc(np.multiply.outer(positions, self.rope.inv_freq[self.slow_bands]) / np.pi).mean(axis=-1)
        return gap / (self.scaling * self.deviation * np.sqrt(self.dim) * turned)

    def queries(self, tokens: np.ndarray, positions: np.ndarray, topics: list[int]) -> np.ndarray:
        """Un-rotated queries that look for `topics`, float32 `[layers, query_heads, tokens, dim]`.

        The noise of a query depends on the token and its position alone, however many are fed at once.
        """
        drawn = (self.layers, self.query_heads, self.dim)
        pairs = zip(positions, tokens, strict=True)
        noise = np.array([self._rng("query", int(p), int(t)).standard_normal(drawn) for p, t in pairs])
        noise = np.moveaxis(noise.reshape(len(tokens), *drawn), 0, 2)
        aims = np.stack([self.directions(layer)[:, topics].sum(axis=1) for layer in range(self.layers)])
        aims = np.repeat(aims, self.query_heads // self.kv_heads, axis=1)[:, :, None]
        x = self.query_length(positions)[:, None] * (aims + self.query_noise * self.dim**-0.5 * noise)
        return x.astype(np.float32)

    def statistics(self) -> QueryStatistics:
        """Query statistics over many prompts, in units of the query length, which is the same in all bands."""
        from scipy.stats import rice  # slow to import, and read for one sort of method

        half = self.dim // 2
        aims = np.stack([self.directions(layer) for layer in range(self.layers)])
        aims = np.repeat(aims[..., :half] + 1j * aims[..., half:], self.query_heads // self.kv_heads, axis=1)
        modulus = np.abs(aims)
        if self.query_noise > 0:
            spread = self.query_noise * self.dim**-0.5
            modulus = rice.mean(modulus / spread, scale=spread)
        return QueryStatistics(aims.mean(axis=2), modulus.mean(axis=2), {"text": "computed, not measured"})
