"""The result files of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu_measure import DTYPES, HOST_SETS, SIZES, THREE_PASSES
from benchmarks.storing import record_text, use_palette


RULES = (
    *("velo", "velo:bfloat16", "velo:int8", "small_fc_lopt", "small_fc_lopt:tf32", "celo_adam", "celo2_base"),
    *("celo2", "celo2:auto"),
)
HOST_RULES = ("velo", "small_fc_lopt", "celo", "celo_adam", "celo2_base", "celo2")
# Shares of the bandwidth of a copy, measured in the same run.
TARGETS = {
    ("velo", "355M", "fp32"): 0.85,
    ("velo", "355M", "bf16"): 0.85,
    ("small_fc_lopt", "355M", "fp32"): 0.65,
}
CHECKS = ("load", "golden", "graph", "launches", "properties", "memcheck", "racecheck")
TABLES = ("kernels", "rows", "host", "training", "launches")


class Report:
    """The result files, which are read at first and written after every result."""

    def __init__(self, files: dict[str, Path], about: dict[str, Any]):
        self.files = files
        self.content = not_run()
        if files["json"].exists():
            old = json.loads(files["json"].read_text())
            self.content |= {key: old[key] for key in ("checks", "copy_gb_per_s", *TABLES) if key in old}
            self.content["checks"] = not_run()["checks"] | self.content["checks"]
        self.content["about"] = about

    def put(self, table: str, key: dict[str, Any], found: dict[str, Any]) -> None:
        """A row, in the place of an earlier one of this key."""
        entry = key | found | {"date": datetime.date.today().isoformat()}
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in entry.items() if k != "output"}, flush=True)
        rows = self.content[table]
        same = [i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in key.items())]
        rows[same[0] : same[0] + 1] = [entry] if same else []
        if not same:
            rows.append(entry)
        self.write()

    def put_check(self, name: str, found: dict[str, Any]) -> None:
        self.content["checks"][name] = found | {"date": datetime.date.today().isoformat()}
        self.write()

    def write(self) -> None:
        texts = {"json": record_text(self.content), "md": markdown(self.content)}
        for kind, text in texts.items():
            unfinished = self.files[kind].with_suffix(f".{kind}.part")
            unfinished.write_text(text)
            os.replace(unfinished, self.files[kind])

    def log(self, name: str, text: str) -> None:
        with self.files["log"].open("a") as file:
            file.write(f"==== {name} ====\n{text}\n")


def not_run() -> dict[str, Any]:
    rows = [{"rule": r, "size": s, "dtype": d} for s in SIZES for r in RULES for d in DTYPES]
    launches = [{"rule": r, "layers": layers} for r in RULES for layers in (1, 12)]
    kernels = [{"rule": r, "size": "355M", "dtype": d} for r in RULES for d in DTYPES]
    host = [{"rule": r, "tensors": name} for name in HOST_SETS for r in HOST_RULES]
    training = [{"optimizer": name} for name in ("adamw", "velo")]
    checks = {name: {"result": "not run"} for name in CHECKS}
    content = {"about": {"command": "python -m benchmarks.gpu"}, "checks": checks}
    return content | {"kernels": kernels, "rows": rows, "host": host, "training": training, "launches": launches}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))]


def split_rows(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with a result; a line that names the others, unless there are only those."""
    done = [r for r in rows if set(r) - set(keys)]
    missing: dict[str, dict[str, None]] = {}  # rule: its sizes, or its numbers of layers
    for r in (r for r in rows if r not in done):
        missing.setdefault(r[keys[0]], {})[str(r[keys[1]])] = None
    names = [f"{rule} {' '.join(others)}" for rule, others in missing.items()]
    return (done, ["", f"Not run: {', '.join(names)}."] if names else []) if done else (rows, [])


