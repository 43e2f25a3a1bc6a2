"""Heads on latents and cond alone. Truth: which latents a token covers, zero padding by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from core2_sampler.weak_heads.conv import ConvHead
from core2_sampler.weak_heads.patch import PatchHead

POOLED = 6
SIGMA = torch.tensor([0.3, 9.0])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, family="sd3", **options):
    """Return a head of small width whose last layer is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind is PatchHead:
            head = PatchHead(family, 4, POOLED, width=16, **{"num_layers": 1, **options})
            last = head.proj_out
        else:
            head = ConvHead(family, 4, widths=(32, 32, 32), **options)
            last = head.network.conv_out
    torch.nn.init.normal_(last.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return head


@torch.no_grad()
def gap_of(head, x, cond, sigma=SIGMA, pooled=None):
    pooled = torch.ones(len(x), POOLED) if pooled is None else pooled
    return head(cond, x=x, sigma=sigma, prompt_embeds=torch.empty(0), pooled=pooled)


@pytest.mark.parametrize("kind", [PatchHead, ConvHead])
@pytest.mark.parametrize("shape", [(2, 4, 8, 6), (2, 4, 9, 12), (2, 4, 3, 5)])
def test_sides_between_two_patches_are_filled_up_with_zeros(kind, shape):
    head, x, cond = make(kind), randn(*shape), randn(*shape, seed=1)
    down, right = (4 - shape[2] % 4) % 4, (4 - shape[3] % 4) % 4
    whole = gap_of(head, *(F.pad(each, (0, right, 0, down)) for each in (x, cond)))
    gap = gap_of(head, x, cond)
    assert gap.abs().max() > 0.1
    torch.testing.assert_close(gap, whole[:, :, : shape[2], : shape[3]])


@pytest.mark.parametrize("kind", [PatchHead, ConvHead])
def test_it_sees_sdxls_latents_as_the_network_does(kind):
    flow, grown = make(kind), make(kind, "sdxl")
    x, cond = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    larger = x * (1 + SIGMA**2).sqrt()[:, None, None, None]
    wanted = gap_of(flow, x, cond)
    torch.testing.assert_close(gap_of(grown, larger, cond), wanted)
    assert (gap_of(flow, larger, cond) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("of", ["x", "cond"])
def test_a_token_of_the_patch_head_tells_of_its_own_square_alone(of):
    head = make(PatchHead, num_layers=0)  # without attention between them
    given = {"x": randn(2, 4, 8, 12), "cond": randn(2, 4, 8, 12, seed=1)}
    here = torch.zeros(2, 4, 8, 12)
    here[:, :, 4:, 4:8] = 1
    changed = given | {of: given[of] + here * randn(2, 4, 8, 12, seed=2)}
    change = gap_of(head, **changed) - gap_of(head, **given)
    assert torch.equal(change != 0, here != 0)


def test_the_patch_head_knows_where_a_square_lies_whatever_the_size():
    head = make(PatchHead, num_layers=0)
    same = randn(1, 4, 4, 4).repeat(2, 1, 3, 2)
    gap = gap_of(head, same, same).unfold(2, 4, 4).unfold(3, 4, 4)  # [B, C, rows, columns, 4, 4]
    squares = gap[0].permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)  # [6, C * 16]
    assert torch.cdist(squares, squares).fill_diagonal_(1).min() > 1e-3
    wider = same.repeat(1, 1, 1, 2)
    torch.testing.assert_close(gap_of(head, wider, wider)[..., :8], gap_of(head, same, same))


def test_only_the_patch_head_reads_the_prompt():
    x, cond, other = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, POOLED, seed=2)
    for kind, reads in ((PatchHead, True), (ConvHead, False)):
        head = make(kind)
        assert torch.equal(gap_of(head, x, cond), gap_of(head, x, cond, pooled=other)) != reads


def test_a_width_that_the_patch_head_cannot_have_is_refused():
    with pytest.raises(ValueError, match="width must be a multiple of 4 and of num_heads, got 20"):
        PatchHead("sd3", 4, POOLED, width=20, num_heads=3)
