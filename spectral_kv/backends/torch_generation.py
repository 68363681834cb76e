"""A cache for transformers' `generate` that compresses itself while the model runs."""

from contextvars import ContextVar

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from spectral_kv.backends.torch_cache import CompressedLayer
from spectral_kv.compressor import Compressor, observed
from spectral_kv.storage.base import Storage, Stored
from spectral_kv.storage.spectral import Arriving
from spectral_kv.xp import rows, stable_order, to_numpy

# The layer that was fed, until the attention over what it returned is computed.
fed: ContextVar["GenerationLayer | None"] = ContextVar("fed", default=None)


def stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sequences `[1, heads, tokens, dim]` of different lengths as one batch, zeros on the left."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])


def placed(before: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """Places `[kv_heads, tokens]`, 0 for the lowest, of tokens that get theirs once and never change their order.

    The first tokens have `before` `[kv_heads, placed]`. Each of the others comes after as many of those as score less
    than it in `scores` `[kv_heads, tokens]`, and the others among themselves are in the order of their scores. So
    scores of different moments, which may have different scales, are never compared. Of equal scores the first token's
    is the higher place.
    """
    if bool(scores.isnan().any()):
        raise ValueError("a scorer returned NaN; scores must be numbers for every evictable token")
    tokens = scores.shape[-1]
    old = scores.new_empty((len(scores), 0), dtype=torch.int64) if before is None else before.argsort().argsort()
    known, new = scores.split([old.shape[-1], tokens - old.shape[-1]], dim=-1)
    lower = torch.searchsorted(known.sort(dim=-1).values, new.contiguous())
    value = torch.cat([2 * old + 1, 2 * lower], dim=-1)
    last_first = tokens - 1 - stable_order(scores.flip(-1))  # ascending, of equal scores the last token first
    order = last_first.gather(-1, stable_order(value.gather(-1, last_first)))
    return torch.empty_like(order).scatter_(-1, order, torch.arange(tokens, device=order.device).expand_as(order))


class GenerationLayer(CacheLayerMixin):
    """One layer of a batch of prompts.

    Every sequence is a `CompressedLayer` of its own, without the padding in front of it: what becomes of it does not
    depend on its neighbours. Attention reads them aligned on the right, and `mask` hides what is empty.

    Parameters
    ----------
    compressor : Compressor
    index : int
        Of the layer.
    every : int, optional
        So many tokens over the budget, tokens are evicted while decoding; None: only after a prompt.
    decode : str
        `rescore` or `append`, see `spectral_kv.cache`.
    arriving : dict of int to Arriving
        Shared by the layers of a cache whose storage codes some of them in common: its prompts, by row of the batch.
    """

    is_sliding = False

    def __init__(self, compressor: Compressor, index: int, every: int | None, decode: str, arriving: dict):
        super().__init__()
        self.compressor, self.index, self.every, self.decode = compressor, index, every, decode
        self.arriving = arriving
        self.sequences: list[CompressedLayer] = []
        self.fed_tokens = 0
        self.whole = True  # unless tokens are fed that attention has not read to the end
        self._prompt: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values before the first attention
        self._queries: list[torch.Tensor] = []  # one a sequence, of its last tokens, for evictions while decoding
        self._places: list[torch.Tensor | None] = []  # `append`: [kv_heads, placed], of the tokens after the sinks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing waits to be made."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.is_initialized, self.whole = True, False
        if not self.sequences:
            self._prompt = found = key_states, value_states
        else:
            grown = [
                sequence.update(key_states[row : row + 1], value_states[row : row + 1])
                for row, sequence in enumerate(self.sequences)
            ]
            found = tuple(stack(list(parts)) for parts in zip(*grown, strict=True))
        self.fed_tokens += key_states.shape[-2]
        fed.set(self)  # last: after an error nobody's attention may take what this layer has not returned for its own
        return found

    def mask(self, queries: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        """What new tokens of `queries` `[batch, query_heads, new, dim]` see, `[batch, 1, new, held]`.

        As `given` unless sequences of different lengths are held.
        """
        if self.index == 0:  # one question to the device in a step
            self._hides_only_padding(given)
        lengths = [sequence.held for sequence in self.sequences]
        if len(set(lengths)) < 2:
            return given
        new, device = queries.shape[-2], queries.device
        slots, own = torch.arange(self.held, device=device), torch.arange(self.held - new, self.held, device=device)
        first = self.held - torch.tensor(lengths, device=device)
        return ((slots >= first[:, None, None]) & (slots <= own[:, None]))[:, None]

    def _hides_only_padding(self, given: torch.Tensor | None) -> None:
        """Refuse a mask that hides a token after the padding in front of the prompts: it is held like any other."""
        if given is None or not self.sequences:
            return
        seen = (given if given.dtype == torch.bool else given == 0)[:, 0, -1]
        padding = torch.tensor([self.fed_tokens - sequence.seen for sequence in self.sequences], device=given.device)
        places = torch.arange(self.fed_tokens - seen.shape[-1], self.fed_tokens, device=given.device)
        if not bool((seen | (places < padding[:, None])).all()):
            raise ValueError(
                "a token after the padding in front of the prompts is masked: sequences of a batch end together and "
                "take turns of the same length, and padding ends in the first piece of a prompt; else give every "
                "sequence a cache of its own"
            )

    @torch.no_grad()
    def attended(self, queries: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Put a prompt away, or evict what is too much, now that attention has read it.

        `queries` `[batch, query_heads, tokens, dim]` are those of the tokens just fed, rotated; `mask`
        `[batch, 1, tokens, held]`, where there is one, says what they saw.
        """
        self._settle(queries.detach(), mask)
        self.whole = True

    def _settle(self, queries: torch.Tensor, mask: torch.Tensor | None) -> None:
        new = queries.shape[-2]
        budget = self.compressor.budget
        if not self.sequences:
            padding = self._padding(mask, len(queries))
            self._put_away(queries, padding)
            self._queries = [queries[row, :, empty:] for row, empty in enumerate(padding)]
            for row, sequence in enumerate(self.sequences):
                self._forget(row, evicted=sequence.held < sequence.seen)
            return
        if self.compressor.scorer is None:
            return
        for row, sequence in enumerate(self.sequences):
            self._remember(row, queries[row])
            over = sequence.held - budget.tokens
            evicts = over > 0 and (new > 1 or (self.every is not None and over >= self.every))
            if evicts:
                self._evict(row)
            self._forget(row, evicts)

    def stepped(self, tokens: int) -> None:
        """The one sequence has grown by so many tokens, without a forward pass; evict what is too much."""
        self.fed_tokens += tokens
        evicts = self.compressor.scorer is not None and self.every is not None
        if evicts and self.sequences[0].held - self.compressor.budget.tokens >= self.every:
            self._evict(0)

    @staticmethod
    def _padding(mask: torch.Tensor | None, batch: int) -> list[int]:
        """Number of empty slots in front of every sequence."""
        if mask is None:
            return [0] * batch
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, -1].expand(batch, -1)
        padding = (seen.shape[-1] - seen.sum(dim=-1)).tolist()
        if any(not bool(row[empty:].all()) for row, empty in zip(seen, padding, strict=True)):
            raise ValueError("prompts are padded on the right: set tokenizer.padding_side = 'left'")
        return padding

    def _put_away(self, queries: torch.Tensor, padding: list[int]) -> None:
        keys, values = self._prompt
        self._prompt = None
        compressor, dtype = self.compressor, self.compressor.backend.cache_dtype
        for row, empty in enumerate(padding):
            k, v = (x[row, :, empty:].detach().to(dtype) for x in (keys, values))
            tokens = k.shape[-2]
            positions = np.arange(tokens, dtype=np.int32)
            self._places.append(None)
            if compressor.scorer is None or compressor.budget.tokens >= tokens:
                positions = np.broadcast_to(positions, (len(k), tokens))
                k, v = k.clone(), v.clone()
            else:
                kept = self._chosen(row, self._scores(k, v, positions, queries[row, :, empty:], (0, self.index)))
                positions = to_numpy(kept)
                k, v = rows(k, kept), rows(v, kept)
            if hasattr(compressor.storage, "arriving"):
                stored = self._arrival(row).add(k[None], v[None], positions[0], tokens)
            else:
                stored = compressor.storage.store(k[None], v[None], self.index)
            self.hold(self._sequence(stored, tokens, positions))

    def _arrival(self, row: int) -> Arriving:
        """What puts the layers of one prompt away together."""
        if self.index == 0:
            backend = self.compressor.backend
            self.arriving[row] = self.compressor.storage.arriving(backend.shape.layers, backend.rope)
        return self.arriving[row] if self.index < self.compressor.backend.shape.layers - 1 else self.arriving.pop(row)

    def hold(self, sequence: CompressedLayer) -> None:
        """Have one more sequence in the batch."""
        sequence.row = len(self.sequences)
        self.sequences.append(sequence)

    def _sequence(self, stored: Stored, seen: int, positions: np.ndarray) -> CompressedLayer:
        """A sequence of `seen` tokens that holds those at `positions`, and grows as far as evictions allow."""
        bounded = self.compressor.scorer is not None and self.every is not None
        most = self.compressor.budget.tokens + self.every if bounded else None
        positions = positions.astype(np.int32, copy=False)
        return CompressedLayer(stored, self.compressor.backend.cache_dtype, seen, positions, most)

    def restore(self, tensors: dict[str, torch.Tensor], positions: np.ndarray, seen: int) -> None:
        """Have one more sequence in the batch, of `seen` tokens, whose storage wrote `tensors` down."""
        storage = self.compressor.storage
        if hasattr(storage, "arriving"):
            stored = self._arrival(len(self.sequences)).restore(tensors, positions[0], seen)
        else:
            stored = storage.restored(tensors, self.index)
        self.hold(self._sequence(stored, seen, positions))

    def _evict(self, row: int) -> None:
        """Bring a sequence that is over the budget back to it."""
        sequence = self.sequences[row]
        keys, values = (x[0] for x in sequence.stored.load())
        seed = (0, self.index, sequence.seen)  # else a random scorer would draw the same at every eviction
        kept = self._chosen(row, self._scores(keys, values, sequence.positions, self._queries[row], seed))
        positions = np.take_along_axis(sequence.positions, to_numpy(kept), axis=1)
        stored = sequence.stored.take(kept[None])
        self.sequences[row] = self._sequence(stored, sequence.seen, positions)

    def _scores(self, keys, values, positions: np.ndarray, queries: torch.Tensor, seed: tuple[int, ...]):
        """The scorer's verdict on every row of a sequence, `[kv_heads, tokens]`."""
        compressor = self.compressor
        wanted = observed(compressor.scorer, queries.shape[-2])
        view = compressor.view(
            self.index, keys, values, positions, compressor.budget.evictable(keys.shape[-2]),
            seed=seed, queries=queries[:, queries.shape[-2] - wanted :] if wanted else None,
        )  # fmt: skip
        return compressor.scorer.score(view)

    def _chosen(self, row: int, scores: torch.Tensor) -> torch.Tensor:
        """Rows of a sequence to keep, `[kv_heads, kept]`."""
        if self.decode != "append":
            return self.compressor.select([scores])[0]
        protected = self.compressor.protected
        middle = protected.evictable(scores.shape[-1])
        places = placed(self._places[row], scores[:, middle].float())
        scores = torch.zeros_like(scores, dtype=torch.float32)
        scores[:, middle] = places.float()
        kept = self.compressor.select([scores])[0]
        chosen = kept[:, middle.start : protected.tokens - protected.recent] - middle.start
        self._places[row] = places.gather(-1, chosen).to(torch.int32)
        return kept

    def _remember(self, row: int, queries: torch.Tensor) -> None:
        """Queries `[query_heads, tokens, dim]` of tokens just fed, with those of a sequence's last tokens before them.

        Of a turn of several tokens all are read. While decoding, the oldest is forgotten for every new one.
        """
        joined = torch.cat([self._queries[row], queries], dim=-2)
        if queries.shape[-2] == 1:
            joined = joined[:, max(joined.shape[-2] - self._remembered(), 0) :]
        self._queries[row] = joined

    def _forget(self, row: int, evicted: bool) -> None:
        """Drop the queries of a sequence that no eviction while decoding will read."""
        queries = self._queries[row]
        self._queries[row] = queries[:, max(queries.shape[-2] - self._remembered(evicted), 0) :].clone()

    def _remembered(self, evicted: bool = False) -> int:
        return self.compressor.remembered(self.every, self.decode == "append", evicted)

    @property
    def held(self) -> int:
        """Slots that attention reads: those of the longest sequence."""
        return max((sequence.held for sequence in self.sequences), default=0)

    @property
    def positions(self) -> list[np.ndarray]:
        """Logical positions `[kv_heads, held]` of what every sequence holds."""
        return [sequence.positions for sequence in self.sequences]

    @property
    def nbytes(self) -> int:
        """Bytes of every array that must live to continue decoding."""
        return self._beside + sum(sequence.nbytes for sequence in self.sequences)

    @property
    def allocated(self) -> int:
        """The same with the room to grow."""
        return self._beside + sum(sequence.allocated for sequence in self.sequences)

    @property
    def _beside(self) -> int:
        """Bytes beside stored keys and values: remembered queries, places and, where tokens are evicted, positions."""
        found = sum(x.nbytes for x in (*self._queries, *self._places) if x is not None)
        if self.compressor.scorer is not None:
            found += sum(sequence.position_nbytes for sequence in self.sequences)
        return found

    def get_seq_length(self) -> int:
        """Tokens fed, padding included: where the next one goes."""
        return self.fed_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `query_length` new tokens are masked against, and the position that the first of them stands for.

        The held tokens count as the last ones before the new: each of them is seen by every new token.
        """
        return self.held + query_length, self.fed_tokens - self.held

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.sequences, self.fed_tokens, self._prompt, self._queries, self._places = [], 0, None, [], []
        self.whole = True

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of these numbers, each as often as it is named."""
        if self.sequences:
            chosen, self.sequences = [self.sequences[row].copy() for row in indices.tolist()], []
            for sequence in chosen:
                self.hold(sequence)
            self._queries = [self._queries[row] for row in indices.tolist()]
            self._places = [self._places[row] for row in indices.tolist()]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.sequences)).repeat_interleave(repeats))


