"""Registers, spills, load widths and the cost of the hot loop of every CUDA kernel, from its machine code: no GPU.

The hot loop is the one that loads most bytes an iteration. "busy" is a ratio of two times: how long one iteration
occupies the busiest part of a multiprocessor (the issue slots or a pipe), over how long its bytes take at the full
bandwidth of the memory. Below 1 the memory is the limit. Costs are those of the usual path through the loop, the
shortest one that loads most bytes and takes an exponential of every logit. Occupancy counts static shared memory only.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import cuda_toolchain, sass
from benchmarks.cuda_toolchain import ARCHS, ROOT, Resources
from benchmarks.measure import print_table
from benchmarks.sass import Instruction, Kernel, is_exponential


@dataclass(frozen=True)
class Architecture:
    """A GPU from its data sheet, and the lanes per cycle and multiprocessor of its pipes from the programming guide."""

    gpu: str
    sms: int
    ghz: float  # boost clock
    tb_per_s: float
    shared: int  # bytes a multiprocessor, 1 KiB of which each block takes for itself
    lanes: dict[str, int]

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor's share of the memory bandwidth."""
        return self.tb_per_s * 1e12 / (self.sms * self.ghz * 1e9)


# 4 warp instructions are issued a cycle; `alu` also stands for every opcode that is not named below.
SPECS = {
    "sm_80": Architecture("A100 80GB", 108, 1.41, 2.04, 164 << 10, {"issue": 128, "fma": 64, "alu": 64, "xu": 16}),
    "sm_90": Architecture("H100 SXM", 132, 1.76, 3.35, 228 << 10, {"issue": 128, "fma": 128, "alu": 64, "xu": 16}),
    "sm_100": Architecture("B200", 148, 1.85, 7.7, 228 << 10, {"issue": 128, "fma": 128, "alu": 64, "xu": 16}),
}
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor, on all of these
FMA = {"FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HMUL2", "HFMA2", "FADD2", "FMUL2", "FFMA2"}
TWICE = {"FADD2", "FMUL2", "FFMA2"}  # packed pairs: two operations a lane
XU = {"MUFU", "F2I", "I2F", "F2F", "POPC", "FLO", "BREV"}
NO_PIPE = {"BRA", "BSSY", "BSYNC", "BREAK", "NOP", "EXIT", "BAR", "WARPSYNC", "LDG", "LDS", "LDC", "STG", "STS", "LDL",
           "STL", "LDGSTS", "SHFL", "DEPBAR", "LDGDEPBAR", "S2R", "CS2R", "S2UR", "R2UR"}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What is known of one kernel on one architecture. The fields from `load_widths` on are a thread's, for one
    iteration of the hot loop. None: there is no such loop, or the kernel's name has no type of logits."""

    file: str
    kernel: str
    arch: str
    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    local_accesses: int  # instructions that touch local memory
    shared_bytes: int
    threads: int | None
    occupancy: float | None
    load_widths: list[int] | None = None
    store_widths: list[int] | None = None
    logits: float | None = None
    ex2_per_logit: float | None = None
    instructions_per_logit: float | None = None
    busy: float | None = None
    busiest: str | None = None  # issue, fma, alu or xu

    @property
    def wide_share(self) -> float | None:
        """Share of the hot loop's loads and stores, as instructions, that move at least 128 bits."""
        if self.load_widths is None:
            return None
        widths = self.load_widths + self.store_widths
        return sum(width >= 16 for width in widths) / len(widths)


def specification(arch: str) -> Architecture:
    return SPECS[re.match(r"sm_\d+", arch)[0]]


def occupancy(arch: str, registers: int, shared: int, threads: int) -> float:
    """Share of a multiprocessor's threads that can be resident at once."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers come in units of 256 a warp, from 4 equal banks
    by_registers = REGISTERS // 4 // per_warp * 4 // warps
    by_shared = specification(arch).shared // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, THREADS // (warps * 32), BLOCKS) * warps * 32 / THREADS


def cycles(i: Instruction, pipe: str, lanes: int) -> float:
    """Cycles of a multiprocessor's pipe that this instruction of one warp takes."""
    if pipe == "issue":
        return 32 / lanes
    if i.name in FMA:
        kind = "fma"
    elif i.name in XU:
        kind = "xu"
    elif i.name in NO_PIPE or i.name.startswith("U"):  # U...: the uniform unit of the warp scheduler
        return 0.0
    else:
        kind = "alu"
    return (32 / lanes) * (2 if i.name in TWICE else 1) if kind == pipe else 0.0


BYTES = {"13__nv_bfloat16": (2, "bf16"), "6__half": (2, "fp16"), "f": (4, "fp32")}


def template_arguments(mangled: str) -> list[str]:
    """The template arguments of a kernel's own name that are types of logits, numbers or flags, in their order."""
    found = re.search(r"I((?:\d+__nv_bfloat16|\d+__half|f|L[a-z]+n?\d+E|S\d*_|N[\w]*?E)+)E", mangled)
    return re.findall(r"\d+__nv_bfloat16|\d+__half|f|L[a-z]+n?\d+E", found[1]) if found else []


def logit_bytes(mangled: str) -> int | None:
    """Size of the logits that this kernel is instantiated for; None: its template arguments name no such type."""
    return next((BYTES[argument][0] for argument in template_arguments(mangled) if argument in BYTES), None)


