"""A run's results as text and tables, and as the entry of its device in benchmarks/RESULTS.md."""

import re

from benchmarks.measure import table_lines

HEADER = ["", "gives", "fwd us", "TB/s", "of read", "x entcov", "fwd+bwd us", "TB/s", "of copy", "x entcov", "peak MiB",
          "error", "gradient error", "-inf logits"]  # fmt: skip
NOT_REACHED = "not reached within the time limit"  # the first words of a failure for lack of time
BLOCK = "<!-- device: {} -->\n{}\n<!-- end -->"


def ceilings(run: dict, runs: list[dict]) -> tuple[dict[str, float], dict | None]:
    """{"read": TB/s, "copy": TB/s}, the fastest measured way of each, and the run that they were measured in: this one,
    or the device's latest with ceilings."""
    for candidate in (run, *reversed(runs)):
        best: dict[str, float] = {}
        for record in candidate["stages"].get("benchmarks", {}).get("ceilings", []):
            best[record["ceiling"]] = max(best.get(record["ceiling"], 0.0), record["tb_per_s"])
        if best:
            return best, candidate
    return {}, None


def measurements(run: dict) -> list[dict]:
    stages = (run["stages"].get(name, {}) for name in ("benchmarks", "rivals"))
    return [record for found in stages for record in found.get("measurements", [])]


def about(run: dict) -> str:
    """Which machine, versions and code a run is of."""
    e = run["environment"]
    known = [f"{name} {e[name]}" for name in ("driver", "nvcc", "torch", "python", "commit") if e.get(name)]
    if triton := e.get("packages", {}).get("triton"):
        known.insert(3, f"triton {triton}")
    return f"{e.get('device', 'unknown device')}; {', '.join(known)}; {run['ended'][:10]}"


def entry(runs: list[dict]) -> list[str]:
    """Everything about one device in plain text, the latest run first. Runs of other code or versions stay apart."""
    lines = []
    if len(runs) > 1:
        lines += [f"{len(runs)} runs that differ in code, driver or versions; each stage is of the latest that ran it:"]
        lines += [f"  {about(run)}: {', '.join(run['stages'])}" for run in reversed(runs)] + [""]
    for run in reversed(runs):
        lines += [*text(run, runs), ""]
    return lines[:-1]


def text(run: dict, runs: list[dict]) -> list[str]:
    """The whole report of one run; `runs`: all of the device."""
    lines = [about(run)]
    if run["rehearsal"]:
        lines.append("REHEARSAL on a CPU with tiny shapes: nothing here is a measurement of a GPU.")
    rows = [[name, f["status"], f"{f['seconds']:.0f} s", counts(f)] for name, f in run["stages"].items()]
    lines += ["", *table_lines(["stage", "", "took", ""], rows)]
    for name, found in run["stages"].items():
        if found.get("reason"):
            lines.append(f"{name}: {found['reason']}")
    top, source = ceilings(run, runs)
    if top:
        where = "this run" if source is run else f"another run: {about(source)}"
        lines += ["", "; ".join(f"{kind} ceiling {rate:.3g} TB/s" for kind, rate in top.items())
                  + f" (bytes read plus bytes written; the fastest of those measured in {where})"]  # fmt: skip
    if selections := run["stages"].get("selection", {}).get("selections"):
        lines += ["", "covariance of all tokens and one selection", *table_lines(*selection_table(selections))]
    trained = {name: run["stages"][name]["steps"] for name in ("training", "megatron")
               if run["stages"].get(name, {}).get("steps")}  # fmt: skip
    if trained:
        lines += ["", "the tiny recipe, a line a step", *table_lines(*training_table(trained))]
    if run["environment"].get("packages", {}).get("matplotlib", "") is None:
        lines += ["", "No plot: matplotlib is not installed here."]
    return lines + tables(measurements(run), top)


