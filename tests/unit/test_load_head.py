"""Heads from the hub. Truth: the same head from its folder.

The cache is laid out as huggingface_hub does it, and the hub out of reach.
"""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from core2_sampler import CoRe2Guidance, attach, attached
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads import load_head
from core2_sampler.weak_heads.card import read_card, step_errors
from core2_sampler.weak_heads.controls import AffineHead

ID = "somebody/a-head"
SD3 = STOCK["StableDiffusion3Pipeline"]
CARD = {"noise_bins": [0.0, 1.0], "gap_power": [1.0], "relative_gap_error": {"any": [0.25]}}


def affine(value):
    head = AffineHead("sd3", 4)
    head.coefficients.fill_(value)
    return head


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Return what puts a head into an empty cache of the hub, which cannot be reached."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(head, revision="main", subfolder="", card=None):
        commit = f"{len(list(cache.rglob('refs/*'))) + 1:040x}"
        repository = cache / repo_folder_name(repo_id=ID, repo_type="model")
        folder = repository / "snapshots" / commit / subfolder
        head.save_pretrained(folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        if card is not None:
            (folder / "card.json").write_text(json.dumps(card))
        return folder

    return put


def test_a_head_is_loaded_by_its_id_with_its_card(publish):
    folder = publish(affine(0.3), card=CARD)
    head = load_head(ID, "sd3")
    assert type(head) is AffineHead and not head.training
    assert torch.equal(head.coefficients, load_head(folder).coefficients)
    assert head.config["_name_or_path"] == ID and read_card(head) == CARD
    assert step_errors(head, torch.tensor([0.5]), [3.0]) == [1.0]
    with pytest.raises(ValueError, match="made for flux, got one for sd3"):
        load_head(ID, "flux")


def test_a_folder_of_the_same_name_comes_first(publish, tmp_path, monkeypatch):
    publish(affine(0.3))
    affine(0.7).save_pretrained(tmp_path / ID)
    monkeypatch.chdir(tmp_path)
    assert float(load_head(ID).coefficients[0, 0, 0]) == pytest.approx(0.7)


@pytest.mark.parametrize("where", [{"revision": "v2"}, {"subfolder": "heads/fine"}])
def test_a_part_of_a_repository_goes_by_its_folder_in_the_cache(where, publish):
    """So that what is kept of it, as a guider keeps it, leads to the same head again."""
    publish(affine(0.3))
    folder = publish(affine(0.7), **where, card=CARD)
    head = load_head(ID, **where)
    assert float(head.coefficients[0, 0, 0]) == pytest.approx(0.7) and read_card(head) == CARD
    again = load_head(head.config["_name_or_path"])
    assert torch.equal(again.coefficients, head.coefficients) and read_card(again) == CARD
    if "subfolder" in where:
        root = folder.parents[1]
        assert torch.equal(load_head(root, **where).coefficients, head.coefficients)


def test_attach_takes_an_id(publish):
    publish(affine(0.3))
    pipe = SD3.pipe()
    with attached(pipe, head=affine(0.3), core2="fast"):
        wanted = SD3.sample(pipe)
    with attached(pipe, head=ID, core2="fast"):
        assert torch.equal(SD3.sample(pipe), wanted)


@pytest.mark.parametrize("given", ["id", "head"])
def test_a_guider_is_saved_with_its_head_by_id(given, publish, tmp_path):
    publish(affine(0.3))
    guider = CoRe2Guidance(4.0, "fast", ID if given == "id" else load_head(ID))
    guider.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["head"] == ID
    again = CoRe2Guidance.from_pretrained(tmp_path)
    again.set_state(0, 3, torch.tensor(1000.0))
    again.prepare_models(SD3.pipe().transformer)  # where the head is loaded
    assert float(again._answers.head.coefficients[0, 0, 0]) == pytest.approx(0.3)


def test_what_is_neither_here_nor_in_the_cache_is_refused(publish, tmp_path):
    pipe = SD3.pipe()
    for head, reason in (
        (ID, "no such folder, and no config.json from the hub .LocalEntryNotFoundError"),
        ("heads/sd3", "owner/name, got heads/sd3, which is not there: no such folder"),
        (tmp_path / ID, "which is not there$"),  # a Path is no id
        ("a/b/c", "which is not there$"),
        ("/nowhere", "which is not there"),
    ):
        with pytest.raises(ValueError, match=reason):
            attach(pipe, head=head, core2="fast")
    publish(affine(0.3))
    with pytest.raises(ValueError, match="got somebody/a-head, which is not there"):
        load_head(ID, revision="v9")
    with pytest.raises(ValueError, match=r"folder with card.json .* got somebody/a-head"):
        read_card(load_head(ID))


def test_nothing_is_unpickled_from_the_hub(publish):
    folder = publish(affine(0.3))
    weights = next(folder.glob("*.safetensors"))
    torch.save(affine(0.3).state_dict(), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_head(ID)
