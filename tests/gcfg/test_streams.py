"""Masks and weights of latents that hold several streams, by hand."""

import pytest
import torch
from comfyui_gcfg.gcfg.plan import GuidancePlan
from comfyui_gcfg.gcfg.streams import factor_of_delta, parse_stream_weights, stream_names
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal

VIDEO, AUDIO = (1, 6, 3, 4, 2), (1, 5, 7, 2)  # (B, C, frames, h, w), (B, C, length, bands)
NAME = "Guidance Term '2'"


def parts(packed):
    video = packed[:, 0, : 6 * 3 * 4 * 2].reshape(-1, *VIDEO[1:])
    return video, packed[:, 0, 6 * 3 * 4 * 2 :].reshape(-1, *AUDIO[1:])


def test_pairs_are_read():
    assert parse_stream_weights(" Video: 1,audio :0.5\n3: -2 ", NAME) == {"video": 1.0, "audio": 0.5, "3": -2.0}
    assert parse_stream_weights("", NAME) == parse_stream_weights(" , \n", NAME) == {}


@pytest.mark.parametrize("text", ["video", "video 1", ": 1", "video: x", "video: nan", "video: 101", "video: 1e999"])
def test_bad_pairs_are_named(text):
    assert refusal(parse_stream_weights, f"audio: 1, {text}", NAME) == (
        f"Guidance Term '2': stream_weights has '{text}', expected stream: weight with a weight from -100 to 100, such "
        f"as video: 1, audio: 0.5; correct it."
    )


def test_a_stream_is_named_once():
    assert refusal(parse_stream_weights, "audio: 1, audio: 2", NAME) == (
        "Guidance Term '2': stream_weights names 'audio' twice, expected once; delete one."
    )


def test_names():
    assert stream_names([VIDEO, AUDIO]) == (("video", "1"), ("audio", "2"))
    assert stream_names([(1, 4, 8, 8)]) == (("image", "1"),)
    assert stream_names([(1, 64, 20)]) == (("audio", "1"),)
    assert stream_names([VIDEO]) == (("video", "1"),)
    assert stream_names([(1, 16, 9), (1, 1, 5)]) == (("1",), ("2",))


def test_an_unknown_stream_is_refusal():
    assert refusal(factor_of_delta, (), {"sound": 0.5}, [VIDEO, AUDIO], NAME) == (
        "Guidance Term '2': stream_weights names 'sound', expected video or audio, as the latent holds; correct it."
    )


def test_a_stream_is_named_by_its_kind_or_by_its_number():
    for weights in ({"1": 1.0, "video": 0.5}, {"video": 0.5, "audio": 2.0, "1": 1.0}):
        assert refusal(factor_of_delta, (), weights, [VIDEO, AUDIO], NAME) == (
            "Guidance Term '2': stream_weights names one stream twice, as video and as 1, expected once; delete one."
        )


def test_weights_multiply_their_stream():
    for weights in ({"video": 2.0, "audio": 0.5}, {"1": 2.0, "2": 0.5}):
        video, audio = parts(factor_of_delta((), weights, [VIDEO, AUDIO], NAME))
        assert (video == 2.0).all()
        assert (audio == 0.5).all()
    assert factor_of_delta((), {"audio": 1.0}, [VIDEO, AUDIO], NAME) is None


def test_a_mask_is_that_of_the_first_stream():
    mask = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))  # a mask per frame
    video, audio = parts(factor_of_delta((mask,), {"audio": 0.5}, [VIDEO, AUDIO], NAME))
    assert torch.equal(video, mask.expand(1, 6, 3, 4, 2))
    assert (audio == 0.5).all()


def test_each_mask_is_that_of_its_stream():
    masks = torch.rand(1, 4, 2), torch.rand(1, 7, 2)
    video, audio = parts(factor_of_delta(masks, {}, [VIDEO, AUDIO], NAME))
    assert torch.equal(video, masks[0].expand(VIDEO))
    assert torch.equal(audio, masks[1].expand(AUDIO))
    assert refusal(factor_of_delta, (*masks, masks[0]), {}, [VIDEO, AUDIO], NAME) == (
        "Guidance Term '2': mask has 3 parts, expected at most 2 as the latent has; connect one mask."
    )


def test_frames_between_masks_are_blended():
    """Two masks on three frames: the one in the middle is half of each."""
    masks = torch.stack([torch.zeros(4, 2), torch.ones(4, 2)])
    factor = factor_of_delta((masks,), {}, [VIDEO], NAME)
    assert [float(factor[0, 0, frame].mean()) for frame in range(3)] == [0.0, 0.5, 1.0]


def test_a_plan_with_a_mask_of_zeros_leaves_its_term_out():
    terms = [GuidanceTerm(2.0, mask=torch.zeros(1, 8, 8)), GuidanceTerm(3.0, stream_weights={"image": 0.0})]
    plan = GuidancePlan.schedule([*terms, GuidanceTerm(4.0, mask=torch.ones(8, 8))], lambda percent: 1.0 - percent)
    fitted = plan.fitted([(1, 4, 8, 8)])
    assert [term.off for term in fitted.terms] == [True, True, False]
    assert [term.index for term in fitted.active(0.5)] == [2]
    assert fitted.used([1.0, 0.0]) == (2,)
    assert fitted.idle([1.0, 0.0]) == ()
    (nested,) = GuidancePlan.schedule(terms[:1], lambda percent: 1.0 - percent).fitted([VIDEO, AUDIO]).terms
    assert not nested.off  # the audio has no mask
