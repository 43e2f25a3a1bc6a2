"""The fused operation: the torch reference, and the Triton kernel.

The kernel runs on the GPU where there is one, and else in Triton's interpreter on the CPU. Truth:
the formulas of guidance and of the solvers in float64, as their papers write them; and
`core2_sampler.guidance` with `core2_sampler.samplers`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import partial

import pytest
import torch

from core2_sampler import guidance
from core2_sampler.fused import reference
from core2_sampler.fused.state import BLOCK, SIGMA, State, step_table
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler
from core2_sampler.schedules import flow_sigmas, karras_sigmas
from core2_sampler.steps import Plan, Step

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
IMPLEMENTATIONS = ("reference", pytest.param("kernel", marks=needs_triton))
KINDS = ("cond", "cfg", "fast", "slow", "slow-in-model")
SOLVERS = {
    "euler": (sample_euler, flow_sigmas(4, 3.0)),
    "2m-flow": (partial(sample_dpmpp_2m, path="flow"), flow_sigmas(4, 3.0)),
    "2m-ve": (partial(sample_dpmpp_2m, path="ve"), karras_sigmas(4, 0.03, 14.6)),
}
SCALES = torch.tensor([[3.5, 7.5, 1.5], [4.5, 2.0, 6.0], [5.0, 5.0, 1.1], [2.5, 9.0, 3.0]])
W2S = (1.5, 0.3, 0.0, 2.5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step_function(name):
    if name == "reference":
        return reference.guided_step
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is declared, and later
    from core2_sampler.fused import kernel

    assert (DEVICE == "cpu") == ("Interpreted" in type(kernel._guided_step).__name__)
    return kernel.guided_step


def is_interpreted(step):
    return DEVICE == "cpu" and step is not reference.guided_step


def plan_of(kind, steps=4):
    name = kind.split("-")[0]
    return Plan(tuple(Step(name, 2.0, W2S[i]) for i in range(steps)), kind == "slow-in-model")


def ulp(value, dtype):
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(value, info.eps), exponent)


class Formula:
    """One step after the other in float64; beside each result the size of what was summed up."""

    def __init__(self, kind, sigmas, solver):
        self.kind, self.sigmas, self.solver = kind, sigmas.double(), solver
        self.before = self.size_before = None

    def guide(self, i, scale, cond, uncond, guess):
        s, gap = W2S[i], cond - uncond
        if self.kind == "cond":
            return cond, cond.abs()
        size = cond.abs() + (scale - 1).abs() * (cond.abs() + uncond.abs() + guess.abs())
        strong = uncond + scale * gap
        if self.kind == "cfg":
            return strong, size
        weak = guess if self.kind == "slow-in-model" else cond + (scale - 1) * guess
        size = size + guess.abs()
        if self.kind == "fast":
            return weak, size
        return weak + s * (strong - weak), (1 + 2 * abs(s)) * 2 * size

    def step(self, i, x, *parts):
        now, after = self.sigmas[i], self.sigmas[i + 1]
        d, size = self.guide(i, *parts)
        if self.solver == "euler":
            return x + (after - now) * d, x.abs() + (after - now).abs() * size
        x0, size = x - now * d, x.abs() + now * size
        signal = (lambda s: 1 - s) if self.solver == "2m-flow" else (lambda s: torch.ones_like(s))
        length = [
            (signal(b) / b).log() - (signal(a) / a).log()
            for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)
        ]
        guess, guess_size = x0, size
        if i and after > 0 and math.isfinite(length[i - 1]):
            r = length[i - 1] / length[i]  # Lu et al., algorithm 2
            guess = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * self.before
            guess_size = (1 + 1 / (2 * r)) * size + 1 / (2 * r) * self.size_before
        self.before, self.size_before = x0, size
        weight = signal(after) * -torch.expm1(-length[i]) if after > 0 else torch.ones_like(after)
        return after / now * x + weight * guess, after / now * x.abs() + weight * guess_size


def check(got, exact, size):
    """At most an ulp of the output beyond rounding, and the rounding of the sums in float32."""
    got = got.cpu()
    finite = torch.isfinite(exact.to(got.dtype)) & (size < torch.finfo(torch.float32).max)
    off = (got.double() - exact).abs()[finite]
    allowed = 1.5 * ulp(exact[finite], got.dtype) + 16 * 2.0**-24 * size[finite]
    assert (off <= allowed).all(), (off / allowed).max()
    nothing = (exact == 0) & (size == 0)
    assert torch.equal(torch.signbit(got[nothing]), torch.signbit(exact[nothing]))


def run(step, kind, solver, x, parts, input_dtype=torch.float32, change=lambda d: d):
    """Run four steps on given predictions; yield x after each, and its truth."""
    function, sigmas = SOLVERS[solver]
    batch, scales = len(x), SCALES[:, : len(x)]
    state = State.allocate(
        x.to(DEVICE),
        4,
        pairs=True,
        multistep=solver != "euler",
        input_dtype=input_dtype,
    )
    state.begin(x, step_table(plan_of(kind), sigmas, function, batch, scales))
    formula = Formula(kind, sigmas, solver)
    for i, (cond, uncond, guess) in enumerate(parts):
        start = state.x.double().cpu()
        pair = kind not in ("cond", "fast")
        d = change((torch.cat([uncond, cond]) if pair else cond).to(DEVICE))
        guessed = None if kind in ("cond", "cfg") else change(guess.to(DEVICE))
        step(state, d, guessed, guess_is_gap=kind != "slow-in-model")
        scale = scales[i].double()[:, None, None, None]
        exact, size = formula.step(i, start, scale, cond.double(), uncond.double(), guess.double())
        if formula.before is not None:
            check(state.before, formula.before, formula.size_before)
            formula.before = state.before.double().cpu()  # so that only this step's rounding shows
        assert torch.equal(state.row[0], state.table[i + 1])
        assert state.step.tolist() == [i + 1] * len(state.step)
        check_seen(step, state)
        yield state.x.clone(), exact, size


def check_seen(step, state):
    """What the denoiser is given is x, rounded once, in both halves."""
    first, second = state.seen.chunk(2)
    assert torch.equal(first.nan_to_num(9), second.nan_to_num(9))
    if is_interpreted(step) and state.seen.dtype == torch.bfloat16:
        # The interpreter cuts float32 off to bfloat16, where a GPU rounds.
        x, first = (tensor[torch.isfinite(state.x)].double() for tensor in (state.x, first))
        assert ((first - x).abs() <= ulp(x, torch.bfloat16)).all()
    else:
        assert torch.equal(first.nan_to_num(9), state.x.to(first.dtype).nan_to_num(9))


def random_parts(shape, dtype, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(steps, 3, *shape, generator=generator)
    return [tuple(part.to(dtype) for part in triple) for triple in draw]


def latents(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# To the kernel the two paths of 2M are numbers in a table, and guidance knows no solver.
@pytest.mark.parametrize(
    ("implementation", "kind", "solver"),
    [("reference", kind, solver) for kind in KINDS for solver in SOLVERS]
    + [
        pytest.param("kernel", kind, solver, marks=needs_triton)
        for kind, solver in [*((kind, "euler") for kind in KINDS), ("slow", "2m-flow")]
    ],
)
def test_every_kind_and_solver_is_the_formula(implementation, kind, solver):
    step, shape = step_function(implementation), (2, 3, 17, 23)
    assert BLOCK < shape[1] * shape[2] * shape[3] < 2 * BLOCK
    for result in run(step, kind, solver, latents(shape), random_parts(shape, torch.float32)):
        check(*result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("network", DTYPES)
def test_every_dtype_of_the_network_is_rounded_once(implementation, network):
    step, shape = step_function(implementation), (2, 4, 4, 4)
    for result in run(step, "slow", "2m-ve", latents(shape), random_parts(shape, network), network):
        check(*result)


def transposed(d):
    return d.transpose(2, 3).contiguous().transpose(2, 3)


def spread(d):
    wide = torch.full((len(d) + 1, *d.shape[1:-1], 3 * d.shape[-1]), math.nan, dtype=d.dtype)
    wide[1:, ..., ::3] = d
    return wide[1:, ..., ::3]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "change", [lambda d: d.contiguous(memory_format=torch.channels_last), transposed, spread]
)
def test_any_strides(implementation, change):
    step, shape = step_function(implementation), (2, 5, 9, 31)
    parts, x = random_parts(shape, torch.bfloat16), latents(shape)
    plain, *_ = next(run(step, "slow", "euler", x, parts))
    strided, *_ = next(run(step, "slow", "euler", x, parts, change=change))
    assert torch.equal(plain, strided)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["cond", "cfg", "fast", "slow"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(implementation, kind, dtype):
    step, info = step_function(implementation), torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest denormal
    if is_interpreted(step) and dtype is torch.bfloat16:
        tiny = 4 * info.smallest_normal  # the interpreter misreads denormals of bfloat16
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -3.0, 5 * tiny, -tiny, 60000.0]
    grid = torch.tensor(values, dtype=torch.float64).to(dtype)
    cond, uncond = (
        part.reshape(1, 1, 10, 10) for part in torch.meshgrid(grid, grid, indexing="ij")
    )
    x, guess = uncond.mT.float().contiguous(), cond.flip(2).contiguous()
    got, exact, size = next(run(step, kind, "euler", x, [(cond, uncond, guess)], dtype))
    check(got, exact, size.nan_to_num(math.inf))
    inputs = {"cond": (), "cfg": (uncond,), "fast": (guess,), "slow": (uncond, guess)}[kind]
    good, got = torch.isfinite(torch.stack([x, cond, *inputs])).all(0), got.cpu()
    assert not torch.isfinite(got[~good]).any()  # what went wrong is never hidden
    assert torch.isfinite(got[good]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e4, 1e30, -50.0])
def test_huge_scales(implementation, scale):
    step, shape = step_function(implementation), (1, 2, 8, 8)
    x, (cond, uncond, _) = latents(shape), random_parts(shape, torch.bfloat16)[0]
    state = State.allocate(x.to(DEVICE), 1, pairs=True)
    plan, sigmas = Plan((Step("cfg", scale),)), torch.tensor([0.75, 0.25])
    state.begin(x, step_table(plan, sigmas, sample_euler, 1))
    step(state, torch.cat([uncond, cond]).to(DEVICE))
    c, u = cond.double(), uncond.double()
    check(state.x, x.double() - 0.5 * (u + scale * (c - u)), abs(scale) * (c.abs() + u.abs()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_agrees_with_guidance_and_samplers(solver, kind):
    function, sigmas = SOLVERS[solver]
    shape = (1, 3, 5, 7)
    x, parts = latents(shape), random_parts(shape, torch.float32)
    scales = SCALES[:, :1]

    def predict(_x, i):
        cond, uncond, guess = parts[i]
        scale = float(scales[i, 0])
        strong = guidance.strong(cond, uncond, scale)
        weak = guess if kind == "slow-in-model" else guidance.weak(cond, guess, scale)
        slow = guidance.weak_to_strong(weak, strong, W2S[i])
        return {"cond": cond, "cfg": strong, "fast": weak}.get(kind, slow)

    truth = []
    function(predict, x, sigmas, on_step=lambda _i, x: truth.append(x.clone()))
    ours = run(reference.guided_step, kind, solver, x, parts)
    for (got, *_), expected in zip(ours, truth, strict=True):
        off = (got.cpu() - expected).abs().max()
        assert off < 1e-6 * max(1.0, 2 * expected.abs().max()), off


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_head_that_says_nothing_is_cond_to_the_bit(implementation):
    step, shape = step_function(implementation), (1, 4, 8, 8)
    parts = [(cond, cond, torch.zeros_like(cond)) for cond, *_ in random_parts(shape, DTYPES[2])]
    runs = [
        [x for x, *_ in run(step, kind, "2m-flow", latents(shape), parts, DTYPES[2])]
        for kind in ("cond", "fast")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("w2s", "plain"), [(0.0, "fast"), (1.0, "cfg")])
def test_weak_to_strong_ends_in_weak_and_in_strong_to_the_bit(implementation, w2s, plain):
    step, shape = step_function(implementation), (1, 4, 8, 8)
    (cond, uncond, guess), x = random_parts(shape, torch.float32)[0], latents(shape)
    pair = torch.cat([uncond, cond])
    results = []
    for given in ((pair, guess), (cond, guess) if plain == "fast" else (pair,)):
        state = State.allocate(x.to(DEVICE), 1, pairs=True)
        plan, sigmas = Plan((Step("cfg", 7.5, w2s),)), torch.tensor([0.75, 0.25])
        state.begin(x, step_table(plan, sigmas, sample_euler, 1))
        step(state, *(tensor.to(DEVICE) for tensor in given))
        results.append(state.x)
    assert torch.equal(*results)


def test_the_table_starts_at_the_first_noise_level_and_ends_with_the_last():
    function, sigmas = SOLVERS["2m-ve"]
    table = step_table(plan_of("cfg"), sigmas, function, 2)
    assert torch.equal(table[:, SIGMA, 0].double(), sigmas.float().double())
    assert torch.isfinite(table).all()


def test_a_run_that_broke_does_not_reach_the_next_one():
    function, sigmas = SOLVERS["2m-flow"]
    x, parts = latents((1, 1, 4, 4)), random_parts((1, 1, 4, 4), torch.float32)
    state = State.allocate(x, 4, pairs=False, multistep=True)
    results = []
    for d in (torch.full_like(x, math.nan), parts[0][0], parts[0][0]):
        state.begin(x, step_table(plan_of("cond"), sigmas, function, 1))
        for _ in range(4):
            reference.guided_step(state, d)
        results.append(state.x.clone())
    assert torch.isnan(results[0]).all()
    assert torch.isfinite(results[1]).all()
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": print}, "solver must be"),
        ({"sigmas": torch.ones(3)}, "sigmas must be 5"),
        ({"scales": torch.ones(4, 3)}, r"scales must be \[4, 2\]"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, message):
    values = {"sigmas": flow_sigmas(4), "solver": sample_euler, "scales": None} | change
    with pytest.raises(ValueError, match=message):
        step_table(plan_of("cfg"), batch_size=2, **values)
