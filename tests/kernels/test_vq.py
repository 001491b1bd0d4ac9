"""vq_assign on the CPU, against float64."""

import json

import pytest
import torch
import torch.nn.functional as F

from onevocab.kernels import aot
from onevocab.kernels.vq import vq_assign, vq_assign_reference


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("n,codes,dim", [(1, 1, 1), (300, 77, 5), (5000, 1024, 16)])
def test_vq_assign(n, codes, dim, backend):
    torch.manual_seed(0)
    latents, codebook = torch.randn(n, dim), torch.randn(codes, dim)
    got = vq_assign(latents, codebook, backend=backend)
    exact = torch.cdist(latents.double(), codebook.double()).argmin(-1)
    assert got.dtype == torch.int64 and got.shape == (n,)
    assert (got == exact).float().mean() >= 0.999
    assert torch.equal(vq_assign(latents.bfloat16(), codebook)[:5], vq_assign(latents.bfloat16().float(), codebook)[:5])


def test_vq_assign_of_equal_codes_and_unit_vectors():
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    codebook[[7, 31]] = codebook[[3, 3]]
    assert vq_assign(codebook, codebook)[[3, 7, 31]].tolist() == [3, 3, 3]
    assert vq_assign_reference(codebook, codebook)[[3, 7, 31]].tolist() == [3, 3, 3]
    latents, unit = F.normalize(torch.randn(50, 8), dim=-1), F.normalize(codebook[:20], dim=-1)
    unit[7] = -unit[7]
    assert torch.equal(vq_assign(latents, unit), (latents @ unit.t()).argmax(-1))
    plain = vq_assign(latents, unit)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # near ties must not depend on the precision of training
        assert torch.equal(vq_assign(latents, unit), plain)


def test_vq_assign_names_what_does_not_fit():
    for latents, codebook in [((3, 4), (5, 3)), ((3, 4, 1), (5, 4)), ((0, 4), (5, 4)), ((3, 4), (0, 4))]:
        with pytest.raises(ValueError, match="do not fit"):
            vq_assign(torch.ones(latents), torch.ones(codebook))
    with pytest.raises(ValueError, match="floating-point"):
        vq_assign(torch.ones(3, 4, dtype=torch.int64), torch.ones(5, 4))


def test_no_variant_spills():
    for version, table in json.loads(aot.table_path("vq").read_text()).items():
        rows = [row for targets in table.values() for row in targets["90"]]
        assert len(rows) == len(aot.OPERATIONS["vq"].CASES), version
        assert not any(row["LDL"] or row["STL"] for row in rows), version
