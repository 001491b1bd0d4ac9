"""generation.json: how a run's replies are drawn unless somebody says otherwise."""

import json

import pytest
import torch
from tiny import tiny_run

from onevocab.common.errors import UserError
from onevocab.generation import AnyToAny
from onevocab.generation.defaults import GenerationDefaults
from onevocab.generation.sampling import Sampling, sample_ids

OURS = {"temperature": {"text": 0.0, "image": 0.5}, "top_k": 5, "top_p": 0.9, "guidance": {"image": 2.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny_run(tmp_path_factory.mktemp("runs") / "tiny")
    (folder / "generation.json").write_text(json.dumps(OURS))
    return folder


def test_a_run_carries_its_sampling(run):
    model = AnyToAny.load(run)
    assert model.defaults.sampling(seed=3) == Sampling(**OURS, seed=3)
    as_said = model.generate("draw a dog", "image", **OURS).ids
    assert model.generate("draw a dog", "image").ids == as_said
    assert model.generate("draw a dog", "image", temperature=1.5, top_k=0).ids != as_said
    *_, last = model.stream("draw a dog", "image")
    assert last.value.ids == as_said


def test_what_is_given_wins_and_the_rest_stays():
    defaults = GenerationDefaults(**OURS)
    assert defaults.sampling(temperature=0.7).temperature == 0.7
    assert defaults.sampling(temperature={"image": 1.0}).temperature == {"text": 0.0, "image": 1.0}
    one_for_all = GenerationDefaults(temperature=0.3).sampling(temperature={"image": 1.0})
    assert one_for_all.temperature_of("text") == 0.3 and one_for_all.temperature_of("image") == 1.0
    assert defaults.sampling(top_k=0).top_k == 0 and defaults.sampling(top_k=None).top_k == 5


def test_without_a_file_the_model_samples_as_it_is(tmp_path):
    assert GenerationDefaults.load(tmp_path).sampling() == Sampling()


@pytest.mark.parametrize("content", ["[]", "{", '{"top_k": -1}', '{"temperature": "hot"}', '{"temperature": -1}',
                                     '{"temperature": {"text": -1}}', '{"top_p": 0}', '{"guidance": -3}'])
def test_a_file_that_makes_no_sense_is_named(tmp_path, content):
    (tmp_path / "generation.json").write_text(content)
    with pytest.raises(UserError, match=r"generation\.json"):
        GenerationDefaults.load(tmp_path)


def test_each_modality_has_its_temperature():
    logits, noise = torch.tensor([[2.0, 1.9, 0.0]]), torch.tensor([0.6], dtype=torch.float64)
    sampling = Sampling(temperature={"text": 0.0, "image": 1.0})
    assert sample_ids(logits, noise, sampling).item() == 0
    assert sample_ids(logits, noise, sampling, "image").item() == 1
    assert sampling.temperature_of("audio") == 1.0
