"""Components in as many bits as they need, in chunks of tokens: whole numbers of steps and an entropy coder.

Numbers are found by `at_rest/rounding.py`, which tells the coder how large to expect them, and written and read by
`at_rest/ans.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from spectral_kv.at_rest import ans
from spectral_kv.at_rest.entropy import CAP, WIDTH, Tables
from spectral_kv.at_rest.rounding import CONTEXTS, GAINS, Components, Sizes, stand_for

NOTHING = CONTEXTS + 1  # context of tokens which are not there


@dataclass(frozen=True)
class VariableRate:
    """Components in codes, in chunks of tokens of which each can be read on its own.

    Parameters
    ----------
    step : float
    chunk : int
        Tokens of a chunk, which is a stream of `at_rest/ans.py`.
    levels : np.ndarray of uint8, [components]
    means : np.ndarray of uint8, [2, contexts]
    tables : Tables
        Of numbers by context, and of the tokens' scales.
    words : np.ndarray of uint16
        Of one chunk after the other: scales of its tokens, then numbers, component by component.
    states : np.ndarray of int32
        Of the lanes of one chunk after the other.
    far : np.ndarray of uint32
        By how much numbers exceed `CAP`, likewise.
    ends : np.ndarray of uint32, [chunks, 2]
        Where words and what is far end.
    """

    step: float
    chunk: int
    levels: np.ndarray
    means: np.ndarray
    tables: Tables
    words: np.ndarray
    states: np.ndarray
    far: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, components: Components, step: float, chunk: int) -> "VariableRate":
        rounded = components.rounded(step)
        tables, tokens = Tables.of(rounded.frequencies), components.tokens
        lanes, turns = ans.lanes_of(chunk)
        nothing = NOTHING * WIDTH + CAP
        rows = pad(rounded.rows, (0, -tokens % chunk), value=nothing).unflatten(1, (-1, chunk))
        rows = pad(rows, (0, turns * lanes - chunk), value=nothing).unflatten(2, (turns, lanes))
        words, counts, states = ans.encode(rows, tables)
        far, many = rounded.beyond(chunk)
        ends = np.stack([np.cumsum(counts), np.cumsum(many)], axis=1).astype(np.uint32)
        used = (len(counts) - 1) * lanes + min(lanes, tokens - (len(counts) - 1) * chunk)
        return cls(step, chunk, rounded.sizes.levels, rounded.means, tables, words, states.ravel()[:used], far, ends)

    def decode(self, tokens: int, block: np.ndarray, start: int, stop: int, beside: torch.Tensor) -> torch.Tensor:
        """Components, float32 `[components, stop - start]`, of `tokens` in all; only their chunks are read.

        `block` says which one each of the components belongs to, `beside` lies on the device that is wanted.
        """
        first, last = start // self.chunk, -(-stop // self.chunk)
        lanes, turns = ans.lanes_of(self.chunk)
        begins = np.concatenate([np.zeros((1, 2), dtype=np.uint32), self.ends])[first : last + 1].astype(np.int64)
        states = np.full((last - first) * lanes, ans.LOW, dtype=np.int32)
        own = self.states[first * lanes : last * lanes]
        states[: len(own)] = own
        words = self.words[begins[0, 0] : begins[-1, 0]]
        decoder = ans.decoder(words, begins[:-1, 0] - begins[0, 0], states.reshape(-1, lanes), beside)

        count = min(last * self.chunk, tokens) - first * self.chunk
        absent = torch.ones((last - first, self.chunk), dtype=torch.bool, device=beside.device)
        absent.view(-1)[:count] = False
        absent = pad(absent, (0, turns * lanes - self.chunk), value=True)

        def read(contexts: torch.Tensor) -> torch.Tensor:
            """The next numbers, int16 `[rows, tokens]`, in such contexts."""
            wide = pad(contexts, (0, absent.shape[0] * self.chunk - count)).unflatten(1, (-1, self.chunk))
            wide = pad(wide, (0, turns * lanes - self.chunk)).masked_fill_(absent, NOTHING)
            found = decoder(wide.unflatten(2, (turns, lanes)), self.tables)
            return found.flatten(2)[:, :, : self.chunk].flatten(1)[:, :count]

        scale = torch.full((int(block.max()) + 1, count), GAINS, dtype=torch.int8, device=beside.device)
        sizes = Sizes(self.levels, read(scale).to(torch.int8), block)
        skipped = start - first * self.chunk
        numbers = read(sizes.contexts())
        far = self.far[begins[0, 1] : begins[-1, 1]]
        if len(far):
            numbers = self._with(far, numbers)
        numbers = numbers[:, skipped : skipped + stop - start]
        return stand_for(numbers, sizes, self.means, self.step)

    def _with(self, far: np.ndarray, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers with what exceeds `CAP` added, int32."""
        row, token = torch.nonzero(numbers.abs() >= CAP, as_tuple=True)
        order = np.lexsort((token.cpu(), row.cpu(), token.cpu() // self.chunk))
        size = np.empty(len(order), dtype=np.int64)
        size[order] = far
        numbers = numbers.to(torch.int32)
        own = numbers[row, token]
        numbers[row, token] = own + own.sign() * torch.from_numpy(size).to(own)
        return numbers