class GenerationCache(Cache):
    """A cache that holds a budget of tokens of every layer and KV head; `spectral_kv.cache` makes it.

    It is for `model.generate(..., past_key_values=cache)` and for forward calls. A prompt is compressed layer by layer
    while it runs, so that one layer at a time is whole; so is every later feed of several tokens.
    """

    def __init__(
        self, compressor: Compressor, every: int | None = None, decode: str = "rescore", storage: Storage | None = None
    ):
        self.compressor, self.every, self.decode = compressor, every, decode
        self.storage = storage or compressor.storage  # as it was asked for
        arriving = {}
        layers = [
            GenerationLayer(compressor, i, every, decode, arriving) for i in range(compressor.backend.shape.layers)
        ]
        super().__init__(layers=layers)
        self._arriving = arriving

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Keys and values `[batch, kv_heads, tokens, dim]` of new tokens of a layer; what its attention reads.

        Raises
        ------
        ValueError
            If another number of sequences is held, or a forward pass before this one did not end.
        RuntimeError
            If the model attends in another way than when the cache was made.
        """
        if fed.get() is not None:
            fed.set(None)
            raise RuntimeError(
                "the model does not attend by way of spectral_kv: make the cache after setting the model's attention"
            )
        if layer_idx == 0:
            self._takes(len(key_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _takes(self, batch: int) -> None:
        """Refuse a forward pass that could not be right, before anything changes."""
        if any(not layer.whole or layer.fed_tokens != self.position for layer in self.layers):
            raise ValueError(
                "the last forward pass of this cache did not end, and layers hold different tokens: "
                "cache.reset() and feed all again, or load it again"
            )
        held = len(self.layers[0].sequences)
        if held and batch != held:
            raise ValueError(
                f"the cache holds {held} sequences, and {batch} are fed: for several answers to each of them call "
                "cache.batch_repeat_interleave(answers) first"
            )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._arriving.clear()

    def crop(self, *args) -> None:
        """What is evicted does not come back.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            "a compressed cache can't take tokens back, as assisted generation and prompt lookup want: "
            "generate without assistant_model and prompt_lookup_num_tokens"
        )

    @property
    def position(self) -> int:
        """Tokens fed so far, padding included."""
        return self.layers[0].fed_tokens

    @property
    def held(self) -> int:
        """Tokens that attention reads in every layer and KV head."""
        return self.layers[0].held

    @property
    def nbytes(self) -> int:
        """Bytes of every array that must live to continue decoding: keys and values, positions, queries, places."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated(self) -> int:
        """The same with the room to grow."""
        return sum(layer.allocated for layer in self.layers)

    @torch.no_grad()
    def prefill(self, input_ids, attention_mask=None, chunk: int | None = None) -> torch.Tensor:
        """Feed a prompt, or a further turn, without generating.

        With `chunk` it is fed in pieces, and the budget is held after every one: no layer ever holds more than budget
        and chunk. Each piece is chosen from with what is held, by the queries of the piece, so that what is kept is not
        quite that of the whole prompt. A last piece of one token counts as generated.
        `generate(..., prefill_chunk_size=chunk)` of transformers does the same.

        Parameters
        ----------
        input_ids : torch.Tensor of int, [batch, tokens]
            New tokens alone.
        attention_mask : torch.Tensor, [batch, position + tokens], optional
            Zero for padding in front of a prompt; it has to end in the first piece. Of a further turn it can be left
            out.
        chunk : int, optional
            Tokens that are fed at once; by default all.

        Returns
        -------
        torch.Tensor, [batch, vocabulary]
            Logits of the token that follows.
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1, or unset to feed the prompt at once")
        model, end = self.compressor.backend.model, self.position + input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape[1] != end:
            raise ValueError(
                f"attention_mask is of {attention_mask.shape[1]} tokens, and {end} are there with those fed before: "
                "give it for all of them"
            )
        if attention_mask is None:
            padding = [self.position - sequence.seen for sequence in self.layers[0].sequences]
            if any(padding):
                empty = torch.tensor(padding, device=input_ids.device)[:, None]
                attention_mask = (torch.arange(end, device=input_ids.device) >= empty).long()
        # as `generate` counts them, which may go on from here
        places = None if attention_mask is None else (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        for piece in input_ids.split(chunk or input_ids.shape[1], dim=1):
            start, stop = self.position, self.position + piece.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :stop]
            at = None if places is None else places[:, start:stop]
            logits = model(piece, attention_mask=mask, position_ids=at, past_key_values=self, logits_to_keep=1).logits
        return logits[:, -1]

    @torch.no_grad()
    def greedy(self, input_ids, count: int, attention_mask=None, chunk: int | None = None) -> torch.Tensor:
        """Feed tokens and decode greedily, as `generate` would, by steps of the library's engine where they can be had.

        The same tokens are evicted at the same moments. Nothing stops at the end of a text: all but the last of the
        tokens are held afterwards.

        Parameters
        ----------
        input_ids, attention_mask, chunk
            As of `prefill`.
        count : int

        Returns
        -------
        torch.Tensor of int, [batch, count]
        """
        if count < 1:
            raise ValueError(f"count={count} must be at least 1: cache.prefill feeds tokens and decodes none")
        said = [self.prefill(input_ids, attention_mask, chunk).argmax(-1, keepdim=True)]
        while (left := count - sum(part.shape[1] for part in said)) > 0:
            last = said[-1][:, -1:]
            if self.reason() is None:
                said.append(self._stepped(last[:, 0], left))
            else:
                said.append(self.prefill(last).argmax(-1, keepdim=True))
        return torch.cat(said, dim=1)

    def reason(self) -> str | None:
        """Why `greedy` runs forward passes of the model and not the steps of an engine, or None if it takes those.

        `model.generate` runs forward passes whatever is held.
        """
        sequences = [layer.sequences for layer in self.layers]
        if not sequences[0]:
            return "nothing is held yet: feed a prompt first"
        if len(sequences[0]) > 1:
            return f"its {len(sequences[0])} sequences are held apart, and a step is of one of them"
        if self.layers[0]._remembered():
            return f"{type(self.compressor.scorer).__name__} reads queries of generated tokens, which steps don't show"
        return self.compressor.backend.engine.reason([own[0] for own in sequences])

    def _stepped(self, ids: torch.Tensor, most: int) -> torch.Tensor:
        """At most so many tokens `[1, count]` after `ids` `[1]`, by the engine, until some have to be evicted."""
        layers = [layer.sequences[0] for layer in self.layers]
        if self.compressor.scorer is not None and self.every is not None:
            most = min(most, max(self.compressor.budget.tokens + self.every - layers[0].held, 1))
        said = self.compressor.backend.engine.generate(layers, ids, most)
        for layer in self.layers:
            layer.stepped(most)
        return said.T

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is held, by layer and sequence."""
        found = {}
        for index, layer in enumerate(self.layers):
            for row, sequence in enumerate(layer.sequences):
                held = sequence.stored.tensors()
                held |= {"positions": torch.from_numpy(sequence.positions), "queries": layer._queries[row]}
                if layer._places[row] is not None:
                    held["places"] = layer._places[row]
                found |= {f"{index}.{row}.{name}": x for name, x in held.items()}
        return found

    def restore(self, tensors: dict[str, torch.Tensor], position: int, seen: list[int]) -> None:
        """Hold what `tensors` returned, of sequences of `seen` tokens, and continue after `position` fed tokens."""
        self.reset()
        for index, layer in enumerate(self.layers):
            device = self.compressor.backend.device_of(index)
            layer.fed_tokens, layer.is_initialized = position, True
            for row, tokens in enumerate(seen):
                start = f"{index}.{row}."
                held = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
                positions = held.pop("positions").numpy()
                held = {name: x.to(device) for name, x in held.items()}
                layer._queries.append(held.pop("queries"))
                layer._places.append(held.pop("places", None))
                layer.restore(held, positions, tokens)

    def save(self, path, tokens=None, codec=None) -> None:
        """Write it to a safetensors file: see `spectral_kv.load`.

        Parameters
        ----------
        path : path
        tokens : array of int, [batch, tokens], optional
            The ids that were fed; `load` can check them.
        codec : str or SpectralAtRest, optional
            `spectral` writes dense caches of which no head has evicted tokens of its own by a transform coder, about 16
            times smaller; a `spectral_kv.at_rest.storage.SpectralAtRest` says how small. By default what is
            held is written as it is.
        """
        from spectral_kv.backends.torch_cache_file import save

        save(self, path, tokens, codec)
