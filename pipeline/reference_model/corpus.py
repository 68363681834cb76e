"""Build the training corpus of the reference model from permissively licensed source distributions.

    python -m pipeline.reference_model.corpus SDISTS OUT

reads every sdist (`.tar.gz`, `.zip`) in SDISTS whose metadata name a permissive licence, keeps its prose and its
Python sources, drops every paragraph seen before and every paragraph that shares ten words in a row with the
evaluation documents (Python's language reference), trains a byte-level BPE tokenizer, and writes to OUT:
`tokenizer.json`, `tokens.u16.xz` (all packages one after the other, files ended by `<|end|>`) and `corpus.json`
(package, version, licence, tokens; what was refused and why).
"""

import argparse
import email
import email.message
import hashlib
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.documents.overlap import shingles
from pipeline.documents.pydoc import topics_text

BOS, END = "<|bos|>", "<|end|>"
VOCABULARY = 8192
PROSE = {".rst", ".md", ".txt"}
PERMISSIVE = re.compile(
    r"\b(mit|bsd|apache|isc|psf|python software foundation|hpnd|historical permission|zpl|zope public|unlicense|zlib"
    r"|cc0|0bsd|public domain|mit-cmu)\b",
    re.IGNORECASE,
)
RESTRICTIVE = re.compile(
    r"gpl|general public|mozilla|mpl|eclipse|epl|cddl|affero|proprietary|creative commons attribution", re.IGNORECASE
)
SKIPPED_FOLDERS = re.compile(
    r"(^|/)(tests?|testing|locale|_?vendor|third_?party|node_modules|licenses?|extern)(/|$)", re.IGNORECASE
)
PROSE_LIMIT, CODE_LIMIT = 6_000_000, 2_500_000  # characters a package, so that no package dominates


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files in a source distribution, by name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    yield name, archive.read(name)
    else:
        with tarfile.open(path) as archive:
            for member in sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name):
                if member.size < 2_000_000:
                    yield member.name, archive.extractfile(member).read()


def licence(metadata: email.message.Message) -> str:
    """The licence a package declares: its expression, its classifiers, else the first line of its licence field."""
    parts = [metadata.get("License-Expression") or ""]
    parts += [c.rsplit("::", 1)[-1].strip() for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    if not any(parts):
        parts.append((metadata.get("License") or "").strip().split("\n")[0])
    return "; ".join(p for p in parts if p)


def readable(text: str) -> bool:
    """True for text a person wrote: mostly letters and spaces, lines of a human length."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return 400 <= len(text) <= 400_000 and letters >= 0.7 * len(text) and len(text) / (text.count("\n") + 1) < 300


class Filter:
    """Drops paragraphs seen before and paragraphs shared with the evaluation documents."""

    def __init__(self, evaluation: str):
        self.seen: set[bytes] = set()
        self.evaluation = shingles(evaluation)
        self.repeated = self.contaminated = 0

    def __call__(self, text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n").expandtabs(4)):
            if len(paragraph) > 60:
                digest = hashlib.blake2b(paragraph.strip().encode(), digest_size=8).digest()
                if digest in self.seen:
                    self.repeated += 1
                    continue
                self.seen.add(digest)
                if not self.evaluation.isdisjoint(shingles(paragraph)):
                    self.contaminated += 1
                    continue
            kept.append(paragraph.rstrip())
        return "\n\n".join(kept).strip() + "\n"


def package_texts(path: Path, clean: Filter) -> tuple[dict, list[str]]:
    """What a source distribution contributes: its record for the model card and its texts, prose first."""
    metadata, prose, code = None, [], []
    for name, content in members(path):
        inner = name.split("/", 1)[-1]
        if inner == "PKG-INFO":
            metadata = email.message_from_bytes(content)
        suffix = Path(inner).suffix
        if suffix in PROSE | {".py"} and not SKIPPED_FOLDERS.search(inner):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if readable(text):
                (code if suffix == ".py" else prose).append(text)
    if metadata is None:
        return {"file": path.name, "refused": "no metadata"}, []
    record = {"package": metadata["Name"], "version": metadata["Version"], "licence": licence(metadata)}
    if RESTRICTIVE.search(record["licence"]) or not PERMISSIVE.search(record["licence"]):
        return record | {"refused": "licence"}, []
    texts = []
    for group, limit in ((prose, PROSE_LIMIT), (code, CODE_LIMIT)):
        for text in group:
            if limit > 0 and len(text := clean(text)) > 200:
                texts.append(text)
                limit -= len(text)
    return record, texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE whose digits are single tokens, so that any number can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdists", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    clean = Filter(topics_text())
    records, corpora, refused = [], [], []
    for path in sorted(arguments.sdists.iterdir(), key=lambda p: p.name.lower()):
        record, texts = package_texts(path, clean)
        if texts:
            records.append(record)
            corpora.append(texts)
        else:
            refused.append(record)
        print(f"{path.name}: {sum(map(len, texts)):,} characters", flush=True)

    tokenizer = train_tokenizer([t for texts in corpora for t in texts[::4]])
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    pieces = []
    for record, texts in zip(records, corpora, strict=True):
        ids = [np.array([*e.ids, end], dtype=np.uint16) for e in tokenizer.encode_batch(texts)]
        record["tokens"] = int(sum(map(len, ids)))
        pieces += ids
    tokens = np.concatenate(pieces)
    (arguments.out / "tokens.u16.xz").write_bytes(lzma.compress(tokens.tobytes(), preset=6))
    summary = {
        "tokens": len(tokens),
        "characters": sum(len(t) for texts in corpora for t in texts),
        "paragraphs_dropped_as_repeated": clean.repeated,
        "paragraphs_dropped_as_shared_with_evaluation": clean.contaminated,
        "packages": records,
        "refused": refused,
    }
    (arguments.out / "corpus.json").write_text(json.dumps(summary, indent=1))
    print(f"{len(tokens):,} tokens from {len(records)} packages")


if __name__ == "__main__":
    main()
