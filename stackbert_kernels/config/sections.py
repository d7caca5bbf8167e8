"""The model, the text and the optimizer of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stackbert_kernels.config.checks import at_most, fraction, not_rounded_away, one_of, positive, require

ACTIVATIONS = ("gelu", "gelu_tanh")
NORMS = ("post", "pre")
OBJECTIVES = ("mlm", "mlm+nsp", "mlm+sop")
OPTIMIZERS = ("adamw", "lamb", "lans")
MOST_LAYERS, MOST_BATCH_TOKENS, MOST_WORDS = 4096, 2**28, 2**24
"""Beyond all that is trained; what is larger is a slip of the hand that would take all memory."""


@dataclass(frozen=True)
class ModelConfig:
    """A BERT encoder with its heads; `layers` is the final depth."""

    layers: int = 12
    """Encoder layers at the end."""
    hidden: int = 768
    """Width of the encoder."""
    heads: int = 12
    """Attention heads; hidden must be divisible by them."""
    inner: int = 0
    """Width of the feed-forward layer; 0 = 4 x hidden."""
    rank: int = 0
    """Each matrix of the feed-forward layer is the product of two of this rank; 0 = one matrix. Of single stages: Stage.rank."""
    score_dim: int = 0
    """Width of a head's queries and keys; 0 = that of its values, hidden / heads. Of single stages: Stage.score_dim."""
    embedding: int = 0
    """Width of the embeddings, with a linear map to hidden after them (ALBERT); 0 = hidden, with none."""
    vocab_size: int = 0
    """Rows of the word embedding; 0 = as many as the tokenizer has words."""
    max_position: int = 512
    """Longest sequence that the model can read."""
    token_types: int = 2
    """Kinds of segments that tokens can belong to."""
    activation: str = "gelu"
    """gelu (erf, as BERT) or gelu_tanh."""
    norm: str = "post"
    """post (as BERT) or pre."""
    norm_eps: float = 1e-12
    """Added to variances in layer norms."""
    dropout: float = 0.1
    """After the embeddings and before each residual sum."""
    attention_dropout: float | None = None
    """On the attention probabilities; default: the same as dropout."""
    init_std: float = 0.02
    """Standard deviation of new weights."""
    equal_init: bool = False
    """Whether all layers begin with the weights of the first."""
    scaled_init: bool = False
    """Whether the matrices that end a residual branch begin with init_std / sqrt(2 layers)."""
    objective: str = "mlm"
    """mlm, mlm+nsp (next sentence) or mlm+sop (sentence order)."""

    def __post_init__(self):
        positive(layers=self.layers, hidden=self.hidden, heads=self.heads, max_position=self.max_position)
        positive(token_types=self.token_types, norm_eps=self.norm_eps, init_std=self.init_std)
        at_most(MOST_LAYERS, layers=self.layers)
        not_rounded_away(norm_eps=self.norm_eps)
        require(
            self.hidden % self.heads == 0,
            f"hidden must be divisible by heads, got hidden {self.hidden}, heads {self.heads}",
        )
        require(self.inner >= 0, f"inner must be >= 0, got {self.inner}")
        require(self.embedding >= 0, f"embedding must be >= 0, got {self.embedding}")
        require(self.vocab_size >= 0, f"vocab_size must be >= 0, got {self.vocab_size}")
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("norm", self.norm, NORMS)
        one_of("objective", self.objective, OBJECTIVES)
        require(
            self.objective == "mlm" or self.token_types >= 2,
            f"token_types must be >= 2 with objective {self.objective}, got {self.token_types}",
        )
        if self.inner == 0:
            object.__setattr__(self, "inner", 4 * self.hidden)
        require(
            0 <= self.rank < min(self.hidden, self.inner),
            f"rank must be in [0, {min(self.hidden, self.inner)}) with hidden {self.hidden}, inner {self.inner}, got {self.rank}",
        )
        require(
            0 <= self.score_dim < self.head_dim,
            f"score_dim must be in [0, hidden / heads = {self.head_dim}), got {self.score_dim}",
        )
        if self.attention_dropout is None:
            object.__setattr__(self, "attention_dropout", self.dropout)
        # Masks take 8 random bits an element (contract 3.3): from 511/512 on, nothing would be kept.
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0 <= value < 511 / 512, f"{name} must be in [0, 0.998), got {value}")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def relaxed(self) -> bool:
        """Whether layers are less than BERT's: a feed-forward of low rank, or narrow scores."""
        return self.rank > 0 or self.score_dim > 0

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Of queries, keys and values, over all heads."""
        scores = self.heads * (self.score_dim or self.head_dim)
        return scores, scores, self.hidden

    @property
    def embedding_width(self) -> int:
        return self.embedding or self.hidden


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched and masked."""

    text: tuple[str, ...] = ()
    """Text files, globs, directories, .jsonl with a `text` field, or one prepared directory."""
    vocab: str = ""
    """vocab.txt or tokenizer.json; empty = train a WordPiece on the text."""
    train_vocab_size: int = 8192
    """Words of a WordPiece that is trained here."""
    lowercase: bool = True
    """Whether words lose case and accents; a given tokenizer.json has its own rules."""
    seq_len: int = 128
    """Most tokens of a sample, [CLS] and [SEP] included."""
    short_seq_len: int = 0
    """The same for the first steps of the run, short_share of them (BERT: 128 of 512 in 90%); 0 = seq_len from the first step on.
    Held-out samples always have seq_len."""
    short_share: float = 0.9
    """With short_seq_len: the share of all steps that have it."""
    batch_tokens: int = 2048
    """Tokens of one step, over all accumulated parts and all processes; no padding is counted because there is none."""
    mask_rate: float = 0.15
    """Share of the tokens to predict; of these 80% are shown as [MASK], 10% as another word, 10% as they are."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    max_ngram: int = 1
    """Longest run of tokens (of words with whole_word) that is masked together, of length n with a probability in proportion to 1/n;
    1 = each by itself (BERT), 3 = ALBERT. Held-out text is always masked as with 1."""
    heldout: float = 0.01
    """Share of the documents kept for evaluation."""
    eval_tokens: int = 32768
    """Most held-out tokens read by one evaluation."""

    def __post_init__(self):
        require(self.seq_len >= 8, f"seq_len must be >= 8, got {self.seq_len}")
        require(
            self.batch_tokens >= self.seq_len,
            f"batch_tokens must be >= seq_len, got batch_tokens {self.batch_tokens}, seq_len {self.seq_len}",
        )
        require(
            self.short_seq_len == 0 or 8 <= self.short_seq_len < self.seq_len,
            f"short_seq_len must be 0 or in [8, seq_len), got short_seq_len {self.short_seq_len}, seq_len {self.seq_len}",
        )
        require(0 < self.short_share < 1, f"short_share must be in (0, 1), got {self.short_share}")
        require(
            self.short_seq_len > 0 or self.short_share == DataConfig.short_share,
            f"short_share needs short_seq_len, got short_share {self.short_share} without it",
        )
        positive(train_vocab_size=self.train_vocab_size, eval_tokens=self.eval_tokens)
        at_most(MOST_BATCH_TOKENS, batch_tokens=self.batch_tokens)
        at_most(MOST_WORDS, train_vocab_size=self.train_vocab_size)
        require(1 <= self.max_ngram <= 16, f"max_ngram must be in [1, 16], got {self.max_ngram}")
        fraction(mask_rate=self.mask_rate, heldout=self.heldout)
        positive(mask_rate=self.mask_rate, heldout=self.heldout)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and a rate that warms up, may stay, and decays linearly to zero."""

    optimizer: str = "adamw"
    """adamw, lamb (a trust ratio for each parameter) or lans (that, with normalised gradients and Nesterov's momentum)."""
    lr: float = 1e-4
    """Highest learning rate."""
    warmup: int = 0
    """Steps of linear warm-up; 0 = 2% of all steps."""
    constant: int = 0
    """Steps at the highest rate between warm-up and decay."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-6
    """Added to the root of the squared gradients' mean."""
    weight_decay: float = 0.01
    """Decoupled; of matrices and embeddings, not of biases and norms."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping. lans has none: there the length of gradients does not matter."""
    accumulate: int = 1
    """Parts into which a step's batch (with several processes, the share of each) is cut, one backward each."""
    skip_limit: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""

    def __post_init__(self):
        positive(lr=self.lr, eps=self.eps, accumulate=self.accumulate, skip_limit=self.skip_limit)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        not_rounded_away(eps=self.eps)
        fraction(beta1=self.beta1, beta2=self.beta2)
        for name in ("warmup", "constant", "weight_decay", "clip"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be >= 0, got {value}")
            require(value < math.inf, f"{name} must be finite, got {value}")
