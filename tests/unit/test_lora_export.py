"""An adapter as a LoRA file. Truth: our own fast mode with the head, on the same latents."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch

from core2_sampler.cli import main
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS

pytest.importorskip("peft")

TINY = {"sd3": tiny_sd3_pipeline, "sdxl": tiny_sdxl_pipeline, "flux": tiny_flux_pipeline}
STOCK = {
    "sd3": (diffusers.StableDiffusion3Pipeline, {"guidance_scale": 1.0}),
    "sdxl": (diffusers.StableDiffusionXLPipeline, {"guidance_scale": 1.0}),
    "flux": (diffusers.FluxPipeline, {}),
}
CALL = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "latent"}


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == code


def sample(pipe, **options):
    return pipe("a b", generator=torch.Generator().manual_seed(3), **CALL, **options).images


def loud(pipe, kind="adapter", **options):
    """Return a head that changes the output visibly."""
    head = HEADS.get(kind).for_denoiser(pipe.family.denoiser(pipe), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith("up"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return head


@pytest.mark.parametrize("family", TINY)
def test_the_stock_pipeline_with_the_lora_is_our_fast_mode(family, tmp_path):
    pipe = TINY[family]()
    head = loud(pipe, reference_scale=4.0, scale_range=(2.0, 6.0))
    head.save_pretrained(tmp_path / "head")
    pipe.register_modules(weak_head=head)
    scale = {pipe.family.scale_argument: 3.0}
    wanted = sample(pipe, core2="fast", **scale)

    stock_class, unguided = STOCK[family]
    parts = {name: part for name, part in pipe.components.items() if name != "weak_head"}
    network = "unet" if family == "sdxl" else "transformer"
    stock = stock_class(**parts | {network: copy.deepcopy(parts[network])})
    stock.set_progress_bar_config(disable=True)
    plain = sample(stock, **unguided)
    assert (plain - wanted).abs().max() > 0.05

    file = tmp_path / "loras" / "guided.safetensors"
    run("heads", "export", tmp_path / "head", "--lora", file, "--guidance-scale", "3")
    stock.load_lora_weights(file.parent, weight_name=file.name)
    torch.testing.assert_close(sample(stock, **unguided), wanted, atol=1e-5, rtol=0)

    stock.fuse_lora(components=[network])
    stock.unload_lora_weights()
    module = getattr(stock, network)
    assert {type(m) for m in module.modules()} == {type(m) for m in parts[network].modules()}
    torch.testing.assert_close(sample(stock, **unguided), wanted, atol=1e-5, rtol=0)


def test_what_is_no_change_of_weights_at_that_scale_is_refused(tmp_path, capsys):
    pipe = tiny_sd3_pipeline()
    loud(pipe, reference_scale=4.0, scale_range=(2.0, 6.0)).save_pretrained(tmp_path / "head")
    loud(pipe, "tap").save_pretrained(tmp_path / "tap")
    for arguments, said in (
        (["head", "--guidance-scale", "7"], "within 2.0 to 6.0"),
        (["tap"], "must be made of an adapter, got a TapHead"),
        (["nowhere"], "nowhere"),
        (["head", "head"], "heads must be one adapter, got 2"),
    ):
        folders = [tmp_path / text if text.isalpha() else text for text in arguments]
        run("heads", "export", *folders, "--lora", tmp_path / "x.safetensors", code=2)
        assert said in capsys.readouterr().err
    run("heads", "export", tmp_path / "head", "--lora", tmp_path / "x.pt", code=2)
    assert "must end in .safetensors" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


def test_a_head_of_another_pipeline_is_refused():
    from core2_sampler.weak_heads.lora import lora_weights

    head = loud(tiny_sd3_pipeline())
    head.register_to_config(family="PixArtTransformer2DModel")
    with pytest.raises(ValueError, match="sd3, sdxl, flux, got one for PixArt"):
        lora_weights(head, 4.5)
