"""Draws the pictures of the papers' pages: python docs/pictures.py [name ...]. Under a minute on two cores.

Everything but CORSD's diagram is computed: the networks, data, weights and steps are the demo's (seed 0), and the
losses are the package's own.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from accelerate.utils import set_seed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import amd_loss, correlation_loss, kd_loss, mixup, sp_loss
from kdkernels.training import Distillation, FeatureTaps, Method, data, fit
from kdkernels.training.demo import DEMO_METHODS, LABELLED, LR, STUDENT_EPOCHS, TEACHER_EPOCHS
from kdkernels.training.methods import Alone
from kdkernels.training.models import ConvNet, small_student, small_teacher
from kdkernels.training.triplets import TripletDataset, collate_triplets
from kdkernels.training.views import rotate_views

FOLDER = Path(__file__).parent / "pictures"
TEACHER, STUDENT, OTHER = "#3949ab", "#e67e22", "#9e9e9e"
SPLIT = data.digits()
IMAGES, LABELS = SPLIT.test.tensors


@cache
def teacher() -> ConvNet:
    set_seed(0)
    model = small_teacher(SPLIT.channels, SPLIT.classes)
    distillation = Distillation(None, model, Alone())
    fit(distillation, data.loader(SPLIT.train, 64, train=True), epochs=TEACHER_EPOCHS, lr=0.05, progress=False)
    distillation.close()
    return model.eval()


@cache
def student(name: str) -> tuple[ConvNet, Method]:
    """The demo's student after the demo's training with a method; the method, for its heads."""
    guide, method = teacher(), DEMO_METHODS[name][1]()
    set_seed(0)
    model = small_student(SPLIT.channels, SPLIT.classes)
    loader = data.loader(data.labelled_subset(SPLIT.train, LABELLED, 0), 32, train=True, triplets=method.triplets)
    epochs = STUDENT_EPOCHS // 3 if method.triplets else STUDENT_EPOCHS
    distillation = Distillation(guide, model, method)
    fit(distillation, loader, epochs=epochs, lr=LR, progress=False)
    distillation.close()
    return model.eval(), method.eval()


def untrained() -> ConvNet:
    set_seed(0)
    return small_student(SPLIT.channels, SPLIT.classes).eval()


@torch.no_grad()
def stage(model: nn.Module, images: Tensor, index: int) -> Tensor:
    with FeatureTaps(model, [f"stages.{index}"]) as taps:
        model(images)
        return taps.pop()[0]


def by_class(per_class: int) -> Tensor:
    """Indices of test images, the same number of each class, sorted by class."""
    return torch.cat([LABELS.eq(c).nonzero()[:per_class, 0] for c in range(SPLIT.classes)])


def show(axes: Axes, values: Tensor, title: str, cmap: str = "viridis", **options: float | str) -> None:
    axes.imshow(values, cmap=cmap, interpolation="nearest", **options)
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])


def class_bars(axes: Axes, rows: dict[str, tuple[Tensor, str]], title: str) -> None:
    width = 0.8 / len(rows)
    for k, (label, (values, colour)) in enumerate(rows.items()):
        axes.bar(torch.arange(10) + (k - (len(rows) - 1) / 2) * width, values, width, label=label, color=colour)
    axes.set_title(title, fontsize=9)
    axes.set(xticks=range(10), xlabel="class", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)


def kd() -> Figure:
    """One image's probabilities at two temperatures, and why the loss carries T^2."""
    model, alone = teacher(), student("alone")[0]
    with torch.no_grad():
        logits, ours = model(IMAGES), alone(IMAGES)
    right = (logits.argmax(1) == LABELS) & (ours.argmax(1) == LABELS)
    one = int((logits / 4).softmax(1).topk(2).values[:, 1].where(right, torch.zeros(())).argmax())
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    image, first, second, size = figure.subplots(1, 4, width_ratios=(2, 4, 4, 4))
    show(image, IMAGES[one, 0], f"class {int(LABELS[one])}", "gray_r")
    for axes, t in ((first, 1), (second, 4)):
        class_bars(
            axes,
            {
                "teacher": ((logits[one] / t).softmax(0), TEACHER),
                "student alone": ((ours[one] / t).softmax(0), STUDENT),
            },
            f"softmax(z / T), T = {t}",
        )
    temperatures = [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 20]
    for t2, colour, label in ((True, TEACHER, "with T²"), (False, OTHER, "without")):
        norms = []
        for t in temperatures:
            z = ours[:256].clone().requires_grad_()
            kd_loss(z, logits[:256], temperature=t, scale_by_t2=t2).backward()
            norms.append(float(z.grad.norm()))
        size.loglog(temperatures, norms, "o-", color=colour, label=label, markersize=3)
    size.set(xlabel="T", title="‖dL/dz‖, 256 images")
    size.title.set_fontsize(9)
    size.legend(frameon=False, fontsize=8)
    return figure


