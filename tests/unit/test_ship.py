"""Shipping trained Shapes models: what they share lies there once, and stock classes load it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from core2_sampler import CoRe2Pipeline
from core2_sampler.cli.ship import ship
from core2_sampler.shapes import models
from core2_sampler.shapes.train import save_half
from core2_sampler.weak_heads.conv import ConvHead


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What training leaves: three pipelines on the same encoders, and the CLIP pair."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    clip = models.build_clip().half()
    text = CLIPTextModelWithProjection(clip.config.text_config).half()
    text.text_model.load_state_dict(clip.text_model.state_dict())
    text.text_projection.load_state_dict(clip.text_projection.state_dict())
    clip.save_pretrained(folder / "clip")
    text.save_pretrained(folder / "text_encoder")
    models.build_vae().save_pretrained(folder / "vae")
    models.build_t5().save_pretrained(folder / "text_encoder_3")
    for family in ("sd3", "sdxl", "flux"):
        network = getattr(models, f"build_{family}")()
        pipe = getattr(models, f"assemble_{family}")(network, folder)
        save_half(pipe, folder / family)
    return folder


@pytest.fixture
def shipped(trained, tmp_path):
    target = tmp_path / "models"
    target.mkdir()
    for name in ("clip", "sdxl", "flux", "sd3"):
        ship(trained / name, None, target)
    return target


def real_files(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*.safetensors") if not path.is_symlink())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def test_shipping_warns_of_nothing(trained, tmp_path):
    (tmp_path / "models").mkdir()
    logger, said = logging.getLogger("diffusers"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        ship(trained / "sd3", None, tmp_path / "models")
    finally:
        logger.removeHandler(handler)
    assert said == []


def test_what_the_models_share_is_there_once(trained, shipped):
    assert set(real_files(shipped)) == {
        "clip/model-00003-of-00003.safetensors",  # the image tower
        "sd3/text_encoder/model-00001-of-00002.safetensors",
        "sd3/text_encoder/model-00002-of-00002.safetensors",
        "sd3/text_encoder_3/model.safetensors",
        "sd3/vae/diffusion_pytorch_model.safetensors",
        "sd3/transformer/diffusion_pytorch_model.safetensors",
        "sdxl/unet/diffusion_pytorch_model.safetensors",
        "flux/transformer/diffusion_pytorch_model.safetensors",
    }
    links = [path for path in shipped.rglob("*") if path.is_symlink()]
    assert all(not path.readlink().is_absolute() and path.is_file() for path in links)


@pytest.mark.parametrize("family", ["sd3", "sdxl", "flux"])
def test_stock_classes_load_what_was_trained(trained, shipped, family):
    wanted = DiffusionPipeline.from_pretrained(trained / family).components
    got = DiffusionPipeline.from_pretrained(shipped / family).components
    networks = [name for name, part in wanted.items() if isinstance(part, torch.nn.Module)]
    assert len(networks) >= 4
    for name in networks:
        expected, loaded = wanted[name].state_dict(), got[name].state_dict()
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items()), name


def test_no_weight_of_a_shared_text_tower_is_unexpected(trained, shipped):
    plain, report = CLIPTextModel.from_pretrained(
        shipped / "sdxl" / "text_encoder", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    pair = CLIPModel.from_pretrained(shipped / "clip").state_dict()
    original = CLIPModel.from_pretrained(trained / "clip").state_dict()
    assert all(torch.equal(pair[key], value) for key, value in original.items())
    assert all(
        torch.equal(pair[f"text_model.{k}"], v.half()) for k, v in plain.state_dict().items()
    )


def test_a_new_model_leaves_the_others_as_they_are(trained, shipped, tmp_path):
    before = load_file(shipped / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors")
    other = DiffusionPipeline.from_pretrained(trained / "sd3")
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "sd3")
    ship(tmp_path / "sd3", None, shipped)
    after = load_file(shipped / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    changed = load_file(shipped / "sd3" / "vae" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(changed["decoder.conv_out.bias"], before["decoder.conv_out.bias"])


def test_a_head_lies_in_its_model_with_its_card(trained, tmp_path):
    target, folder = tmp_path / "models", tmp_path / "head"
    target.mkdir()
    channels = models.build_vae().config.latent_channels
    head = ConvHead("sd3", channels, widths=(32,))
    torch.nn.init.constant_(head.network.conv_out.bias, 0.5)
    head.save_pretrained(folder)
    (folder / "card.json").write_text('{"model": "shapes-sd3"}', encoding="utf-8")
    ship(trained / "sd3", folder, target)
    assert (target / "sd3/weak_head/card.json").read_text() == '{"model": "shapes-sd3"}'
    got = CoRe2Pipeline.from_pretrained(target / "sd3").weak_head
    assert torch.equal(got.network.conv_out.bias, head.network.conv_out.bias)


def test_a_model_that_cannot_be_read_changes_nothing(trained, shipped, tmp_path):
    before = real_files(shipped)
    for folder in (tmp_path, trained / "vae", trained / "text_encoder"):
        with pytest.raises(ValueError, match="must hold a pipeline or the CLIP pair, got"):
            ship(folder, None, shipped)
    with pytest.raises(ValueError, match="head must be left out with the CLIP pair, got"):
        ship(trained / "clip", tmp_path, shipped)
    broken = tmp_path / "broken"
    broken.mkdir()
    index = json.loads((trained / "sd3" / "model_index.json").read_text(encoding="utf-8"))
    (broken / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({"w": torch.zeros(1)}, broken / "weights.safetensors")
    with pytest.raises(ValueError, match="is not a diffusers model"):
        ship(broken, None, shipped)
    assert real_files(shipped) == before
    assert [path.name for path in shipped.parent.iterdir() if path.name.startswith("tmp")] == []
