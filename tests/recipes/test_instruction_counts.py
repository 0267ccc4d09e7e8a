"""Instructions are counted as often as loops turn, under the kinds that they are of."""

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.instruction_counts import KINDS, amd_loops, count, kind_of, nvidia_loops, tile_loop
from tests.helpers.running import ROOT, run_python


# Has a loop over tiles that holds a loop of four turns; before them a loop that takes no exponentials
NVIDIA = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R9, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   FADD R4, R5, R6.reuse ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   FFMA R4, R5, R6, R4 ;
        /*0060*/                   FFMA R4, R5, R6, R4 ;
        /*0070*/                   IADD3 R7, P3, R7.reuse, 0x4, RZ ;
        /*0080*/                   ISETP.NE.U32.AND P3, PT, R7, 0x10, PT ;
        /*0090*/               @P3 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/                   F2FP.BF16.F32.PACK_AB R4, R4, R5 ;
        /*00c0*/                   SHFL.BFLY PT, R8, R4, 0x1, 0x1f ;
        /*00d0*/                   HMMA.16816.F32.BF16 R16, R48, R24.reuse, R16 ;
        /*00e0*/               @P2 BRA `(.L_x_1) ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""
# Has the same; as LLVM does it, one block of the inner loop is laid out before that loop's header
AMD = """
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
\tv_add_f32_e32 v4, v5, v6
\ts_branch .LBB0_3
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=2
\tv_fma_f32 v4, v5, v6, v4
\ts_add_i32 s7, s7, 1
\ts_cmp_lg_u32 s7, 4
\ts_cbranch_scc0 .LBB0_4
.LBB0_3:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execz .LBB0_2
; %bb.9:                                ;   in Loop: Header=BB0_3 Depth=2
\tglobal_load_dword v5, v[2:3], off
\ts_branch .LBB0_2
.LBB0_4:                                ;   in Loop: Header=BB0_1 Depth=1
\tv_exp_f32_e32 v4, v4
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
\tds_write_b64 v1, v[2:3]
\tv_cmp_lt_f32_e32 vcc, v1, v2
\ts_cbranch_scc0 .LBB0_1
; %bb.5:
\ts_endpgm
"""


def test_nvidia():
    counted = count(tile_loop(nvidia_loops(NVIDIA)))
    assert counted == {
        "arithmetic": 1,
        "fma": 2 * 4,
        "integer": 2 * 4,
        "control": 1 + 4 + 1,
        "exponential": 1,
        "conversion": 1,
        "shared memory": 1,
        "tensor core": 1,
    }


def test_amd():
    counted = count(tile_loop(amd_loops(AMD)))
    assert counted == {
        "arithmetic": 2,
        "fma": 4,
        "integer": 3 * 4,
        "global memory": 4,
        "control": 1 + 3 * 4 + 1,
        "exponential": 1,
        "tensor core": 1,
        "shared memory": 1,
    }


def test_loops_that_cannot_be_counted():
    with pytest.raises(ValueError, match="counts to no constant"):
        count(tile_loop(nvidia_loops(NVIDIA.replace("R7, 0x10", "R7, R8"))))
    with pytest.raises(ValueError, match="takes exponentials"):
        tile_loop(nvidia_loops(NVIDIA.replace("MUFU.EX2", "MUFU.RCP")))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LDGSTS.E.BYPASS.128", "global memory"),
        ("LDSM.16.MT88.4", "shared memory"),
        ("LDC", "integer"),
        ("FSETP.GEU.AND", "arithmetic"),
        ("HGMMA.64x64x16.F32.BF16", "tensor core"),
        ("HMNMX2.BF16_V2", "arithmetic"),
        ("v_pk_fma_f32", "fma"),
        ("v_cndmask_b32_e64", "integer"),
        ("v_max3_f32", "arithmetic"),
        ("v_cmp_o_f32_e64", "arithmetic"),
        ("v_cmp_gt_i32_e32", "integer"),
        ("v_cvt_f16_f32_e32", "conversion"),
        ("s_waitcnt", "control"),
    ],
)
def test_kinds(name: str, kind: str):
    assert kind_of(name) == kind


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_counts_of_real_kernels(tmp_path: Path):
    """On vector units the network has h1 h2 + h2 fused products, half as many instructions on AMD."""
    script = ROOT / "recipes" / "compile_triton_kernels.py"
    flags = ["--instructions", "--kernels", "forward", "--output", tmp_path / "card"]
    run_python(script, *flags, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    rows = json.loads((tmp_path / "card.json").read_text())["results"]
    # expects of each target the dot product's, the smallest network, and two wider ones, which may be multiplied in two ways
    assert len(rows) == 4 * (1 + 1 + 2 * 2)
    for row in rows:
        counted, packed = row["instructions"], 2 if row["target"] == "gfx942" else 1
        assert counted["all"] == pytest.approx(sum(counted[kind] for kind in KINDS))
        assert counted["exponential"] >= 1 and counted["tensor core"] > 0
        if row["kernel"] == "flash forward":
            assert counted["fma"] < 0.5 and counted["all"] < 30
        elif row["network"] == "tensor cores":  # not chosen on AMD, which has no arithmetic of bfloat16
            assert counted["fma"] < 16 < 40 < counted["all"] or (row["target"] == "gfx942" and not row["chosen"])
        else:
            first, second = row["hidden_dims"]
            # allows for products with the third layer that Triton 3.7 does not pack on AMD
            more = 4 if packed == 1 else second / 2 + 4.5
            assert (first + 1) * second / packed <= counted["fma"] < (first + 1) * second / packed + more
    assert (tmp_path / "card.md").read_text().count("\n| ") == len(rows) + 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_of_two_ways_the_one_that_is_chosen_issues_less(tmp_path: Path):
    """With Triton 3.7, a kernel whose warps all compute the same would issue several times as much."""
    script = ROOT / "recipes" / "compile_triton_kernels.py"
    flags = ["--instructions", "--targets", "sm_90", "--sizes", "2", "--output", tmp_path / "card"]
    run_python(script, *flags, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    rows = [row for row in json.loads((tmp_path / "card.json").read_text())["results"] if "network" in row]
    issued = {(row["kernel"], row["chosen"]): row["instructions"]["all"] for row in rows}
    assert {kernel for kernel, _ in issued} == {"forward", "query", "key"}
    assert all(issued[kernel, True] < issued[kernel, False] for kernel, _ in issued)
