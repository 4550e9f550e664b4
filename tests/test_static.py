"""The SASS reader against listings with known counts, and every shipped kernel for every target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from attnvariants_kernels._triton import INTERPRETED, why_not  # noqa: E402
from attnvariants_kernels.launch import Config  # noqa: E402
from bench import sass, static  # noqa: E402

needs_compiler = pytest.mark.skipif(
    bool(why_not()) or INTERPRETED, reason="needs Triton's compiler"
)
CONFIG = Config(block_m=64, block_n=16, num_warps=4, num_stages=2)
HEAD_DIM = 16

# A loop over groups around a loop over full tiles and one over edge tiles, a loop that waits, a
# slow path moved behind the end that branches back into the middle of the first loop, and a jump
# that ptxas writes as a call. A tile of 64 x 16 has 8 elements a thread.
LISTING = """
	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, R3 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRYWAIT P0, [UR4], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], R8, !UPT ;
        /*0050*/                   FFMA R20, R8.reuse, UR6, -R4 ;
        /*0060*/                   MUFU.EX2 R20, R20 ;
        /*0070*/               @P3 FMUL R20, R20, R5 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R20, R21, R20 ;
        /*0090*/                   HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR8], R24, gsb0 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], R8, !UPT ;
        /*00c0*/                   FSEL R8, R8, -INF , P2 ;
        /*00d0*/                   ISETP.GE.AND P2, PT, R8, R9, PT ;
        /*00e0*/                   LDL.LU R30, [R1] ;
        /*00f0*/                   STL [R1+0x4], R30 ;
        /*0100*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp) ;
        /*0110*/                   FFMA R20, R8, UR6, -R4 ;
        /*0120*/                   MUFU.EX2 R20, R20 ;
        /*0130*/                   MUFU.EX2 R21, R21 ;
        /*0140*/                   HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR8], R24, gsb0 ;
        /*0150*/                   BRA.U UP0, `(.L_x_3) ;
        /*0160*/               @P4 CALL.REL.NOINC `(.L_x_4) ;
        /*0170*/                   BRA `(.L_x_0) ;
.L_x_4:
        /*0180*/                   SYNCS.PHASECHK.TRYWAIT P0, [UR4], R2 ;
        /*0190*/              @!P0 BRA `(.L_x_4) ;
        /*01a0*/                   EXIT ;
.L_x_9:
        /*01b0*/                   SYNCS.PHASECHK.TRYWAIT P0, [UR4], R2 ;
        /*01c0*/              @!P0 BRA `(.L_x_9) ;
        /*01d0*/                   BRA `(.L_x_2) ;
.L_x_10:
        /*01e0*/                   BRA `(.L_x_10);
        /*01f0*/                   NOP;
"""


def loop_of(lines):
    body = "".join(
        f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines)
    )
    return sass.mma_loops(f".L_x_0:\n{body}        /*ff00*/  @P0 BRA `(.L_x_0) ;\n")


def test_only_innermost_loops_with_tensor_cores_are_found():
    full, edge = sass.mma_loops(LISTING)
    assert (len(full.body), full.mma, full.mufu, full.other) == (9, 2, 1, 7)
    assert (len(edge.body), edge.mma, edge.mufu, edge.other) == (11, 2, 2, 9)
    assert (full.spills, edge.spills) == (0, 2)
    assert (full.calls, edge.calls) == (0, 1)
    assert full.opcodes()["HGMMA"] == 2


def test_the_full_tile_loop_is_the_cheapest():
    loops = sass.mma_loops(LISTING)
    loop, figures = sass.full_tile_loop(loops[::-1], "forward", CONFIG, HEAD_DIM)
    assert loop is loops[0]
    assert figures["non_mma"] == pytest.approx(7 / 8, abs=1e-3)
    assert figures["mufu"] == pytest.approx(1 / 8, abs=1e-3)
    assert figures["tiles"] == 1


def test_no_loop_no_figures():
    assert sass.full_tile_loop([], "delta", CONFIG, HEAD_DIM) == (None, None)


@pytest.mark.parametrize(
    ("mma", "config"),
    [
        ("HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], R8", CONFIG),
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", Config(16, 8, 1, 2)),
        ("HMMA.1688.F32.TF32 R8, R4, R6, R8", Config(16, 4, 1, 2)),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT", CONFIG),
    ],
)
def test_loops_unrolled_by_the_assembler_are_divided(mma, config):
    one = loop_of([mma, "FADD R1, R1, R2", mma])
    two = loop_of([mma, "FADD R1, R1, R2", mma, mma, "FADD R3, R1, R2", mma])
    for tiles, loops in ((1, one), (2, two)):
        _, figures = sass.full_tile_loop(loops, "forward", config, HEAD_DIM)
        assert figures["tiles"] == tiles
        elements = tiles * config.block_m * config.block_n / 32 / config.num_warps
        assert figures["non_mma"] == pytest.approx((tiles + 1) / elements, abs=1e-3)


