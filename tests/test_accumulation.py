"""cached_backward: four micro-batches against one batch whose dropout masks are the micro-batches'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, check_close
from torch import Tensor, nn

import kdkernels
from kdkernels import cached_backward, correlation_loss, pkt_loss, rkd_loss, sp_loss, supervised_contrastive_loss

VIEWS = 2
SIZES = (6, 4, 8, 2)  # rows of the micro-batches
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Masks(nn.Module):
    """Dropout that records its masks, or replays recorded ones on a batch that is all of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.replay: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.replay is not None:
            return x * self.replay
        mask = F.dropout(torch.ones_like(x), 0.4)
        self.drawn.append(mask)
        return x * mask


class Student(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 20), nn.Tanh(), Masks(), nn.Linear(20, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)
        self.to(DEVICE, dtype)

    @property
    def masks(self) -> Masks:
        return self.body[2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.body(x)
        return self.head(f), f


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # logits, features, the teacher's, labels
LOSSES: dict[str, Loss] = {
    "sp": lambda z, f, t, y: 3000 * sp_loss([z, f], [t, t]),
    "correlation": lambda z, f, t, y: correlation_loss(f, t, views=VIEWS),
    "rkd": lambda z, f, t, y: rkd_loss(f, t),
    "pkt": lambda z, f, t, y: 1e4 * pkt_loss(f, t),
    "supervised": lambda z, f, t, y: supervised_contrastive_loss(f, t, y),
    "with cross entropy": lambda z, f, t, y: F.cross_entropy(z, y) + 50 * correlation_loss(f, t, views=VIEWS),
}


def make_batches(dtype: torch.dtype) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    rows = sum(SIZES)
    x, t = (torch.randn(rows, n, dtype=torch.float64).to(DEVICE, dtype) for n in (7, 12))
    whole = x, t, torch.arange(rows, device=DEVICE) % 3
    return list(zip(*(v.split(SIZES) for v in whole), strict=True)), whole


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(LOSSES))
def test_micro_batches_equal_one_batch(name: str, dtype: torch.dtype) -> None:
    student, (batches, whole) = Student(dtype), make_batches(dtype)
    loss = cached_backward(lambda b: (*student(b[0]), *b[1:]), batches, LOSSES[name], modules=student)
    actual = [g.clone() for g in grads(student)]
    masks = student.masks.drawn
    assert len(masks) == 8
    assert all(torch.equal(a, b) for a, b in zip(masks[:4], masks[4:], strict=True)), "the passes drew other masks"
    assert not torch.equal(masks[0][:2], masks[1][:2])

    student.zero_grad()
    student.masks.replay = torch.cat(masks[:4])
    expected = LOSSES[name](*student(whole[0]), *whole[1:])
    expected.backward()
    check_close("loss", loss, expected, TOLERANCE[dtype])
    assert len(actual) == len(grads(student))
    for i, (a, e) in enumerate(zip(actual, grads(student), strict=True)):
        assert e.norm() > 1e-6
        check_close(f"gradient {i}", a, e, TOLERANCE[dtype])


def test_adding_up_micro_batches_is_another_loss() -> None:
    """What the two passes are for: the sum of the micro-batches' losses points elsewhere."""
    student, (batches, _) = Student(torch.float64).eval(), make_batches(torch.float64)
    student.masks.replay = torch.ones((), dtype=torch.float64, device=DEVICE)
    for x, t, _ in batches:
        sp_loss(student(x)[1], t).backward()
    summed = torch.cat([g.flatten() for g in grads(student)])
    student.zero_grad()
    cached_backward(lambda b: (student(b[0])[1], b[1]), batches, sp_loss, modules=student)
    exact = torch.cat([g.flatten() for g in grads(student)])
    assert F.cosine_similarity(summed, exact, dim=0) < 0.99


def test_gradients_add_up_and_the_loss_is_scaled_by_backward() -> None:
    student, (batches, _) = Student(torch.float64), make_batches(torch.float64)

    def step(**options: object) -> Tensor:
        torch.manual_seed(1)
        forward = lambda b: (student(b[0])[1], b[1])  # noqa: E731
        return cached_backward(forward, batches, sp_loss, modules=student, **options)

    first = step()
    once = [g.clone() for g in grads(student)]
    assert torch.equal(step(backward=lambda loss: (1024 * loss).backward()), first)
    assert not first.requires_grad
    for a, e in zip(grads(student), once, strict=True):
        check_close("gradient", a, 1025 * e, 1e-12)


