"""The mean of several denoisers. Truth: numpy's mean in float64, and stock ``from_pretrained``."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file

from core2_sampler.cli import main
from core2_sampler.shapes.averaging import average
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Three stages of one training, the first in half precision; the last has another VAE."""
    folder, pipe = tmp_path_factory.mktemp("stages"), tiny_sd3_pipeline()
    stock = StableDiffusion3Pipeline(
        **{k: v for k, v in pipe.components.items() if k[:4] != "weak"}
    )
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "second", "last"):
        for parameter in stock.transformer.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator)
        if name == "last":
            stock.vae.decoder.conv_out.bias.data += 1
        stock.save_pretrained(folder / name)
    half = SD3Transformer2DModel.from_pretrained(folder / "first/transformer").half()
    half.save_pretrained(folder / "first/transformer")
    return folder


def test_the_denoiser_is_the_mean_and_the_rest_the_lasts(stages, tmp_path, capsys):
    folders = [stages / name for name in ("first", "second", "last")]
    with pytest.raises(SystemExit) as done:
        main(["shapes", "average", *map(str, folders), "--out", str(tmp_path / "new/mean")])
    assert done.value.code == 0
    assert "the mean of 3 denoisers in " in capsys.readouterr().out
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    lacks = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "new/mean", **lacks)
    for key, value in pipe.transformer.state_dict().items():
        parts = np.stack([each[key].numpy().astype(np.float64) for each in weights])
        wanted = parts.mean(0).astype(weights[0][key].numpy().dtype)
        np.testing.assert_array_equal(value.numpy(), wanted.astype(np.float32), key)
    stored = load_file(tmp_path / "new/mean" / WEIGHTS)
    assert {key: value.dtype for key, value in stored.items()} == {
        key: value.dtype for key, value in weights[0].items()
    }
    files = {path.relative_to(folders[2]) for path in folders[2].rglob("*") if path.is_file()}
    made = tmp_path / "new/mean"
    assert {path.relative_to(made) for path in made.rglob("*") if path.is_file()} == files
    for file in files - {next(path for path in files if str(path) == WEIGHTS)}:
        assert (made / file).read_bytes() == (folders[2] / file).read_bytes(), file


def test_the_mean_of_equal_folders_is_each_of_them(stages, tmp_path):
    average([stages / "second"] * 3, tmp_path / "mean")
    wanted = load_file(stages / "second" / WEIGHTS)
    for key, value in load_file(tmp_path / "mean" / WEIGHTS).items():
        assert torch.equal(value, wanted[key]), key


def test_what_cannot_be_averaged_is_refused_before_anything_is_written(stages, tmp_path):
    first, last, out = stages / "first", stages / "last", tmp_path / "mean"
    tiny_flux_pipeline().save_pretrained(tmp_path / "flux")
    shutil.copytree(first, tmp_path / "heads")
    config = json.loads((first / "transformer/config.json").read_text())
    config["num_attention_heads"] *= 2  # the same shapes, another network
    config["attention_head_dim"] //= 2
    (tmp_path / "heads/transformer/config.json").write_text(json.dumps(config))
    for folders, text in (
        ([first], "two trained pipelines or more, got 1"),
        ([first, tmp_path], f"must be those of trained pipelines, got {tmp_path} without"),
        ([first, last / "transformer"], "must be those of trained pipelines, got .*transformer"),
        ([first, last, tmp_path / "flux"], "of another class, config or shape in .* and .*flux"),
        ([first, tmp_path / "heads"], "of another class, config or shape in .* and .*heads"),
    ):
        with pytest.raises(ValueError, match=text):
            average(folders, out)
    with pytest.raises(ValueError, match="out must not exist yet, got"):
        average([first, last], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux", "heads"]


def test_variants_beside_the_weights_are_neither_counted_nor_kept(stages, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(stages / "second", other)
    variant = other / WEIGHTS.replace(".safetensors", ".fp16.safetensors")
    shutil.copy(other / WEIGHTS, variant)
    average([stages / "last", other], tmp_path / "mean")
    average([stages / "last", stages / "second"], tmp_path / "plain")
    assert (tmp_path / "mean" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    assert not (tmp_path / "mean" / variant.relative_to(other)).exists()
