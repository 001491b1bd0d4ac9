"""Every setting says what it is: `train.py CONFIG --help` is a manual."""

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel

from onevocab.pipeline.config import RunConfig
from onevocab.training.plan import PlanConfig


def sections(annotation) -> Iterator[type[BaseModel]]:
    """The models that a field's type names, those in unions and tuples included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def undescribed(config: type[BaseModel], before: set) -> list[str]:
    missing = []
    for name, field in config.model_fields.items():
        below = list(sections(field.annotation))
        if not below and not field.description and name != "kind":  # a quantizer's kind is its class's docstring
            missing.append(f"{config.__name__}.{name}")
        for section in below:
            if section not in before:
                before.add(section)
                missing += undescribed(section, before)
    return missing


def test_every_setting_is_described():
    found: set = set()
    assert undescribed(RunConfig, found) == [] and undescribed(PlanConfig, found) == []
    assert len(found) > 15, "hardly any section was found"
