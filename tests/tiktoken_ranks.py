"""Tokenizers from published files of ranks, as the references of the chat formats need them."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxtax.chat.tokenizer import Tokenizer

# How Qwen's tokenizers split a text before they merge bytes (QwenLM, tokenization_qwen.py).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_tiktoken_ranks(
    path: Path, pattern: str, special: Sequence[str], *, compose: bool = False
) -> Tokenizer:
    """The tokenizer of a file of ranks, such as o200k_base.tiktoken and qwen.tiktoken.

    Args:
      path: one token per line: its bytes in base64, and its rank, from 0 on.
      pattern: regular expression whose matches are merged apart from each other, as in QWEN_PATTERN.
      special: the control tokens, which have the ids after the ranks, in this order.
      compose: bring texts to Unicode's composed form (NFC) first, as Qwen's tokenizers do.

    Raises:
      ValueError: a line that is not a token and its rank; ranks that are missing or double.
    """
    ranks = _read_ranks(path)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={spelled[token]: rank for token, rank in ranks.items()},
            merges=[(spelled[left], spelled[right]) for left, right in merges],
            ignore_merges=True,  # a piece that is a token is that token, whatever its merges give
        )
    )
    if compose:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return Tokenizer(inner)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are 0 to their number less one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"{path} line {number} is not a token in base64 and its rank: {line[:60]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{path}: the ranks are not 0 to the number of tokens less one, each once")
    return ranks


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself, where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256)]
