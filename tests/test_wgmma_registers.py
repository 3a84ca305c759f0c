"""No kernel of the built library writes registers that a running wgmma reads or adds to."""

import shutil
import subprocess
from pathlib import Path

import pytest
from wgmma_registers import functions, overwritten

from kimi_linear._backends import CUDA_LIBRARY

# One step of a ring: the operand of the next product comes while this one may still be read.
LOOP = """
    Function : loop
        /*0000*/  WARPGROUP.ARRIVE ;
        /*0010*/  HGMMA.64x32x16.F32.BF16 R24, R104, gdesc[UR20], R24, gsb0 ;
        /*0020*/  LDS.128 R12, [R9] ;
        /*0030*/  {first} ;
        /*0040*/  WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0050*/  {second} ;
        /*0060*/  @!P1 BRA 0x0 ;
        /*0070*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/  FADD R24, R24, R25 ;
        /*0090*/  EXIT ;
"""
MOVE = "IMAD.MOV.U32 R104, RZ, RZ, R14"


@pytest.mark.parametrize(
    "first, left, second, wrong",
    [
        ("NOP", "0x0", MOVE, ""),
        (MOVE, "0x0", "NOP", "30"),  # before the wait
        ("NOP", "0x1", MOVE, "50"),  # behind one that leaves the product running
        ("NOP", "0x0", "@P0 " + MOVE, ""),
        ("FADD R39, R39, R12", "0x0", "NOP", "30"),  # the last of its sums
        ("FADD R40, R40, R12", "0x0", "NOP", ""),
        ("STS [R9], R24", "0x0", "NOP", ""),
    ],
)
def test_what_is_found(first, left, second, wrong):
    found = overwritten(LOOP.format(first=first, left=left, second=second))
    assert [line.split(":")[0] for line in found] == ([f"loop {wrong}"] if wrong else [])


def test_a_branch_is_followed():
    """The write stands behind a branch back, which the listing's order does not show."""
    text = LOOP.format(first="NOP", left="0x0", second="NOP")
    text = text.replace("WARPGROUP.ARRIVE", MOVE)
    assert overwritten(text) == []
    assert overwritten(text.replace("gsb0, 0x0", "gsb0, 0x1", 1)) == [f"loop 0: {MOVE}"]


@pytest.mark.skipif(
    not Path(CUDA_LIBRARY).exists()
    or not shutil.which("cuobjdump")
    or not shutil.which("nvdisasm"),
    reason="needs a library with CUDA, cuobjdump and nvdisasm",
)
def test_of_the_library():
    command = ["cuobjdump", "-arch", "sm_90a", "-sass", CUDA_LIBRARY]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(functions(listing)) > 40
    assert overwritten(listing) == []
