"""The control heads. Truth: the affine map that made the data."""

from __future__ import annotations

import pytest
import torch

from core2_sampler.rows import Rows
from core2_sampler.weak_heads.controls import AffineHead, CondHead, LastGapHead

A = torch.tensor([[0.5, -1.0, 0.1], [2.0, 0.3, -0.2]])  # a, b, c of two channels, at sigma 0
B = torch.tensor([[0.1, 0.2, 0.3], [-0.4, 0.5, 0.6]])  # how they grow with sigma


def affine_rows(sigmas, count=8):
    """Return rows whose gap is exactly affine in cond and x, linear in sigma."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor(sigmas).repeat_interleave(count)
    x, cond = torch.randn(2, len(sigma), 2, 4, 4, generator=generator)
    a, b, c = (A + sigma[:, None, None] * B)[..., None, None].unbind(2)
    none = torch.zeros(len(sigma), 1)
    return Rows(x, cond, a * cond + b * x + c, sigma, none, none, none)


def call(head, rows):
    return head(
        rows.cond, x=rows.x, sigma=rows.sigma, prompt_embeds=rows.prompt_embeds, pooled=rows.pooled
    )


@pytest.fixture
def fitted():
    head = AffineHead("sd3", 2)
    rows = affine_rows([0.2, 0.5, 1.0])
    head.fit([rows.map(lambda t: t[::2]), rows.map(lambda t: t[1::2])])
    return head


def test_affine_recovers_the_map_at_every_level(fitted):
    torch.testing.assert_close(fitted.levels, torch.tensor([0.2, 0.5, 1.0]))
    wanted = torch.stack([A + s * B for s in (0.2, 0.5, 1.0)])
    torch.testing.assert_close(fitted.coefficients, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 0.3, 0.5, 0.99, 1.0])
def test_affine_is_linear_in_sigma_between_the_levels(fitted, sigma):
    rows = affine_rows([sigma])
    torch.testing.assert_close(call(fitted, rows), rows.gap, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sigma", "nearest"), [(0.0, 0.2), (3.0, 1.0)])
def test_affine_is_constant_outside_the_levels(fitted, sigma, nearest):
    rows = affine_rows([nearest])
    outside = rows.map(lambda t: torch.full_like(t, sigma) if t is rows.sigma else t)
    torch.testing.assert_close(call(fitted, outside), rows.gap, atol=1e-5, rtol=1e-5)


def test_affine_merges_neighbouring_levels():
    head = AffineHead("sd3", 2)
    head.fit([affine_rows([0.1, 0.2, 0.7, 0.9])], max_levels=2)
    torch.testing.assert_close(head.levels, torch.tensor([0.15, 0.8]))


def test_affine_survives_collinear_regressors():
    head = AffineHead("sd3", 2)
    rows = affine_rows([1.0])
    none = torch.zeros(len(rows), 1)
    head.fit([Rows(rows.x, 2 * rows.x, 3 * rows.x, rows.sigma, none, none, none)])
    again = Rows(rows.x, 2 * rows.x, 3 * rows.x, rows.sigma, none, none, none)
    torch.testing.assert_close(call(head, again), again.gap, atol=1e-4, rtol=1e-4)


def test_last_gap_returns_what_it_saw_until_it_is_reset():
    head, rows = LastGapHead("sd3", 2), affine_rows([1.0])
    assert (call(head, rows) == 0).all()
    head.observe(rows.gap)
    assert torch.equal(call(head, rows), rows.gap)
    head.observe(2 * rows.gap)
    assert torch.equal(call(head, rows), 2 * rows.gap)
    head.reset()
    assert (call(head, rows) == 0).all()


def test_last_gap_of_another_run_is_refused():
    head, rows = LastGapHead("sd3", 2), affine_rows([1.0])
    head.observe(rows.gap[:3])
    with pytest.raises(ValueError, match="reset"):
        call(head, rows)


def test_cond_is_no_guidance():
    rows = affine_rows([0.5])
    assert torch.equal(call(CondHead("sd3", 2), rows), torch.zeros_like(rows.gap))
