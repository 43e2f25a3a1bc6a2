"""The time-boxed training loop: its rate, its result, and that a kill loses nothing but time."""

import pytest
import torch
from torch import nn

from core2_sampler.training import TimeBox, fit, write_atomically


def regression(model: nn.Module):
    """Least squares for y = 3 x0 - 2 x1 + 1; a batch is a function of the step."""

    def loss(step: int) -> torch.Tensor:
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
        y = 3 * x[:, 0] - 2 * x[:, 1] + 1
        return (model(x)[:, 0] - y).square().mean()

    return loss


def quiet(_: str) -> None:
    pass


def test_the_rate_warms_up_stays_and_falls_with_the_clock():
    box = TimeBox(minutes=10, learning_rate=1.0, warmup_steps=10, decay_share=0.5)
    assert box.rate(0, 0) == pytest.approx(0.1)
    assert box.rate(50, 250) == 1.0
    assert box.rate(50, 450) == pytest.approx(0.5)
    assert box.rate(50, 600) == pytest.approx(0.01)


def test_fit_finds_the_least_squares_solution(tmp_path):
    model = nn.Linear(2, 1)
    box = TimeBox(0.03, 0.05, warmup_steps=5)
    average = fit(model, regression(model), box, tmp_path, ema_decay=0.9, weight_decay=0, log=quiet)
    torch.testing.assert_close(average.weight, torch.tensor([[3.0, -2.0]]), atol=0.05, rtol=0)
    torch.testing.assert_close(average.bias, torch.tensor([1.0]), atol=0.05, rtol=0)


def test_a_run_that_died_goes_on_where_its_checkpoint_stood(tmp_path):
    steps: list[int] = []

    def dying(model: nn.Module, limit: int):
        inner = regression(model)

        def loss(step: int) -> torch.Tensor:
            if step >= limit:
                raise KeyboardInterrupt
            steps.append(step)
            return inner(step)

        return loss

    box = TimeBox(0.01, 0.05, warmup_steps=5)
    model = nn.Linear(2, 1)
    with pytest.raises(KeyboardInterrupt):
        fit(model, dying(model, 20), box, tmp_path, log=quiet, save_seconds=0)
    weights = model.weight.detach().clone()
    steps.clear()
    again = nn.Linear(2, 1)
    with pytest.raises(KeyboardInterrupt):
        fit(again, dying(again, 20), box, tmp_path, log=quiet, save_seconds=0)
    assert steps == []  # steps 0 to 19 were saved: nothing is done twice
    torch.testing.assert_close(again.weight.detach(), weights, rtol=0, atol=0)
    fit(again, dying(again, 10**9), box, tmp_path, log=quiet, save_seconds=0)
    assert steps[0] == 20


def test_a_finished_run_is_not_trained_further(tmp_path):
    model = nn.Linear(2, 1)
    box = TimeBox(0.005, 0.05)
    first = fit(model, regression(model), box, tmp_path, log=quiet)
    again = fit(nn.Linear(2, 1), regression(model), box, tmp_path, log=quiet)
    torch.testing.assert_close(again.weight, first.weight, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="must stay finite.*near step"):
        fit(
            model,
            lambda step: model(torch.full((1, 2), torch.nan)).sum(),
            TimeBox(0.01, 0.05),
            tmp_path,
            log=quiet,
            log_seconds=0,
        )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
