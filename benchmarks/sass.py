"""Reads nvdisasm's text: instructions, control flow and loops of every kernel, and what one iteration costs.

A loop is the natural loop of a backward branch: its target dominates it. A loop with branches has more than one path
for an iteration. The usual one is the shortest of those that load most bytes and take an exponential of everything they
load.
"""

import heapq
import re
from dataclasses import dataclass, field
from functools import cached_property

LABEL = re.compile(r"^(\.L\S*):")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;\s*$")
TARGET = re.compile(r"`\((\.L\S+?)\)")
SECTION = re.compile(r"^\s*\.section\s+\.(text|nv\.info)\.([^,\s]+)")
MAX_THREADS = re.compile(r"EIATTR_MAX_THREADS.*?\.word\s+(0x\w+).*?\.word\s+(0x\w+).*?\.word\s+(0x\w+)", re.DOTALL)

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes a thread; 4 if none is named
LOADS, STORES, LOCAL = ("LDG", "LDGSTS"), ("STG",), ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for a thread."""
        return next((WIDTHS[part] for part in self.opcode.split(".")[1:] if part in WIDTHS), 4)

    @property
    def leaves(self) -> bool:
        """Whether the next instruction is never reached from this one."""
        # A uniform branch names its condition as an operand. BRA.DIV is taken by a diverged warp only.
        if self.name == "BRA" and ("DIV" in self.opcode or re.match(r"!?U?P\d", self.operands)):
            return False
        return self.predicate is None and self.name in ("BRA", "EXIT", "RET", "BRX", "JMP", "BPT")


def is_exponential(i: Instruction) -> bool:
    return i.opcode.startswith("MUFU.EX2")


def _keep_shorter(ways: dict, key: tuple[int, int], way: tuple[int, list[int]]) -> None:
    ways[key] = min(way, ways.get(key, way))


@dataclass
class Loop:
    """One natural loop: its header and all its blocks, by index into Kernel.blocks."""

    kernel: "Kernel"
    header: int
    blocks: set[int]
    latches: set[int]
    inner: list["Loop"] = field(default_factory=list)

    @cached_property
    def own(self) -> list[Instruction]:
        """Instructions that belong to no loop inside this one."""
        nested = set().union(*(loop.blocks for loop in self.inner))
        return [i for block in sorted(self.blocks - nested) for i in self.kernel.blocks[block]]

    def usual(self, exponentials: int = 0) -> list[Instruction]:
        """The instructions of the shortest path that loads most bytes and has at least that many exponentials.

        If no path has as many, it is the shortest of those with most.
        """
        ways = self._ways()
        most_loaded = max(loaded for loaded, _ in ways)
        counts = [count for loaded, count in ways if loaded == most_loaded]
        enough = [count for count in counts if count >= exponentials] or [max(counts)]
        _, blocks = min(ways[most_loaded, count] for count in enough)
        return [i for block in blocks for i in self.kernel.blocks[block]]

    def _ways(self) -> dict[tuple[int, int], tuple[int, list[int]]]:
        """(bytes loaded, exponentials) of one iteration -> the shortest way with these: its instructions and blocks."""
        arriving: dict[int, dict] = {}
        ends: dict[tuple[int, int], tuple[int, list[int]]] = {}
        for block in self._position:
            here = self.kernel.blocks[block]
            loads = sum(i.width for i in here if i.name in LOADS)
            count = sum(map(is_exponential, here))
            ways: dict[tuple[int, int], tuple[int, list[int]]] = {}
            for before in (arriving[p] for p in self._before(block)) if block != self.header else [{(0, 0): (0, [])}]:
                for (loaded, counted), (length, way) in before.items():
                    _keep_shorter(ways, (loaded + loads, counted + count), (length + len(here), [*way, block]))
            arriving[block] = ways
            if block in self.latches:
                for key, way in ways.items():
                    _keep_shorter(ends, key, way)
        return ends

    def _before(self, block: int) -> list[int]:
        if block == self.header:
            return []
        at = self._position
        return [p for p in self.kernel.predecessors[block] if p in at and at[p] < at[block]]

    @cached_property
    def _position(self) -> dict[int, int]:
        return {block: n for n, block in enumerate(self._in_order())}

    def _in_order(self) -> list[int]:
        """The blocks in topological order, backward edges left out."""
        seen, order = {self.header}, []
        stack = [(self.header, iter(self._forward(self.header)))]
        while stack:
            block, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                order.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(self._forward(following))))
        return order[::-1]

    def _forward(self, block: int) -> list[int]:
        return [s for s in self.kernel.successors[block] if s in self.blocks and s != self.header]


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> address
    max_threads: int | None = None  # of __launch_bounds__

    @cached_property
    def _starts(self) -> list[int]:
        addresses = [i.address for i in self.instructions]
        after = {b: a for b, a in zip(addresses, addresses[1:], strict=False)}
        starts = {addresses[0], *self.labels.values()}
        starts |= {after[i.address] for i in self.instructions if self._ends_block(i) and i.address in after}
        return sorted(starts & set(addresses))

    @staticmethod
    def _ends_block(i: Instruction) -> bool:
        return i.leaves or i.name in ("BRA", "EXIT", "RET")

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        edges = [*self._starts, self.instructions[-1].address + 1]
        blocks, at = [[] for _ in self._starts], 0
        for i in self.instructions:
            while i.address >= edges[at + 1]:
                at += 1
            blocks[at].append(i)
        return blocks

    @cached_property
    def successors(self) -> list[list[int]]:
        index = {address: n for n, address in enumerate(self._starts)}
        following = []
        for n, block in enumerate(self.blocks):
            last, out = block[-1], []
            # BRA.DIV is taken by diverged warps only, which these kernels do not have. A call returns to the next
            # instruction.
            if last.name == "BRA" and "DIV" not in last.opcode and (target := TARGET.search(last.operands)):
                out.append(index[self.labels[target[1]]])
            if not last.leaves and n + 1 < len(self.blocks):
                out.append(n + 1)
            following.append(out)
        return following

    @cached_property
    def predecessors(self) -> list[list[int]]:
        into = [[] for _ in self.blocks]
        for block, out in enumerate(self.successors):
            for successor in out:
                into[successor].append(block)
        return into

    def shortest(self, start: int, ends: set[int]) -> int:
        """The fewest instructions from the start of block `start` to the end of one of the blocks `ends`."""
        waiting, seen = [(len(self.blocks[start]), start)], set()
        while waiting:
            length, block = heapq.heappop(waiting)
            if block in ends:
                return length
            if block not in seen:
                seen.add(block)
                for following in self.successors[block]:
                    heapq.heappush(waiting, (length + len(self.blocks[following]), following))
        raise ValueError(f"{self.name}: no way leads from block {start} to one of {sorted(ends)}")

    @cached_property
    def dominators(self) -> list[set[int]]:
        """For each block, the blocks on every path from the kernel's start to it; unreachable blocks have none."""
        reached, stack = set(), [0]
        while stack:
            block = stack.pop()
            if block not in reached:
                reached.add(block)
                stack += self.successors[block]
        found = [set(reached) if n in reached else set() for n in range(len(self.blocks))]
        found[0], changed = {0}, True
        while changed:
            changed = False
            for n in sorted(reached - {0}):
                through = set.intersection(*(found[p] for p in self.predecessors[n] if p in reached)) | {n}
                changed, found[n] = changed or through != found[n], through
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, those with the same header merged, each with all loops inside it."""
        latches: dict[int, set[int]] = {}
        for block, out in enumerate(self.successors):
            for successor in out:
                if successor in self.dominators[block]:
                    latches.setdefault(successor, set()).add(block)
        loops = []
        for header, tails in latches.items():
            body, stack = {header}, list(tails)
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += self.predecessors[block]
            loops.append(Loop(self, header, body, tails))
        for loop in loops:
            loop.inner = [other for other in loops if other is not loop and other.blocks < loop.blocks]
        return loops

    def hot_loop(self) -> Loop | None:
        """The loop that itself loads most bytes from global memory in an iteration; None: no loop loads any."""

        def bytes_loaded(loop: Loop) -> int:
            return sum(i.width for i in loop.own if i.name in LOADS)

        loading = [loop for loop in self.loops if bytes_loaded(loop)]
        return max(loading, key=bytes_loaded, default=None)


def parse(text: str) -> list[Kernel]:
    """The kernels of one cubin, in its order."""
    kernels, threads, current, info = {}, {}, None, None
    for line in text.splitlines():
        if section := SECTION.match(line):
            kind, name = section.groups()
            current = info = None
            if kind == "text":
                current = kernels.setdefault(name, Kernel(name, [], {}))
                waiting: list[str] = []
            else:
                info = threads.setdefault(name, [])
        elif line.startswith("//-----") or re.match(r"^\s*\.section\s", line):
            current = info = None
        elif info is not None:
            info.append(line)
        elif current is not None:
            if label := LABEL.match(line):
                waiting.append(label[1])
            elif instruction := INSTRUCTION.match(line):
                address, predicate, opcode, operands = instruction.groups()
                i = Instruction(int(address, 16), predicate, opcode, operands)
                current.instructions.append(i)
                current.labels.update(dict.fromkeys(waiting, i.address))
                waiting = []
    for name, kernel in kernels.items():
        if bound := MAX_THREADS.search("\n".join(threads.get(name, []))):
            x, y, z = (int(word, 16) for word in bound.groups())
            kernel.max_threads = x * y * z
    return [kernel for kernel in kernels.values() if kernel.instructions]
