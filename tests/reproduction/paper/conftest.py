"""Made-up results, for the tests of the claims and of the paper's page."""

import copy

import pytest
from comfyui_gcfg.evaluation.images import write_shard
from comfyui_gcfg.testkit import results


@pytest.fixture
def stored():
    """All results; a test may change its copy."""
    return copy.deepcopy(results.every_result())


@pytest.fixture
def find(stored):
    """One of them."""
    return lambda task, method: next(each for each in stored if (each["task"], each["method"]) == (task, method))


@pytest.fixture(scope="session")
def output(tmp_path_factory):
    """The evaluation's output folder, with the images of all results."""
    return results.write_output(results.every_result(), tmp_path_factory.mktemp("output"), write_shard)
