"""The word pieces: BERT's from a vocab.txt, any tokenizer.json, or a WordPiece trained on the text at hand."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stackbert_kernels.config import ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _bert(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    special = special_ids(tokenizer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special["[CLS]"]), ("[SEP]", special["[SEP]"])],
    )
    return tokenizer


def special_ids(tokenizer: Tokenizer, origin: str = "vocab") -> dict[str, int]:
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    missing = [name for name, number in ids.items() if number is None]
    if missing:
        raise ConfigError(f"{origin} must contain {' '.join(SPECIAL)}, got none of {' '.join(missing)}")
    return ids


def load(vocab: str, lowercase: bool) -> Tokenizer:
    """From a vocab.txt (one piece a line; BERT's rules) or a tokenizer.json (its own rules; `lowercase` plays no part)."""
    path = Path(vocab)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"vocab: cannot read {vocab}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"vocab: {vocab} is not UTF-8 at byte {error.start}") from None
    if path.suffix != ".json":
        pieces = content.removesuffix("\n").split("\n")
        pieces = [piece.removesuffix("\r") for piece in pieces]
        ids = {piece: number for number, piece in enumerate(pieces)}
        if len(ids) != len(pieces):
            twice = next(piece for number, piece in enumerate(pieces) if ids[piece] != number)
            raise ConfigError(f"vocab: {vocab} must have each piece once, got {twice!r} twice")
        missing = [name for name in SPECIAL if name not in ids]
        if missing:
            raise ConfigError(f"vocab: {vocab} must contain {' '.join(SPECIAL)}, got none of {' '.join(missing)}")
        return _finish(_bert(ids, lowercase))
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"vocab: {vocab} is not a tokenizer.json: {str(error).splitlines()[0]}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special_ids(tokenizer, f"vocab: {vocab}")
    return tokenizer


def train(text: Callable[[], Iterable[str]], size: int, lowercase: bool) -> Tokenizer:
    """A WordPiece of at most `size` pieces, BERT's rules. `text` is called twice; the same text gives the same pieces."""
    if size < 2 * len(SPECIAL):
        raise ConfigError(f"train_vocab_size must be >= {2 * len(SPECIAL)}, got {size}")
    tokenizer = _bert({name: number for number, name in enumerate(SPECIAL)}, lowercase)
    letters: collections.Counter[str] = collections.Counter()
    for part in text():
        letters.update(tokenizer.normalizer.normalize_str(part))
    # Rare letters become [UNK]: the alphabet, each letter also as a ## piece, may take a quarter of the words.
    ranked = sorted((c for c in letters if not c.isspace()), key=lambda c: (-letters[c], c))
    alphabet = sorted(ranked[: min(1000, max(32, size // 8))])
    # The library would number the ## letters in the order of a hash map, which changes from run to run and decides between pairs of
    # equal count. Given as special they have fixed numbers; the tokenizer is made anew from the vocabulary, without that mark.
    inside = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(), trainer)
    return _finish(_bert(tokenizer.get_vocab(), lowercase))


def continuations(tokenizer: Tokenizer) -> list[int] | None:
    """Ids of the pieces that continue a word; None where the tokenizer has no such mark."""
    prefix = json.loads(tokenizer.to_str())["model"].get("continuing_subword_prefix")
    if not prefix:
        return None
    return sorted(
        number for piece, number in tokenizer.get_vocab().items() if piece.startswith(prefix) and piece != prefix
    )
