"""A Hugging Face Qwen3 folder as the start: its shape, its weights, and more rows of vocabulary.

Reads `config.json` and safetensors only. Nothing in these files is trusted: types, shapes and names are checked before
memory is taken, and shards are files of the folder itself.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onevocab.common.errors import UserError
from onevocab.common.files import read_json
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder

# Our name -> (their name, what transformers assumes where the file has no such key).
KEYS = {"dim": ("hidden_size", None), "layers": ("num_hidden_layers", None), "heads": ("num_attention_heads", None),
        "kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", 128),
        "mlp_dim": ("intermediate_size", None), "rope_theta": ("rope_theta", 1e4), "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False), "max_length": ("max_position_embeddings", 32_768)}
LARGEST_VOCABULARY = 2**24
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_shape(folder) -> tuple[ModelConfig, int]:
    """FOLDER/config.json -> (the decoder's shape, rows of the embedding). Raises UserError, naming the key, for
    anything but a dense Qwen3 without biases, sliding windows, scaled positions or quantized weights."""
    path = Path(folder) / "config.json"
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is no configuration of a model")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    windowed = data.get("use_sliding_window") and data.get("sliding_window") is not None
    layer_types = data.get("layer_types") or []
    supported = {  # key -> whether its value, or transformers' default, is one that the decoder computes
        "model_type": data.get("model_type") == "qwen3",
        "hidden_act": data.get("hidden_act", "silu") == "silu",
        "attention_bias": not data.get("attention_bias"),
        "use_sliding_window": not windowed,
        "layer_types": isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types),
        "quantization_config": not data.get("quantization_config"),
    }
    for key, fine in supported.items():
        if not fine:
            raise UserError(f"{path}: {key} = {str(data.get(key))[:60]} is not supported; a dense Qwen3 with full "
                            "attention and without biases is")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{path}: rope_parameters or rope_scaling = {str(rope)[:80]} is not supported; plain rotary "
                        "positions are")
    data = data | {key: value for key, value in rope.items() if key == "rope_theta"}
    values = {ours: data.get(theirs, usual) for ours, (theirs, usual) in KEYS.items()}
    for ours, value in values.items():
        wanted = bool if ours == "tie_embeddings" else int | float if ours in ("rope_theta", "norm_eps") else int
        limit = 2**20 if wanted is int and ours != "max_length" else 1e12
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool) or not value < limit:
            raise UserError(f"{path}: {KEYS[ours][0]} is {str(value)[:60]}")
    try:
        config = ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        raise UserError(f"{path}: {KEYS.get(ours, ['the shape'])[0]}: {first['msg']}") from None
    rows = data.get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows <= LARGEST_VOCABULARY:
        raise UserError(f"{path}: vocab_size is {str(rows)[:60]}")
    return config, rows


def agreed(shape: ModelConfig, given: Mapping[str, object], source) -> ModelConfig:
    """The shape of `source`, with the configuration's own max_length where it gives one. Raises UserError naming the
    key of [model] that is given and says something else."""
    for key, value in given.items():
        have = getattr(shape, key)
        if key == "max_length":
            if value > have:
                raise UserError(f"model.max_length = {value}, but {source} was made for {have}; make it smaller, or "
                                "leave it out")
        elif value != have:
            raise UserError(f"model.{key} = {value}, but {source} has {have}; leave it out, or start from another one")
    return shape.model_copy(update={"max_length": given["max_length"]} if "max_length" in given else {})


def weight_files(folder) -> list[Path]:
    """The folder's safetensors: `model.safetensors`, or the shards of its index. Raises UserError."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = ["model.safetensors"]
    else:
        data = read_json(index)
        shards = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{index}: weight_map is missing or empty")
        for key, name in shards.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise UserError(f"{index}: weight_map: {key[:80]} is said to be in {str(name)[:80]!r}, which is not "
                                "the name of a safetensors file in this folder")
        names = sorted(set(shards.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]} is missing; {folder} is to hold config.json, tokenizer.json and "
                        "model.safetensors, or shards with model.safetensors.index.json")
    return [folder / name for name in names]