def test_a_sweep_for_statistics_is_not_the_full_tile_loop():
    mma = "HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], R8"
    sweep = loop_of([mma])
    output = loop_of([mma, "FADD R1, R1, R2", "FADD R1, R1, R2", mma])
    loop, _ = sass.full_tile_loop(sweep + output, "forward", CONFIG, HEAD_DIM)
    assert loop is output[0]


def row(**changes):
    return {"target": "sm_90", "head_dim": 128, "causal": True, "cell": "softmax",
            "kernel": "forward", "pass": "forward", "non_mma": 8.5, "stack_and_local": 0,
            **changes}  # fmt: skip


def missed(*rows):
    return [line for one in static.check(list(rows)) if one["rows"] for line in one["missed"]]


def test_what_meets_the_limits_passes():
    handwritten = row(cell=static.HANDWRITTEN, non_mma=8.4)
    rows = static.with_ratio([handwritten, row()])
    assert rows[1]["times_handwritten"] == pytest.approx(8.5 / 8.4, abs=1e-4)
    assert missed(*rows) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"non_mma": 8.51}, "non_mma"),
        ({"times_handwritten": 1.03}, "times_handwritten"),
        ({"stack_and_local": 8}, "stack_and_local"),
        ({"stack_and_local": 8, "target": "sm_80", "non_mma": None}, "stack_and_local"),
        ({"kernel": "dq", "pass": "backward", "non_mma": 12.1}, "non_mma"),
        ({"kernel": "dkv", "pass": "backward", "target": "sm_80", "stack_and_local": 65},
         "stack_and_local"),
    ],
)  # fmt: skip
def test_every_miss_is_named(changes, named):
    lines = missed(row(times_handwritten=1.0) | changes)
    assert len(lines) == 1
    assert f": {named} " in lines[0]
    assert row(**changes)["kernel"] in lines[0]
    assert row(**changes)["target"] in lines[0]


def test_what_could_not_be_read_is_a_miss():
    assert any("could not be read" in line for line in missed(row(non_mma=None)))


def test_nothing_measured_is_a_miss():
    assert all(one["missed"] for one in static.check([]))


def test_handwritten_yardstick_is_attention():
    code = """
import torch
from bench.handwritten import attention
torch.manual_seed(0)
for m, n, causal in ((37, 37, True), (19, 50, True), (16, 45, False)):
    q, k, v = torch.randn(1, 2, m, 16), torch.randn(1, 1, n, 16), torch.randn(1, 1, n, 16)
    out = attention(q, k, v, causal=causal, config=(16, 16, 4, 2))
    keep = torch.ones(m, n, dtype=torch.bool).tril(n - m if causal else n)
    s = (q.double() @ k.double().mT / 4).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(out.double(), s.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-6)
"""
    if why_not():
        pytest.skip(why_not())
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_handwritten_yardstick_on_sm_90():
    from bench import handwritten

    launch = handwritten.shipped(target="sm_90", head_dim=128, causal=False)["forward"]
    figures = static.measure(launch, "sm_90", 128)
    assert figures["tiles"] == 1
    # 128 x 128 x 128 twice in instructions of 64 x 128 x 16, shared by two groups of four warps
    assert figures["mma"] == 16
    assert figures["stack_and_local"] == 0
    # one exponential an element, and two a row for the rescale
    assert figures["mufu"] == pytest.approx(1 + 2 / 64, abs=1e-3)
    assert figures["non_mma"] <= 8.5


@needs_compiler
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=() if target == "sm_90" else pytest.mark.nightly)
        for target in static.COMPILED
    ],
)
def test_every_shipped_kernel_compiles(target):
    rows = compiled([target], head_dims=[128], masks=[True])
    missing = {static.cell_name(*cell) for cell in static.cells()} - {row["cell"] for row in rows}
    assert not missing


@needs_compiler
def test_every_size_compiles():
    # of the plainest hooks; `make nightly` takes all, for all targets
    rows = compiled(["sm_90"], variants=["softmax"])
    found = {(row["head_dim"], row["causal"]) for row in rows}
    assert found == {(dim, causal) for dim in (64, 128, 256) for causal in (True, False)}


@needs_compiler
@pytest.mark.aot
@pytest.mark.parametrize("target", static.COMPILED)
def test_every_kernel_of_every_size_compiles(target):
    compiled([target])


def compiled(targets, **which):
    """Rows of a matrix of kernels of which every one must compile."""
    rows = static.run(static.jobs_of(targets, disassemble=False, **which))
    assert not [f"{static.describe(row)}: {row['error']}" for row in rows if "error" in row]
    assert all("config" in row for row in rows)
    return rows
