"""The tokenizers of the Shapes world: a real CLIP and a real T5 one; every word is one token."""

from __future__ import annotations

from transformers import CLIPTokenizer, T5Tokenizer

from core2_sampler.shapes.world import COLORS, NUMBERS, PREFIXES, RELATIONS, SHAPES

MAX_TOKENS = 16  # the longest caption has 13 with begin and end
_END_OF_WORD = "</w>"


def words() -> list[str]:
    """Return every word of the grammar, sorted."""
    phrases = [*SHAPES, *COLORS, *NUMBERS.values(), *PREFIXES, *RELATIONS, "a", "and"]
    plurals = [shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES]
    return sorted({word for phrase in [*phrases, *plurals] for word in phrase.split()})


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE (the GPT-2 table), so any text has tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [table[byte] for byte in range(256)]


def build_tokenizer() -> CLIPTokenizer:
    """Return the CLIP tokenizer: bytes, then merges that build each word of the grammar."""
    symbols = _byte_symbols()
    pieces = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols)]
    merges: dict[tuple[str, str], None] = {}  # an ordered set
    for word in words():  # from the end, so that only the last two symbols can ever merge
        suffix = word[-1] + _END_OF_WORD
        for letter in reversed(word[:-1]):
            merges[letter, suffix] = None
            suffix = letter + suffix
    pieces += [left + right for left, right in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=MAX_TOKENS)


def build_t5_tokenizer() -> T5Tokenizer:
    """Return the T5 tokenizer: a unigram model of the words, with printable ASCII for the rest."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(code), -20.0) for code in range(33, 127)]
    known = [("\u2581" + word, -2.0) for word in words()]
    mask = [("<extra_id_0>", 0.0)]
    vocab = [*special, ("\u2581", -10.0), *letters, *known, *mask]
    return T5Tokenizer(vocab=vocab, extra_ids=1, model_max_length=MAX_TOKENS)
