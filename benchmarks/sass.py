"""What a kernel's machine code tells: registers, loads before and after its wait, chains of tensor-core instructions.

The tools are those that Triton brings along.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_REGISTER = re.compile(r"^-?\|?(R\d+)\b")
_TENSOR_CORE = re.compile(r"^(?:[HIQDO]MMA|[HIQD]GMMA|UTC\w*MMA)\b")


class Instruction(NamedTuple):
    """guard: the predicate that it depends on. target: for a jump, the number of the instruction that comes next."""

    guard: str
    name: str
    operands: tuple[str, ...]
    target: int | None = None


class Code(NamedTuple):
    """waits: whether the kernel waits for the one before it (sm_90 and later).

    early, late: loads of weights (those that are evicted first) before and after the wait. early is 0 if any load
    before the wait goes to shared memory while others are still to be issued: those then start only once it arrived.
    chain: the longest row of tensor-core instructions each of which adds to the result of the one before; endless: such
    a row goes round a loop, and `chain` counts two rounds.
    """

    waits: bool
    early: int
    late: int
    chain: int
    endless: bool


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack, where spilled registers go."""
    said = _tell("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2]) + int(found[3])


def read(cubin: bytes) -> Code:
    """Raises ValueError if the disassembler's output has no instructions."""
    instructions = parse(_tell("nvdisasm", "-c", cubin))
    if not instructions:
        raise ValueError("nvdisasm shows no instructions")
    names = [instruction.name for instruction in instructions]
    waits = next((i for i, name in enumerate(names) if name.startswith("ACQBULK")), None)
    weights = [i for i, name in enumerate(names) if name.startswith("LDG") and ".EF" in name]
    before = [i for i in weights if waits is not None and i < waits]
    stores = (i for i, name in enumerate(names) if name.startswith("STS"))
    early = 0 if before and next(stores, len(names)) < before[-1] else len(before)
    return Code(waits is not None, early, len(weights) - len(before), *chain(instructions))


def parse(listing: str) -> list[Instruction]:
    """The instructions of `nvdisasm -c`, in the order of their addresses."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.search(line):
            operands = tuple(part.strip() for part in instruction[3].split(","))
            found.append(Instruction(instruction[1] or "", instruction[2], operands))
    return [_jump(instruction, labels) for instruction in found]


def _jump(instruction: Instruction, labels: dict[str, int]) -> Instruction:
    label = re.search(r"\.L_\w+", " ".join(instruction.operands))
    jumps = instruction.name.startswith("BRA") and label
    return instruction._replace(target=labels[label[0]]) if jumps and label else instruction


def chain(instructions: list[Instruction]) -> tuple[int, bool]:
    """(chain, endless) of `Code`. A branch forward is taken for not taken, and a loop for run twice."""
    lengths: dict[str, int] = {}
    longest, endless = 0, False

    def run(begin: int, end: int) -> int:
        return max((_extend(lengths, instruction) for instruction in instructions[begin:end]), default=0)

    for i, instruction in enumerate(instructions):
        longest = max(longest, run(i, i + 1))
        if instruction.target is not None and instruction.target <= i:
            again = run(instruction.target, i + 1)
            endless |= again > longest
            longest = max(longest, again)
    return longest, endless


def _extend(lengths: dict[str, int], instruction: Instruction) -> int:
    """Notes what an instruction writes; the length of the chain that it continues, 0 for other instructions.
    lengths: of the chains whose results registers hold, by their first register."""
    name, operands = instruction.name, instruction.operands
    if _TENSOR_CORE.match(name):
        target, added = _accumulator(name, operands)
        lengths[target] = lengths.get(added, 0) + 1
        return lengths[target]
    written = _REGISTER.match(operands[0])
    if written and not name.startswith(("ST", "RED", "BRA")):
        copied = _REGISTER.match(operands[-1]) if name.split(".")[0] == "MOV" or ".MOV" in name else None
        length = lengths.get(copied[1], 0) if copied else 0
        # Under a predicate it may also leave the register alone.
        lengths[written[1]] = max(length, lengths.get(written[1], 0)) if instruction.guard else length
    return 0


def _accumulator(name: str, operands: tuple[str, ...]) -> tuple[str, str]:
    """What a tensor-core instruction writes, and what it adds to."""
    if name.startswith("UTC"):
        # Memory of its own; that it starts from zero is a predicate that the code does not show.
        memory = [operand for operand in operands if operand.startswith("tmem")]
        return memory[0], memory[0]
    if "GMMA" in name:
        return operands[0], "" if "!UPT" in operands else operands[0]
    return operands[0], operands[3].split(".")[0]


def _tell(tool: str, option: str, cubin: bytes) -> str:
    """The output of a tool bundled with Triton for a cubin."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