def training_table(trained: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    keys = list(dict.fromkeys(key for steps in trained.values() for step in steps for key in step if key != "step"))
    rows = [
        [name, str(step["step"]), *(f"{step[key]:.4g}" if key in step else "-" for key in keys)]
        for name, steps in trained.items()
        for step in steps
    ]
    return ["", "step", *keys], rows


def counts(found: dict) -> str:
    if "passed" in found:
        return f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    if "tools" in found:
        return ", ".join(f"{tool} {t['status']} ({t['errors']} errors)" for tool, t in found["tools"].items())
    if "measurements" in found:
        names = {r["contender"] for r in found["measurements"]}
        measured = {r["contender"] for r in found["measurements"] if "median_us" in r}
        late = sum(r.get("failure", "").startswith(NOT_REACHED) for r in found["measurements"])
        return f"{len(measured)} of {len(names)} contenders measured" + (f", {late} shapes not reached" if late else "")
    return ""


def tables(records: list[dict], top: dict[str, float]) -> list[str]:
    shapes = dict.fromkeys((r["workload"], r["dtype"], r["tokens"], r["columns"]) for r in records if "pass" in r)
    lines = kernel_table([r for r in records if "kernel" in r], top)
    for shape in shapes:
        workload, dtype, tokens, columns = shape
        mine = [r for r in records if (r.get("workload"), r.get("dtype"), r.get("tokens"), r.get("columns")) == shape]
        names = dict.fromkeys(r["contender"] for r in mine if "pass" in r)
        rows = [row(name, [r for r in mine if r["contender"] == name and "pass" in r], top) for name in names]
        lines += ["", f"{workload}, {tokens} x {columns} {dtype}", *table_lines(HEADER, rows)]
    failures = dict.fromkeys(f"{r['contender']}{_where(r)}: {r['failure']}" for r in records if "failure" in r)
    notes = dict.fromkeys(f"{r['contender']} ({r['source']}): {r['note']}" for r in records if r.get("note"))
    if failures:
        lines += ["", "Not measured:", *failures]
    if notes:
        lines += ["", "Notes:", *notes]
    return lines


def kernel_table(records: list[dict], top: dict[str, float]) -> list[str]:
    """entcov's kernels alone. The last column is their share of the copy ceiling for kernels that write, else of the
    read ceiling; or their time over that of the bare products."""

    def against(r: dict) -> str:
        if "bare" in r:
            return f"{r['slower_than_bare']['median']:.2f} x {r['bare']}"
        if "tb_per_s" not in r or not top:
            return "-"
        return f"{r['tb_per_s'] / top['copy' if r['writes'] else 'read']:.0%}"

    rows = [
        [r["kernel"], f"{r['tokens']} x {r['columns']} {r['dtype']}", f"{r['median_us']:.0f}",
         f"{r['min_us']:.0f}-{r['max_us']:.0f}", f"{r['tb_per_s']:.2f}" if "tb_per_s" in r else "-", against(r)]
        for r in records
    ]  # fmt: skip
    header = ["kernels alone", "", "us", "min-max", "TB/s", "of ceiling"]
    return ["", *table_lines(header, rows)] if rows else []


def selection_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of what `python -m benchmarks selection` measured."""
    header = ["selection", "tokens", "", "ms", "x entcov", "range", "operations", "host reads", "chosen"]
    return header, [
        [
            row["selection"],
            f"{row['tokens']:,}",
            row["name"],
            f"{row['median_ms']:.2f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['min']:.2f}-{row['ratio']['max']:.2f}",
            str(row["operations"]),
            str(row["host_reads"]),
            f"{row['chosen']:,}",
        ]
        for row in rows
    ]


def _where(record: dict) -> str:
    return f" ({record['workload']}, {record['columns']} {record['dtype']})" if "workload" in record else ""


def row(name: str, records: list[dict], top: dict[str, float]) -> list[str]:
    by_pass = {record["pass"]: record for record in records}
    cells = [name, " ".join(records[0]["outputs"])]
    for label, kind in (("forward", "read"), ("forward+backward", "copy")):
        r = by_pass.get(label)
        if r is None:
            cells += ["-"] * 4
            continue
        rate = r.get("tb_per_s")
        share = f"{rate / top[kind]:.0%}" if rate and kind in top else "-"
        slower = r["slower_than_entcov"]["median"]
        cells += [f"{r['median_us']:.0f}", f"{rate:.2f}" if rate else "-", share, f"{slower:.2f}"]
    peaks = [r["peak_bytes"] for r in records if r.get("peak_bytes") is not None]
    errors = records[0]["errors"]
    values = [errors[output] for output in records[0]["outputs"]]
    worst = "nan" if any(isinstance(v, str) for v in values) else f"{max(values):.0e}"
    gradient = errors["gradient"] if isinstance(errors["gradient"], str) else f"{errors['gradient']:.0e}"
    return [*cells, f"{max(peaks) / 2**20:,.0f}" if peaks else "-", worst, gradient, infinity(records[0])]


def infinity(record: dict) -> str:
    """Results for -inf logits: "ok", or the outputs that are NaN or wrong."""
    found = record.get("errors_minus_infinity")
    if found is None:
        return "-"
    if isinstance(found, str):
        return found
    bad = [
        name for name, value in found.items() if isinstance(value, str) or value > (0.05 if name == "gradient" else 0.2)
    ]
    return f"wrong: {', '.join(bad)}" if bad else "ok"


def renew(results: str, device: str, runs: list[dict]) -> str:
    """RESULTS.md with these runs as the only entry of their device; the others stay."""
    body = "\n".join([f"## {device}", "", "```", *entry(runs), "```"])
    block = BLOCK.format(device, body)
    old = re.compile(re.escape(f"<!-- device: {device} -->") + r".*?<!-- end -->", re.DOTALL)
    if old.search(results):
        return old.sub(lambda _: block, results)
    without_none = re.sub(r"<!-- none -->.*?<!-- end none -->\n*", "", results, flags=re.DOTALL)
    return without_none.rstrip() + "\n\n" + block + "\n"
