"""New tokenizers: the tiny world's words, or byte pairs learned from texts."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jaxtax.chat.tokenizer import Tokenizer

# In the order of the o200k_harmony vocabulary, where they have the ids 199998 to 200018; None is a reserved
# place, named by its own id.
CONTROL_TOKENS: tuple[str | None, ...] = (
    "<|startoftext|>", "<|endoftext|>", None, None, "<|return|>", "<|constrain|>", None, "<|channel|>",
    "<|start|>", "<|end|>", "<|message|>", None, None, None, "<|call|>", None, None, None, None, None,
    "<|endofprompt|>",
)  # fmt: skip

# Roles and channels are ordinary words of a message's header.
HEADER_WORDS = ("system", "developer", "user", "assistant", "tool", "analysis", "commentary", "final")

UNKNOWN = "<unk>"

# Reserved tokens fill the vocabulary up to a multiple of this, so that it divides over small meshes.
VOCABULARY_MULTIPLE = 8


def build_world_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer of whole words, split at spaces: `words`, the header words, then the control tokens.

    Raises:
      ValueError: a word that spaces would split.
    """
    split = [word for word in words if word.split() != [word]]
    if split:
        raise ValueError(f"these are not single words: {split}")
    listed = dict.fromkeys((UNKNOWN, *HEADER_WORDS, *words))
    inner = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(listed)}, unk_token=UNKNOWN)
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _add_control_tokens(inner, CONTROL_TOKENS)
    return Tokenizer(inner)


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, control: Sequence[str | None] = CONTROL_TOKENS
) -> Tokenizer:
    """Byte-level BPE learned from `texts` (one per message); every string can be encoded and comes back.

    The same texts in the same order give the same tokenizer.

    Args:
      vocab_size: tokens in all, control tokens included; fewer when the texts have fewer pairs to merge.
      control: the control tokens of its chat format, None for reserved ones.

    Raises:
      ValueError: `vocab_size` leaves no room for the 256 bytes and the control tokens.
    """
    smallest = 256 + len(control)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below {smallest}: 256 bytes and the control tokens")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Headers come with every message and are in none of the texts; without this each would cost many tokens.
    inner.train_from_iterator((part for text in texts for part in (text, *HEADER_WORDS)), trainer)
    _add_control_tokens(inner, control)
    return Tokenizer(inner)


def _add_control_tokens(inner: tokenizers.Tokenizer, control: Sequence[str | None]) -> None:
    """Append the control tokens and the reserved ones that fill the vocabulary up."""
    first = inner.get_vocab_size()
    filling = -(first + len(control)) % VOCABULARY_MULTIPLE
    names = [
        name or f"<|reserved_{first + place}|>" for place, name in enumerate((*control, *([None] * filling)))
    ]
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
