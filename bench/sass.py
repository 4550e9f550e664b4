"""Reading compiled CUDA kernels: resources, and the loops that hold tensor-core instructions.

The disassembler and the resource dump come in Triton's wheel, so no GPU and no CUDA toolkit is
needed.
"""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import networkx

# m x n x k of one instruction as its mnemonic spells it, and the warps that share it
_SHAPES = {"HMMA": (re.compile(r"\.(16)(8)(8|16)\b"), 1),
           "HGMMA": (re.compile(r"\.(\d+)x(\d+)x(\d+)\b"), 4)}  # fmt: skip
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"(\.L\w+)\)?\s*$")
# Lengths contracted per tile by the matrix products of a kernel's loop: head_dim or a block side.
PRODUCTS = {"forward": "dn", "dq": "ddn", "dkv": "ddmm"}
_ENDS = ("EXIT", "RET", "BRX", "JMP", "JMX")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS.

    Attributes:
        text: as printed, predicate included.
        name: the mnemonic with its modifiers, such as "MUFU.EX2".
        conditional: whether it may do nothing.
        target: the label it names last, or "".
    """

    text: str
    name: str
    conditional: bool
    target: str

    @property
    def opcode(self):
        """The mnemonic without modifiers."""
        return self.name.split(".")[0]

    @property
    def jumps(self):
        """Whether it is a plain jump: ptxas writes some of these as calls that never return."""
        return self.opcode == "BRA" or (self.opcode == "CALL" and self.target != "")

    @property
    def is_mma(self):
        """HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100) and their kin of other types."""
        return self.opcode.endswith("MMA")

    @property
    def multiply_adds(self):
        """Multiply-adds per warp, or None where the mnemonic does not tell."""
        shape, warps = _SHAPES.get(self.opcode, (None, 1))
        found = shape and shape.search(self.name)
        return int(found[1]) * int(found[2]) * int(found[3]) / warps if found else None


@dataclass(frozen=True)
class Loop:
    """The code from a label to the backward branch to it."""

    body: tuple[Instruction, ...]

    def count(self, wanted):
        """How many instructions `wanted(instruction)` holds for."""
        return sum(bool(wanted(instruction)) for instruction in self.body)

    @property
    def mma(self):
        """Number of tensor-core instructions."""
        return self.count(lambda one: one.is_mma)

    @property
    def mufu(self):
        """Number of instructions of the special function unit."""
        return self.count(lambda one: one.opcode == "MUFU")

    @property
    def spills(self):
        """Number of loads and stores of local memory."""
        return self.count(lambda one: one.opcode in ("LDL", "STL"))

    @property
    def calls(self):
        """Number of calls, whose instructions elsewhere are not counted."""
        return self.count(lambda one: one.opcode == "CALL" and not one.jumps)

    @property
    def other(self):
        """Number of instructions that are not tensor-core instructions."""
        return len(self.body) - self.mma

    @property
    def multiply_adds(self):
        """Multiply-adds of one pass per warp, or None where the mnemonics do not tell."""
        seen = [one.multiply_adds for one in self.body if one.is_mma]
        return None if None in seen else sum(seen)

    def opcodes(self):
        """Opcode -> count, most frequent first."""
        return dict(collections.Counter(one.opcode for one in self.body).most_common())


@dataclass(frozen=True)
class Resources:
    """What `cuobjdump --dump-resource-usage` says: registers a thread, bytes of the rest."""

    registers: int
    stack: int
    shared: int
    local: int


def _tool(name, *arguments):
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def ptxas_version(target):
    """Version of the assembler that Triton uses for a target such as "sm_90"."""
    from triton.backends.nvidia import compiler

    return re.search(r"V([\d.]+)", compiler.get_ptxas_version(int(target[3:])))[1]


def read(cubin):
    """`(Resources, [Loop])` of the one kernel in a cubin; the loops as of `mma_loops`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if len(found) != 1:
        raise ValueError(f"expected one kernel in the cubin, cuobjdump lists {len(found)}.")
    return Resources(*map(int, found[0])), mma_loops(text)


