"""Which registers of a running wgmma does compiled code write?

A wgmma reads its operand A from registers, and adds to its sums, after the instruction itself: until
a wait, nobody may write them. ptxas keeps to that, but not everywhere (13.0, operand A in a loop
with waits that leave a group running), and a kernel is then wrong where the tensor cores are late.

Registers are followed along all branches of a listing of `cuobjdump -sass`.
"""

import re
from collections import defaultdict

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# Their first register is no result.
NO_RESULT = (
    *("ST", "RED", "BAR", "SYNCS", "UTM", "UBLK", "LDGSTS", "LDGDEP", "CCTL", "MEMBAR", "ERRBAR"),
    *("WARP", "BRA", "BSSY", "BSYNC", "EXIT", "RET", "NOP", "R2UR", "DEPBAR", "BRX"),
)  # fmt: skip
MOST_STATES = 100  # of a branch's target; a loop that never waits would make more and more


def functions(listing):
    """{name: [(address, instruction)]} of those that have a wgmma."""
    found, code = {}, None
    for line in listing.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            code = found.setdefault(name[1], [])
        elif (match := INSTRUCTION.match(line)) and code is not None:
            code.append((int(match[1], 16), match[2]))
    return {name: code for name, code in found.items() if any("HGMMA" in t for _, t in code)}


def results(text):
    """The registers that an instruction other than a wgmma writes."""
    op = text.split()[0]
    if op.startswith(NO_RESULT):
        return range(0)
    match = re.match(r"\S+\s+(?:P\w+, )?(?:P\w+, )?R(\d+)\b", text)
    if match is None:
        return range(0)
    count = 1
    if op.startswith("LDSM"):
        count = int(op[-1]) if op[-1] in "24" else 1
    elif ".128" in op or op.startswith(("HMMA", "IMMA")):
        count = 4
    elif ".64" in op or op.startswith("IMAD.WIDE") or op == "CS2R":
        count = 2
    return range(int(match[1]), int(match[1]) + count)


def operands(text):
    """A wgmma's registers: its sums, and operand A where that is not in shared memory."""
    op, rest = text.split(None, 1)
    parts = [part.strip() for part in rest.split(",")]
    first = int(parts[0][1:])
    found = set(range(first, first + int(re.search(r"64x(\d+)x", op)[1]) // 2))
    if a := re.match(r"R(\d+)", parts[1]):
        found |= set(range(int(a[1]), int(a[1]) + 4))
    return frozenset(found)


def after(state, text):
    """(committed groups, the one that is being made) behind an instruction."""
    groups, group = state
    op = text.split()[0]
    if op.startswith("HGMMA"):
        group |= operands(text)
        if "gsb0" in text:
            return (*groups, group), frozenset()
    elif op.startswith("WARPGROUP.DEPBAR"):
        left = int(re.search(r"gsb0, 0x(\d+)", text)[1], 16)
        groups = groups[len(groups) - left :] if left else ()
    return groups, group


def overwritten(listing):
    """["function address: instruction"] of what writes registers of a running wgmma."""
    found = []
    for name, code in functions(listing).items():
        index = {address: i for i, (address, _) in enumerate(code)}
        seen, work, wrong = defaultdict(set), [(0, ((), frozenset()))], set()
        while work:
            i, state = work.pop()
            for address, whole in code[i:]:
                text = PREDICATE.sub("", whole)
                op = text.split()[0]
                if not op.startswith("HGMMA"):
                    running = state[1].union(*state[0])
                    if not running.isdisjoint(results(text)):
                        wrong.add(address)
                state = after(state, text)
                to = index.get(int(target[1], 16)) if (target := branch(text)) else None
                if to is not None and state not in seen[to]:
                    assert len(seen[to]) < MOST_STATES, f"{name} {address:x}: products pile up"
                    seen[to].add(state)
                    work.append((to, state))
                if text == whole and leaves(op, text):
                    break
        found += [f"{name} {a:x}: {code[index[a]][1]}" for a in sorted(wrong)]
    return found


def branch(text):
    return re.match(r"BRA\S*\s.*?0x([0-9a-f]+)", text)


def leaves(op, text):
    """Whether nothing goes on behind it; a branch may also ask a predicate as an operand."""
    always = op == "BRA" and not re.match(r"BRA\s+!?U?P", text)
    return always or op == "EXIT" or op.startswith("RET")
