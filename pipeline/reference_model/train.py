"""Train the reference model on one GPU.

    python -m pipeline.reference_model.train CORPUS OUT --minutes 8.4

CORPUS is what `pipeline.reference_model.corpus` wrote. The schedule follows the clock, so the program ends when
asked to: a learning rate that warms up, stays and falls to zero, on sequences of 2048 tokens and then, for the last
share, of 8192. Every sequence starts with the BOS token, so that attention sinks form on it as they do in large
models; a share of the sequences carries planted facts and variable chains that are asked for later
(`pipeline.documents.lookups`). OUT receives the model in Hugging Face format (bf16 safetensors, in shards of at
most 15 MB), its tokenizer and `training.json`.
"""

import argparse
import json
import lzma
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.optim import AdamW, Muon
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.documents.lookups import Lookup, chain, fact, needles
from pipeline.reference_model.corpus import BOS, END, VOCABULARY

TOKENS_PER_STEP = 131_072
SHORT, LONG = 2048, 8192
HELD_OUT = 500_000  # tokens at the end of the corpus that only the progress report sees


def lookups(rng: np.random.Generator, count: int) -> list[Lookup]:
    """A mix of lone facts, sets of needles that distract from each other, and chains."""
    items: list[Lookup] = []
    while len(items) < count:
        kind = rng.random()
        if kind < 0.25:
            items.append(fact(rng))
        elif kind < 0.6:
            items += needles(rng, int(rng.integers(2, 7)))
        else:
            items.append(chain(rng, int(rng.integers(1, 5))))
    return items


class Sequences(IterableDataset):
    """Endless batches `[rows, length + 1]` of token ids, each row a window of the corpus behind BOS."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, length: int, retrieval: float, seed: int):
        self.tokens, self.tokenizer, self.length, self.retrieval, self.seed = tokens, tokenizer, length, retrieval, seed
        self.bos = tokenizer.token_to_id(BOS)
        self.breaks = np.array(
            [tokenizer.decode([i], skip_special_tokens=False).endswith("\n") for i in range(VOCABULARY)]
        )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text).ids, dtype=self.tokens.dtype)

    def plant(self, rng: np.random.Generator, window: np.ndarray) -> np.ndarray:
        """Splice statements and their questions into a window at line breaks; half of the questions come last."""
        events: list[tuple[float, np.ndarray]] = []
        room = len(window) // 2
        for item in lookups(rng, int(rng.integers(1, 3 + len(window) // 512))):
            places = np.sort(rng.random(len(item.statements) + 1))
            if rng.random() < 0.5:
                places[-1] = 1.0
            pieces = [*(f"\n{s}\n" for s in item.statements), f"\n{item.question} {item.answer}.\n"]
            encoded = [self.encode(p) for p in pieces]
            room -= sum(map(len, encoded))
            if room < 0:
                break
            events += zip(places, encoded, strict=True)
        events.sort(key=lambda event: event[0])
        text = window[: len(window) - sum(len(e) for _, e in events)]
        breaks = np.flatnonzero(self.breaks[text]) + 1
        breaks = np.concatenate([[0], breaks, [len(text)]])
        pieces, last = [], 0
        for place, encoded in events:
            cut = (
                len(text) if place == 1.0 else int(breaks[np.searchsorted(breaks, place * len(text), side="right") - 1])
            )
            pieces += [text[last:cut], encoded]
            last = cut
        return np.concatenate([*pieces, text[last:]])

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, self.length, worker.id if worker else 0])
        while True:
            rows = np.empty((TOKENS_PER_STEP // self.length, self.length + 1), dtype=np.int64)
            for row in rows:
                start = rng.integers(0, len(self.tokens) - self.length)
                window = self.tokens[start : start + self.length]
                row[0] = self.bos
                row[1:] = self.plant(rng, window) if rng.random() < self.retrieval else window
            yield torch.from_numpy(rows)


def reference_config(tokenizer: Tokenizer) -> Qwen2Config:
    """15.7 M parameters: 8 layers of width 384, 6 query and 2 key-value heads of 64, tied embeddings."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        initializer_range=0.02,
    )


def learning_rate(progress: float) -> float:
    """Warm-up over the first 3 % of the time, constant, linear to zero over the last 45 %."""
    return min(1.0, progress / 0.03, (1.0 - progress) / 0.45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.4, help="time for the optimisation itself")
    parser.add_argument(
        "--long-share", type=float, default=0.4, help="last share of the time, on sequences of 8192 tokens"
    )
    parser.add_argument("--retrieval", type=float, default=0.3, help="share of sequences with planted lookups")
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(arguments.corpus / "tokenizer.json"))
    tokens = np.frombuffer(lzma.decompress((arguments.corpus / "tokens.u16.xz").read_bytes()), dtype=np.uint16)
    train, held_out = tokens[:-HELD_OUT], torch.from_numpy(tokens[-HELD_OUT:].astype(np.int64))

    model = Qwen2ForCausalLM(reference_config(tokenizer)).cuda()
    for layer in model.model.layers:
        layer.compile()
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if not any(p is q for q in inner)]
    muon = Muon(inner, lr=arguments.muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = AdamW(outer, lr=arguments.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rates = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]

    @torch.compile
    def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1).float(), targets.flatten())

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            return head_loss(hidden, model.lm_head.weight, rows[:, 1:])

    @torch.no_grad()
    def held_out_loss(length: int) -> float:
        rows = held_out[: HELD_OUT // length * length].view(-1, length)[: 131_072 // length].cuda()
        bos = torch.full_like(rows[:, :1], tokenizer.token_to_id(BOS))
        return loss_of(torch.cat([bos, rows], 1)).item()

    def batches(length: int):
        loader = DataLoader(
            Sequences(train, tokenizer, length, arguments.retrieval, arguments.seed),
            batch_size=None, num_workers=7, prefetch_factor=8, pin_memory=True,
        )  # fmt: skip
        return iter(loader)

    streams = {SHORT: batches(SHORT), LONG: batches(LONG)}
    for length, stream in streams.items():  # compilation is not training time
        loss_of(next(stream).cuda()).backward()
        model.zero_grad(set_to_none=True)
        print(f"compiled for {length} tokens, loss {held_out_loss(length):.2f}", flush=True)

    history, steps, start = [], {SHORT: 0, LONG: 0}, time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        length = LONG if progress > 1 - arguments.long_share else SHORT
        for group, rate in rates:
            group["lr"] = rate * learning_rate(progress)
        loss = loss_of(next(streams[length]).cuda(non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        steps[length] += 1
        if sum(steps.values()) % 200 == 0:
            seen = sum(steps.values()) * TOKENS_PER_STEP
            history.append({"tokens": seen, "loss": loss.item(), "held_out": held_out_loss(LONG)})
            rate = seen / (time.monotonic() - start)
            print(f"{progress:5.1%} {seen / 1e6:7.1f} M tokens {rate / 1e6:.2f} M/s {history[-1]}", flush=True)

    final = {length: held_out_loss(length) for length in (SHORT, LONG)}
    print(f"held-out loss {final}", flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out, max_shard_size="15MB")
    shutil.copy(arguments.corpus / "tokenizer.json", arguments.out / "tokenizer.json")
    record = {
        "recipe": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens_seen": {str(k): v * TOKENS_PER_STEP for k, v in steps.items()},
        "corpus_tokens": len(tokens),
        "held_out_loss": {str(k): v for k, v in final.items()},
        "history": history,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
