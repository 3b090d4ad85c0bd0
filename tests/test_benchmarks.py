"""The benchmarks measure what they say: correctness before time, ratios the right way round, memory, what was lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import DEVICE

from benchmarks import (
    bench_angular_margin,
    bench_channel_gram,
    bench_energy,
    bench_gram,
    bench_logit_losses,
    bench_softmax_kl,
    published,
)
from benchmarks.cases import Case, Provider, errors, logits, maps, oracle, our_backends
from benchmarks.render import (
    best_compile,
    gain,
    geomean,
    lost,
    lost_summary,
    markdown,
    ratio,
    share,
    step_summary,
    summary,
    trimmed,
    write,
)
from benchmarks.report import CASES, measure, slug
from benchmarks.timing import cold, peak_memory, quantile, take_turns

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks/results/amd-epyc.json").read_text())
WITHOUT_COMPILE = ["native", "triton", "reference", "eager"]


def small_cases() -> list[Case]:
    fp32 = torch.float32
    shape = [(4, 3, 4, 4)]
    found = [
        dataclasses.replace(bench_softmax_kl.case(name, 6, 11), inputs=logits(6, 11, fp32, labels))
        for name, (_, _, labels) in bench_softmax_kl.LOSSES.items()
    ]
    found += [
        dataclasses.replace(bench_logit_losses.case(name, 6, 11), inputs=logits(6, 11, fp32, labels))
        for name, (_, _, labels) in bench_logit_losses.LOSSES.items()
    ]
    found.append(bench_logit_losses.cwd_case(2, 3, 4, 5))
    examples = [bench_gram.CASES[0], bench_angular_margin.CASES[0], bench_energy.CASES[2], bench_energy.CASES[-1]]
    examples += bench_channel_gram.CASES[:4:3]
    found += [dataclasses.replace(example, inputs=maps(shape, shape, fp32)) for example in examples]
    stages = [(3, 2, 6, 6), (3, 3, 3, 3), (3, 4, 3, 3)]
    return [*found, dataclasses.replace(bench_channel_gram.CASES[-1], inputs=maps(stages, stages, fp32))]


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name.split(" ")[0])
def test_the_published_formulas_are_ours(case: Case) -> None:
    """In fp64, where AMD's quotient of exponentials is harmless too: the same value and gradient."""
    students, constants = case.inputs()
    inputs = (
        [x.detach().double().requires_grad_() for x in students],
        [x.double() if x.is_floating_point() else x for x in constants],
    )
    truth = oracle(case, inputs)
    assert max(errors(Provider(case.published, case.gradient), inputs, truth)) < 1e-5  # its own eps of 1e-6, 1e-7
    assert max(errors(Provider(case.ours, case.gradient, "reference"), inputs, truth)) == 0


def test_a_row_has_everything() -> None:
    case = bench_softmax_kl.case("stkd", 16, 10)
    row = measure(case, 0.0, 3, WITHOUT_COMPILE)
    assert list(row["providers"]) == [*our_backends(case.inputs()), "eager"]
    assert row["bytes"] == 5 * 16 * 10 * 4
    for found in row["providers"].values():
        median, low, high = found["step"]
        assert 0 < low <= median <= high
        assert 0 < found["forward"][0] < found["step"][0]
        assert found["gradient_error"] < 1e-5
        assert found["peak_bytes"] >= 16 * 10 * 4  # the gradient at least
    json.dumps(row)


def test_a_wrong_number_is_not_timed() -> None:
    case = bench_softmax_kl.case("kd", 6, 11)
    calls = []

    def wrong(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)  # off by 0.1 per mille everywhere but in the oracle, which calls first
        return case.ours(*args) * (1.0 if len(calls) == 1 else 1.0001)

    with pytest.raises(AssertionError, match=r"kd 6x11 float32 on .* off from fp64"):
        measure(dataclasses.replace(case, ours=wrong), 0.0, 1, WITHOUT_COMPILE)


def test_backward_runs_on_the_candidates_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.ops.softmax_kl import reference

    def refuse(*args: object) -> None:
        raise RuntimeError("the reference's backward")

    case = bench_softmax_kl.case("kd", 4, 5)
    inputs = case.inputs()
    monkeypatch.setattr(reference, "backward", refuse)
    with pytest.raises(RuntimeError, match="the reference's backward"):
        Provider(case.ours, 0.7, "reference").step(inputs)


def test_the_oracle_by_rows_is_the_whole_one() -> None:
    case = bench_softmax_kl.case("stkd", 300, 40000)  # three parts
    inputs = case.inputs()
    value, gradients = oracle(case, inputs)
    whole, gradients_whole = oracle(dataclasses.replace(case, rows_are_independent=False), inputs)
    assert torch.isclose(value, whole, rtol=1e-12, atol=0)
    assert (gradients[0].double() - gradients_whole[0]).norm() < 1e-7 * gradients_whole[0].norm()


def test_candidates_take_turns() -> None:
    heard: list[str] = []

    def candidate(name: str) -> Any:
        def run() -> dict[str, float]:
            heard.append(name)
            return {"step": float(len(heard))}

        return run

    found = take_turns({name: candidate(name) for name in "abc"}, 0.0, 4)
    assert len(heard) == 3 + 4 * 3  # one warm-up each
    for i in range(0, len(heard), 3):
        assert sorted(heard[i : i + 3]) == ["a", "b", "c"]
    assert [len(found[name]["step"]) for name in "abc"] == [4, 4, 4]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's cache is emptied instead")
def test_inputs_are_cold() -> None:
    case = bench_softmax_kl.case("kd", 64, 100)
    copies = cold(case, case.inputs())
    first = {next(copies)[0][0].data_ptr() for _ in range(64)}
    assert len(first) == 64  # 3.3 MB, more than a core's second level of cache
    assert {next(copies)[0][0].data_ptr() for _ in range(64)} == first


