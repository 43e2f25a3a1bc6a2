"""A web page that draws stock CFG and another mode side by side, from the same latents."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, get_args

import typer
from PIL.Image import Image

from core2_sampler.cli.draw import CAPTION, Studio, arms_of, errors_in_one_line
from core2_sampler.cli.generate import GenerateConfig, GenerateMode, check, core2_config
from core2_sampler.cli.images import grid
from core2_sampler.cli.loading import load_model, load_weak_head
from core2_sampler.config import ConfigError, load_config, options_of, user_input
from core2_sampler.fitting import find_head
from core2_sampler.info import pick_device
from core2_sampler.model_files import find_model

MODES = tuple(mode for mode in get_args(GenerateMode) if mode != "cfg")
"""The modes of ``core2 generate`` but CFG, which the page sets beside each of them."""

EXAMPLE = "a red circle left of a blue square"
"""The prompt that the page starts with."""

LARGEST_SEED = 2**53 - 1
"""Up to here a browser's numbers are whole."""


@dataclass(frozen=True, slots=True)
class Demo:
    """A loaded pipeline, and what it draws at the press of the button.

    Attributes:
        pipe: one of our pipelines, with the weak head.
        model: its name, as `find_model` takes it.
        head: the head's folder or name; None is the model's own, where it has one.
        device: where the pipeline is.
    """

    pipe: Any
    model: str
    head: str | None
    device: str

    @classmethod
    def load(cls, model: str, head: str | None, device: str) -> Demo:
        """Load a model and its head, once both are known to be usable.

        Raises:
            ConfigError: if there is no such model, head or device, or they do not fit.
        """
        files = find_model(model)
        head_files = find_head(head, files)
        with user_input():
            device = pick_device(device)
        pipe = load_model(files, device)
        if head_files is not None:
            pipe.register_modules(weak_head=load_weak_head(head_files, pipe))
        return cls(pipe, model, head, device)

    def draw(
        self,
        prompt: str,
        mode: str,
        steps: float | None = None,
        guidance_scale: float | None = None,
        slow_steps: str | None = None,
        negative_prompt: str | None = None,
        seed: float | None = None,
    ) -> list[tuple[Image, str]]:
        """Draw stock CFG and another mode from the same latents.

        Args:
            prompt: what to draw.
            mode: one of `MODES`.
            steps: this and the rest are options of ``core2 generate``; an empty text or None
                leaves one out.
            guidance_scale: strength of guidance.
            slow_steps: modes of fast and slow steps: which steps are slow.
            negative_prompt: what not to draw.
            seed: of the initial latents.

        Returns:
            Image and caption (mode, NFE, seconds) of CFG, then of the mode.

        Raises:
            ConfigError: on what ``core2 generate --compare`` refuses.
            typer.TyperException: if the run failed, with the step and the noise level.
        """
        options = {"steps": steps, "guidance_scale": guidance_scale, "slow_steps": slow_steps}
        options |= {"negative_prompt": negative_prompt, "seed": seed}
        given = {name: value for name, value in options.items() if value not in (None, "")}
        config = self._request({"prompts": [prompt], "mode": mode, **given})
        job = check(config)
        studio, arms = Studio(self.pipe, config, job), arms_of(config, job)
        with errors_in_one_line():
            studio.warm_up(arms)
            drawn = [studio.draw(arm, prompt, lambda count: None)[0] for arm in arms]
        return [(grid([[each.image]]), CAPTION.format(**each.record)) for each in drawn]

    def _request(self, given: dict[str, Any]) -> GenerateConfig:
        """Return the request for a comparison; the head is named where something reads it."""
        given |= {"model": self.model, "device": self.device, "compare": True}
        config = load_config(GenerateConfig, given=given)
        plain = core2_config(GenerateConfig(config.prompts, mode=config.mode))
        return replace(config, head=self.head) if plain.plan(2, 2.0).needs_head else config


def build_page(demo: Demo) -> Any:
    """Return the page, a ``gradio.Blocks``: a form, a button, two images with their captions."""
    import gradio as gr

    options = options_of(GenerateConfig)

    def field(name: str) -> dict[str, Any]:
        text, default = options[name].metadata["help"], options[name].default
        return {"label": name.replace("_", " "), "info": text, "value": default}

    @functools.wraps(demo.draw)  # gradio names the inputs after its arguments
    def press(*values: Any) -> list[Any]:
        try:
            drawn = demo.draw(*values)
        except (ConfigError, typer.TyperException) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
        return [part for pair in drawn for part in pair]

    with gr.Blocks(title="core2_sampler", analytics_enabled=False) as page:
        form = [gr.Textbox(EXAMPLE, label="prompt")]
        with gr.Row():
            form.append(gr.Dropdown(MODES, **field("mode")))
            form.append(gr.Number(**field("steps")))
            form.append(gr.Number(**field("guidance_scale"), placeholder="default"))
        with gr.Row():
            form.append(gr.Textbox(**field("slow_steps")))
            form.append(gr.Textbox(**field("negative_prompt")))
            form.append(gr.Number(**field("seed"), maximum=LARGEST_SEED))
        button = gr.Button("Draw", variant="primary")
        outputs: list[Any] = []
        with gr.Row():
            for label in ("stock CFG", "the mode"):
                with gr.Column():
                    image = gr.Image(label=label, format="png", interactive=False)
                    outputs += [image, gr.Markdown()]
        button.click(press, form, outputs, api_name="draw")
    return page
