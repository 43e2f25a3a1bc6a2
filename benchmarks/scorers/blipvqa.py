"""BLIP-VQA of T2I-CompBench (arXiv 2307.06350): does the image show each noun phrase?

Upstream runs the original checkpoint at 480 px. This is the port to transformers' conversion of it,
at the size that the conversion was made for; upstream also rounds each answer to four decimals.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.scorers.base import (
    Images,
    Source,
    loading,
    make_key,
    model_parts,
    need,
    pairs,
    place,
)

MODEL = "Salesforce/blip-vqa-capfilt-large"
MAX_PHRASES = 8
MAX_TOKENS = 35
SKIPPED = ("top", "the side", "the left", "the right")
CHUNKS_FILE = "noun_chunks.json"

_ENGLISH = "en_core_web_sm"
_PUNCTUATION = re.compile(r'[.!"()*#:;~]')

Chunks = Callable[[str], Sequence[str]]
"""Noun phrases of a prompt, in order."""


class BlipVqaScorer:
    """Scores attribute binding in 0..1: the product over noun phrases of the answer "yes".

    Args:
        model: a ``BlipForQuestionAnswering``.
        tokenizer: its tokenizer.
        processor: its image processor.
        chunks: splits a prompt into noun phrases.
        chunks_name: names ``chunks`` in the key.
    """

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, chunks: Chunks, chunks_name: str
    ) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.chunks = chunks
        self.answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
        self.key = make_key(
            "blipvqa",
            port="transformers",
            chunks=chunks_name,
            vocabulary=len(tokenizer),
            **model_parts(model, processor),
        )

    @classmethod
    def load(
        cls, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return the scorer, as ``Loader`` says.

        Args:
            source: folder or hub id of the model. A folder may hold ``noun_chunks.json``, a map
                from prompts to their noun phrases; otherwise spaCy finds them.
            device: of the model.
            dtype: of the model.
        """
        from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

        check_chunks(source)
        file = Path(source or MODEL) / CHUNKS_FILE
        chunks, chunks_name = chunks_of_file(file) if file.is_file() else chunks_of_spacy()
        with loading(str(source or MODEL)):
            model = BlipForQuestionAnswering.from_pretrained(source or MODEL)
            tokenizer = BertTokenizer.from_pretrained(source or MODEL)
        size = model.config.vision_config.image_size
        processor = BlipImageProcessorPil(size={"height": size, "width": size})
        return cls(place(model, device, dtype), tokenizer, processor, chunks, chunks_name)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, as ``Scorer`` says; 1 for a prompt without noun phrases."""
        pixels = self.processor(pairs(images, prompts), return_tensors="pt").pixel_values
        found = [questions(self.chunks(prompt)) for prompt in prompts]
        owner = [index for index, asked in enumerate(found) for _ in asked]
        scores = torch.ones(len(prompts))
        if owner:
            pixels = pixels.to(device=self.model.device, dtype=self.model.dtype)
            seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
            asked = [question for per_image in found for question in per_image]
            for index, answer in zip(owner, self._answer(seen[owner], asked), strict=True):
                scores[index] *= answer
        return scores

    def _answer(self, seen: Tensor, asked: Sequence[str]) -> Tensor:
        """Return p(yes) / (p(yes) + p(no)) of each question about its encoded image, [Q].

        Questions of one length go together: transformers (5.23) drops the mask of the decoder's
        cross-attention, so with padding an answer would depend on its batch.
        """
        ids = self.tokenizer(list(asked), truncation=True, max_length=MAX_TOKENS).input_ids
        answers = torch.empty(len(asked))
        for length in sorted({len(row) for row in ids}):
            rows = [index for index, row in enumerate(ids) if len(row) == length]
            tokens = torch.tensor([ids[index] for index in rows], device=seen.device)
            answers[rows] = self._answer_unpadded(seen[rows], tokens)
        return answers

    def _answer_unpadded(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """Return the answers to questions of one length [Q, T]."""
        start = self.model.config.text_config.bos_token_id  # [DEC]; [ENC] comes right after it
        tokens[:, 0] = start + 1
        question = self.model.text_encoder(
            input_ids=tokens, encoder_hidden_states=seen
        ).last_hidden_state
        logits = self.model.text_decoder(
            input_ids=torch.full((len(tokens), 1), start, device=seen.device),
            encoder_hidden_states=question,
        ).logits[:, -1]
        return logits[:, self.answers].float().softmax(-1)[:, 0].cpu()


def questions(chunks: Sequence[str]) -> list[str]:
    """Return what is asked about an image: upstream's eight first phrases, cleaned as BLIP does."""
    phrases = [chunk for chunk in chunks if chunk not in SKIPPED][:MAX_PHRASES]
    return [_PUNCTUATION.sub("", f"{phrase}?".lower()).rstrip(" ") for phrase in phrases]


def chunks_of_file(path: Path) -> tuple[Chunks, str]:
    """Return the noun phrases kept in a JSON map, and a name for them.

    Raises:
        ValueError: if the file is not such a map; on use, if a prompt is not in it.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
        raise ValueError(f"{path} must map each prompt to the list of its noun phrases")

    def look_up(prompt: str) -> Sequence[str]:
        if prompt not in table:
            raise ValueError(
                f"{path} must have the noun phrases of every prompt, got no {prompt!r}"
            )
        return table[prompt]

    return look_up, f"file:{digest(table)}"


def check_chunks(source: Source) -> None:
    """Check that noun phrases can be found, without loading anything.

    Args:
        source: folder or hub id of the model, which may have them in a file.

    Raises:
        ModuleNotFoundError: if spaCy is missing and needed.
        ValueError: if its English model is.
    """
    if (Path(source or MODEL) / CHUNKS_FILE).is_file():
        return
    need(f"BLIP-VQA, without {CHUNKS_FILE} in the folder of its model,", "spacy")
    if importlib.util.find_spec(_ENGLISH) is None:
        raise ValueError(
            f"spaCy must have its English model, got none: python -m spacy download {_ENGLISH}, or "
            f"give your own copy of BLIP-VQA's model with {CHUNKS_FILE} as the source"
        )


def chunks_of_spacy() -> tuple[Chunks, str]:
    """Return spaCy's noun phrases with upstream's model, and a name for them."""
    import spacy

    parse = spacy.load(_ENGLISH)

    def split(prompt: str) -> list[str]:
        return [chunk.text for chunk in parse(prompt).noun_chunks]

    return split, f"spacy-{spacy.__version__}-{parse.meta['version']}"
