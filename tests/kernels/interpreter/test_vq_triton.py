"""vq_assign in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from onevocab.kernels import tuning
from onevocab.kernels.vq import ops_triton, vq_assign, vq_assign_reference


@pytest.fixture(autouse=True)
def small_blocks():
    torch.manual_seed(0)
    with tuning.forced(vq_assign={"BLOCK_N": 16, "BLOCK_K": 16}):
        yield


def nearest_enough(latents, codebook, codes, kind=torch.float32):
    """The chosen code is nearest in float64, or within the rounding of a distance of the nearest."""
    latents, codebook = latents.double(), codebook.double()
    distances = (latents[:, None] - codebook).square().sum(-1)
    chosen = distances.gather(1, codes[:, None])[:, 0]
    slack = 8 * torch.finfo(torch.float32).eps * (latents.square().sum(-1) + codebook.square().sum(-1).max())
    assert codes.dtype == torch.int64 and (chosen <= distances.amin(1) + slack).all()
    return (codes == distances.argmin(1)).float().mean()


@pytest.mark.parametrize("n,codes,dim", [(1, 1, 1), (17, 2, 3), (16, 16, 16), (33, 33, 8), (65, 100, 40), (5, 47, 100)])
def test_nearest(n, codes, dim):
    latents, codebook = torch.randn(n, dim), torch.randn(codes, dim) * 1.5
    assert nearest_enough(latents, codebook, vq_assign(latents, codebook, backend="triton")) > 0.98


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_other_types(kind):
    latents, codebook = torch.randn(20, 16).to(kind), torch.randn(50, 16)
    assert nearest_enough(latents, codebook, vq_assign(latents, codebook, backend="triton")) == 1


def test_unit_vectors_by_angle():
    latents, codebook = (F.normalize(torch.randn(n, 8), dim=-1) for n in (40, 70))
    assert torch.equal(vq_assign(latents, codebook, backend="triton"), (latents @ codebook.t()).argmax(-1))


def test_norms_of_codes_count():
    codebook = torch.tensor([[10.0, 0.0], [1.0, 0.0]])
    assert vq_assign(torch.tensor([[2.0, 0.0], [8.0, 0.0]]), codebook, backend="triton").tolist() == [1, 0]


def test_equal_codes_give_the_lowest():
    """Twins within a block, in another block, and in the last, half empty one."""
    codebook = torch.randn(45, 8)
    codebook[9] = codebook[3]
    codebook[20] = codebook[3]
    codebook[44] = codebook[17]
    got = vq_assign(codebook, codebook, backend="triton")
    expected = torch.arange(45)
    expected[[9, 20]], expected[44] = 3, 17
    assert torch.equal(got, expected)
    same = torch.ones(20, 4)
    assert (vq_assign(same, same, backend="triton") == 0).all()


def test_latents_that_are_not_numbers():
    """Any code will do, but it is one; the rows beside are what they were."""
    latents, codebook = torch.randn(5, 8), torch.randn(20, 8)
    expected = vq_assign(latents, codebook, backend="triton")
    latents[1, 3], latents[4] = float("nan"), float("inf")
    got = vq_assign(latents, codebook, backend="triton")
    assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]]) and ((got >= 0) & (got < 20)).all()


def test_far_from_everything():
    """Scores below any padding's: what fills up the last block must not win."""
    codebook = torch.full((17, 3), 1e6)
    codebook[16] = 9e5
    assert vq_assign(torch.full((2, 3), -1e6), codebook, backend="triton").tolist() == [16, 16]


def test_inputs_that_are_not_contiguous():
    latents, codebook = torch.randn(8, 20).t(), torch.randn(30, 16)[:, ::2]
    assert torch.equal(vq_assign(latents, codebook, backend="triton"), vq_assign_reference(latents, codebook))


def test_registration_and_what_the_kernel_does_not_take():
    torch.library.opcheck(ops_triton.vq_assign, (torch.randn(5, 4), torch.randn(6, 4)))
    with pytest.raises(ValueError, match="at most 256"):
        vq_assign(torch.randn(2, 300), torch.randn(2, 300), backend="triton")
