"""Phases take the place of a stage's usual data for some steps and cost it nothing."""

import json

import pytest
import torch
from conftest import ROOT
from samples import mixed_codes, write_codes

from onevocab.common.errors import UserError
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.mixture import MixtureSchedule, Phase

CONFIG = LoaderConfig(seq_len=128, global_batch_size=2, window=16)


@pytest.fixture(scope="module")
def loaders(tmp_path_factory, tokenizers):
    """Makes fresh loaders: of the usual data, of two phases."""
    folders = [write_codes(tmp_path_factory.mktemp(f"codes{n}"), tokenizers, mixed_codes(n)) for n in (40, 12, 9)]
    return lambda: [PackedLoader(folder, tokenizers, CONFIG, seed=1) for folder in folders]


def schedule(loaders) -> MixtureSchedule:
    usual, first, second = loaders()
    return MixtureSchedule(usual, [Phase(5, 1, second), Phase(2, 3, first)])


def batches(loader, count: int) -> list:
    return [loader.next_batch() for _ in range(count)]


def equal(ours, theirs) -> bool:
    return all(torch.equal(a.ids, b.ids) and torch.equal(a.loss_weights, b.loss_weights) for a, b in
               zip(ours, theirs, strict=True))


def test_phases_stand_where_they_should_and_the_usual_data_miss_nothing(loaders):
    got = batches(schedule(loaders), 10)
    usual, first, second = loaders()
    assert equal(got[2:5], batches(first, 3)) and equal(got[5:6], batches(second, 1))
    assert equal(got[:2] + got[6:], batches(usual, 6))


@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_a_resumed_curriculum_goes_on_where_it_was(loaders, start):
    whole, resumed = schedule(loaders), schedule(loaders)
    batches(whole, start)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert equal(batches(resumed, 8), batches(whole, 8))


@pytest.mark.parametrize("phases,reason", [([(4, 1), (2, 3)], "overlap: 3 steps from 2 on, and one from 4 on"),
                                            ([(2, 3), (18, 3)], "from step 18 on ends after the stage's 20 steps")])
def test_phases_that_do_not_fit_are_refused_in_the_configuration(phases, reason, tmp_path):
    from train import read_config

    config = tmp_path / "run.toml"
    config.write_text((ROOT / "configs" / "smoke.toml").read_text() + "".join(
        f"[[instruct.phases]]\nstart = {start}\nsteps = {steps}\nsources = [{{ path = 'x' }}]\n"
        for start, steps in phases))
    with pytest.raises(UserError, match=f"instruct: .*{reason}"):
        read_config(config, [])


def test_other_phases_than_the_checkpoints_are_refused(loaders):
    usual, first, second = loaders()
    state = schedule(loaders).state_dict()
    with pytest.raises(UserError, match="phases are not those"):
        MixtureSchedule(usual, [Phase(2, 3, first)]).load_state_dict(state)
    with pytest.raises(UserError, match="not those of the checkpoint"):
        MixtureSchedule(usual, [Phase(2, 3, second), Phase(5, 1, first)]).load_state_dict(state)