def reads_twice(mangled: str) -> bool:
    """Whether this kernel is the variant for rows that are not on 16-byte boundaries: the last flag among its arguments
    is false. It loads the two words that each vector lies in, and finds the second one in the cache."""
    flags = [argument for argument in template_arguments(mangled) if argument.startswith("Lb")]
    return flags[-1:] == ["Lb0E"]


def readable(mangled: str) -> str:
    """row_stats<bf16,1> for _ZN6entcov...9row_statsI13__nv_bfloat16Lb1EEEv..."""
    names, rest = [], mangled.removeprefix("_ZN").removeprefix("_Z")
    while found := re.match(r"(\d+)", rest):
        length, start = int(found[1]), found.end()
        names.append(rest[start : start + length])
        rest = rest[start + length :]
    if not names:
        return mangled
    arguments = [BYTES[a][1] if a in BYTES else re.sub(r"\D", "", a) for a in template_arguments(mangled)]
    return names[-1] + (f"<{','.join(arguments)}>" if arguments else "")


def examine(file: str, arch: str, kernel: Kernel, resources: Resources) -> Evidence:
    """The evidence of one kernel."""
    local = sum(i.name in sass.LOCAL for i in kernel.instructions)
    threads = kernel.max_threads
    known = Evidence(
        file, readable(kernel.name), arch, resources.registers, resources.spill_stores + resources.spill_loads,
        resources.stack, local, resources.shared, threads,
        occupancy(arch, resources.registers, resources.shared, threads) if threads else None,
    )  # fmt: skip
    loop, size = kernel.hot_loop(), logit_bytes(kernel.name)
    if loop is None:
        return known
    spec, again = specification(arch), 2 if reads_twice(kernel.name) else 1
    way = loop.usual()
    if size:
        way = loop.usual(sum(bytes_of(way, sass.LOADS)) // (size * again))
    loads, stores = bytes_of(way, sass.LOADS), bytes_of(way, sass.STORES)
    logits = sum(loads) / (size * again) if size else None
    to_share = spec.bytes_per_cycle / (32 * (sum(loads) / again + sum(stores)))
    busy = {p: sum(cycles(i, p, n) for i in way) * to_share for p, n in spec.lanes.items()}
    busiest = max(busy, key=busy.get)
    return replace(
        known,
        load_widths=loads,
        store_widths=stores,
        logits=logits,
        ex2_per_logit=sum(map(is_exponential, way)) / logits if size else None,
        instructions_per_logit=len(way) / logits if size else None,
        busy=busy[busiest],
        busiest=busiest,
    )


def bytes_of(way: list[Instruction], names: tuple[str, ...]) -> list[int]:
    return [i.width for i in way if i.name in names]


def gather(sources: Iterable[Path], archs: Iterable[str] = ARCHS) -> list[Evidence]:
    """Compiles the sources and returns the evidence of every kernel, by file, architecture and kernel."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = cuda_toolchain.compile_all(list(sources), tuple(archs), Path(folder))
    rows = []
    for (source, arch), (resources, text) in compiled.items():
        kernels = sass.parse(text)
        if {k.name for k in kernels} != set(resources):
            raise RuntimeError(f"{source.name}, {arch}: ptxas and nvdisasm do not name the same kernels")
        rows += [examine(source.name, arch, kernel, resources[kernel.name]) for kernel in kernels]
    return rows


def kernel_sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/cuda/*.cu"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--arch", nargs="+", default=ARCHS, metavar="SM", help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--json", type=Path, default=None, help="also write the evidence there")


def run(args: argparse.Namespace) -> int:
    sources = args.files or kernel_sources()
    if not sources:
        print("static: this source tree has no csrc/cuda/*.cu")
        return 1
    unknown = [arch for arch in args.arch if not re.match(r"sm_\d+", arch) or re.match(r"sm_\d+", arch)[0] not in SPECS]
    if unknown:
        print(f"static: --arch must be one of {', '.join(SPECS)} (with or without the a), got {', '.join(unknown)}")
        return 2
    try:
        compiler, rows = cuda_toolchain.version(cuda_toolchain.nvcc()), gather(sources, args.arch)
    except cuda_toolchain.ToolMissing as error:
        print(f"static: {error}")
        return 1
    note = "" if compiler == cuda_toolchain.PINNED_NVCC else f", not {cuda_toolchain.PINNED_NVCC} as in CI"
    print(f"nvcc {compiler}{note}; the hot loop's columns are a thread's, for one iteration")
    header = ["kernel", "arch", "regs", "spill", "stack", "local", "shared", "threads", "occ", "128-bit", "logits",
              "EX2/logit", "instr/logit", "busy", "by"]  # fmt: skip
    print_table(header, [cells(row) for row in rows])
    if args.json:
        document = {"nvcc": compiler, "kernels": [{**asdict(r), "wide_share": r.wide_share} for r in rows]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def cells(e: Evidence) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        e.kernel, e.arch, str(e.registers), str(e.spill_bytes), str(e.stack_bytes), str(e.local_accesses),
        str(e.shared_bytes), shown(e.threads, "d"), shown(e.occupancy, ".0%"), shown(e.wide_share, ".0%"),
        shown(e.logits, "g"), shown(e.ex2_per_logit, ".2f"), shown(e.instructions_per_logit, ".2f"),
        shown(e.busy, ".2f"), e.busiest or "-",
    ]  # fmt: skip