def sp() -> Figure:
    """Row-normalised Gram matrices of a batch sorted by class."""
    images = IMAGES[by_class(6)]
    target = stage(teacher(), images, 2)
    networks = [("student, untrained", untrained()), ("student, CE alone", student("alone")[0])]
    networks.append(("student, CE + 300 SP", student("sp")[0]))
    panels = [(name, stage(model, images, 2)) for name, model in networks]
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax, (name, x) in zip(axes, [*panels, ("teacher", target)], strict=True):
        q = x.flatten(1)
        loss = "" if x is target else f"\nsp_loss {float(sp_loss(x, target)):.2e}"
        show(ax, F.normalize(q @ q.t()), name + loss, vmin=0, vmax=0.25)
        ax.set(xticks=torch.arange(10) * 6 + 2.5, yticks=torch.arange(10) * 6 + 2.5)
        ax.set_xticklabels(range(10), fontsize=7)
        ax.set_yticklabels(range(10), fontsize=7)
        ax.tick_params(length=0)
    figure.colorbar(axes[-1].images[0], ax=list(axes), shrink=0.8, pad=0.01)
    return figure


def stkd() -> Figure:
    """Two images, their mixture, its label, and what both networks say of it."""
    model, ours = teacher(), student("stkd")[0]
    best = -1.0
    for seed in range(200):  # of 200 draws the pair in which the teacher sees both classes best
        draw = torch.Generator().manual_seed(seed)
        two = torch.randperm(len(IMAGES), generator=draw)[:2]
        mixed, a, b, lam = mixup(IMAGES[two], LABELS[two], generator=draw)
        with torch.no_grad():
            q = (model(mixed[:1])[0] / 4).softmax(0)
        if a[0] != b[0] and 0.55 < float(lam) < 0.65 and float(q[a[0]].minimum(q[b[0]])) > best:
            best, chosen = float(q[a[0]].minimum(q[b[0]])), (two, mixed, a, b, lam)
    two, mixed, a, b, lam = chosen
    label = lam * F.one_hot(a[0], 10) + (1 - lam) * F.one_hot(b[0], 10)
    with torch.no_grad():
        t, s = (network(mixed[:1])[0] for network in (model, ours))
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=(2, 2, 2, 5, 5))
    show(axes[0], IMAGES[two[0], 0], f"x, class {int(a[0])}", "gray_r")
    show(axes[1], IMAGES[two[1], 0], f"x[π], class {int(b[0])}", "gray_r")
    show(axes[2], mixed[0, 0], f"x~, λ = {float(lam):.2f}", "gray_r")
    class_bars(
        axes[3], {"label y~": (label, OTHER), "student, p": (s.softmax(0), STUDENT)}, "T = 1: the cross entropy's"
    )
    rows = {"teacher, q": ((t / 4).softmax(0), TEACHER), "student, q": ((s / 4).softmax(0), STUDENT)}
    class_bars(axes[4], rows, "T = 4: the KL's")
    return figure


