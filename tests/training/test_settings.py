"""Every setting says what it is: `train.py CONFIG --help` prints it."""

import pytest
from pydantic import BaseModel

from onevocab.model.config import ModelConfig, ModelSection
from onevocab.tokenizers.autoencoder import AutoencoderConfig
from onevocab.tokenizers.quantizers import CLASSES
from onevocab.tokenizers.text import TextConfig
from onevocab.training.config import TrainConfig
from onevocab.training.muon import OptimizerConfig
from onevocab.training.plan import PlanConfig
from onevocab.training.schedule import ScheduleConfig

CONFIGS = [ModelConfig, ModelSection, AutoencoderConfig, TextConfig, TrainConfig, OptimizerConfig, PlanConfig,
           ScheduleConfig, *(cls.Config for cls in CLASSES.values())]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_is_described(config):
    sections = {name for name, field in config.model_fields.items() if isinstance(field.default, BaseModel)}
    without = {name for name, field in config.model_fields.items() if not field.description} - sections - {"kind"}
    assert config.__doc__ and not without
