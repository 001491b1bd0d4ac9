"""A decode step never waits for a GPU: nothing in it asks for a value, so a CUDA graph can hold it.

Tensors on the device "meta" have no values. The step runs on them as on a GPU, launchers of kernels included, but for
launching: whatever would need a value on the host, or a copy between host and device, is an error.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onevocab.generation.engine import Request, _Batch
from onevocab.generation.sampling import Sampling
from onevocab.kernels import aot
from onevocab.kernels.attention import IntervalMask
from onevocab.model.cache import KVCache
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder

CONFIG = ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=96)
pytestmark = pytest.mark.skipif(not aot.backend._HAS_TRITON, reason="triton is not installed: pip install triton")


class OnTheDevice(TorchDispatchMode):
    """Refuses what reads values on the host, and copies to and from it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert not name.startswith(self.FORBIDDEN), f"{name} waits for the device"
        assert all(x.device.type == "meta" for x in given), f"{name} copies between host and device"
        if name.startswith("index"):
            assert not any(x.dtype == torch.bool for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)), name
        return out


@pytest.fixture
def device(monkeypatch):
    """The launchers run themselves, in place of what stands for them when there are no values."""
    from onevocab.kernels.decode import ops_triton as decode
    from onevocab.kernels.elementwise import ops_triton as elementwise

    for module, names in ((decode, ("decode_attention",)),
                          (elementwise, ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    with torch.inference_mode(), aot.recording(90) as launched:
        yield launched


def step(model, cache, at: int, **known):
    positions = torch.full((3, 1), at, device="meta")
    ids = torch.zeros(3, 1, dtype=torch.long, device="meta")
    with OnTheDevice():
        return model(ids, positions, IntervalMask.up_to(positions), cache, **known)


def test_a_step_asks_the_device_for_nothing(device):
    model = Decoder(CONFIG, 100).to("meta")
    cache = KVCache(CONFIG, 3, 40, device="meta")
    kept = cache.lengths
    shapes = []
    for at in (7, 8, 39):
        device.clear()
        assert step(model, cache, at, filled=at + 1).shape == (3, 1, 64)
        shapes.append([(kernel.__name__, [x.shape if torch.is_tensor(x) else x for x in args], options)
                       for kernel, args, options in device])  # fmt: skip
        assert cache.lengths is kept  # a graph goes on with the same memory
    assert shapes[0] == shapes[1] == shapes[2] and any(name == "partial_attention" for name, *_ in shapes[0])
    with pytest.raises(ValueError, match="holds 40 positions, 41 are needed"):
        step(model, cache, 40, filled=41)
    with pytest.raises(RuntimeError, match="item"):  # what the caller does not know is asked for
        step(model, cache, 8)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_asks_the_device_for_nothing(device, guidance):
    grammar = SimpleNamespace(left=30)
    requests = [Request(torch.arange(4).numpy(), grammar, row, torch.arange(3).numpy()) for row in range(3)]
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, guidance={"image": guidance})
    batch = _Batch(Decoder(CONFIG, 100).to("meta"), requests, sampling)
    rows = 3 * (1 + batch.guided)
    batch.cache = KVCache(CONFIG, rows, 40, device="meta")
    batch.positions, batch.filled = torch.full((rows,), 4, device="meta"), [4] * rows
    both = torch.arange(60, 70, device="meta")
    groups = [(None, (range(10, 50),), None, "image")], [(None, (range(60, 65), range(80, 85)), both, "image")]
    with OnTheDevice():
        for group in groups:
            ids = batch.next_ids(batch.step(torch.zeros(3, dtype=torch.long, device="meta")), group)
            assert ids.shape == (3,)
    assert batch.filled == [6] * rows


def test_what_is_past_the_end_is_refused_before_anything_is_written():
    """On a CPU what a caller claims to know is counted anyway."""
    cache = KVCache(CONFIG, 2, 5)
    for filled in (None, 5):
        with pytest.raises(ValueError, match="holds 5 positions, 6 are needed"):
            cache.advance(torch.tensor([[5], [0]]), filled)
    assert cache.lengths.tolist() == [0, 0]
    where, n_keys = cache.advance(torch.tensor([[-1, 2], [0, 1]]), 4)
    new = torch.randn(2, 2, 2, 16)
    keys, values = cache.write(0, where, new, -new, n_keys)
    assert n_keys == 3 and keys.shape == (2, 3, 2, 16) and cache.lengths.tolist() == [3, 2]
    expected = torch.zeros(2, 3, 2, 16)
    expected[0, 2], expected[1, :2] = new[0, 1], new[1]
    assert torch.equal(keys, expected) and torch.equal(values, -expected)
    assert (cache.keys[0][:, 3:] == 0).all() and (cache.keys[1] == 0).all()