def angular_maps(r: Tensor, margin: float = 1.35, scale: float = 64.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, u, w and G of a map of channel energies, as kdkernels/amd_loss.py defines them."""
    q = r / (r.norm() + 1e-6)
    w, u = 1 - q, torch.cos(margin * q.clamp(-1 + 1e-7, 1 - 1e-7).acos())
    return q, u, w, -F.softplus(scale * (w - u))


def amd() -> Figure:
    """One image's positive map and its three unit maps for three networks, and the maps as functions of q."""
    one = int((LABELS == 4).nonzero()[1, 0])
    image = IMAGES[one : one + 1]
    networks = [("teacher", teacher()), ("student, CE alone", student("alone")[0])]
    networks.append(("student, AMD", student("amd")[0]))
    target = stage(teacher(), image, 0)
    features = [stage(model, image, 0) for _, model in networks]
    maps = [angular_maps(x[0].square().sum(0)) for x in features]
    units = [torch.stack([q, *(v / v.norm() for v in (u, w, g))]) for q, u, w, g in maps]
    ranges = torch.stack(units)
    low, high = ranges.amin((0, 2, 3)), ranges.amax((0, 2, 3))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 2))
    titles = ["q", "u / ‖u‖", "w / ‖w‖", "G / ‖G‖"]
    for row, (name, _), x, unit in zip(left.subplots(3, 5), networks, features, units, strict=True):
        loss = "" if name == "teacher" else f"\namd_loss {float(amd_loss(x, target)):.1e}"
        show(row[0], image[0, 0], name + loss, "gray_r")
        for k, ax in enumerate(row[1:]):
            show(ax, unit[k], titles[k], vmin=float(low[k]), vmax=float(high[k]))
    above, below = right.subplots(2, 1)
    q = torch.linspace(0, 1, 201)
    w, u = 1 - q, torch.cos(1.35 * q.acos())
    above.plot(q, u, color=TEACHER, label="u = cos(1.35 acos q)")
    above.plot(q, w, color=STUDENT, label="w = 1 − q")
    below.plot(q, -F.softplus(64 * (w - u)), color="#2e7d32", label="G = −softplus(64 (w − u))")
    below.set_xlabel("q", fontsize=9)
    for ax in (above, below):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
        ax.tick_params(labelsize=7)
    return figure


def mlkd() -> Figure:
    """Cosines of every view with every base image, for the teacher and the student's correlation head."""
    images, labels = IMAGES[by_class(3)], LABELS[by_class(3)]
    views = rotate_views(images)
    target = stage(teacher(), views, 2).mean((2, 3))
    model, method = student("mlkd")
    before = stage(student("alone")[0], views, 2).mean((2, 3))
    with torch.no_grad():
        after = method.loss.g_c(stage(model, views, 2).mean((2, 3)))
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4))
    one = int((labels == 7).nonzero()[0, 0])
    for r, ax in enumerate(left.subplots(4, 1)):
        show(ax, views[4 * one + r, 0], "base" if r == 0 else f"view {r}", "gray_r")
    axes = right.subplots(1, 3)
    panels = [("student, CE alone: f_s", before), ("student, MLKD: g_c(f_s)", after), ("teacher: f_t", target)]
    for ax, (name, f) in zip(axes, panels, strict=True):
        u = F.normalize(f).unflatten(0, (-1, 4))
        loss = "" if f is target else f"\ncorrelation_loss {float(correlation_loss(f, target)):.2e}"
        show(ax, u[:, 1:].flatten(0, 1) @ u[:, 0].t(), name + loss, vmin=0, vmax=1, aspect="auto")
        ax.set(xticks=torch.arange(10) * 3 + 1, xlabel="30 base images by class")
        ax.set_xticklabels(range(10), fontsize=7)
    axes[0].set_ylabel("90 rotated views, by class")
    right.colorbar(axes[-1].images[0], ax=list(axes), shrink=0.8, pad=0.01)
    return figure