def cell(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else row.get("result", "failed" if "failed" in row else "not run")


def named(row: dict[str, Any], key: str, form: str) -> str:
    """Numbers by name."""
    if key not in row:
        return cell(row, key, "")
    return ", ".join(f"{name} {value:{form}}" for name, value in row[key].items()) or "none"


def markdown(content: dict[str, Any]) -> str:
    """The results as tables; what has not been measured is "not run"."""
    about = content["about"]
    setting = ", ".join(f"{key} {value}" for key, value in about.items() if key != "command")
    bandwidth = content.get("copy_gb_per_s")
    lines = [f"`{about['command']}`: {setting or 'not run yet'}."]
    lines += ["", f"Bandwidth of a copy: {f'{bandwidth:.0f} GB/s' if bandwidth else 'not run'}."]
    checks = [
        [name, x["result"], str(x.get("seconds", "")), x.get("date", "")] for name, x in content["checks"].items()
    ]
    lines += table(["check", "result", "seconds", "date"], checks)
    heads = ["rule", "parameters", "type", "host, ms", "device, ms", "kernels, ms", "share of the copy's bandwidth"]
    done, others = split_rows(content["kernels"], ("rule", "size", "dtype"))
    lines += table(
        heads,
        [
            [r["rule"], r["size"], r["dtype"], cell(r, "host_ms", ".2f"), cell(r, "device_ms", ".2f")]
            + [named(r, "kernels_ms", ".3f"), named(r, "share_of_copy", ".2f") if r["rule"] in THREE_PASSES else ""]
            for r in done
        ],
    )
    lines += others
    counts = ("launches", "copies", "waits")
    heads = ["rule", "parameters", "type", "step, ms", "replayed graph, ms", "AdamW (fused), ms", "ratio"]
    heads += ["share of the copy's bandwidth", "of the graph", "target", *counts, "peak extra bytes/param", "date"]
    rows = []
    done, others = split_rows(content["rows"], ("rule", "size", "dtype"))
    for r in done:
        cells = [r["rule"], r["size"], r["dtype"]]
        cells += [cell(r, key, ".2f") for key in ("step_ms", "graph_ms", "adamw_ms", "ratio")]
        if r["rule"] in THREE_PASSES and "share_of_copy" in r and "graph_ms" in r:
            cells += [cell(r, "share_of_copy", ".2f"), f"{r['share_of_copy'] * r['step_ms'] / r['graph_ms']:.2f}"]
        else:
            cells += ["", ""]
        cells.append(str(TARGETS.get((r["rule"], r["size"], r["dtype"]), "")))
        cells += [cell(r, key, "d") for key in counts]
        rows.append([*cells, cell(r, "peak_extra_bytes", ".2f"), r.get("date", "")])
    lines += table(heads, rows)
    lines += others
    keys = ("step_ms", "foreach_ms", "fused_ms", "ratio")
    done, others = split_rows(content["host"], ("rule", "tensors"))
    host = [[r["rule"], r["tensors"], *(cell(r, key, ".2f") for key in keys)] for r in done]
    lines += table(["rule", "small tensors", "host, ms", "AdamW (foreach), ms", "AdamW (fused), ms", "ratio"], host)
    lines += others
    training = [
        [r["optimizer"], cell(r, "step_ms", ".1f"), cell(r, "tokens_per_s", ".0f")] for r in content["training"]
    ]
    lines += table(["optimizer of a GPT-2, 124M, bf16", "training step, ms", "tokens/s"], training)
    counts = ("launches", "own_launches", "copies", "waits")
    done, others = split_rows(content["launches"], ("rule", "layers"))
    launches = [
        [r["rule"], str(r["layers"]), *(cell(r, key, "d") for key in ("tensors", *counts)), named(r, "kernels", "d")]
        for r in done
    ]
    lines += table(["rule", "layers", "tensors", "launches", "own", "copies", "waits", "own kernels"], launches)
    lines += others
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """Step time beside AdamW's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in content["rows"] if "step_ms" in r]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.5 * len(rows)), layout="constrained")
    series = (("AdamW (fused)", "adamw_ms", "#8c8c8c"), ("hf_lopt", "step_ms", "#2a6fbb"))
    for i, (label, key, color) in enumerate(series):
        places = [j + 0.36 * (i - 0.5) for j in range(len(rows))]
        bars = axes.barh(places, [r[key] for r in rows], height=0.34, color=color, label=label)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{r['rule']} {r['size']} {r['dtype']}" for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per step (log scale)")
    axes.set_title(f"{content['about'].get('device')}, torch {content['about'].get('torch')}", size=9)
    axes.margins(x=0.15)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)
    use_palette(path, 32)
    pyplot.close(figure)
