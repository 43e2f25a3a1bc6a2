"""Staying a drop-in for the stock classes: their call's signature, loading, the saved index."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from diffusers import ModelMixin
from diffusers.pipelines import auto_pipeline
from torch import Tensor
from torch.nn.attention import SDPBackend

from core2_sampler.atomic import write_atomic
from core2_sampler.fused.compiling import (
    How,
    check_how,
    compile_network,
    set_attention,
    with_kernel,
)
from core2_sampler.fused.float8 import check_float8, convert_to_float8
from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.modulation import check_modulated
from core2_sampler.fused.sampler import FusedSampler
from core2_sampler.pipelines.adapters.base import Family, check_no_lone_cache
from core2_sampler.pipelines.loop import Observer, run_loop
from core2_sampler.pipelines.negatives import Negatives
from core2_sampler.plan import Core2Config, Plan
from core2_sampler.types import Conditioning, Denoiser


def with_core2(stock_call: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that shows the stock call's arguments in place of ``(*args, **kwargs)``.

    Args:
        stock_call: the stock pipeline's ``__call__``.

    Returns:
        The decorator, for a ``__call__(self, *args, core2=None, **kwargs)``; keyword-only
        arguments of its own come after the stock ones.
    """

    def show(function: Callable[..., Any]) -> Any:
        stock = inspect.signature(stock_call)
        own = inspect.signature(function).parameters.values()
        parameters = [
            *(p for p in stock.parameters.values() if p.kind is not p.VAR_KEYWORD),
            *(p for p in own if p.kind is p.KEYWORD_ONLY),
            *(p for p in stock.parameters.values() if p.kind is p.VAR_KEYWORD),
        ]
        function.__signature__ = stock.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return show


