"""Latent evaluators: the contract of each kind, their data, training and cost.

Truth: closed forms of losses and FLOPs, the sampler's own final latents, made-up worlds in which
one number of an image is what a word of its caption says.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from core2_sampler.collect import CollectConfig, Job, collect, initial_latents
from core2_sampler.evaluators import load_evaluator, shipped
from core2_sampler.evaluators.base import Evaluator
from core2_sampler.evaluators.cost import online_share
from core2_sampler.evaluators.images import Finals, ImageFolder, final_latents
from core2_sampler.evaluators.kinds import (
    COLORS,
    KINDS,
    NUMBERS,
    SIDES,
    contrastive_loss,
    edits,
    ranking_loss,
    real_loss,
)
from core2_sampler.evaluators.network import LatentEvaluator, from_flow, to_flow
from core2_sampler.evaluators.pairs import CaptionPairs, EditPairs, RankedPairs, RealPairs
from core2_sampler.evaluators.train import EvaluatorConfig, save_evaluator, train_evaluator
from core2_sampler.full_size import FULL_SIZE
from core2_sampler.guidance import make_predict
from core2_sampler.plan import make_plan
from core2_sampler.samplers import sample_euler
from core2_sampler.schedules import flow_sigmas
from core2_sampler.shapes import MODELS
from core2_sampler.testing import GaussianDenoiser
from core2_sampler.trajectory import Record, TrajectoryStore
from core2_sampler.types import Conditioning

CHANNELS, SIDE, PROMPT_DIM, POOLED_DIM = 4, 8, 12, 10


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(batch, seed=7):
    return Conditioning(noise(batch, 5, PROMPT_DIM, seed=seed), noise(batch, POOLED_DIM, seed=seed))


def small(kind, family="sd3", seed=0, num_layers=1):
    x = torch.empty(1, CHANNELS, SIDE, SIDE)
    sizes = {"patch_size": 2, "width": 64, "num_layers": num_layers}
    return LatentEvaluator.for_model(kind, family, x, prompts(1), seed=seed, **sizes).eval()


@pytest.fixture(params=KINDS.names())
def evaluator(request):
    """Return each kind, untrained."""
    return small(request.param)


def scored(evaluator, batch=3, height=8, width=8):
    x, sigma = noise(batch, CHANNELS, height, width), torch.linspace(0, 1, batch)
    with torch.no_grad():
        return evaluator(x, sigma, prompts(batch))


def test_it_scores_any_batch_and_resolution(evaluator):
    assert isinstance(evaluator, Evaluator)
    for shape in ((1, 8, 8), (3, 8, 12), (2, 7, 9)):
        score = scored(evaluator, *shape)
        assert score.shape == shape[:1] and score.dtype == torch.float32
        assert torch.isfinite(score).all()
    half = scored(evaluator.to(torch.bfloat16))
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_a_score_does_not_depend_on_batch_mates(evaluator):
    x, sigma, prompt = noise(3, CHANNELS, 8, 8), torch.tensor([0.1, 0.5, 1.0]), prompts(3)
    with torch.no_grad():
        together = evaluator(x, sigma, prompt)
        for row in range(3):
            part = slice(row, row + 1)
            own = Conditioning(prompt.prompt_embeds[part], prompt.pooled[part])
            alone = evaluator(x[part], sigma[part], own)
            torch.testing.assert_close(alone, together[part], atol=1e-5, rtol=1e-5)


def test_autocast_changes_no_score_and_no_pick(evaluator):
    """Candidates at high noise differ by less than bfloat16 can tell."""
    x, gap = noise(2, CHANNELS, SIDE, SIDE), 0.3 * noise(2, CHANNELS, SIDE, SIDE, seed=1)
    ahead = torch.cat([x - 0.01 * scale * gap for scale in (0, 2, 6.5, 10, 14)])
    prompt, sigma = prompts(2), torch.full((10,), 0.95)
    prompt = Conditioning(prompt.prompt_embeds.repeat(5, 1, 1), prompt.pooled.repeat(5, 1))
    with torch.no_grad():
        wanted = evaluator(ahead, sigma, prompt)
        with torch.autocast("cpu", torch.bfloat16):
            scores = evaluator(ahead, sigma, prompt)
            match = evaluator.kind.reads_prompt and evaluator.match(
                evaluator.see(ahead, sigma), evaluator.read(prompt)
            )
    assert wanted.unique().numel() == 10 and torch.equal(scores, wanted)
    assert torch.equal(scores.unflatten(0, (5, 2)).argmax(0), wanted.unflatten(0, (5, 2)).argmax(0))
    if evaluator.kind.reads_prompt and not evaluator.kind.judges_alone:
        torch.testing.assert_close(match.diagonal(), wanted)


def test_prompts_of_another_model_are_refused(evaluator):
    x, sigma = noise(1, CHANNELS, SIDE, SIDE), torch.ones(1)
    other = Conditioning(noise(1, 5, PROMPT_DIM + 4), noise(1, POOLED_DIM))
    with pytest.raises(ValueError, match="widths 12 and 10 for this .*, got 16 and 10"):
        evaluator(x, sigma, other)


def test_it_reads_what_its_kind_says(evaluator):
    x, sigma = noise(2, CHANNELS, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        first, other = (evaluator(x, sigma, prompts(2, seed)) for seed in (1, 2))
        later = evaluator(x, sigma + 0.3, prompts(2, 1))
    assert torch.equal(first, other) is (evaluator.config.kind == "fidelity")
    assert (first - later).abs().min() > 1e-6  # it knows the noise level


def test_it_is_the_same_after_saving_and_loading(evaluator, tmp_path):
    evaluator.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = load_evaluator(tmp_path, family="sd3")
    assert not again.training
    torch.testing.assert_close(scored(again), scored(evaluator))
    assert not torch.equal(scored(again), scored(small(evaluator.config.kind, seed=1)))
    with pytest.raises(ValueError, match="must be made for flux, got one for sd3"):
        load_evaluator(tmp_path, family="flux")
    with pytest.raises(ValueError, match="must have 4 channels for this .* got 16"):
        again(noise(1, 16, 8, 8), torch.ones(1), prompts(1))
    with pytest.raises(ValueError, match=r"device of the latents \(meta\), got one on cpu"):
        again(torch.empty(1, CHANNELS, 8, 8, device="meta"), torch.ones(1), prompts(1))
    weights = next(tmp_path.glob("*.safetensors"))
    torch.save(again.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_evaluator(tmp_path)


def test_what_is_no_evaluator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder that `core2 evaluators train` wrote"):
        load_evaluator(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "TapHead"}))
    with pytest.raises(ValueError, match="folder that `core2 evaluators train` wrote"):
        load_evaluator(tmp_path, "sd3")
    with pytest.raises(ValueError, match="did you mean 'alignment'"):
        small("alignmnt")
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        LatentEvaluator("fidelity", "sd3", 4, 8, 8, width=100)


def test_a_shipped_evaluator_is_found_by_its_kind(evaluator, tmp_path, monkeypatch):
    assert shipped.SHIPPED.is_relative_to(MODELS)  # package data holds models/**
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "shipped")
    kind = evaluator.config.kind
    evaluator.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "card.json").write_text("{}")
    for _ in range(2):  # a second one takes its place
        folder = shipped.ship_evaluator(tmp_path / "own")
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    assert str(tmp_path) not in (folder / "config.json").read_text()
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    for name in (kind, f"shapes-{kind}", folder):
        again = load_evaluator(shipped.find_evaluator(name, "sd3"), "sd3")
        assert again.dtype == torch.float32
        torch.testing.assert_close(scored(again), scored(evaluator), atol=0.03, rtol=0.01)
    with pytest.raises(ValueError, match=rf"shipped for sd3 \({kind}\), got {kind}x"):
        shipped.find_evaluator(f"{kind}x", "sd3")
    with pytest.raises(ValueError, match=r"shipped for flux \(none is\), got"):
        shipped.find_evaluator(kind, "flux")


def test_it_can_start_from_another_kind(global_random_state):
    first, second = small("alignment", seed=1), small("preference", seed=2)
    x, sigma = noise(2, CHANNELS, 8, 8), torch.full((2,), 0.4)
    with torch.no_grad():
        assert not torch.allclose(first.see(x, sigma), second.see(x, sigma))
        second.start_from(first)
        assert torch.equal(first.see(x, sigma), second.see(x, sigma))
    with pytest.raises(ValueError, match="for sd3, got one for flux"):
        second.start_from(small("alignment", family="flux"))
    with pytest.raises(ValueError, match="of the same sizes, got other num_layers"):
        second.start_from(small("fidelity", num_layers=2))


def test_every_noise_schedule_is_seen_as_the_flow():
    x0, eps, sigma = noise(2, 4, 2, 2), noise(2, 4, 2, 2, seed=1), torch.tensor([0.25, 3.0])
    level = sigma[:, None, None, None]
    x, share = to_flow(x0 + level * eps, sigma, "ve")
    torch.testing.assert_close(share, torch.tensor([0.2, 0.75]))
    torch.testing.assert_close(
        x, (1 - share)[:, None, None, None] * x0 + share[:, None, None, None] * eps
    )
    back = from_flow(x, share, "ve")
    torch.testing.assert_close(back[0], x0 + level * eps)
    torch.testing.assert_close(back[1], sigma)
    assert to_flow(x, sigma, "flow")[0] is x
    # so the same weights say the same of the same latents, in both conventions
    flow, ve = small("fidelity"), small("fidelity", family="sdxl")
    with torch.no_grad():
        torch.testing.assert_close(
            flow(x, share, prompts(2)), ve(x0 + level * eps, sigma, prompts(2))
        )


def test_losses_are_their_formulas():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    wanted = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert float(contrastive_loss(logits, ["a", "b"])) == pytest.approx(wanted)
    # equal captions share the match: cross entropy against one half each
    flat = contrastive_loss(torch.zeros(2, 2), ["a", "a"])
    assert float(flat) == pytest.approx(math.log(2))
    better, worse = torch.tensor([1.0]), torch.tensor([-1.0])
    assert float(ranking_loss(better, worse)) == pytest.approx(math.log(1 + math.exp(-2)))
    assert float(real_loss(better, worse)) == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("text", "words", "possible"),
    [
        ("two red stars", (("two", "three"),), {"three red stars"}),
        ("a red star and a blue ring", (("red", "blue"),), {"a blue star and a red ring"}),
        ("a red star and a red ring", (("red", "blue"),), {"a blue star and a red ring",
                                                            "a red star and a blue ring"}),
        ("a star left of a ring", SIDES, {"a star right of a ring"}),
        ("a tenth redder star", (NUMBERS, COLORS), set()),
        ("two stars", (("two",),), set()),
    ],
)  # fmt: skip
def test_an_edited_caption_means_something_else(text, words, possible):
    assert edits(text, words) == sorted(possible)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("a red star and a blue ring", {"a blue star and a red ring"}),
        ("a red star left of a ring", set()),
        ("a red star and a red ring", set()),
    ],
)
def test_a_swap_only_changes_the_order(text, possible):
    assert edits(text, (COLORS, *SIDES), True) == sorted(possible)


class World:
    """Images whose channels 0, 1, 2 are what number, first color and side their caption says."""

    def captions(self, name, count):
        rng = random.Random(name)
        parts = (("two", "three"), ("red blue", "blue red"), ("left", "right"))
        return [f"{' '.join(rng.choice(part) for part in parts)}" for _ in range(count)]

    def images(self, texts, seed):
        signs = torch.tensor(
            [
                [1.0 if w in ("two", "red", "left") else -1.0 for w in (a, b, d)]
                for a, b, _, d in map(str.split, texts)
            ]
        )
        x0 = 0.3 * noise(len(texts), CHANNELS, SIDE, SIDE, seed=seed)
        x0[:, :3] += signs.reshape(-1, 3, 1, 1)
        return x0

    def draw(self, step, count):
        texts = self.captions(step, count)
        return self.images(texts, step), texts

    def held_out(self):
        return self.draw(10_000, 128)

    def twins(self, edits):
        return WorldTwins(edits)


class WorldTwins(World):
    """The same, each followed by one with an edited caption."""

    def __init__(self, edits):
        self.edits = edits

    def captions(self, name, count):
        firsts, known = super().captions(name, count // 2), set(super().captions("all", 500))
        rng = random.Random(f"twins {name}")
        seconds = [rng.choice([e for e in self.edits(text) if e in known]) for text in firsts]
        return [text for pair in zip(firsts, seconds, strict=True) for text in pair]


@cache
def vector(word):
    return noise(PROMPT_DIM, seed=sum(map(ord, word)))


def read(texts):
    """Encode each word as a vector of its own and of its place."""
    vectors = torch.stack(
        [torch.stack([vector(w).roll(i) for i, w in enumerate(t.split())]) for t in texts]
    )
    return Conditioning(vectors, vectors[:, :, :POOLED_DIM].flatten(1)[:, :POOLED_DIM])


def generated():
    """Return images whose last channel is their rank, two of each of 80 prompts."""
    world = World()
    texts = [text for text in world.captions("generated", 80) for _ in range(2)]
    x0, ranks = world.images(texts, 5), [float(i % 2) for i in range(160)]
    x0[:, 3] += torch.tensor(ranks)[:, None, None] + 1
    records = [Record(f"p{i // 2}", text, i % 2, 0, 4.0) for i, text in enumerate(texts)]
    return Finals(x0, records), [(rank,) for rank in ranks]


def source_of(kind):
    world, (finals, ranks) = World(), generated()
    if kind.lesson == "captions":
        return CaptionPairs(world)
    if kind.lesson == "edits":
        return EditPairs(world, kind.words, kind.swaps)
    if kind.lesson == "generated":
        return RealPairs(world, finals, 0.3)
    return RankedPairs(finals, ranks, 0.3)


SHORT = EvaluatorConfig(
    steps=20, learning_rate=5e-3, warmup_steps=2, ema_decay=0.5, evaluations=1, save_seconds=0
)


def trained(evaluator, source, config=SHORT, folder=None):
    return train_evaluator(evaluator, source, read, config, folder=folder, log=lambda line: None)


def test_twenty_steps_lower_the_loss_and_beat_chance(evaluator, tmp_path):
    source, kind = source_of(evaluator.kind), evaluator.config.kind
    progress = trained(evaluator, source)
    losses = [loss for _, _, loss in progress.losses]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    accuracy = progress.evaluations[-1]
    # 0.75 over noise levels of which the last shows next to nothing
    assert accuracy["accuracy"] > 0.75
    assert accuracy["by_noise"]["0.3"] == pytest.approx(told(evaluator, source), abs=0.1)
    assert accuracy["by_noise"]["0.1"] > accuracy["by_noise"]["0.9"] - 0.05
    card = save_evaluator(evaluator, tmp_path, progress, SHORT, model="made up")
    told_by_card = json.loads(card.read_text())
    assert told_by_card["held_out_accuracy"] == accuracy["accuracy"]
    assert told_by_card["kind"] == kind and told_by_card["model"] == "made up"
    torch.testing.assert_close(scored(load_evaluator(tmp_path)), scored(evaluator))


def test_the_same_training_again_ends_with_the_same_weights(tmp_path):
    """After its end, and after a kill: all that is left of it then is its checkpoint."""
    first, config = small("fidelity"), replace(SHORT, steps=6)
    source = source_of(first.kind)

    def killed(line):
        if line.startswith("step 3 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_evaluator(first, source, read, config, folder=tmp_path, log=killed)
    for seed in (3, 4):
        again = small("fidelity", seed=seed)
        trained(again, source, config, tmp_path)
        whole = small("fidelity")
        trained(whole, source, config)
        assert torch.equal(scored(again), scored(whole))


def told(evaluator, source):
    """Return how often what is right scores higher at noise 0.3, by whole calls."""
    right = total = 0

    def scores(x0, texts):
        eps, sigma = noise(*x0.shape, seed=3), torch.full((len(x0),), 0.3)
        with torch.no_grad():
            return evaluator(0.7 * x0 + 0.3 * eps, sigma, read(texts))

    for pairs in source.held_out(64):
        own, other = pairs.texts, pairs.other_texts or pairs.texts
        table = [[scores(x0, texts) for texts in (own, other)] for x0 in (pairs.x0, pairs.other_x0)]
        compared = [(table[0][0], table[1][0])]
        if pairs.other_texts:
            compared += [(table[0][0], table[0][1]), (table[1][1], table[0][1])]
            compared += [(table[1][1], table[1][0])]
        right += sum(int((better > worse).sum()) for better, worse in compared)
        total += len(compared) * len(pairs.x0)
    return right / total


CONTRASTED = [name for name in KINDS.names() if KINDS.get(name).lesson in ("captions", "edits")]


@pytest.mark.parametrize("kind", CONTRASTED)
@pytest.mark.parametrize("deaf", ["image", "prompt"])
def test_who_knows_the_captions_alone_or_the_images_alone_is_right_by_chance(kind, deaf):
    evaluator = small(kind)
    with torch.no_grad():
        ends = evaluator.norm_out if deaf == "image" else evaluator.prompt_out[-1]
        ends.weight.zero_()  # whatever came before it, it returns its bias
        ends.bias.fill_(1.0)
    still = replace(SHORT, steps=1, learning_rate=0.0)
    last = trained(evaluator, source_of(evaluator.kind), still).evaluations[-1]
    assert last["accuracy"] == 0.5 and set(last["by_noise"].values()) == {0.5}


def test_twins_are_right_under_their_own_captions():
    pairs = EditPairs(World(), (NUMBERS, COLORS)).train(3, 200)
    assert len(pairs.texts) == len(pairs.other_x0) == 100
    for text, other in zip(pairs.texts, pairs.other_texts, strict=True):
        assert other in edits(text, (NUMBERS, COLORS))
    for x0, texts in ((pairs.x0, pairs.texts), (pairs.other_x0, pairs.other_texts)):
        signs = World().images(texts, 0)[:, :3].mean((2, 3)).sign()
        assert torch.equal(x0[:, :3].mean((2, 3)).sign(), signs)


def test_nothing_held_out_is_refused():
    finals, ranks = generated()
    with pytest.raises(ValueError, match="got 80 and 0 examples"):
        RankedPairs(finals, ranks, 1e-9)
    with pytest.raises(ValueError, match="0 and 0 examples"):
        RankedPairs(finals, [(1.0,)] * 160, 0.3)


def test_preference_is_by_the_first_clear_difference():
    # The second rank deviates by 0.2, 0.1 and 0.3 in p and by 0.025 twice in q8: 0.082 in all.
    assert math.sqrt((0.2**2 + 0.1**2 + 0.3**2 + 2 * 0.025**2) / 21) == pytest.approx(0.082, 0.01)
    records = [Record("p", "a", seed, 0, 4.0) for seed in range(3)]
    records += [Record(f"q{i}", f"b{i}", seed, 0, 4.0) for i in range(9) for seed in range(2)]
    ranks = [(1.0, 0.2), (1.0, 0.3), (0.0, 0.7)]
    ranks += [(0.0, 1.0), (1.0, 1.0)] * 8 + [(1.0, 1.0), (1.0, 1.05)]
    finals = Finals(torch.arange(21.0).reshape(21, 1, 1, 1), records)
    source = RankedPairs(finals, ranks, 0.3)
    found = set()
    for pairs in [source.train(step, 32) for step in range(9)] + list(source.held_out(99)):
        found |= set(
            zip(pairs.x0.flatten().tolist(), pairs.other_x0.flatten().tolist(), strict=True)
        )
    # the judge first; a tie of the judge by the other, unless that difference is noise
    assert {(a, b) for a, b in found if a < 3} == {(1, 0), (0, 2), (1, 2)}
    assert {(a, b) for a, b in found if a >= 3} == {(4 + 2 * i, 3 + 2 * i) for i in range(8)}


def test_two_wordings_of_one_thing_are_on_one_side():
    texts = [f"{form} {i}" for i in range(40) for form in ("a photo of", "a drawing of")]
    records = [Record(text, text, 0, 0, 4.0) for text in texts]
    finals = Finals(torch.zeros(80, 1, 1, 1), records, lambda text: text.split()[-1])
    parts = [{texts[i].split()[-1] for i in finals.of(part, 0.3)} for part in (False, True)]
    assert all(parts) and not parts[0] & parts[1]
    assert [len(finals.of(part, 0.3)) for part in (False, True)] == [2 * len(p) for p in parts]


def test_final_latents_are_those_of_the_sampler(tmp_path):
    denoiser, sigmas = GaussianDenoiser(), flow_sigmas(5)
    means = {"a": noise(1, 4, seed=1), "b": noise(1, 4, seed=2)}

    def encode(texts):
        cond = torch.cat([means[text] for text in texts])
        return denoiser.prompt(cond), denoiser.prompt(0 * cond)

    jobs = [Job(text, text, seed) for text in means for seed in range(2)]
    store, config = TrajectoryStore(tmp_path), CollectConfig(guidance_scales=(2.0, 5.0))
    collect(denoiser, encode, jobs, store, config, sigmas=sigmas, latent_shape=(4, 3, 3))
    finals = final_latents(store)
    assert len(finals.records) == 4
    for x0, record in zip(finals.x0, finals.records, strict=True):
        plan = make_plan("cfg", 5, record.guidance_scale)
        predict = make_predict(denoiser, sigmas, plan, *encode([record.prompt]))
        wanted = sample_euler(predict, initial_latents([record.seed], (4, 3, 3)), sigmas)
        torch.testing.assert_close(x0, wanted[0], atol=5e-3, rtol=5e-3)  # the store is in float16
    other = TrajectoryStore(tmp_path / "other")
    with pytest.raises(ValueError, match="must hold last steps"):
        final_latents(other)


def folder_of(folder, count):
    for i in range(count):
        (folder / f"{i}.png").touch()
        (folder / f"{i}.txt").write_text(f"{('two', 'three', 'nine')[i % 3]} number {i // 3 % 2}\n")


def test_a_folder_of_images_is_read_once_each_and_split_by_file(tmp_path):
    folder_of(tmp_path, 40)
    (tmp_path / "no-caption.png").touch()
    asked = []

    def encode(file):
        asked.append(file.stem)
        return torch.full((1, 1, 1), float(file.stem))

    images = ImageFolder(tmp_path, encode, 0.3)
    kept, seen = set(images.held_out()[0].flatten().tolist()), set()
    for step in range(30):
        x0, texts = images.draw(step, 8)
        for value, text in zip(x0.flatten().tolist(), texts, strict=True):
            assert (tmp_path / f"{value:.0f}.txt").read_text().strip() == text
        seen |= set(x0.flatten().tolist())
    assert seen and not seen & kept and len(seen) + len(kept) == 40
    assert len(asked) == len(set(asked))
    with pytest.raises(ValueError, match="got 0 in"):
        ImageFolder(tmp_path / "none", encode, 0.3)


def test_twins_of_a_folder_are_images_of_the_same_part(tmp_path):
    folder_of(tmp_path, 60)
    images = ImageFolder(tmp_path, lambda file: torch.full((1, 1, 1), float(file.stem)), 0.4)
    source = EditPairs(images, (("two", "three", "four"),))  # of nine there is none
    kept = set(images.held_out()[0].flatten().tolist())
    for held_out, batches in ((False, [source.train(s, 8) for s in range(9)]),
                              (True, list(source.held_out(8)))):  # fmt: skip
        for pairs in batches:
            for text, other in zip(pairs.texts, pairs.other_texts, strict=True):
                assert text.split()[1:] == other.split()[1:]
                assert {text.split()[0], other.split()[0]} == {"two", "three"}
            values = torch.cat([pairs.x0, pairs.other_x0]).flatten().tolist()
            assert {value in kept for value in values} == {held_out}
    with pytest.raises(ValueError, match="captions must have edits .* got 0 and 0 such captions"):
        EditPairs(images, (("two", "four"),))
    with pytest.raises(ValueError, match="captions must have edits .* got 0 and 0 such captions"):
        EditPairs(images, (NUMBERS,), swaps=True)


# FLOPs of a pass of the denoiser for 1024 x 1024 px: see test_full_size.py.
PASSES = {"sdxl": 6.761e12, "sd35-large": 31.121e12, "flux-dev": 74.385e12}


def flops_by_hand(model, kind):
    """Write the network down once more as matrix products: two FLOPs each."""
    (words, prompt_dim), width, patches = model.prompt, 384, 16 * 16
    products = 128**2 * model.latent_channels * 9 * 32 + patches * 32 * 8 * 8 * width
    products += 2 * width**2  # the noise level
    products += 6 * (12 * patches * width**2 + 2 * patches**2 * width)
    if kind != "fidelity":
        products += model.pooled * width + words * prompt_dim * width  # into the network
        products += (2 + 2 * words) * width**2 + 2 * words * width  # attention
        products += 2 * width**2 + width**2  # out of it, and the image's side
    return 2 * (products + (width if kind in ("fidelity", "preference") else 0))


@pytest.mark.parametrize("name", PASSES)
def test_all_evaluators_together_cost_under_three_percent_of_cfg(name):
    model = FULL_SIZE.get(name)
    by_hand = {kind: flops_by_hand(model, kind) for kind in KINDS.names()}
    three = ("alignment", "fidelity", "preference")  # each way to score once
    share = online_share(model, PASSES[name], three, candidates=4)
    assert share == pytest.approx(4 * sum(by_hand[kind] for kind in three) / (2 * PASSES[name]))
    assert 5 * sum(by_hand.values()) / (2 * PASSES[name]) <= 0.03
