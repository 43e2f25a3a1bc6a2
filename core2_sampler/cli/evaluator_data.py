"""The pairs that ``core2 evaluators train`` learns from: rendered, real or generated images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.config import ConfigError
from core2_sampler.evaluators.kinds import KINDS
from core2_sampler.model_files import EMBEDDED, ModelFiles
from core2_sampler.rows import stable_hash

if TYPE_CHECKING:
    from torch import Tensor

    from core2_sampler.cli.evaluators import TrainOptions
    from core2_sampler.evaluators.images import Captioned, Edits, Finals, Images
    from core2_sampler.evaluators.pairs import PairSource
    from core2_sampler.shapes.world import Prompt

# Rendered images: kept at most, and encoded anew in a step until then. The VAE takes longer for an
# image than a small network for its part in a step.
_BANK = (48_000, 16)
_VAL_PROMPTS = 480
_SCORERS = ("shapes", "shapes-clip")
_HELD_OUT_SHARE = 0.1
_FEW_TWINS = 40  # captions with an edit: fewer tell two evaluators hardly apart


def pair_source(options: TrainOptions, pipe: Any) -> PairSource:
    """Return the pairs that the kind learns from.

    Args:
        options: of the command.
        pipe: makes and decodes latents.

    Raises:
        ConfigError: if there are no images for the model.
    """
    from core2_sampler.evaluators.images import final_latents
    from core2_sampler.evaluators.pairs import CaptionPairs, EditPairs, RankedPairs, RealPairs
    from core2_sampler.trajectory import TrajectoryStore

    kind = KINDS.get(options.kinds[0])
    if options.data is None:
        images = _images(options, pipe)
        if kind.lesson == "captions":
            return CaptionPairs(images)
        return EditPairs(images, kind.words, kind.swaps)
    generated = final_latents(TrajectoryStore(options.data), says)
    share = options.held_out_share or _HELD_OUT_SHARE
    if kind.lesson == "generated":
        return RealPairs(_images(options, pipe), generated, share)
    names = [record.prompt_id for record in generated.records]
    if len(set(names)) == len(names):
        raise ConfigError(
            f"data must hold several seeds of a prompt, got one of each in {options.data}: collect "
            "with --num-seeds"
        )
    ranks = rank(generated, options.scorers or _SCORERS, pipe)
    return RankedPairs(generated, ranks, share)


def check_data(options: TrainOptions) -> None:
    """Check that the options of data fit the kind of evaluator, and that none goes unused.

    Raises:
        ConfigError: naming the option.
    """
    lesson, name = KINDS.get(options.kinds[0]).lesson, options.kinds[0]
    if (lesson in ("generated", "ranked")) != (options.data is not None):
        raise ConfigError(
            "data must be given for fidelity and preference, and for no other kind, got "
            f"{options.data} for {name}"
        )
    unused = {
        "scorers": options.scorers is not None and lesson != "ranked",
        "images": options.images is not None and lesson == "ranked",
        "held_out_share": options.held_out_share is not None
        and options.data is None
        and options.images is None,
    }
    for option, given in unused.items():
        if given:
            why = " on rendered images" if option == "held_out_share" else ""
            raise ConfigError(f"{option} has no effect for {name}{why}; leave it out")


def identify(options: TrainOptions, model: ModelFiles) -> dict[str, Any]:
    """Return what a training is of, beside its settings: JSON values."""
    from core2_sampler.trajectory import TrajectoryStore
    from core2_sampler.weights import hash_weights, model_weights

    data = images = None
    if options.data is not None:
        store = TrajectoryStore(options.data)
        data = stable_hash(list(store.entries()), store.rounds())
    if options.images is not None:
        files = sorted(file for file in options.images.glob("*") if file.is_file())
        captions = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".txt"]
        images = stable_hash([[file.name, file.stat().st_size] for file in files], captions)
    return {
        "kind": options.kinds[0],
        "model": model_weights(model.name, model.source),
        "data": data,
        "images": images,
        "scorers": options.scorers,
        "held_out_share": options.held_out_share,
        "start": None if options.start is None else hash_weights([options.start]),
        "max_sequence_length": model.check_tokens(options.max_sequence_length),
    }


def says(text: str) -> str:
    """Return what a prompt says, whatever its words: on Shapes, its content."""
    from core2_sampler.benchmarks.scorers.shapes import demand

    try:
        return replace(demand(text), prefix="").content
    except ValueError:  # not of the Shapes world
        return " ".join(text.lower().split())


def _images(options: TrainOptions, pipe: Any) -> Captioned:
    """Return the images of the folder that was given, or rendered ones."""
    from core2_sampler.evaluators.images import ImageFolder

    if options.images is not None:
        size = pipe.family.latent_shape(pipe)[1] * pipe.vae_scale_factor
        encode = partial(_encode_file, pipe, size)
        return ImageFolder(options.images, encode, options.held_out_share or _HELD_OUT_SHARE)
    if options.model not in EMBEDDED:
        raise ConfigError(f"images must be given for a model that is not embedded: {options.model}")
    return ShapesImages(pipe)


def _encode_file(pipe: Any, size: int, file: Path) -> Tensor:
    """Return the clean latents of an image file's middle square, [C, H, W]."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return encode_pixels(pipe, pipe.image_processor.preprocess(square))[0]


