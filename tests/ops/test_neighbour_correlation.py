"""neighbour_correlation against its definition, on the reference and on the CPU's kernels; the contract, the edges."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from checking import DEVICE, DTYPES, check_compiled, check_contract, check_op, opcheck
from torch import Tensor

import kdkernels
from kdkernels import neighbour_correlation_loss
from kdkernels.ops.backend import why_not

PROBE = torch.ones(2, 2, device=DEVICE)
BACKENDS = [b for b in ("reference", "native") if why_not("neighbour_correlation", b, PROBE) is None]


@pytest.fixture(params=BACKENDS)
def neighbour_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kdkernels.use_backend(request.param):
        yield request.param


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.usefixtures("neighbour_backend")
class TestNeighbourCorrelation:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_meets_the_definition(self, dtype: torch.dtype) -> None:
        for shape in ((6, 9), (2, 1), (3, 1300), (150, 520)):  # several chunks, and several threads' rows
            s, t = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype)
            # an upstream gradient of a loss scaler's size, or fp16 underflows by its nature
            check_op(neighbour_correlation_loss, [s], constants=[t], upstream=100.0)

    def test_the_mean_over_neighbours(self) -> None:
        s, t = torch.tensor([[1.0, -2], [3, 0], [0, 5]], device=DEVICE, requires_grad=True), rows(3, 2) * 0
        loss = neighbour_correlation_loss(s, t)
        assert loss.item() == (1 * 3 + 3 * 0 + 2 * 0 + 0 * 5) / 2
        assert torch.autograd.grad(2 * loss, s)[0].tolist() == [[3, 0], [1, 0], [0, 0]]

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
    def test_strides_and_a_mixed_pair_of_dtypes(self, layout: str) -> None:
        make = {
            "transposed": lambda: rows(11, 6).t(),
            "sliced": lambda: rows(12, 22)[::2, ::2],
            "expanded": lambda: rows(1, 11).expand(6, 11),
        }[layout]
        teacher = make().to(torch.bfloat16 if layout == "sliced" else torch.float32)
        check_op(neighbour_correlation_loss, [rows(6, 11) if layout == "expanded" else make()], constants=[teacher])

    @pytest.mark.parametrize("shape", [(0, 3), (1, 3), (3, 0)], ids=str)
    def test_nothing_to_compare(self, shape: tuple[int, int]) -> None:
        loss, (gradient,) = check_op(neighbour_correlation_loss, [rows(*shape)], constants=[rows(*shape)])
        assert loss.item() == 0
        assert (gradient == 0).all()

    def test_equal_numbers_have_slope_zero_and_nan_comes_out(self) -> None:
        s, t = rows(5, 7), rows(5, 7)
        s[1], s[3, :4] = t[1], t[3, :4]
        _, (gradient,) = check_op(neighbour_correlation_loss, [s], constants=[t])
        assert (gradient[1] == 0).all()
        for bad in (float("nan"), float("inf")):
            s[2, 5] = bad
            loss, (gradient,) = check_op(neighbour_correlation_loss, [s], constants=[t])
            assert not loss.isfinite()
            assert not gradient[3, 5].isfinite()

    def test_contract_and_gradcheck(self) -> None:
        t = rows(6, 9)
        check_contract(lambda s: neighbour_correlation_loss(s, t), rows(6, 9))
        s, t = rows(4, 5).double().requires_grad_(), t[:4, :5].double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: neighbour_correlation_loss(x, t.detach()), s)
        neighbour_correlation_loss(s, t).backward()
        assert t.grad is None


def test_neighbour_correlation_compiled_and_its_errors() -> None:
    with torch.inference_mode():
        t = rows(6, 9)
    check_compiled(lambda s: neighbour_correlation_loss(s, t), rows(6, 9))
    s, t = rows(4, 5), rows(4, 5)
    opcheck(torch.ops.kdkernels.neighbour_correlation_traced.default, (s.requires_grad_(), t, True))
    opcheck(torch.ops.kdkernels.neighbour_correlation.default, (s.detach(), t, False))
    with pytest.raises(ValueError, match="same width"):
        neighbour_correlation_loss(s, t[:, :3])
