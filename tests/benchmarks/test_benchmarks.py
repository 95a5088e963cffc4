"""The benchmarks, as far as they run without a GPU: on small models and small problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import (
    backward,
    denoising,
    kernels,
    patterns,
    plots,
    record,
    resolutions,
    tables,
    timing,
)
from benchmarks.__main__ import app
from benchmarks.models import kind_of
from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Window,
    default_links,
)
from gna_compile.simulate import cases


def text_of(table: Any) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_models() -> None:
    run = CliRunner().invoke(app, ["models", "wan", "--tiny", "--repeats", "1"])
    assert run.exit_code == 0, run.output
    assert "sites rewritten: 1" in run.output
    assert "finite: True" in run.output


@pytest.mark.parametrize("command", ["models", "denoising", "resolutions", "kernels", "backward"])
def test_names_the_known_ones(command: str) -> None:
    tiny = [] if command in ("kernels", "backward") else ["--tiny"]
    run = CliRunner().invoke(app, [command, "sora", *tiny])
    assert run.exit_code != 0
    assert "hunyuan" in run.output


def test_denoising() -> None:
    """All phases are lowered by the first step, and the second run compiles nothing."""
    run = CliRunner().invoke(app, ["denoising", "flux", "--tiny", "--steps", "6"])
    assert run.exit_code == 0, run.output
    assert "default: 2 attention sites: 2 rewritten; warmup: 2 attention sites: 0" in run.output
    assert "of the first run: {0: 1}, of the timed one: {}; finite: True" in run.output


@pytest.mark.parametrize(("name", "rewritten"), [("hunyuan-video", 2), ("cosmos", 1)])
def test_denoising_of_videos(name: str, rewritten: int) -> None:
    """The pipelines take what stands for a prompt, and switch phases without compiling again."""
    torch._dynamo.reset()
    model, arguments = denoising.prepared(name, layers=1, tiny=True)
    options = {"policy": denoising.TINY, "inner": "eager"}
    model.compile(backend="gna", options=options)
    pipe = denoising.RECIPES[name].pipeline(model)
    result = denoising.denoise(pipe, arguments, steps=6, policy=denoising.TINY)
    assert result["steps"] == {"warmup": 2, "default": 4}
    assert f"{rewritten} rewritten" in result["sites"].partition(";")[0]
    assert result["compiled"] == {0: 1}
    assert result["compiled again"] == {}
    assert result["finite"]


def test_resolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed size compiles once more, then any size runs."""
    grids = [(4, 6, 8), (6, 8, 10), (8, 4, 6)]
    monkeypatch.setitem(resolutions.TINY_GRIDS, "wan", grids)
    calls = resolutions.measure("wan", "gna", layers=1, dtype="fp32", tiny=True)
    assert [call.grid for call in calls] == grids
    assert [call.graphs for call in calls] == [1, 1, 0]
    assert [call.rewritten for call in calls] == [1, 1, 0]
    assert "6x8x10" in text_of(resolutions.table(calls))


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void gna::sm90::forward<gna::sm90::Traits<128>>(gna::sm90::Parameters)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(Params)", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>()", "attention"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("triton_poi_fused_clone_transpose_3", "copies"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_mul_cat_7", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4>()", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_bounds_of_the_kernel_cases() -> None:
    """As published with the goals; 1 over the share of the pairs that is visible."""
    bounds = {
        "hunyuan-gna": 11.11, "hunyuan-na": 11.11, "hunyuan-58": 2.40, "flux4k-gna": 10.24,
        "flux4k-na": 10.24, "cosmos-56-gna": 2.29, "cosmos-89-gna": 9.17, "cosmos-89-na": 9.17,
        "wan720p-gna": 10.94, "wan720p-na": 11.07, "1d-32k": 16.0, "1d-32k-na": 16.0,
        "ltx-11": 147.71, "ltx-355": 2621.44, "dense": 1.0, "dense-64": 1.0, "flux4k-text": 8.96,
        "hunyuan-text": 10.79, "dilated": 55.0,
    }  # fmt: skip
    assert {name: round(case.bound, 2) for name, case in kernels.CASES.items()} == bounds
    assert list(kernels.CASES) == list(cases.CASES)
    hunyuan = kernels.CASES["hunyuan-text"]
    tokens = 30 * 48 * 80
    pairs = tokens * (18 * 24 * 24 + 100) + 256 * (tokens + 100)
    assert hunyuan.pairs == pairs
    assert hunyuan.flops == 4 * pairs * 24 * 128
    assert hunyuan.target == pytest.approx(0.97 * (tokens + 256) ** 2 / pairs)


SMALL = kernels.Case(cases.Case((12, 16), 2, 64, (6, 8), (2, 4), suffix=3), goal=2.0, shown=2)


def test_candidates_compute_what_they_should() -> None:
    """The op is the same by two providers; the masked dense one hides what the op's mask hides."""
    torch.manual_seed(0)
    inputs = SMALL.inputs("cpu")
    outputs = [SMALL.attention(inputs, provider)() for provider in ("cpu", "portable")]
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    whole = kernels.Case(cases.Case((12, 16), 2, 64, (12, 16), (1, 1), suffix=3), shown=2)
    runs = kernels.candidates(whole, ["cudnn"], "cpu", "cpu")
    assert list(runs) == ["cudnn-masked", "cudnn", "ours"]
    mask = runs["cudnn-masked"].args[2]  # type: ignore[attr-defined]
    query, key, value = runs["cudnn-masked"].args[1]  # type: ignore[attr-defined]
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(runs["ours"](), dense, rtol=2e-2, atol=2e-2)


def test_a_candidate_that_fails_is_left_out() -> None:
    result = kernels.measure("small", SMALL, ["fa2", "flex", "cudnn"], 2, "cpu", "cpu")
    assert set(result.ms) == {"fa2", "ours"}
    assert set(result.failed) == {"flex", "cudnn", "cudnn-masked"}
    assert "runs on cuda, not cpu" in result.failed["flex"]
    assert result.speedups == {} and result.of_goal is None
    assert result.tflops["ours"] == pytest.approx(1e-9 * SMALL.flops / result.ms["ours"])
    assert "flex failed" in kernels.summary(result)
    assert "small" in text_of(kernels.table([result]))


def test_turns() -> None:
    """Ratios are of the same turn, after calls that do not count; the last two swap places."""
    log: list[str] = []
    ms = {"slow": 9.0, "base": 4.0, "ours": 0.5}
    runs = {name: (lambda name=name: name) for name in ms}

    def clock(run: timing.Run, before: int, calls: int) -> float:
        name = str(run())
        log.append(f"{before}+{calls} {name}")
        return ms[name] * (1 + (len(log) > 6))  # the GPU slows down in the second turn

    times = timing.take_turns(runs, 2, clock)
    assert log[3:6] == ["11+2 slow", "25+5 base", "200+40 ours"]
    assert log[6:] == ["11+2 slow", "200+40 ours", "25+5 base"]
    assert times["base"][1] > times["base"][0]
    ratios = timing.speedups(times, over="base")
    assert ratios == {"slow": [4 / 9, 4 / 9], "ours": [8.0, 8.0]}
    assert timing.medians(ratios)["ours"] == 8
    assert timing.speedups({"ours": [1.0]}, over="base") == {}


def canned() -> list[kernels.Result]:
    """Results as a run gives them, of invented times."""
    results = []
    for name, ms in (("hunyuan-text", 30.0), ("flux4k-na", 11.0), ("1d-32k", 1.5)):
        case = kernels.CASES[name]
        result = kernels.Result(name, case.target, case.bound, case.flops)
        result.ms = {"cudnn": 9 * ms, "ours": ms}
        result.speedups, result.ratios = {"ours": 9.0}, [9.0]
        result.of_goal = 9 / case.target
        result.tflops = {peer: 1e-9 * case.flops / time for peer, time in result.ms.items()}
        result.failed = {"flex": "OutOfMemoryError: too much"}
        kernels.predict(result, case, "sm90")
        results.append(result)
    return results


def test_the_table_of_kernels() -> None:
    text = text_of(kernels.table(canned()))
    assert "…" not in text  # nothing is cut off
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "86.0% !" in rows["hunyuan-text"]  # of 0.97 x 10.79
    assert "121.6% " in rows["flux4k-na"] and "!" not in rows["flux4k-na"]
    assert "90%" not in rows["1d-32k"] and "56%" in rows["1d-32k"]  # 9 of 16


def test_the_table_of_training() -> None:
    result = backward.Result("1d-32k", 16.0, {"cudnn": 10.0, "sm90": 2.0}, {"sm90": 5.0}, {})
    row = text_of(backward.table([result])).splitlines()[1]
    assert row.split() == ["1d-32k", "10.00", "2.00", "5.00", "16.00"]


def test_training_steps() -> None:
    result = backward.measure(
        "1d-32k", backward.training_steps(SMALL, ["fa2", "cpu", "sm90"], "cpu"), 1, 9.0, "cpu"
    )
    assert set(result.ms) == {"fa2", "cpu"}
    assert "runs on cuda" in result.failed["sm90"]
    steps = backward.training_steps(SMALL, ["fa2", "portable"], "cpu")
    assert "a step takes" in backward.measure("1d-32k", steps, 1, 0.0, "cpu").failed["portable"]


def test_plots_of_kernels(tmp_path: Path) -> None:
    path = tmp_path / "kernels-h200.json"
    results = [asdict(result) for result in canned()]
    path.write_text(json.dumps({"environment": record.environment(), "results": results}))
    run = CliRunner().invoke(app, ["plots", str(path)])
    assert run.exit_code == 0, run.output
    for name in ("kernels-h200.svg", "kernels-h200.predictions.svg"):
        assert "</svg>" in (tmp_path / name).read_text()


def test_plot_of_models(tmp_path: Path) -> None:
    kinds = ("attention", "matmul", "copies", "pointwise", "other")
    side = {"ms": 10.0, "profile_ms": dict.fromkeys(kinds, 2.0)}
    result = {"model": "wan", "dense": side, "gna": side, "speedup": 1.0, "bound": 2.0}
    path = tmp_path / "models-h200.json"
    path.write_text(json.dumps({"environment": record.environment(), "results": [result]}))
    plots.draw(path)
    assert "</svg>" in (tmp_path / "models-h200.svg").read_text()


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_gpus_have_short_names(monkeypatch: pytest.MonkeyPatch, name: str, short: str) -> None:
    """Without a dash, which in a file's name begins a variant."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert record.gpu() == short


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    about = record.environment()
    assert about["commit"] == "" and about["uncommitted changes"] is False


def test_tables_tell_of_uncommitted_changes() -> None:
    environment: dict[str, Any] = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11"}}
    environment |= {"commit": "0123456789", "uncommitted changes": True}
    about = tables._about({"environment": environment})
    assert about == "NVIDIA H200, torch 2.11, commit 0123456 with changes"


def test_earlier_results_are_kept_only_if_they_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def kept(*rows: dict[str, Any]) -> Any:
        return json.loads(record.update("it", "case", list(rows), "abc").read_text())["results"]

    old, new = {"case": "c", "ms": 1}, {"case": "c", "ms": 2}
    assert kept(old) == [old]
    assert kept({"case": "b"}, {"case": "a"}) == [{"case": "a"}, {"case": "b"}, old]
    assert kept(new) == [{"case": "a"}, {"case": "b"}, new]

    about = record.environment()
    monkeypatch.setattr(record, "environment", lambda: about | {"commit": "later"})
    told = {"commit": about["commit"]}
    expected = [{"case": "a", "ms": 3}, told | {"case": "b"}, told | new]
    assert kept({"case": "a", "ms": 3}) == expected
    monkeypatch.setattr(record, "environment", lambda: about | {"commit": "last"})
    assert kept({"case": "b"}) == [{"commit": "later"} | expected[0], {"case": "b"}, expected[2]]
    monkeypatch.setattr(record, "environment", lambda: about | {"gpu": "another"})
    assert kept({"case": "a"}) == [{"case": "a"}]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where the tables of README and docs look for results."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def write(path: Path, rows: Any, commit: str = "0123456789") -> None:
    environment = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11"}, "commit": commit}
    path.write_text(json.dumps({"environment": environment, "results": rows}))


def test_the_docs_table_of_kernels(results: Path) -> None:
    rows = [asdict(result) for result in canned()]
    rows[0]["ms"]["cudnn-masked"] = 404.4
    write(results / "kernels-h200.json", rows)
    (results / "kernels-h200.svg").touch()
    about, table, *notes = tables.kernels().split("\n\n")
    assert about == "NVIDIA H200, torch 2.11, commit 0123456:"
    head, _, first, *_ = table.splitlines()
    # Nobody ran FlashAttention-2 or FlexAttention: they have no column.
    assert head == (
        "| case | FLOP bound | cuDNN dense, ms | ours, ms | ours | of the bound "
        "| useful TFLOP/s | planner's error |"
    )
    assert first.startswith("| hunyuan-text | 10.79× | 270.0 | 30.00 | **9.00×** | 83% | 506 | -")
    assert "cuDNN takes 404 ms on `hunyuan-text`" in notes[0]
    assert notes[1] == "`flex` did not run on `hunyuan-text`: OutOfMemoryError: too much"
    assert notes[-1] == "![Useful TFLOP/s](../kernels-h200.svg)"


def test_the_docs_table_of_transformers(results: Path) -> None:
    side = {"ms": 10.4, "attention_share": 0.75, "cold_s": 16.4, "peak_gib": 4.25}
    row = {"model": "wan", "grid": [21, 45, 80], "text": 512, "layers": 3, "policy": "wan2.1-720p"}
    row |= {"batch": 1, "dtype": "bf16", "regional": False, "mode": None}
    row |= {"dense": side, "gna": side, "speedup": 2.946, "bound": 3.14}
    write(results / "models-h200.json", [row])
    write(results / "models-h200-regional-fp16.json", [row | {"regional": True, "dtype": "fp16"}])
    write(results / "models-h100.json", [row | {"batch": 2}], commit="")
    h100, h100_table, _, table = tables.transformers().split("\n\n")
    assert h100 == "NVIDIA H200, torch 2.11:"
    assert "| wan, batch 2 | 21×45×80 + 512 |" in h100_table
    cells = "| 10 | 10 | **2.95×** | 3.14× | 94% | 75% → 75% | 16 → 16 | 4.2 → 4.2 |"
    rows = [f"| {name} | 21×45×80 + 512 | 3 | wan2.1-720p {cells}" for name in
            ("wan", "wan, block by block, fp16")]  # fmt: skip
    assert table.splitlines()[2:] == rows


def test_the_docs_tables_of_loops_and_training(results: Path) -> None:
    assert tables.loops() == tables.training() == tables.resolutions() == ""
    gna = {"seconds": 20.0, "steps": {"warmup": 9, "default": 19}, "compiled again": {}}
    row = {"model": "flux", "layers": 2, "policy": "flux-4k", "steps": 28, "paper": 1.45}
    row |= {"dense": {"seconds": 30.0}, "gna": gna, "speedup": 1.5}
    write(results / "denoising-h200.json", [row])
    assert tables.loops().splitlines()[-1] == (
        "| flux, 2 layers | flux-4k | 28 | 9 | 30.0 | 20.0 | **1.50×** | 1.45× | 0 |"
    )
    step = backward.Result("1d-32k", 16.0, {"cudnn": 10.0, "sm90": 2.0}, {"sm90": 5.0}, {})
    write(results / "backward-h200.json", [asdict(step)])
    assert tables.training().splitlines()[-1] == "| 1d-32k | 16.00× | 10.0 | 2.0 | **5.00×** |"
    calls = [
        resolutions.Call("wan", 1, "bf16", "inductor", (4, 6), 1, 17.62, 272.7, 0),
        resolutions.Call("wan", 1, "bf16", "gna", (4, 6), 0, 8.0, 90.9, 0),
    ]
    rows = [asdict(call) | {"commit": "fedcba9876"} for call in calls]
    write(results / "resolutions-h200.json", rows)
    assert tables.resolutions().splitlines()[-3:] == [
        "| wan | 4×6 | 1 → 0 | 17.6 → 8.0 | 273 → 91 | **3.00×** |",
        "",
        "Of commit fedcba9: `wan`.",
    ]


def test_patterns() -> None:
    """cuDNN is left out where there is none; groups of heads run alone, too."""
    segments = (GlobalTokens(5), GridTokens((8, 8)), GridTokens((4, 4)))
    window = Window((4, 4), (2, 2))
    groups = (HeadGroup(2, (window, None)), HeadGroup(2, (None, None)))
    pattern = AttentionPattern(segments, segments, default_links(segments), groups)
    result = patterns.measure("small", pattern, 1, "cpu")
    assert result.provider == "cpu, cpu" and set(result.failed) == {"cudnn"}
    assert result.of_groups is not None and result.of_groups > 0
    assert set(result.ms) == {"ours", "group 0", "group 1"}
    assert result.bound == pytest.approx(1 / pattern.flop_share)
