"""Schedules and samplers against diffusers' schedulers, and the laws that editing x0 relies on."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from vsuav.schedule import SOLVERS, Sampler, Schedule, add_noise

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
LATENT = Schedule(**BETAS, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1)


def network(x: torch.Tensor, t: int) -> torch.Tensor:
    """Any smooth function of state and time does for a prediction."""
    return torch.sin(3 * x + t / 300)


def sample(sampler: Sampler, x: torch.Tensor, edit=lambda i, x0: x0) -> torch.Tensor:
    """The loop as the engine runs it: earlier estimates newest first, no more of them than the solver reads."""
    earlier = []
    for i, t in enumerate(sampler.timesteps):
        v = network(x, t)
        x0 = edit(i, sampler.predict(i, x, v))
        x = sampler.advance(i, x, v, x0, earlier)
        earlier = [x0, *earlier][: sampler.history]
    return x


def theirs(solver: str, schedule: Schedule, times: tuple[int, ...]):
    """diffusers' scheduler for a solver, on exactly these time steps."""
    config = {
        **BETAS,
        "prediction_type": "v_prediction",
        "steps_offset": schedule.steps_offset,
        "timestep_spacing": schedule.timestep_spacing,
    }
    if solver == "ddim":
        scheduler = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=schedule.set_alpha_to_one)
        scheduler.set_timesteps(len(times))
        return scheduler
    config["final_sigmas_type"] = "zero" if schedule.set_alpha_to_one else "sigma_min"
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(**config, solver_order=2, solver_type="bh2")
    else:
        scheduler = DPMSolverMultistepScheduler(**config, solver_order=2, euler_at_final=True)
    scheduler.set_timesteps(len(times))
    alphas = scheduler.alphas_cumprod[list(times)]
    last = (
        torch.zeros(1)
        if schedule.set_alpha_to_one
        else ((1 - scheduler.alphas_cumprod[:1]) / scheduler.alphas_cumprod[:1]) ** 0.5
    )
    scheduler.timesteps = torch.tensor(times)
    scheduler.sigmas = torch.cat([((1 - alphas) / alphas) ** 0.5, last])
    return scheduler


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_whole_run_equals_diffusers(solver, steps, spacing, whole):
    """Steps that divide 1000, where diffusers' DDIM and the list of time steps agree on what comes next."""
    schedule = Schedule(
        **BETAS, prediction_type="v_prediction", set_alpha_to_one=whole, steps_offset=1, timestep_spacing=spacing
    )
    sampler = Sampler(schedule, steps, solver)
    scheduler = theirs(solver, schedule, sampler.timesteps)
    assert scheduler.timesteps.tolist() == list(sampler.timesteps)
    x = reference = torch.randn(4, 50)
    for t in scheduler.timesteps:
        reference = scheduler.step(network(reference, int(t)), t, reference).prev_sample
    torch.testing.assert_close(sample(sampler, x), reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [3, 7, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_equal_diffusers_for_steps_that_do_not_divide(steps, spacing):
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert list(Sampler(LATENT, steps, spacing=spacing).timesteps) == scheduler.timesteps.tolist()


def test_the_schedule_table_equals_diffusers():
    for kind in ("linear", "scaled_linear"):
        theirs = DDPMScheduler(beta_start=2e-4, beta_end=0.01, beta_schedule=kind).alphas_cumprod
        ours = Schedule(beta_start=2e-4, beta_end=0.01, beta_schedule=kind).alphas_cumprod
        torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)


@pytest.mark.parametrize("level", [0, 20, 350, 999])
def test_noising_equals_diffusers(level):
    clean, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    theirs = DDPMScheduler(**BETAS).add_noise(clean, noise, torch.tensor([level, level]))
    torch.testing.assert_close(add_noise(LATENT, clean, noise, level), theirs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_edit_moves_the_result_as_far_as_it_moved_x0_at_the_last_step(solver):
    """The noise is not recomputed from the edited estimate: only the signal part of the last state follows it."""
    x, delta = torch.randn(4, 50), torch.randn(4, 50)
    sampler = Sampler(LATENT, 1, solver)
    moved = sample(sampler, x, edit=lambda i, x0: x0 + delta) - sample(sampler, x)
    torch.testing.assert_close(moved, LATENT.alphas_cumprod[0].sqrt() * delta, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_edit_keeps_the_noise_of_the_state(solver):
    """From step 0 to 1 every solver is first order, so the next state is a x0 + s noise with the noise of x and v."""
    sampler = Sampler(LATENT, 4, solver)
    x, v, edited = torch.randn(3, 4, 50).unbind()
    t, following = sampler.timesteps[:2]
    alpha, after = LATENT.alphas_cumprod[t], LATENT.alphas_cumprod[following]
    noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
    expected = after.sqrt() * edited + (1 - after).sqrt() * noise
    torch.testing.assert_close(sampler.advance(0, x, v, edited), expected, atol=1e-5, rtol=0)


@given(
    st.sampled_from(sorted(SOLVERS)), st.integers(1, 12), st.sampled_from(["leading", "trailing"]), st.integers(0, 9)
)
def test_the_right_answer_is_a_fixed_point(solver, steps, spacing, seed):
    """If every prediction names the same clean latent, the run ends there but for the last trace of noise."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 30, generator=generator)
    sampler = Sampler(LATENT, steps, solver, spacing)
    signal, sigma = LATENT.signal_and_noise(sampler.timesteps[0])
    x, earlier = signal * clean + sigma * noise, []
    for i, t in enumerate(sampler.timesteps):
        signal, sigma = LATENT.signal_and_noise(t)
        v = (signal * x - clean) / sigma
        x0 = sampler.predict(i, x, v)
        torch.testing.assert_close(x0, clean, atol=2e-3, rtol=0)
        x = sampler.advance(i, x, v, x0, earlier)
        earlier = [x0, *earlier][: sampler.history]
    signal, sigma = LATENT.signal_and_noise(-1)
    torch.testing.assert_close(x, signal * clean + sigma * noise, atol=5e-3, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_is_rounded_once(solver):
    """Inputs in float16 give the float32 result, rounded."""
    sampler = Sampler(LATENT, 5, solver)
    x, v, x0, *earlier = torch.randn(5, 4, 30).half().unbind()
    exact = sampler.advance(3, x.float(), v.float(), x0.float(), [e.float() for e in earlier])
    assert torch.equal(sampler.advance(3, x, v, x0, earlier), exact.half())
    assert torch.equal(sampler.predict(3, x, v), sampler.predict(3, x.float(), v.float()).half())


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_reads_more_history_than_it_says(solver):
    sampler = Sampler(LATENT, 6, solver)
    x, v, x0, one, two, three = torch.randn(6, 4, 30).unbind()
    earlier = [one, two, three]
    same = sampler.advance(4, x, v, x0, earlier[: sampler.history])
    assert torch.equal(sampler.advance(4, x, v, x0, earlier), same)
    if sampler.history:
        with pytest.raises(ValueError, match="earlier estimates at step 4"):
            sampler.advance(4, x, v, x0, earlier[: sampler.history - 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be one of scaled_linear, linear"),
        ({"prediction_type": "sample"}, "prediction_type must be"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing must be"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is not supported"),
        ({"beta_end": 1.5}, "betas must satisfy"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a whole number between 1 and 65536, got 0"),
    ],
)
def test_a_configuration_that_would_be_misread_is_refused(change, message):
    config = {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction", "skip_prk_steps": True}
    assert Schedule.from_config(config).prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(config | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LATENT, 0), "steps must be between 1 and 1000, got 0"),
        ((LATENT, 1001), "steps must be between 1 and 1000, got 1001"),
        ((LATENT, 1000), "steps must be below 1000 with leading spacing"),
        ((LATENT, 4, "euler"), "solver must be one of ddim, dpm\\+\\+2m, unipc, got 'euler'"),
        ((LATENT, 4, "ddim", "middle"), "spacing must be one of leading, trailing, got 'middle'"),
        ((Schedule(**BETAS), 4), "prediction_type must be v_prediction"),
        ((Schedule(prediction_type="v_prediction", clip_sample=True), 4), "clip_sample must be false"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)


def test_a_noise_level_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="level must be between 0 and 999, got 1000"):
        add_noise(LATENT, torch.zeros(1), torch.zeros(1), 1000)
