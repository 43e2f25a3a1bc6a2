"""Counting evaluations on real modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core2_sampler.nfe import count_nfe
from core2_sampler.testing import tiny_sd3_pipeline


def test_rows_are_counted_inside_the_context_only():
    module = nn.Linear(2, 2)
    with count_nfe(module) as counter:
        module(torch.zeros(6, 2))
        module(torch.zeros(2, 2))
    module(torch.zeros(4, 2))
    assert (counter.calls, counter.rows, counter.per_sample(2)) == (2, 8, 4)
    assert not module._forward_hooks


def test_the_hook_goes_away_after_an_error():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), count_nfe(module):
        module(torch.zeros(6, 3))
    assert not module._forward_hooks


def test_stock_cfg_costs_two_evaluations_a_step():
    pipe = tiny_sd3_pipeline()
    with count_nfe(pipe.transformer) as counter:
        pipe(["a", "b", "c"], num_inference_steps=3, max_sequence_length=4, output_type="latent")
    assert (counter.calls, counter.per_sample(3)) == (3, 6)


def test_a_wrong_batch_size_is_refused():
    module = nn.Linear(2, 2)
    with count_nfe(module) as counter:
        module(torch.zeros(6, 2))
    with pytest.raises(ValueError, match="got 4"):
        counter.per_sample(4)
