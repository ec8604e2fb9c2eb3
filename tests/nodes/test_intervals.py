"""Terms of which one begins where the other ends, on every schedule: exactly one of them acts at every step."""

import pytest
from comfyui_gcfg.gcfg.plan import GuidancePlan
from comfyui_gcfg.gcfg.terms import GuidanceTerm

SCHEDULERS = ["normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform"]


@pytest.fixture(params=["eps", "flow"])
def sampling(request, comfy):
    """The model_sampling of SD1.5, and that of SD3 and Z-Image."""
    if request.param == "eps":
        return comfy.model_sampling.ModelSamplingDiscrete()
    if not hasattr(comfy.model_sampling, "ModelSamplingDiscreteFlow"):
        pytest.skip("this ComfyUI has no flow models")
    flow = comfy.model_sampling.ModelSamplingDiscreteFlow()
    flow.set_parameters(shift=3.0)
    return flow


def levels(comfy, sampling, scheduler, steps):
    if hasattr(comfy.samplers, "calculate_sigmas"):
        return comfy.samplers.calculate_sigmas(sampling, scheduler, steps).tolist()
    model = type("Model", (), {"model_sampling": sampling})()
    return comfy.samplers.calculate_sigmas_scheduler(model, scheduler, steps).tolist()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_neighbours_never_act_together(comfy, sampling, scheduler):
    for middle in (0.25, 0.5, 0.6, 0.75):
        terms = [GuidanceTerm(4.0, 0.0, middle), GuidanceTerm(4.0, middle, 1.0)]
        plan = GuidancePlan.schedule(terms, sampling.percent_to_sigma)
        boundary = plan.terms[1].sigma_start
        for steps in range(1, 41):
            for sigma in levels(comfy, sampling, scheduler, steps):
                acting = [(term.index, term.weight) for term in plan.active(sigma)]
                assert acting == [(0 if sigma > boundary else 1, 4.0)]


def test_schedules_have_steps_on_the_boundary(comfy, sampling):
    """Else the test above would prove nothing."""
    plan = GuidancePlan.schedule([GuidanceTerm(4.0, 0.5, 1.0)], sampling.percent_to_sigma)
    met = [s for s in SCHEDULERS for n in range(1, 41) if plan.terms[0].sigma_start in levels(comfy, sampling, s, n)]
    assert met