def parse(text):
    """`(instructions, labels)` of a listing of `nvdisasm -c`; a label is an index."""
    instructions, labels = [], {}
    for line in map(str.strip, text.splitlines()):
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            words = found[1].split()
            conditional = words[0].startswith("@")
            name = words[1] if conditional else words[0]
            target = _TARGET.search(found[1])
            # a branch on an operand, as in "BRA.U UP0, label" and "BRA.DIV UR4, label"
            operand = name.startswith("BRA") and "," in found[1]
            instructions.append(
                Instruction(found[1], name, conditional or operand, target[1] if target else "")
            )
    return instructions, labels


def _flow(instructions, labels):
    """Which instruction may follow which."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(instructions)))
    meets = collections.defaultdict(list)
    for one in instructions:
        if one.opcode == "BSSY" and one.target in labels:
            meets[_barrier(one)].append(labels[one.target])
    for index, one in enumerate(instructions):
        after = []
        if one.jumps and one.target in labels:
            after = [labels[one.target]]
        elif one.opcode == "BSYNC":
            after = meets[_barrier(one)]
        leaves = one.jumps or one.opcode in ("BSYNC", *_ENDS)
        goes_on = one.conditional or not leaves
        graph.add_edges_from(
            (index, to) for to in [*after, *([index + 1] if goes_on else [])]
            if to < len(instructions)
        )  # fmt: skip
    return graph


def _barrier(one):
    found = re.search(r"\bB\d+\b", one.text)
    return found[0] if found else ""


def _dominates(immediate, above, below):
    while below != above:
        parent = immediate.get(below, below)
        if parent in (None, below):
            return False
        below = parent
    return True


def mma_loops(text):
    """The innermost loops of a listing of `nvdisasm -c` that hold tensor-core instructions.

    A branch back is a loop only where its label is passed on every way to it: code moved out of
    line, such as a slow path behind the end of the kernel, branches back too.
    """
    instructions, labels = parse(text)
    if not instructions:
        return []
    immediate = networkx.immediate_dominators(_flow(instructions, labels), 0)
    last = {}
    for index, one in enumerate(instructions):
        start = labels.get(one.target, index + 1) if one.jumps else index + 1
        if start <= index and index in immediate and _dominates(immediate, start, index):
            last[start] = index
    spans = [
        (start, end)
        for start, end in last.items()
        if any(one.is_mma for one in instructions[start : end + 1])
    ]
    innermost = [
        (start, end)
        for start, end in spans
        if not any(start <= a and b <= end for a, b in spans if (a, b) != (start, end))
    ]
    return [Loop(tuple(instructions[start : end + 1])) for start, end in sorted(innermost)]


def unrolling(loop, kernel, config, head_dim):
    """How many tiles one pass of the loop does; None if its products are not those of `kernel`."""
    sides = {"d": head_dim, "n": config.block_n, "m": config.block_m}
    steps = sum(sides[side] for side in PRODUCTS.get(kernel, "")) / 16
    if not steps:
        return None
    if loop.multiply_adds is None:
        # tcgen05 instructions carry no shape: 16 along the contraction, at most 128 rows
        tiles = loop.mma / steps / max(1, config.block_m // 128)
    else:
        tile = config.block_m * config.block_n * head_dim * len(PRODUCTS[kernel])
        tiles = loop.multiply_adds * config.num_warps / tile
    return round(tiles) if tiles >= 1 and tiles == round(tiles) else None


def per_element(loop, config, tiles):
    """Figures of one loop."""
    elements = tiles * config.block_m * config.block_n / (32 * config.num_warps)
    return {
        "non_mma": round(loop.other / elements, 3),
        "mufu": round(loop.mufu / elements, 3),
        "instructions": len(loop.body),
        "mma": loop.mma,
        "tiles": tiles,
        "spills": loop.spills,
        "calls": loop.calls,
    }


def full_tile_loop(loops, kernel, config, head_dim):
    """`(the loop over full tiles, its figures)`; None, None without loops."""
    known = [(loop, unrolling(loop, kernel, config, head_dim)) for loop in loops]
    # a loop without all products of the kernel only gathers statistics
    for wanted in ({1}, {tiles for _, tiles in known} - {None}, {None}):
        found = [(loop, tiles or 1) for loop, tiles in known if tiles in wanted]
        if found:
            figures = [(per_element(loop, config, tiles), loop) for loop, tiles in found]
            best, loop = min(figures, key=lambda one: one[0]["non_mma"])
            return loop, best
    return None, None