def test_peak_memory_counts_what_is_alive_at_a_time() -> None:
    x = torch.ones(1 << 20, device=DEVICE, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).exp().sum()  # alive at a time: x * 2, exp of it; backward adds one and its product

    peak = peak_memory(Provider(loss, 0.7), ([x], []))
    assert 2 * 4 << 20 <= peak <= 4 * (4 << 20) + 4096


def row(name: str, native: float, eager: float, compiled: float, tuned: float) -> dict[str, Any]:
    def provider(ms: float) -> dict[str, Any]:
        times = {"step": [ms / 1e3] * 3, "forward": [ms / 2e3] * 3}
        return {**times, "loss_error": 0.0, "gradient_error": 1e-7, "peak_bytes": 10}

    times = {"native": native, "reference": 2.0, "eager": eager, "compile": compiled, "compile max-autotune": tuned}
    found = {k: provider(v) for k, v in times.items()}
    return {
        "group": "gram",
        "case": name,
        "bytes": 10**6,
        "flops": 0,
        "dtype": "float32",
        "providers": found,
        "failed": {},
    }


MACHINE = {
    "device": "Some CPU",
    "threads": 2,
    "python": "3",
    "torch": "2",
    "triton": "3",
    "commit": "abc",
    "copy_bandwidth": 1e10,
    "matmul_rate": {"float32": 1e11},
}


def test_ratios_and_what_is_lost(tmp_path: Path) -> None:
    rows = [row("fast", 1.0, 4.0, 3.0, 2.0), row("slow", 2.0, 1.0, 8.0, 9.0)]
    assert ratio(rows[0], "eager") == pytest.approx(4)
    assert geomean(ratio(r, "eager") for r in rows) == pytest.approx(2**0.5)
    assert lost(rows) == ["slow: eager takes 0.50 of our time"]
    assert share(rows[0], MACHINE) == ("1.0 GB/s", pytest.approx(0.1))
    assert share({**rows[0], "flops": 10**8}, MACHINE) == ("100 GFLOP/s", pytest.approx(1.0))
    result = {"machine": MACHINE, "cases": rows, "seconds": 60}
    text = markdown(result, [])
    assert "1.41 against eager, 2.83 against the better compile" in text
    assert trimmed([100.0, 2.0, None, 50.0, 8.0, 70.0]) == pytest.approx(4)
    assert "| fast | 1.00 (1.00 to 1.00) native | 0.500 | 4.00 | 2.00 (max) | 2.00 |  | 1.0 GB/s" in text
    assert "- slow: eager takes 0.50 of our time" in text
    made = write(result, tmp_path / "x")
    assert json.loads(made[0].read_text()) == result
    assert all(path.stat().st_size > 1000 for path in made[2:])


def test_the_readme_shows_the_report() -> None:
    result, readme = RESULT, (ROOT / "README.md").read_text()
    pictures = [f"amd-epyc-{kind}.png" for kind in ("ratios", "roofline")]
    assert markdown(result, pictures) == (ROOT / "benchmarks/results/amd-epyc.md").read_text()
    assert summary(result) in readme
    assert step_summary(result) in readme
    ratios = [[ratio(row, pick(row)) for row in result["cases"]] for pick in (lambda _: "eager", best_compile)]
    all_rows, typical = ([f"{mean(column):.1f}" for column in ratios] for mean in (geomean, trimmed))
    assert (
        f"Over all {len(result['cases'])} rows the geometric means are {' and '.join(all_rows)}, without the three "
        f"largest ratios {' and '.join(typical)}" in " ".join(readme.split())
    )
    most = max(added["kdkernels"] for added in result["training_step"]["added"].values())
    assert f"each of ours adds at most {most:.1%}" in " ".join(readme.split())
    assert lost_summary(result) in " ".join(readme.split())
    assert [row["case"] for row in result["cases"]] == [case.label for case in CASES]


def test_a_gain_is_the_measured_one_or_found_by_name() -> None:
    assert gain({"case": CASES[0].label}) == CASES[0].gain == "kernel"
    assert gain({"case": CASES[0].label, "gain": "algebra"}) == "algebra"
    assert gain({"case": "forgotten"}) == ""


@pytest.mark.skipif(DEVICE != "cpu", reason="what a CPU is bad at")
def test_a_slow_baseline_is_slow() -> None:
    """Eager takes at least half as long again per element as on a row beside it."""
    rows = {row["case"]: row for row in RESULT["cases"]}
    beside = {
        "kd 8192x32000 float32": "kd 4096x1000 float32",
        "sp resnet8x4 64x256x8x8 float16": "sp resnet8x4 64x256x8x8 float32",
        "at resnet8x4 64x256x8x8 float16": "at resnet8x4 64x256x8x8 float32",
        "amd resnet8x4 64x256x8x8 float16": "amd resnet8x4 64x256x8x8 float32",
    }
    assert {name for name, row in rows.items() if gain(row) == "baseline"} == set(beside)

    def per_element(row: dict[str, Any]) -> float:
        return row["providers"]["eager"]["step"][0] * getattr(torch, row["dtype"]).itemsize / row["bytes"]

    assert all(per_element(rows[name]) > 1.5 * per_element(rows[other]) for name, other in beside.items())


def test_every_case_has_a_name_of_its_own() -> None:
    labels = [case.label for case in CASES]
    assert len(set(labels)) == len(labels)


def test_published_dkd_is_not_kd() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    target = torch.randint(7, (5,))
    assert not torch.isclose(published.dkd(student, teacher, target), published.kd(student, teacher))


def test_slug() -> None:
    assert slug("AMD EPYC") == "amd-epyc" or DEVICE == "cuda"
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