def encode_pixels(pipe: Any, pixels: Tensor) -> Tensor:
    """Return clean latents [B, C, H, W] of images [B, 3, H, W] in [-1, 1]."""
    import torch

    vae = pipe.vae
    with torch.no_grad():
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def rank(generated: Finals, scorers: Sequence[str], pipe: Any) -> list[tuple[float, ...]]:
    """Return what each scorer says of each generated image, decoded.

    Args:
        generated: images as clean latents.
        scorers: names of `core2_sampler.benchmarks.scorers.SCORERS`.
        pipe: decodes.
    """
    import torch

    from core2_sampler.benchmarks.scorers import SCORERS

    judges = [SCORERS.get(name).load(device=str(pipe.vae.device)) for name in scorers]
    told: list[tuple[float, ...]] = []
    texts = [record.prompt for record in generated.records]
    for start in range(0, len(texts), 16):
        part = slice(start, start + 16)
        with torch.no_grad():
            pixels = pipe.family.decode(pipe, generated.x0[part].to(pipe.vae.device))
        images = pipe.image_processor.postprocess(pixels, output_type="pil")
        scores = [judge.score(images, texts[part]).tolist() for judge in judges]
        told += zip(*scores, strict=True)
    return told


class ShapesImages:
    """Rendered images of the Shapes world, as `core2_sampler.evaluators.images.Captioned`."""

    def __init__(self, pipe: Any) -> None:
        """Take the pipeline whose VAE makes the latents."""
        from core2_sampler.shapes.batches import LatentBank

        self._pipe, self._bank = pipe, LatentBank(pipe.vae, *_BANK)

    def draw(self, step: int, count: int) -> tuple[Tensor, list[str]]:
        """Return images of training captions."""
        batch = self._bank.draw(step, count)
        return batch.latents, batch.texts

    def held_out(self) -> tuple[Tensor, list[str]]:
        """Return images of the captions for choosing, of contents that training never sees."""
        return self._validation

    def twins(self, edits: Edits) -> Images:
        """Return rendered images in twos; see `core2_sampler.evaluators.images.Captioned`."""
        return _ShapesTwins(self._pipe, edits)

    @cached_property
    def _validation(self) -> tuple[Tensor, list[str]]:
        from core2_sampler.shapes.world import held_out_prompts

        prompts = held_out_prompts(_VAL_PROMPTS, "val")
        random.Random(0).shuffle(prompts)  # or a batch would be of one task
        return _rendered(self._pipe, 0, prompts)


class _ShapesTwins:
    """Rendered images, each followed by one of an edited caption of the same part and wording.

    The held-out part is the contents for choosing; where few of those have an edit, every content
    that training never sees.
    """

    def __init__(self, pipe: Any, edits: Edits) -> None:
        from core2_sampler.evaluators.images import check_twins
        from core2_sampler.shapes.world import TASKS, all_prompts

        plain = [prompt for task in TASKS for prompt in all_prompts(task) if not prompt.prefix]

        def twins_of(*splits: str) -> dict[Prompt, list[Prompt]]:
            part = {p.text: p for p in plain if p.split in splits}
            each = {p: [part[e] for e in edits(text) if e in part] for text, p in part.items()}
            return {prompt: twins for prompt, twins in each.items() if twins}

        held_out = twins_of("val")
        if len(held_out) < _FEW_TWINS:
            held_out = twins_of("val", "test")
        self._parts = [twins_of("train"), held_out]
        check_twins([len(part) for part in self._parts])
        self._pipe, self._piece = pipe, cache(self._render_piece)

    def draw(self, step: int, count: int) -> tuple[Tensor, list[str]]:
        import torch

        pieces, pairs = min(_BANK[0] // _BANK[1], step + 4), _BANK[1] // 2
        rng, latents, texts = random.Random(f"draw/{step}"), [], []
        for _ in range(count // 2):
            (x0, captions), i = self._piece(rng.randrange(pieces)), 2 * rng.randrange(pairs)
            latents.append(x0[i : i + 2])
            texts += captions[i : i + 2]
        return torch.cat(latents), texts

    def held_out(self) -> tuple[Tensor, list[str]]:
        return self._validation

    def _render_piece(self, index: int) -> tuple[Tensor, list[str]]:
        """Return some images of the bank; their captions are drawn as those of other trainings."""
        from core2_sampler.shapes.world import training_prompt

        rows: list[Prompt] = []
        rng = random.Random(f"twins/{index}")
        while len(rows) < _BANK[1]:
            prompt = training_prompt(rng)
            twins = self._parts[0].get(replace(prompt, prefix=""))
            if twins:
                rows += [prompt, replace(rng.choice(twins), prefix=prompt.prefix)]
        return _rendered(self._pipe, index, rows)

    @cached_property
    def _validation(self) -> tuple[Tensor, list[str]]:
        """Return held-out twins, the tasks as even as can be."""
        from core2_sampler.shapes.world import PREFIXES

        rows: list[Prompt] = []
        rng, part = random.Random(0), self._parts[1]
        tasks = sorted({prompt.task for prompt in part})
        while len(rows) < _VAL_PROMPTS:
            task, prefix = tasks[len(rows) // 2 % len(tasks)], rng.choice(PREFIXES)
            prompt = rng.choice([prompt for prompt in part if prompt.task == task])
            pair = (prompt, rng.choice(part[prompt]))
            rows += [replace(each, prefix=prefix) for each in pair]
        return _rendered(self._pipe, 0, rows)


def _rendered(pipe: Any, step: int, prompts: list[Prompt]) -> tuple[Tensor, list[str]]:
    """Return clean latents of images of prompts, and their captions."""
    from core2_sampler.shapes.batches import sample_scenes

    pixels, _ = sample_scenes(step, prompts)
    return encode_pixels(pipe, pixels), [prompt.text for prompt in prompts]