def test_heads_inside_the_loss_get_their_gradients() -> None:
    student, (batches, whole) = Student(torch.float64), make_batches(torch.float64)
    student.masks.replay = torch.ones((), dtype=torch.float64, device=DEVICE)
    heads = kdkernels.MLKDLoss(12, 12, embedding_dim=5, views=VIEWS).to(DEVICE, torch.float64)
    cached_backward(lambda b: (student(b[0])[1], *b[1:]), batches, heads, modules=student)
    actual = grads(student) + grads(heads)
    student.zero_grad()
    heads.zero_grad()
    heads(student(whole[0])[1], *whole[1:]).backward()
    expected = grads(student) + grads(heads)
    assert len(actual) == len(expected) == 4 + 4 + 2 * 6  # the student's body, e_s and e_t, g_a and g_c
    size = max(e.norm().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):  # a bias before BatchNorm has gradient 0 and rounding alone
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12 * size)


def test_batchnorm_statistics_are_updated_once() -> None:
    batches = [torch.randn(5, 4, dtype=torch.float64) + k for k in range(3)]
    model, plain = (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    teacher = torch.randn(15, 6, dtype=torch.float64)
    cached_backward(model, batches, lambda f: sp_loss(f, teacher))
    for x in batches:
        plain(x)
    assert model[0].num_batches_tracked == 3
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
    # and the features are normalised micro-batch by micro-batch, in both passes
    actual = [g.clone() for g in grads(model)]
    model.zero_grad()
    sp_loss(torch.cat([model(x) for x in batches]), teacher).backward()
    for a, e in zip(actual, grads(model), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-14)


def test_random_state_goes_on_as_after_one_pass() -> None:
    batches = [torch.randn(4, 3) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5))
    teacher = torch.randn(12, 5)
    torch.manual_seed(4)
    cached_backward(model, batches, lambda f: sp_loss(f, teacher))
    after = torch.rand(3)
    torch.manual_seed(4)
    for x in batches:
        model(x)
    assert torch.equal(after, torch.rand(3))


def test_under_autocast() -> None:
    student, (batches, whole) = Student(torch.float32), make_batches(torch.float32)
    student.masks.replay = torch.ones((), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = cached_backward(lambda b: (student(b[0])[1], b[1]), batches, sp_loss, modules=student)
        actual = [g.clone() for g in grads(student)]
        assert len(actual) == 4  # weights cast without a graph in the first pass would get none
        student.zero_grad()
        expected = sp_loss(student(whole[0])[1], whole[1])
        expected.backward()
    assert loss.dtype == torch.float32
    check_close("loss", loss, expected, 1e-3)
    for a, e in zip(actual, grads(student), strict=True):
        check_close("gradient", a, e, 2e-2)


def test_methods_and_integer_outputs() -> None:
    class Net(nn.Linear):
        def features(self, b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self(b[0]), b[1]

    net = Net(3, 4)
    batches = [(torch.randn(3, 3), torch.tensor([0, 1, 0])), (torch.randn(2, 3), torch.tensor([1, 1]))]
    teacher = torch.randn(5, 4)
    loss = cached_backward(net.features, batches, lambda f, y: supervised_contrastive_loss(f, teacher, y))
    x, y = (torch.cat(v) for v in zip(*batches, strict=True))
    assert loss.item() == pytest.approx(supervised_contrastive_loss(net(x), teacher, y).item(), rel=1e-6)


def test_what_is_invalid_raises() -> None:
    net, teacher = nn.Linear(3, 4), torch.randn(4, 4)
    batches = [torch.randn(2, 3), torch.randn(2, 3)]
    loss = lambda f: sp_loss(f, teacher)  # noqa: E731
    with pytest.raises(TypeError, match="modules"):
        cached_backward(lambda x: net(x), batches, loss)
    with pytest.raises(ValueError, match="none"):
        cached_backward(net, [], loss)
    with pytest.raises(TypeError, match="str"):
        cached_backward(lambda x: [net(x), "y"], batches, loss, modules=net)
    with pytest.raises(RuntimeError, match="needs a gradient"):
        cached_backward(lambda x: (net(x).detach(), net(x)), batches, lambda a, b: loss(a), modules=net)
    calls = []

    def growing(x: Tensor) -> Tensor:
        calls.append(1)
        return net(x) if len(calls) < 4 else net(x)[:1]

    with pytest.raises(RuntimeError, match=r"micro-batch 1 gave \[\(2, 4\)\].*\[\(1, 4\)\]"):
        cached_backward(growing, batches, loss, modules=net)
