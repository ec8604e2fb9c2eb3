"""Guidance nodes in graphs that a real server runs: the image of the stock KSampler, pixel by pixel."""

import itertools

import numpy
import pytest

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
SETTINGS = {"seed": 5, "steps": 3, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
NODES = {
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "RescaleCFG": {"multiplier": 0.7},
    "APG": {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.5},
    "CFGOverride": {"cfg": 2.0, "start_percent": 0.0, "end_percent": 0.6},
}


class Graph:
    """A prompt in API form."""

    def __init__(self):
        self.nodes, self._ids = {}, itertools.count(1)
        self.checkpoint = self.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        self.positive, self.negative = self.text("seven"), self.text("a circle")

    def add(self, class_type, **inputs):
        key = str(next(self._ids))
        self.nodes[key] = {"class_type": class_type, "inputs": inputs}
        return [key, 0]

    def text(self, text):
        return self.add("CLIPTextEncode", clip=[self.checkpoint[0], 1], text=text)

    def term(self, weight, conditioning, **more):
        kind = {
            "start_percent": 0.0,
            "end_percent": 1.0,
            "label": "",
            "curve": "constant",
            "end_weight": 0.0,
            "points": "",
        }
        return self.add("GCFGGuidanceTerm", weight=weight, conditioning=conditioning, **kind, **more)

    def stock(self, model, cfg=5.0):
        return self.add(
            "KSampler",
            model=model,
            cfg=cfg,
            positive=self.positive,
            negative=self.negative,
            latent_image=self.latent,
            **SETTINGS,
        )

    def ours(self, model, unconditional, *terms):
        sockets = {f"term_{number}": term for number, term in enumerate(terms, start=1)}
        return self.add(
            "GCFGKSampler", model=model, unconditional=unconditional, latent_image=self.latent, **sockets, **SETTINGS
        )

    def image(self, latent):
        self.add("PreviewImage", images=self.add("VAEDecode", samples=latent, vae=[self.checkpoint[0], 2]))
        return self.nodes


@pytest.fixture
def picture(client, pixels):
    return lambda graph, latent: pixels(client.run(graph.image(latent)))


@pytest.mark.parametrize("name", NODES)
def test_a_pair_and_one_term_are_the_ksampler(client, picture, name):
    if name not in client.object_info:
        pytest.skip(f"this ComfyUI has no {name}")

    def graph():
        made = Graph()
        return made, made.add(name, model=made.checkpoint, **NODES[name])

    made, model = graph()
    expected = picture(made, made.stock(model))
    made, model = graph()
    terms = (made.term(5.0, made.positive), made.term(-4.0, made.negative))
    assert numpy.array_equal(picture(made, made.ours(model, made.text("a square"), *terms)), expected)
    made, model = graph()
    assert numpy.array_equal(picture(made, made.ours(model, made.negative, made.term(5.0, made.positive))), expected)
    made, model = graph()
    assert not numpy.array_equal(picture(made, made.stock(made.checkpoint)), expected), "the node acts"


def test_a_model_sampling_clone_that_stock_sampled_before(picture):
    """One prompt in which stock samples the clone, then ours takes it as a term: refused until "Free memory" once."""
    made = Graph()
    clone = made.add("ModelSamplingDiscrete", model=made.checkpoint, sampling="v_prediction", zsnr=False)
    sampled = made.stock(clone, cfg=4.0)
    ours = made.ours(made.checkpoint, made.negative, made.term(3.0, made.positive, model=clone))
    made.nodes[ours[0]]["inputs"]["latent_image"] = sampled
    after = picture(made, ours)
    made.nodes[ours[0]]["inputs"]["term_1"] = made.term(3.0, made.positive)
    assert not numpy.array_equal(picture(made, ours), after), "the clone's term acts"
