"""CORSD's terms against plain loops, and its relation networks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checking import DEVICE, DTYPES, check_op, gradients
from torch import Tensor

from kdkernels import CORSDLoss, corsd_loss

pytestmark = pytest.mark.usefixtures("backend")
STAGES, BATCH, CLASSES = 4, 6, 7
NAMES = ("triplet", "relation", "ce_pos", "kl_pos", "ce_neg", "kl_neg")


def weighted(*weights: float) -> dict[str, float]:
    return {f"{name}_weight": w for name, w in zip(NAMES, weights, strict=True)}


WEIGHTS = weighted(0.3, 0.5, 0.7, 1.1, 1.3, 1.7)  # unlike each other
PAPER = weighted(0.01, 0.01, 0.04, 0.16, 0.01, 0.04)


def scores(dtype: torch.dtype = torch.float64, stages: int = STAGES, batch: int = BATCH) -> list[Tensor]:
    """relations_pos, relations_neg, logits_pos, logits_neg."""
    r = [torch.rand(stages, batch, dtype=torch.float64) for _ in range(2)]
    q = [3 * torch.randn(stages, batch, CLASSES, dtype=torch.float64) for _ in range(2)]
    return [x.to(DEVICE, dtype).requires_grad_() for x in r + q]


def labels(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    y = torch.arange(batch, device=DEVICE) % CLASSES
    return y, (y + 3) % CLASSES


def loop(
    near: Tensor,
    far: Tensor,
    q_near: Tensor,
    q_far: Tensor,
    y: Tensor,
    y_far: Tensor,
    weights: dict[str, float],
    t: float = 3.0,
    margin: float = 1.0,
    detach: bool = True,
) -> Tensor:
    """The terms one at a time, stage by stage and triplet by triplet."""
    near, far, q_near, q_far = (x.cpu() for x in (near, far, q_near, q_far))
    constant = (lambda x: x.detach()) if detach else (lambda x: x)
    w = SimpleNamespace(**{name: weights[f"{name}_weight"] for name in NAMES})
    stages, batch = near.shape
    deep = stages - 1
    loss = torch.zeros((), dtype=near.dtype)
    for i in range(batch):
        for s in range(stages):
            loss = loss + w.triplet * torch.clamp(near[s, i] - far[s, i] + margin, min=0) / batch
            loss = loss - w.ce_pos * q_near[s, i].log_softmax(0)[y[i]] / batch
            for label in (y[i], y_far[i]):
                loss = loss - w.ce_neg * q_far[s, i].log_softmax(0)[label] / 2 / batch
            if s == deep:
                continue
            for r in (near, far):
                loss = loss + w.relation * (r[s, i] - constant(r[deep, i])) ** 2 / batch
            for q, weight in ((q_near, w.kl_pos), (q_far, w.kl_neg)):
                teacher, student = (constant(q[deep, i]) / t).softmax(0), (q[s, i] / t).softmax(0)
                loss = loss + weight * (teacher * (teacher / student).log()).sum() / batch
    return loss


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("weights", [WEIGHTS, PAPER], ids=["test", "paper"])
@pytest.mark.parametrize("margin", [1.0, 0.1])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_equals_plain_loops(stages: int, margin: float, weights: dict[str, float], detach: bool) -> None:
    inputs = scores(stages=stages)
    loss = corsd_loss(*inputs, *labels(), margin=margin, detach_deepest=detach, **weights)
    expected = loop(*inputs, *labels(), weights, margin=margin, detach=detach)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=1e-14)
    for a, e in zip(gradients(loss, inputs, 2.5), gradients(expected, inputs, 2.5), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    for detach in (True, False):
        check_op(lambda *x, d=detach: corsd_loss(*x, *labels(), detach_deepest=d, **WEIGHTS), scores(dtype))


def test_gradcheck() -> None:
    inputs = scores(stages=2, batch=2)
    y = labels(2)
    assert torch.autograd.gradcheck(lambda *x: corsd_loss(*x, *y, margin=0.2, detach_deepest=False, **WEIGHTS), inputs)
    # with the deepest stage as a constant: in the other stages' inputs
    shallow = [x[:-1].detach().requires_grad_() for x in inputs]
    deepest = [x[-1:].detach() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: corsd_loss(*(torch.cat(p) for p in zip(x, deepest, strict=True)), *y, **WEIGHTS), shallow
    )


def test_hinge_gradient_is_constant_at_margin_one_and_zero_where_clipped() -> None:
    inputs = scores()
    only = weighted(0.01, 0, 0, 0, 0, 0)
    near, far, *_ = gradients(corsd_loss(*inputs, *labels(), **only), inputs)
    torch.testing.assert_close(near, torch.full_like(near, 0.01 / BATCH), rtol=1e-14, atol=0)
    torch.testing.assert_close(far, -near, rtol=0, atol=0)
    near, far, *_ = gradients(corsd_loss(*inputs, *labels(), **only, margin=0.25), inputs)
    open_ = inputs[0] - inputs[1] + 0.25 > 0
    assert open_.any()
    assert not open_.all()
    torch.testing.assert_close(near, open_.double() * (0.01 / BATCH), rtol=1e-14, atol=0)
    torch.testing.assert_close(far, -near, rtol=0, atol=0)


def test_kl_of_the_deepest_with_itself_is_not_computed() -> None:
    inputs = scores(stages=1)
    with_kl = corsd_loss(*inputs, *labels(), **weighted(0, 0, 0, 1e6, 0, 1e6))
    assert with_kl.item() == 0
    a, b = (
        corsd_loss(*inputs, *labels(), detach_deepest=False, **weighted(0.01, 0.01, 0.04, kl, 0.01, kl))
        for kl in (0, 1e6)
    )
    assert torch.equal(a, b)
    for x, y in zip(gradients(a, inputs), gradients(b, inputs), strict=True):
        assert torch.equal(x, y)


def test_detaching_changes_the_deepest_gradients_alone() -> None:
    inputs = scores()
    on, off = (corsd_loss(*inputs, *labels(), detach_deepest=d, **WEIGHTS) for d in (True, False))
    torch.testing.assert_close(on, off, rtol=1e-13, atol=0)
    without = corsd_loss(
        *inputs, *labels(), **WEIGHTS | {f"{name}_weight": 0.0 for name in ("relation", "kl_pos", "kl_neg")}
    )
    for a, b, c in zip(*(gradients(x, inputs) for x in (on, off, without)), strict=True):
        torch.testing.assert_close(a[:-1], b[:-1], rtol=1e-12, atol=1e-15)
        assert (a[-1] - b[-1]).norm() > 0.01 * b[-1].norm()
        assert torch.equal(a[-1], c[-1])  # nothing of the relation and KL terms


def test_autocast_changes_nothing_and_an_empty_batch_is_zero() -> None:
    for detach in (True, False):
        inputs = scores(torch.float32)
        loss = corsd_loss(*inputs, *labels(), detach_deepest=detach)
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = corsd_loss(*inputs, *labels(), detach_deepest=detach)
        assert torch.equal(loss, cast)
        for a, b in zip(gradients(loss, inputs), gradients(cast, inputs), strict=True):
            assert torch.equal(a, b)
        assert corsd_loss(*scores(batch=0), *labels(0), detach_deepest=detach).item() == 0


def test_large_logits() -> None:
    inputs = [x.detach().float() for x in scores()]
    inputs[2], inputs[3] = inputs[2] * 1e4, inputs[3] * 1e4
    for x in inputs:
        x.requires_grad_()
    for detach in (True, False):
        loss = corsd_loss(*inputs, *labels(), detach_deepest=detach)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients(loss, inputs))


def make_module(**options: object) -> tuple[CORSDLoss, list[Tensor]]:
    loss = CORSDLoss((4, 6, 8), CLASSES, **options).to(DEVICE, torch.float64)
    features = [
        torch.randn(3 * BATCH, c, n, n, dtype=torch.float64, device=DEVICE).requires_grad_()
        for c, n in ((4, 8), (6, 4), (8, 2))
    ]
    return loss, features


def test_pairs_equal_a_plain_loop() -> None:
    loss, features = make_module()
    loss.eval()  # so that BatchNorm sees one pair at a time as it sees all of them
    y, y_far = labels()
    near, far, q_near, q_far = ([[None] * BATCH for _ in range(3)] for _ in range(4))
    for s, net in enumerate(loss.relations):
        for i in range(BATCH):
            anchor, positive, negative = (features[s][3 * i + k][None] for k in range(3))
            for r, q, other in ((near, q_near, positive), (far, q_far, negative)):
                h = net.trunk(torch.cat([anchor, other], 1)).mean((2, 3))
                r[s][i], q[s][i] = net.relation(h)[0, 0], net.classes(h)[0]
    stacked = [torch.stack([torch.stack(stage) for stage in x]) for x in (near, far, q_near, q_far)]
    expected = loop(*stacked, y, y_far, PAPER)
    actual = loss(features, y, y_far)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-11, atol=1e-13)
    for a, e in zip(gradients(actual, features), gradients(expected, features), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-13)


def test_the_deepest_stage_learns_nothing_from_relation_and_kl_terms() -> None:
    loss, features = make_module(**weighted(0, 0.01, 0, 0.16, 0, 0.04))
    y = labels()
    value = loss(features, *y)
    assert (gradients(value, features)[-1] == 0).all()
    assert gradients(loss(features, *y), features)[0].norm() > 0
    deepest = list(loss.relations[-1].parameters())
    loss(features, *y).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in deepest)
    loss, features = make_module(detach_deepest=False, **weighted(0, 0.01, 0, 0.16, 0, 0.04))
    assert gradients(loss(features, *y), features)[-1].norm() > 0


def test_negatives_go_first_and_every_parameter_trains() -> None:
    loss, features = make_module()
    y = labels()
    norm = loss.relations[0].trunk[0][2]
    loss(features, *y).backward()
    assert norm.num_batches_tracked == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    assert all(f.grad.norm() > 0 for f in features)
    first = loss.relations[0].trunk[0]
    means = []
    for other in (2, 1):
        with torch.no_grad():
            means.append(first[1](first[0](torch.cat([features[0][0::3], features[0][other::3]], 1))).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_mean, 0.09 * means[0] + 0.1 * means[1])


def test_logit_relation() -> None:
    loss, features = make_module(logit_relation_weight=0.01)
    plain, _ = make_module()
    plain.load_state_dict({k: v for k, v in loss.state_dict().items() if not k.startswith("logit_relation")})
    y, y_far = labels()
    z = torch.randn(3 * BATCH, CLASSES, dtype=torch.float64, device=DEVICE).requires_grad_()
    relation = loss.logit_relation
    assert torch.equal(relation.prototypes, torch.eye(CLASSES, dtype=torch.float64, device=DEVICE))

    loss.eval()
    plain.eval()
    torch.manual_seed(2)
    value = loss(features, y, y_far, z) - plain(features, y, y_far)
    rows = torch.stack([y, y, y_far], 1).flatten()
    torch.manual_seed(2)
    other = (rows + torch.randint(1, CLASSES, rows.shape, device=DEVICE)) % CLASSES
    assert (other != rows).all()
    expected = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for j in range(3 * BATCH):  # the images of a triplet are summed, triplets averaged
        own, wrong = (
            relation.score(torch.cat([z[j].softmax(0), F.one_hot(k, CLASSES).double()])[None])[0, 0]
            for k in (rows[j], other[j])
        )
        expected = expected + 0.01 * (own - wrong) / BATCH
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(relation.prototypes, torch.eye(CLASSES, dtype=torch.float64, device=DEVICE))

    loss.train()
    loss(features, y, y_far, z).backward()
    assert z.grad is not None
    sums = torch.eye(CLASSES, dtype=torch.float64, device=DEVICE)
    for j, row in enumerate(rows):
        sums[row] += z[j].detach().softmax(0)
    torch.testing.assert_close(relation.prototypes, sums)
    with pytest.raises(ValueError, match=r"needs logits \(18, 7\), got None"):
        loss(features, y, y_far)


def test_options_are_those_of_the_function() -> None:
    defaults = {"temperature": 3.0, "margin": 1.0, "detach_deepest": True, "reduction": "mean"}
    assert make_module()[0].options == {**PAPER, **defaults}
    inputs = scores()
    assert torch.equal(corsd_loss(*inputs, *labels()), corsd_loss(*inputs, *labels(), **PAPER, **defaults))
    options = {**WEIGHTS, "temperature": 2.0, "margin": 0.2, "detach_deepest": False, "reduction": "sum"}
    loss, features = make_module(**options)
    assert loss.options == options
    y, y_far = labels()
    loss.eval()
    stages = zip(loss.relations, features, strict=True)
    pairs = [[net(f[0::3], f[other::3]) for other in (1, 2)] for net, f in stages]
    near, far = ([stage[k][0] for stage in pairs] for k in (0, 1))
    q_near, q_far = ([stage[k][1] for stage in pairs] for k in (0, 1))
    stacked = [torch.stack(x) for x in (near, far, q_near, q_far)]
    torch.testing.assert_close(loss(features, y, y_far), corsd_loss(*stacked, y, y_far, **options))


def test_features_that_do_not_fit_are_named() -> None:
    loss, features = make_module()
    with pytest.raises(ValueError, match=r"B = 6 targets and channels \(4, 6, 8\)"):
        loss([f[:4] for f in features], *labels())
    with pytest.raises(ValueError, match="channels"):
        loss(features[:2], *labels())
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got list"):
        loss(features, [0] * BATCH, labels()[1])
