"""What a captured step has inside it: what runs must share to replay it, and what must not be in.

Tensors that a graph reads are known by where they lie, as it reads whatever lies there; everything
else is known by its value, as the graph holds that of its capture.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from core2_sampler.fused.hot import signature
from core2_sampler.fused.state import Solver, capacity, is_multistep
from core2_sampler.scales import OnlineScale
from core2_sampler.types import Conditioning, Denoiser

_SWITCHES = (
    *("scaling", "merged_adapters", "_active_adapter", "_disable_adapters"),  # of PEFT's layers
    "scale",  # of IP-Adapter's processors
    *("s1", "s2", "b1", "b2"),  # FreeU
)
"""Numbers and names on a network's parts that are set from outside, between calls."""


def obstacle(
    denoiser: Denoiser,
    head: Any,
    device: torch.device,
    static_head: bool,
    rule: OnlineScale | None = None,
) -> str | None:
    """Return why a run must not be captured; None if nothing is known against it.

    Args:
        denoiser: the network, without the hooks of a head.
        head: the weak head, or None.
        device: of the run.
        static_head: whether the head keeps no state between steps, or keeps it in the same tensors.
        rule: the scale rule, or None.
    """
    for evaluator in () if rule is None else rule.evaluators.values():
        if not isinstance(evaluator, nn.Module):
            return f"the evaluator {type(evaluator).__name__} is no module, so it may change unseen"
    if head is not None and not static_head:
        return f"{type(head).__name__} keeps what it has seen in new tensors"
    if torch.is_autocast_enabled(device.type):
        return "autocast frees its copies of the weights after the call"
    if getattr(denoiser.module, "_cache_config", None) is not None:
        return "the denoiser has a cache between steps (call disable_cache())"
    hook = hook_on(denoiser.module)
    return None if hook is None else f"the denoiser {hook}"


def carries_adapters(module: nn.Module) -> bool:
    """Say whether layers of PEFT are in a network."""
    return any("merged_adapters" in vars(part) for part in module.modules())


def hook_on(module: nn.Module) -> str | None:
    """Return what sits on a network beside its own layers; None if nothing does."""
    for part in module.modules():
        known = vars(part)  # much faster than to ask a module for what it has not
        if "_hf_hook" in known:
            return "is offloaded or sharded by accelerate"
        if getattr(known.get("_diffusers_hook"), "hooks", None):
            return "has hooks of diffusers (offload, cache or casts)"
        hooks = (*known["_forward_hooks"].values(), *known["_forward_pre_hooks"].values())
        # Those of transformers stay after the first call that asked for hidden states.
        if not all(getattr(each, "__module__", "").startswith("transformers.") for each in hooks):
            return "has forward hooks"
    return None


def shape_key(
    denoiser: Denoiser,
    head: Any,
    x: Tensor,
    num_steps: int,
    cond: Conditioning,
    uncond: Conditioning | None,
    solver: Solver,
    input_dtype: torch.dtype,
    rule: OnlineScale | None = None,
) -> Hashable:
    """Return what two runs must share to replay the same graphs.

    Args:
        denoiser: the network: where its weights lie, how its adapters are set, and what else it
            holds, such as the timesteps of SDXL's clock.
        head: the weak head, or None.
        x: latents.
        num_steps: hot steps of the run.
        cond: the prompt.
        uncond: the negative prompt, or None.
        solver: of the run.
        input_dtype: see `core2_sampler.fused.run.make_hot`.
        rule: the scale rule, or None.
    """
    return (
        _network(denoiser.module),
        _held(denoiser),
        _network(head) if isinstance(head, nn.Module) else id(head),
        (tuple(x.shape), x.device),
        capacity(num_steps),
        signature(cond, uncond),
        is_multistep(solver),
        input_dtype,
        None if rule is None else _picker(rule),
        kernels(),
    )


def _picker(rule: OnlineScale) -> Hashable:
    evaluators = tuple(
        (name, _network(cast(nn.Module, each))) for name, each in rule.evaluators.items()
    )
    return evaluators, tuple(rule.candidates), repr(rule.weights), rule.upstream


def _network(module: nn.Module) -> int:
    """Return a number that changes when weights move, or a part is switched or set otherwise."""
    tensors = [*module.parameters(), *module.buffers()]
    places = tuple(place for tensor in tensors for place in _places(tensor))
    switches = tuple(
        (i, name, repr(known[name]))
        for i, part in enumerate(module.modules())
        for known in (vars(part),)
        for name in _SWITCHES
        if name in known
    )
    processors = tuple(
        (type(processor), str(getattr(processor, "_attention_backend", None)))
        for part in module.modules()
        if (processor := vars(part).get("processor")) is not None
    )
    return hash((id(module), places, switches, processors))


def _places(tensor: Tensor) -> Iterator[int]:
    """Give where a tensor lies; one that is made of others, as quantised weights are, has many."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _places(getattr(tensor, name))
    else:
        yield tensor.data_ptr()


def _held(value: Any) -> Hashable:
    """Return the values of all that a denoiser was made with, beside its network."""
    if isinstance(value, nn.Module):
        return None
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return value.dtype, tuple(value.shape), raw.numpy().tobytes()
    if is_dataclass(value):
        return tuple(_held(getattr(value, field.name)) for field in fields(value) if field.init)
    leaves, layout = tree.tree_flatten(value)
    if leaves == [value]:
        return repr(value)
    return str(layout), tuple(_held(leaf) for leaf in leaves)


def kernels() -> Hashable:
    """Return the settings of torch by which it picks kernels."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
