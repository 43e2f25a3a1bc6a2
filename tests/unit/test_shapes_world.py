"""The grammar, the renderer and the judge of the Shapes world."""

import json
import random
from collections import defaultdict

import numpy as np
import pytest

from core2_sampler.shapes import world
from core2_sampler.shapes.judge import detect, judge
from core2_sampler.shapes.render import SIZE, Placed, Scene, draw, label_map, render
from core2_sampler.shapes.render import scene_of as scene_of_prompt
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_tokenizer, words
from core2_sampler.shapes.world import Object, Prompt

ALL = [prompt for task in world.TASKS for prompt in world.all_prompts(task)]
RED_STAR_LEFT = Prompt("position", (Object("star", "red"), Object("ring", "blue")), "left of")


def scene_of(*objects: Placed) -> Scene:
    return Scene(objects, (230, 230, 230))


def test_captions_are_unique_and_read_as_english():
    assert len({prompt.text for prompt in ALL if prompt.prefix == ""}) == sum(
        prompt.prefix == "" for prompt in ALL
    )
    assert RED_STAR_LEFT.text == "a red star left of a blue ring"
    assert Prompt("counting", (Object("cross", "red", 3),)).text == "three red crosses"


def test_training_sees_no_held_out_content():
    rng = random.Random(0)
    seen = {world.training_prompt(rng).content for _ in range(20_000)}
    held_out = {p.content for split in ("val", "test") for p in world.held_out_prompts(240, split)}
    assert len(held_out) > 200
    assert not seen & held_out


def test_the_same_content_in_other_words_is_in_the_same_split():
    reverse = Prompt("position", RED_STAR_LEFT.objects[::-1], "right of", "a photo of ")
    assert reverse.content == RED_STAR_LEFT.content
    swapped = Prompt("position", RED_STAR_LEFT.objects, "right of")
    assert swapped.content != RED_STAR_LEFT.content


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_prompts_are_distinct_and_cover_every_task(split):
    prompts = world.held_out_prompts(240, split)
    assert len({prompt.id for prompt in prompts}) == 240
    assert {prompt.task for prompt in prompts} == set(world.TASKS)
    assert all(prompt.split == split for prompt in prompts)


def test_held_out_prompts_refuse_what_the_world_does_not_have():
    with pytest.raises(ValueError, match="'val' or 'test'"):
        world.held_out_prompts(10, "train")
    with pytest.raises(ValueError, match="n must be 1 to"):
        world.held_out_prompts(10**6)


def test_metadata_is_that_of_geneval(tmp_path):
    """Layout of a line of evaluation_metadata.jsonl: the target last, placed against group 0."""
    line = RED_STAR_LEFT.metadata()
    assert line["include"][1] == {
        "class": "star",
        "count": 1,
        "color": "red",
        "position": ["left of", 0],
    }
    count = Prompt("counting", (Object("star", None, 2),)).metadata()
    assert count["exclude"] == [{"class": "star", "count": 3}]
    world.write_metadata([RED_STAR_LEFT], tmp_path / "metadata.jsonl")
    assert json.loads((tmp_path / "metadata.jsonl").read_text()) == line


def test_rendering_is_a_function_of_prompt_and_seed():
    first, again, other = (np.asarray(render(RED_STAR_LEFT, seed)) for seed in (1, 1, 2))
    assert first.shape == (SIZE, SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_labels_name_what_the_judge_finds():
    for seed, prompt in enumerate(world.held_out_prompts(40)):
        scene = scene_of_prompt(prompt, seed)
        found = {(d.shape, d.color) for d in detect(draw(scene))}
        labels = np.unique(np.asarray(label_map(scene, SIZE)))
        pairs = [divmod(int(label) - 1, len(world.COLORS)) for label in labels if label > 0]
        assert {(world.SHAPES[shape], list(world.COLORS)[color]) for shape, color in pairs} == found


def test_the_judge_accepts_fresh_renders():
    rng, right = random.Random(7), defaultdict(list)
    for seed in range(2000):
        prompt = world.training_prompt(rng)
        right[prompt.task].append(judge(render(prompt, seed), prompt).correct)
    assert set(right) == set(world.TASKS)
    shares = {task: sum(verdicts) / len(verdicts) for task, verdicts in right.items()}
    assert min(shares.values()) >= 0.94, shares
    assert sum(shares.values()) / len(shares) >= 0.97, shares


STAR, RING = Placed("star", "red", 15, 30, 18), Placed("ring", "blue", 48, 32, 18)


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ((STAR,), "expected 1 ring"),
        ((STAR, Placed("ring", "green", 48, 32, 18)), "found color green"),
        ((STAR, RING, Placed("star", "red", 30, 10, 17)), "found 2"),
        ((STAR, RING, Placed("cross", "black", 30, 10, 17)), "not asked for"),
        ((Placed("star", "red", 48, 32, 18), Placed("ring", "blue", 15, 30, 18)), "is not left of"),
        ((Placed("circle", "red", 15, 30, 18), RING), "expected 1 star"),
    ],
)
def test_the_judge_says_what_is_wrong(objects, reason):
    verdict = judge(draw(scene_of(*objects)), RED_STAR_LEFT)
    assert not verdict.correct
    assert reason in verdict.reason


def test_detection_measures_place_and_size():
    (found,) = detect(draw(scene_of(Placed("square", "green", 20, 40, 16))))
    assert (found.shape, found.color) == ("square", "green")
    assert abs(found.x - 20) <= 1 and abs(found.y - 40) <= 1
    assert abs(found.width - 16) <= 1 and abs(found.height - 16) <= 1


def test_every_word_is_one_token_and_any_text_survives():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in words())
    longest = max(len(tokenizer("a picture of " + prompt.text).input_ids) for prompt in ALL)
    assert longest <= MAX_TOKENS
    assert tokenizer.decode(tokenizer("a zebra, 3").input_ids, skip_special_tokens=True) == (
        "a zebra , 3"
    )


def test_the_tokenizer_reloads_as_saved(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [prompt.text for prompt in ALL[:50]]
    assert again(texts, padding="max_length").input_ids == (
        tokenizer(texts, padding="max_length").input_ids
    )
