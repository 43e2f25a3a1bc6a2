"""The training loop: its rate, its result, and that a kill loses nothing but time."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from core2_sampler.training import FitConfig, fit


def regression(model: nn.Module):
    """Least squares for y = 3 x0 - 2 x1 + 1; a batch is a function of the step."""

    def loss(step: int) -> torch.Tensor:
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
        y = 3 * x[:, 0] - 2 * x[:, 1] + 1
        return (model(x)[:, 0] - y).square().mean()

    return loss


def quiet(_: str) -> None:
    pass


def run(model, loss=None, folder=None, evaluate=None, identity=None, **config):
    config = {"learning_rate": 0.05, "warmup_steps": 5, "save_seconds": 0} | config
    further = {"folder": folder, "evaluate": evaluate, "identity": identity, "log": quiet}
    return fit(model, loss or regression(model), FitConfig(**config), **further)


def test_the_rate_warms_up_holds_and_falls_with_the_share():
    config = FitConfig(
        minutes=10, learning_rate=1.0, warmup_steps=10, hold_share=0.5, final_share=0.1
    )
    assert config.rate(0, 0) == pytest.approx(0.1)
    assert config.rate(50, 0.4) == 1.0
    assert config.rate(50, 0.75) == pytest.approx(0.55)
    assert config.rate(50, 1.0) == pytest.approx(0.1)
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert config.rate(50, 0.625) == pytest.approx(quarter)


def test_fit_finds_the_least_squares_solution():
    model = nn.Linear(2, 1)
    run(model, steps=300, ema_decay=0.9, weight_decay=0)
    torch.testing.assert_close(model.weight, torch.tensor([[3.0, -2.0]]), atol=0.02, rtol=0)
    torch.testing.assert_close(model.bias, torch.tensor([1.0]), atol=0.02, rtol=0)


def test_only_what_requires_gradients_is_trained():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    run(model, steps=20)
    assert torch.equal(model.bias, before)


class Deep(nn.Module):
    """A matrix inside a block, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.block(x)))


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    torch.manual_seed(0)
    model = Deep()
    twin = Deep()
    twin.load_state_dict(model.state_dict())
    muon = torch.optim.Muon(
        [twin.block.weight], lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    rest = [twin.block.bias, twin.out.weight, twin.out.bias]
    adam = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.01, betas=(0.9, 0.98))
    loss = regression(twin)
    for step in range(3):
        value = loss(step)
        twin.zero_grad()
        value.backward()
        muon.step()
        adam.step()
    constant = {"warmup_steps": 1, "hold_share": 1.0, "clip": 1e9, "ema_decay": 0.0}
    run(model, steps=3, learning_rate=0.01, muon=True, **constant)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), msg=name)


@pytest.mark.parametrize("muon", [False, True])
def test_a_run_that_died_ends_as_one_that_did_not(tmp_path, muon):
    steps: list[int] = []

    def dying(model: nn.Module, limit: int):
        inner = regression(model)

        def loss(step: int) -> torch.Tensor:
            if step == limit:
                raise KeyboardInterrupt
            steps.append(step)
            return inner(step)

        return loss

    whole = Deep()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    run(whole, steps=60, muon=muon)
    for limit in (20, 21, 45):
        model = Deep()
        model.load_state_dict(start if limit == 20 else model.state_dict())
        with pytest.raises(KeyboardInterrupt):
            run(model, dying(model, limit), tmp_path, steps=60, muon=muon)
    last = Deep()
    run(last, dying(last, -1), tmp_path, steps=60, muon=muon)
    assert steps == list(range(60))  # every step once: none lost, none doubled
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_the_time_box_counts_the_time_before_a_kill(tmp_path):
    first = run(nn.Linear(2, 1), folder=tmp_path, minutes=0.005)
    assert first.done and first.seconds >= 0.3
    again = run(nn.Linear(2, 1), folder=tmp_path, minutes=0.005)
    assert again == first


def test_evaluations_see_the_averaged_weights_at_equal_distances():
    model = nn.Linear(2, 1)
    seen = []

    def evaluate():
        seen.append(model.weight.detach().clone())
        return {"norm": float(model.weight.detach().norm())}

    progress = run(model, evaluate=evaluate, steps=40, evaluations=4, ema_decay=0.99)
    assert [entry["step"] for entry in progress.evaluations] == [10, 20, 30, 40]
    assert torch.equal(seen[-1], model.weight)
    assert progress.evaluations[-1]["norm"] == pytest.approx(float(model.weight.norm()))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="must stay finite, got nan"):
        run(model, lambda step: model(torch.full((1, 2), torch.nan)).sum(), tmp_path, steps=9)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("done", [True, False])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, done):
    of = {"data": {"scales": (2.0, 4.0)}, "head": "tap"}

    def dying(model: nn.Module):
        inner = regression(model)
        return lambda step: inner(step) if step < 3 else stop()

    def stop():
        raise KeyboardInterrupt

    model = nn.Linear(2, 1)
    with nullcontext() if done else pytest.raises(KeyboardInterrupt):
        run(model, None if done else dying(model), tmp_path, identity=of, steps=6)
    others = [of | {"head": "conv"}, {"data": of["data"]}, of | {"data": {"scales": [2.0]}}, None]
    for other, named in zip(others, ("head", "head", "data", "data, other head"), strict=True):
        with pytest.raises(ValueError, match=f"got a checkpoint with other {named} in"):
            run(nn.Linear(2, 1), folder=tmp_path, identity=other, steps=6)
    assert run(nn.Linear(2, 1), folder=tmp_path, identity=of, steps=6).step == 6


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(tmp_path):
    run(nn.Linear(2, 1), folder=tmp_path, steps=2)
    with pytest.raises(ValueError, match="other kind in .*take another folder"):
        run(nn.Linear(2, 1), folder=tmp_path, identity={"kind": "numeracy"}, steps=2)
