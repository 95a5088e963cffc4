"""The benchmarks of whole models run, on small models on the CPU."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.models import kind_of


def test_models() -> None:
    run = CliRunner().invoke(app, ["models", "wan", "--tiny", "--repeats", "1"])
    assert run.exit_code == 0, run.output
    assert "sites rewritten: 1" in run.output
    assert "finite: True" in run.output


def test_models_names_the_known_ones() -> None:
    run = CliRunner().invoke(app, ["models", "sora", "--tiny"])
    assert run.exit_code != 0
    assert "hunyuan-video" in run.output


def test_denoising() -> None:
    """All phases are lowered by the first step, and the second run compiles nothing."""
    run = CliRunner().invoke(app, ["denoising", "--tiny", "--layers", "1", "--steps", "6"])
    assert run.exit_code == 0, run.output
    assert "default: 2 attention sites: 2 rewritten; warmup: 2 attention sites: 0" in run.output
    assert "graphs compiled in the first run's steps: {0: 1}" in run.output
    assert "graphs compiled in the second run: {}" in run.output


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