def bind(
    stock_call: Callable[..., Any],
    handled: set[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> SimpleNamespace:
    """Return the stock call's arguments by name, defaults included.

    Args:
        stock_call: the stock pipeline's ``__call__``.
        handled: the arguments that our loop knows.
        args: positional arguments, the pipeline first.
        kwargs: keyword arguments.

    Returns:
        One attribute an argument.

    Raises:
        TypeError: as the stock call would for arguments that it does not have.
        ValueError: an argument that a newer diffusers has and our loop would ignore.
    """
    bound = inspect.signature(stock_call).bind(*args, **kwargs)
    if unknown := bound.arguments.keys() - handled - {"self"}:
        raise ValueError(
            "core2 knows the arguments of the diffusers that it was tried with, got the newer "
            f"{', '.join(sorted(unknown))}: drop it, or call without core2"
        )
    bound.apply_defaults()
    return SimpleNamespace(**{k: v for k, v in bound.arguments.items() if k != "self"})


def from_pipe_as_is(cls: Any, stock_class: Any, pipeline: Any, kwargs: dict[str, Any]) -> Any:
    """Run the stock ``from_pipe``, but keep every component's dtype unless one is asked for.

    The stock method ends in ``.to(float32)``, which casts the modules that both pipelines share
    (https://github.com/huggingface/diffusers/issues/12754).

    Args:
        cls: our pipeline class.
        stock_class: the stock class it derives from.
        pipeline: the pipeline whose components are shared.
        kwargs: of the stock method; the other pipeline's ``weak_head`` is the default.

    Returns:
        The new pipeline.
    """
    kwargs = {"weak_head": getattr(pipeline, "weak_head", None), **kwargs}
    from_pipe = stock_class.from_pipe.__func__
    if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
        return from_pipe(cls, pipeline, **kwargs)
    uncast = type(cls.__name__, (cls,), {"to": lambda self, *_args, **_kwargs: self})
    pipe = from_pipe(uncast, pipeline, **kwargs)
    pipe.__class__ = cls
    return pipe


def register_auto(cls: Any, stock_class: Any) -> None:
    """Let diffusers' AutoPipelines switch tasks from our class as they do from the stock one.

    Args:
        cls: our text-to-image class.
        stock_class: the stock class it derives from.
    """
    tasks = (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    )
    name = next(name for name, known in tasks[0].items() if known is stock_class)
    for task in tasks:
        if name in task:
            task.setdefault(f"core2-{name}", cls if task is tasks[0] else task[name])


class CoRe2Mixin:
    """What our pipeline classes add to the stock ones beside their call.

    Attributes:
        family: how the family is called, encoded and scheduled.
        stock_class: the class that ours derives from, and that a saved folder names.
    """

    family: ClassVar[Family]
    stock_class: ClassVar[Any]
    # Small, and an in-model head is never called itself, so no offload hook would ever move it.
    _exclude_from_cpu_offload = ["weak_head"]
    _core2_plan: Plan | None = None
    _core2_schedule: Tensor | None = None
    _core2_observer: Observer | None = None
    _core2_fused: FusedSampler | None = None
    _core2_vae_bf16 = False
    _core2_negatives: Negatives | None = None
    _core2_kernel: SDPBackend | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a family's class known to diffusers; a class derived from one is not asked for."""
        super().__init_subclass__(**kwargs)
        if "stock_class" in vars(cls):
            register_auto(cls, cls.stock_class)

    @property
    def core2_plan(self) -> Plan | None:
        """The plan of the latest call; None before the first and after a call without `core2`."""
        return self._core2_plan

    @property
    def core2_schedule(self) -> Tensor | None:
        """The scales that the latest call's rule picked for each step and image, [N, B].

        nan in steps that did not ask the rule, whose scale is the plan's or a callback's; None
        without a rule that sees the latents, and where no step asked.
        """
        return self._core2_schedule

    def core2_compile(
        self,
        graphs: bool = True,
        compile: How | None = "regional",
        tables: bool = False,
        attention: str | None = None,
        vae_bf16: bool = False,
        keep_negative: bool = False,
        fp8: bool = False,
        split_pairs: bool = False,
    ) -> None:
        """Run calls with `core2` by hot steps from now on, the latents in float32 between them.

        Calls with a callback, a scale rule other than an online one, ``guidance_rescale``, zigzag
        steps as the released code makes them or a scheduler without a closed form run as before.

        Args:
            graphs: also capture each kind of step as a CUDA graph, on a GPU.
            compile: also compile the denoiser in place, ``regional`` or ``full``, and an output
                head that keeps no state; None does not.
            tables: also compute the AdaLN modulation of all steps before the first one (SD3.5,
                FLUX); it takes memory for 64 steps at least, see
                `core2_sampler.fused.modulation`.
            attention: also switch the denoiser's attention to a backend, by diffusers' names: on
                FLUX for all calls, until ``reset_attention_backend()``; on SD3 and SDXL, whose
                attention calls torch itself, to one of torch's kernels in calls with `core2`, and
                to plain products where that kernel cannot compute; None leaves it.
            vae_bf16: also decode in bfloat16 where a VAE in float16 is decoded in float32 (SDXL);
                its convolutions then round to 8 significant bits.
            keep_negative: also keep the negative prompt's embeddings, and encode it anew only
                where something that they depend on has changed; in every call where a text encoder
                carries adapters or hooks.
            fp8: also convert the linear layers that see tokens to float8, in place, for all calls
                and for good, on a GPU that multiplies in it and with torchao; the images change.
            split_pairs: also run a pair as two passes of B rows, so that all kinds of step share
                one compiled shape; not under a cache of diffusers.

        Raises:
            ValueError: unknown `compile` or `attention`, or the denoiser cannot have `tables` or
                `fp8` or that backend, or no VAE of the family is decoded in float32.
        """
        pipe: Any = self
        denoiser = self.family.denoiser(self)
        if vae_bf16 and self.family.name != "sdxl":
            raise ValueError(
                f"vae_bf16 must be False for {self.family.name}, whose VAE decodes in its own "
                "dtype: load it in bfloat16"
            )
        if compile is not None:
            check_how(compile)
        if tables:
            check_modulated(denoiser)
        if fp8:
            check_float8(denoiser.module)
        kernel = None if attention is None else set_attention(denoiser.module, attention)
        if fp8:
            convert_to_float8(denoiser.module)
        if compile is not None:
            compile_network(denoiser.module, compile)
            head = pipe.weak_head
            if head is not None and not head.in_model and head.static_state:
                head.compile(fullgraph=True)
        self._core2_fused = FusedSampler(Graphs() if graphs else None, tables, split_pairs)
        self._core2_vae_bf16 = vae_bf16
        self._core2_kernel = kernel
        self._core2_negatives = Negatives() if keep_negative else None

    def _forget(self) -> None:
        """Forget what is told of the latest call."""
        self._core2_plan = self._core2_schedule = None

    def _sample(self, call: SimpleNamespace, config: Core2Config) -> Any:
        """Return the images, or latents, of a call with `core2`."""
        pipe: Any = self
        check_no_lone_cache(getattr(pipe, "unet", None) or pipe.transformer)
        run = pipe._prepare(call, config)
        self._core2_plan = run.plan
        if run.plan.needs_head and pipe.weak_head.needs_negative == "empty":
            run.empty = self._encode_empty(call)
        with with_kernel(self._core2_kernel):
            latents = run_loop(self, run, self._denoiser())
        self._core2_schedule = None if run.rule is None else run.rule.schedule
        image = latents if call.output_type == "latent" else pipe._decode(latents, call.output_type)
        pipe.maybe_free_model_hooks()
        return image

    def _encode_empty(self, call: SimpleNamespace) -> Conditioning:
        """Return the empty prompt, one row, of as many tokens as the call's."""
        lengths = {k: v for k, v in vars(call).items() if k == "max_sequence_length"}
        encode: Any = self.family.encode
        return encode(self, [""], [""], **lengths)[1]

    def _denoiser(self) -> Denoiser:
        return self.family.denoiser(self)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a model's index as the stock method does, and make its head's class loadable.

        The stock loaders take a component from a module outside diffusers only if that module also
        holds the name of the base class; a head's own module need not know that.

        Args:
            config_dict: the index.
            **kwargs: as the stock method.

        Returns:
            As the stock method.
        """
        module, _ = config_dict.get("weak_head") or (None, None)
        if module is not None:
            vars(importlib.import_module(module)).setdefault("ModelMixin", ModelMixin)
        pipe_class: Any = super()
        return pipe_class.extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Build on another pipeline's components; their dtypes stay unless one is asked for.

        Args:
            pipeline: a pipeline of the same family.
            **kwargs: as the stock method; ``weak_head`` among them.

        Returns:
            The new pipeline; it shares the components.
        """
        return from_pipe_as_is(cls, cls.stock_class, pipeline, kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write ``model_index.json`` under the stock class name: the folder loads for everyone.

        Args:
            json_file_path: the file.
        """
        pipe: Any = self
        index = json.loads(pipe.to_json_string()) | {"_class_name": self.stock_class.__name__}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_atomic(Path(json_file_path), text.encode())