def _box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str) -> None:
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="#555555"))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=7.5)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linestyle": style})


def corsd() -> Figure:
    """The stages and their relation networks, and the scores of the demo's network on test triplets."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    diagram, scores = figure.subplots(1, 2, width_ratios=(2, 1))
    diagram.set(xlim=(-0.9, 9.1), ylim=(-0.2, 5.1))
    diagram.axis("off")
    _box(diagram, -0.7, 3.9, 1.0, 0.8, "anchor,\npositive,\nnegative", "#eeeeee")
    for k in range(3):
        x = 1.0 + 2.8 * k
        deepest = k == 2
        colour = "#c5cae9" if deepest else "#ffe0b2"
        _box(diagram, x, 3.9, 1.8, 0.8, f"stage {k + 1}\n{'deepest: the teacher' if deepest else 'C, H, W'}", colour)
        _box(diagram, x, 2.2, 1.8, 0.9, f"relation network {k + 1}\n{2 - k} SepConv, pooling", colour)
        _box(diagram, x, 0.7, 0.8, 0.7, "score\nr⁺, r⁻", "#ffffff")
        _box(diagram, x + 1.0, 0.7, 0.8, 0.7, "classes\nq⁺, q⁻", "#ffffff")
        _arrow(diagram, (x - 0.75, 4.3), (x - 0.05, 4.3), "#555555")
        _arrow(diagram, (x + 0.9, 3.85), (x + 0.9, 3.15), "#555555")
        _arrow(diagram, (x + 0.7, 2.15), (x + 0.4, 1.45), "#555555")
        _arrow(diagram, (x + 1.1, 2.15), (x + 1.4, 1.45), "#555555")
    for side, y, colour, text in (
        (0.4, 0.45, TEACHER, "(r − r₃)²"),
        (1.4, 0.1, STUDENT, "KL(q₃ → q)"),
    ):
        diagram.plot([6.6 + side, 6.6 + side, 1.0 + side], [0.65, y, y], color=colour, linestyle="dashed", linewidth=1)
        for k in range(2):
            _arrow(diagram, (1.0 + 2.8 * k + side, y), (1.0 + 2.8 * k + side, 0.68), colour)
        diagram.text(3.3, y + 0.05, text, fontsize=7, color=colour, ha="center")
    diagram.text(-0.7, 1.75, "pairs (anchor, positive)\nand (anchor, negative)", fontsize=7.5)

    model, method = student("corsd")
    drawn = TripletDataset(SPLIT.test, LABELS, torch.Generator().manual_seed(0))
    images, target, _ = collate_triplets([drawn[i] for i in range(len(drawn))])
    heads, near = [], []  # how often q+ names the class, and how often r+ is the smaller score
    with torch.no_grad():
        for k, network in enumerate(method.loss.relations):
            f = stage(model, images, k)
            (r_pos, q_pos), (r_neg, _) = (network(f[0::3], f[other::3]) for other in (1, 2))
            heads.append(100 * float((q_pos.argmax(1) == target).float().mean()))
            near.append(100 * float((r_pos < r_neg).float().mean()))
    for k, (label, values, colour) in enumerate([("q⁺ names the class", heads, TEACHER), ("r⁺ < r⁻", near, STUDENT)]):
        scores.bar(torch.arange(3) + (k - 0.5) * 0.35, values, 0.35, label=label, color=colour)
    scores.set(
        xticks=range(3), xticklabels=[f"stage {k + 1}" for k in range(3)], ylim=(0, 130), yticks=range(0, 101, 25)
    )
    scores.set_title(f"% of {len(drawn)} test triplets", fontsize=9)
    scores.legend(frameon=False, fontsize=8)
    return figure


PICTURES = {"kd": kd, "sp": sp, "stkd": stkd, "amd": amd, "mlkd": mlkd, "corsd": corsd}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]().savefig(FOLDER / f"{name}.png", dpi=100)
        print(FOLDER / f"{name}.png")
