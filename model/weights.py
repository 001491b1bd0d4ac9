"""A checkpoint's weights, for whoever uses a trained model and does not train it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from onevocab.common.checkpoint_files import AVERAGED, INFO, MODEL, check_shapes, read_manifest, verify
from onevocab.common.errors import UserError
from onevocab.common.files import read_json
from onevocab.model.code_rows import fold


def load_weights(step_folder) -> tuple[dict[str, Tensor], dict]:
    """The weights (the averaged ones where there are, with plain rows) and `model.json` of one step folder, verified.
    Raises UserError when it is missing or damaged."""
    step_folder = Path(step_folder)
    if not step_folder.is_dir():
        raise UserError(f"no checkpoint at {step_folder}")
    weights = AVERAGED if AVERAGED in read_manifest(step_folder) else MODEL
    verify(step_folder, [weights, INFO])
    return fold(load_tensors(step_folder / weights)), read_json(step_folder / INFO)


def load_tensors(path) -> dict[str, Tensor]:
    """A safetensors file on the CPU. Raises UserError when it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


@torch.no_grad()
def load_into(model: nn.Module, tensors: dict[str, Tensor], source) -> None:
    """Copies whole weights into a model that is not sharded. Raises UserError that names the first parameter that does
    not fit; source: where the weights are from."""
    own = model.state_dict()
    check_shapes({name: value.shape for name, value in own.items()},
                 {name: value.shape for name, value in tensors.items()}, source)
    for name, target in own.items():
        target.copy_(tensors[name])