def check_weights(folder, config: ModelConfig, rows: int) -> None:
    """Compares names, shapes and types with the configuration, from the files' headers alone. Raises UserError that
    names the file and the key."""
    file_of: dict[str, Path] = {}  # of each weight
    for path, names, _ in _opened(folder):
        for name in names:
            if name in file_of:
                raise UserError(f"{path}: {name} is in {file_of[name].name} too")
            file_of[name] = path
    layers = {int(m[1]) for name in file_of if (m := re.match(r"layers\.(\d{1,6})\.", name))}
    if len(layers) != config.layers:  # before a network of that many is made
        raise UserError(f"{folder}: config.json says num_hidden_layers = {config.layers}, the weights have "
                        f"{len(layers)}")
    with torch.device("meta"):
        wanted = {name: list(value.shape) for name, value in Decoder(config, rows).state_dict().items()}
    for path, names, file in _opened(folder):
        for name in names:
            part = file.get_slice(_theirs(name))
            if part.get_shape() != wanted.get(name):
                raise UserError(f"{path}: {_theirs(name)} has the shape {part.get_shape()}; by config.json it is "
                                f"{wanted.get(name, 'not there')}")
            if part.get_dtype() not in DTYPES:
                raise UserError(f"{path}: {_theirs(name)} is {part.get_dtype()}; {', '.join(DTYPES)} are supported")
    if missing := sorted(wanted.keys() - file_of.keys()):
        raise UserError(f"{folder}: {_theirs(missing[0])} is in none of the weights' files")


def read_weights(folder) -> Iterator[tuple[str, Tensor]]:
    """(name in our decoder, tensor of the type that the file has), one after the other. Call `check_weights` first."""
    for _, names, file in _opened(folder):
        for name in names:
            yield name, file.get_tensor(_theirs(name))


def _theirs(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _opened(folder) -> Iterator[tuple[Path, list[str], object]]:
    """(path, our names of its tensors, open file) of each file. A tied head that is saved a second time, and the
    constants of rotary positions, are left out. Raises UserError."""
    tied = read_shape(folder)[0].tie_embeddings
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                keys = [key for key in file.keys() if not key.endswith("rotary_emb.inv_freq")
                        and not (tied and key == "lm_head.weight")]
                strange = next((key for key in keys if _theirs(key.removeprefix("model.")) != key), None)
                if strange is not None:
                    raise UserError(f"{path}: {strange[:80]} is no weight of Qwen3ForCausalLM")
                yield path, [key.removeprefix("model.") for key in keys], file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


@torch.no_grad()
def start_from(decoder: Decoder, weights: Iterator[tuple[str, Tensor]], in_use: Tensor) -> None:
    """Copies weights whose embedding and head may have fewer rows than the decoder's. The rows that are new start at
    the mean of those old ones that are in use, so that no new token is likelier than the old ones are on average
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). Sets `decoder.old_rows`.

    in_use: bool (old rows,). Raises UserError on a shape that does not fit.
    """
    own, seen = dict(decoder.named_parameters()), set()
    for name, value in weights:
        target, rows = own.get(name), len(in_use) if name in decoder.row_parameters else None
        wanted = None if target is None else (rows or target.shape[0], *target.shape[1:])
        if wanted != tuple(value.shape) or len(target) < len(value):
            raise UserError(f"the weights to start from are of another model: {name} is {tuple(value.shape)} there and "
                            f"{wanted or 'nothing'} here")
        target[: len(value)] = value.to(target)
        if rows:
            target[rows:] = target[:rows][in_use.to(target.device)].mean(0)
        seen.add(name)
    if missing := sorted(own.keys() - seen):
        raise UserError(f"the weights to start from are of another model: {missing[0]} is missing there")
    decoder.old_rows = len(in_use)
