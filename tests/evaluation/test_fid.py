"""FID against torchmetrics' and torch-fidelity's own values, and against the closed form for Gaussians."""

from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from comfyui_gcfg.evaluation.metrics.features import RealFeatures, load_extractor
from comfyui_gcfg.gcfg.errors import GuidanceError
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance


class Moments(torch.nn.Module):
    """Twelve numbers of an image: its quarters' mean colours."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


class Recall(torch.nn.Module):
    """Features by number: the image's first two bytes are the row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, images):
        return self.table[images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()]


def fid(real, fake, extractor):
    return RealFeatures(real, extractor).fid(fake)


def numbered(rows):
    images = torch.zeros(len(rows), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = rows % 256, rows // 256
    return images


def pictures(count, seed, low=0, size=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A weights file of the real Inception layout, random; nothing is fetched."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        mock.patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_the_value_is_torchmetrics_own():
    real, fake = pictures(40, 0), pictures(30, 1, low=60)
    peer = FrechetInceptionDistance(Moments(), normalize=False, input_img_size=(3, 24, 24))
    peer.update(real, real=True)
    peer.update(fake, real=False)
    # Theirs is rounded to float32 at the end.
    assert fid(real.split(7), fake.split(11), Moments()) == pytest.approx(peer.compute().item(), rel=1e-6)


def test_the_value_is_torch_fidelitys_own():
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(900, 16, generator=generator, dtype=torch.float64)
    table[400:] = table[400:] @ torch.randn(16, 16, generator=generator, dtype=torch.float64) + 0.5
    peer = fid_statistics_to_metric(
        fid_features_to_statistics(table[:400]), fid_features_to_statistics(table[400:]), verbose=False
    )
    rows = torch.arange(900)
    value = fid(numbered(rows[:400]).split(64), numbered(rows[400:]).split(64), Recall(table))
    assert value == pytest.approx(peer["frechet_inception_distance"], rel=1e-9)


def test_gaussians_have_their_closed_form():
    """Samples whose mean and covariance are exact: FID is then |m - n|^2 + tr(A + B - 2 (A B)^1/2) itself."""
    noise = np.random.default_rng(3)
    count, width = 500, 8
    sets, means, covariances = [], [], []
    for scale in (1.0, 3.0):
        mix = noise.normal(size=(width, width)) * scale
        covariances.append(mix @ mix.T)
        means.append(noise.normal(size=width))
        white = noise.normal(size=(count, width))
        white -= white.mean(0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
        sets.append(white @ np.linalg.cholesky(covariances[-1]).T + means[-1])
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    table = torch.from_numpy(np.concatenate(sets))
    rows = torch.arange(2 * count)
    value = fid(numbered(rows[:count]).split(99), numbered(rows[count:]).split(99), Recall(table))
    assert value == pytest.approx(expected, rel=1e-9)


def test_one_set_of_real_images_serves_many_sets():
    real = RealFeatures(pictures(30, 0).split(8), Moments())
    far, near = pictures(30, 1, low=100), pictures(30, 2)
    apart = [fid(pictures(30, 0).split(8), [images], Moments()) for images in (far, near)]
    assert [real.fid([far]), real.fid([near]), real.fid([far])] == [*apart, apart[0]]
    assert apart[1] < apart[0]


def test_inception_from_a_local_file_has_the_features_of_both_libraries(inception_weights):
    """The resize variants: TensorFlow's is torch-fidelity's, the other torchmetrics'."""
    images = pictures(4, 5, size=80)
    theirs = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights))
    peer = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(inception_weights))
    ours = load_extractor("inception", inception_weights, "tensorflow")
    torch.testing.assert_close(ours(images), theirs(images)[0], rtol=0, atol=0)
    ours = load_extractor("inception", inception_weights, "torchmetrics")
    torch.testing.assert_close(ours(images), peer.inception(images), rtol=0, atol=0)
    assert not torch.equal(ours(images), theirs(images)[0])


def test_an_extractor_of_ones_own_is_found_by_its_name():
    network = load_extractor("torch.nn:Identity", None, "none")
    assert isinstance(network, torch.nn.Identity)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("torch.nn:Identity", None, "fid.resize is 'torchmetrics', expected 'none' with this fid.extractor"),
        ("inception", None, "fid.extractor_weights is empty, expected torch-fidelity's weights-inception-2015-12-05"),
        ("inception", "words.txt", "fid.extractor_weights is '.*words.txt', expected torch-fidelity's"),
        ("resnet", None, "fid.extractor is 'resnet', expected 'package.module:factory'"),
        ("no.such:thing", None, "fid.extractor is 'no.such:thing', but importing 'no.such' failed .*PYTHONPATH"),
        ("torch.nn:Nothing", None, "fid.extractor is 'torch.nn:Nothing', but 'torch.nn' has no 'Nothing'"),
        ("torch.nn:Identity", "gone.pth", "fid.extractor_weights is '.*gone.pth', which does not exist"),
        ("pathlib:Path", "words.txt", "fid.extractor 'pathlib:Path' returned a .*Path, expected a torch nn.Module"),
    ],
)
def test_a_wrong_extractor_is_told(tmp_path, name, weights, message):
    (tmp_path / "words.txt").write_text("no weights")
    with pytest.raises(GuidanceError, match=message):
        load_extractor(name, weights and tmp_path / weights, "torchmetrics")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"fc.weight": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(GuidanceError, match=r"weights\.pth"):
        load_extractor("inception", tmp_path / "weights.pth", "torchmetrics")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("real", "fake", "extractor", "message"),
    [
        ([], [pictures(2, 0)], Moments(), "fid.images holds no image"),
        ([pictures(1, 0)], [pictures(2, 0)], Moments(), "fid.images holds one image"),
        ([pictures(2, 0)], [pictures(1, 0)], Moments(), r"FID of 1 image\(s\).*raise fid.count"),
        ([pictures(2, 0)], [pictures(2, 0)], torch.nn.Identity(), "features of shape"),
        ([numbered(torch.arange(2))] * 2, [], Recall(torch.full((9, 2), torch.nan)), "not finite"),
    ],
)
def test_what_has_no_fid_is_told(real, fake, extractor, message):
    with pytest.raises(GuidanceError, match=message):
        fid(real, fake, extractor)
