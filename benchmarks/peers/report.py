"""From readings to verdicts: which of our rows may be set against a peer, the table of the goals, and what lies behind it.

A 4-bit figure counts only for a recipe that is no further from the original than the peer's file is. So every peer meets
the fastest of our recipes whose KL divergence is no worse than its own, and the row's ratio is the least of those: it is
reached only if every peer is beaten at its own quality or better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import common

from peers.rounds import FEWEST_QUIET, NOISE, OURS, Row

Line = dict[str, Any]
# The random 1.1 B has no quality of its own: its files are judged by what the same format does to the reference model.
SAME_QUALITY = 1.005  # within half a percent two mean KLs over some thousand tokens are the same


@dataclass(frozen=True)
class Meeting:
    """A peer and the recipe of ours that is set against it."""

    peer: Line
    ours: Line | None
    ratio: float


def meetings(found: Mapping[str, Any], quality: Mapping[str, float], row: Row) -> list[Meeting]:
    """Each peer with our best recipe that is no worse than its file."""
    ours = [line for line in found["lines"] if line["ours"] and line["unit"] == row.task.unit]
    peers = [line for line in found["lines"] if not line["ours"]]
    if row.against == "lowbit":  # ours against ours: `model.generate` against the engine
        ours, peers = [x for x in ours if "generate" in x["name"]], [x for x in ours if "generate" not in x["name"]]
    made = []
    for peer in peers:
        allowed = [line for line in ours if row.width != 4 or may_meet(line, peer, quality)]
        best = choose(allowed, row)
        made.append(Meeting(peer, best, best["median"] / peer["median"] if best else 0.0))
    return made


def may_meet(ours: Line, peer: Line, quality: Mapping[str, float]) -> bool:
    own, other = quality.get(ours["quality"]), quality.get(peer["quality"])
    return own is None or other is None or own <= other * SAME_QUALITY


def choose(lines: Sequence[Line], row: Row) -> Line | None:
    if not lines:
        return None
    return (min if row.task.less_is_better else max)(lines, key=lambda line: float(line["median"]))


def hardest(met: Sequence[Meeting], row: Row) -> Meeting | None:
    """The meeting that decides the row: the least ratio (the greatest, of seconds and megabytes)."""
    counted = [m for m in met if not row.against or row.against in ("lowbit", m.peer["program"], m.peer["name"])]
    if not counted:
        return None
    return (max if row.task.less_is_better else min)(counted, key=lambda m: m.ratio)


@dataclass(frozen=True)
class Judgement:
    """What a verdict rests on: ours, whom it met, and which goals are reached."""

    ours: Line | None
    met: Meeting | None
    reached: tuple[bool, ...]

    @property
    def missed(self) -> bool:
        return not all(self.reached)


def must_reach(row: Row, tiles: bool) -> float | None:
    return row.amx_ratio if tiles and row.amx_ratio else row.ratio


def judge(row: Row, done: Mapping[str, Any], quality: Mapping[str, float], tiles: bool) -> Judgement:
    """Hold a row that was measured against its goals."""
    found = done[row.name]
    met = hardest(meetings(found, quality, row), row)
    must = must_reach(row, tiles)
    ours = met.ours if met else choose([x for x in found["lines"] if x["ours"]], row)
    reached = []
    if must is not None and met:
        enough = met.ratio <= must if row.task.less_is_better else met.ratio >= must
        reached.append(enough and met.ours is not None)
    if row.times is not None and ours:
        reached.append(multiple(ours, row, done) >= row.times[0])
    if row.most is not None and ours:
        slowest = "high" if row.task.kind == "interrupt" else "median"  # a promise to whoever waits, each time
        reached.append(ours[slowest] <= row.most)
    if row.least is not None and ours:
        reached.append(ours["median"] >= row.least)
    if row.bandwidth is not None and ours:
        reached.append(ours["shares"]["bandwidth"] >= row.bandwidth)
    if row.peak is not None and ours and not tiles:
        reached.append(vector_share(ours, row) >= row.peak)
    if row.amx_products is not None and ours and tiles and found.get("profile"):
        reached.append(products_share(ours, row, found["profile"]) >= row.amx_products)
    return Judgement(ours, met, tuple(reached))


def goal_rows(
    rows: Sequence[Row], done: Mapping[str, Any], quality: Mapping[str, float], tiles: bool
) -> list[list[str]]:
    """The table of the goals: what, must reach, ours, the deciding peer, the ratio, met or missed."""
    lines = []
    for row in rows:
        if row.name not in done:
            continue
        judged = judge(row, done, quality, tiles)
        met, ours = judged.met, judged.ours
        verdict = "" if not judged.reached else "**missed**" if judged.missed else "met"
        if verdict and any(line and too_noisy(line) for line in (ours, met.peer if met else None)):
            verdict += ", but the machine was busy"
        lines.append(
            [
                row.name,
                goal_text(row, must_reach(row, tiles), tiles),
                value_text(ours) if ours else "none",
                f"{met.peer['name']}: {value_text(met.peer)}" if met else "" if row.only == OURS else "no peer ran",
                f"{met.ratio:.2f}x" if met and met.ours else "no recipe of that quality" if met else "",
                limit_text(ours, row, tiles, done) if ours else "",
                verdict,
            ]
        )
    return lines


def too_noisy(line: Line) -> bool:
    return int(line["quiet"]) < min(FEWEST_QUIET, line["rounds"])


def goal_text(row: Row, must: float | None, tiles: bool) -> str:
    parts = []
    if must is not None:
        sign = "<=" if row.task.less_is_better else ">="
        parts.append(f"{sign} {must:g}x {row.against or 'the best peer'}")
    if row.most is not None:
        parts.append(f"<= {row.most:g} {row.task.unit}")
    if row.least is not None:
        parts.append(f">= {row.least:g} {row.task.unit}")
    if row.times is not None:
        parts.append(f">= {row.times[0]:g}x {row.times[1]}")
    if row.bandwidth is not None:
        parts.append(f">= {row.bandwidth:.0%} of the bandwidth")
    if row.peak is not None and not tiles:
        parts.append(f">= {row.peak:.0%} of the VNNI peak")
    if row.amx_products is not None and tiles:
        parts.append(f"products alone >= {row.amx_products:.0%} of the AMX peak")
    return ", ".join(parts) or "for information"


def value_text(line: Line) -> str:
    digits = 2 if line["unit"] == "s" else 1 if line["median"] < 100 else 0
    spread = f"{line['low']:.{digits}f}-{line['high']:.{digits}f}"
    return f"{line['median']:.{digits}f} {line['unit']} ({spread})"


def share_text(line: Line, row: Row, tiles: bool) -> str:
    if row.task.kind == "decode":
        return f"{line['shares']['bandwidth']:.0%} of {line['bandwidth']:.1f} GB/s"
    if row.task.kind == "prefill":
        peak, name = (line["tile_peak"], "AMX") if tiles else (line["vector_peak"], "VNNI")
        return f"{operations(line, row) / peak:.0%} of {peak:.0f} GOP/s ({name})" if peak else ""
    return ""


def limit_text(line: Line, row: Row, tiles: bool, done: Mapping[str, Any]) -> str:
    """What a verdict rests on besides the ratio."""
    if row.times:
        return f"{multiple(line, row, done):.2f}x {row.times[1]}"
    text, counted = share_text(line, row, tiles), done[row.name].get("profile")
    if row.amx_products is not None and tiles and counted:
        text += f"; products alone {products_share(line, row, counted):.0%}"
    return text


def multiple(line: Line, row: Row, done: Mapping[str, Any]) -> float:
    """How many times the figure of the same recipe in another row."""
    assert row.times is not None
    other = [x for x in done.get(row.times[1], {"lines": []})["lines"] if x["name"] == line["name"]]
    return float(line["median"] / other[0]["median"]) if other else 0.0


def operations_a_token(line: Line, row: Row) -> float:
    """Of the linear layers in a prefill whose last logits are wanted; the head and attention left out."""
    from peers.entries import LAST_LAYER, SIZES

    left_out = LAST_LAYER[row.model] * (1 - 1 / row.task.context) if line["ours"] else 0.0
    return 2.0 * (SIZES[row.model][0] - left_out)


def operations(line: Line, row: Row) -> float:
    """Integer GOP/s of a prefill."""
    return 1e-9 * operations_a_token(line, row) * float(line["median"])


def products_share(line: Line, row: Row, counted: Mapping[str, Any]) -> float:
    """Of the tiles' peak, while products run: queries, keys and values, outputs, and the MLP with what joins its halves."""
    nanoseconds = sum(counted[part] for part in ("qkv", "output", "mlp"))
    done = operations_a_token(line, row) * row.task.context
    return done / nanoseconds / line["tile_peak"] if line["tile_peak"] and nanoseconds else 0.0


def vector_share(line: Line, row: Row) -> float:
    return operations(line, row) / line["vector_peak"] if line["vector_peak"] else 0.0


def detail(row: Row, found: Mapping[str, Any], quality: Mapping[str, float], tiles: bool) -> str:
    """All contenders of one row."""
    ordered = sorted(found["lines"], key=lambda line: line["median"], reverse=not row.task.less_is_better)
    lines = []
    for line in ordered:
        kl = quality.get(line["quality"])
        noise = f"{line['others']:.0%} {'' if line['quiet'] == line['rounds'] else '(!)'}".strip()
        lines.append(
            [
                f"**{line['name']}**" if line["ours"] else line["name"],
                line["flags"],
                value_text(line),
                f"{line['bits']:.2f}" if line["bits"] else "",
                f"{line['megabytes']:.0f}",
                f"{kl:.4f}" if kl is not None else "",
                share_text(line, row, tiles),
                f"{line['bandwidth']:.1f}",
                f"{line['vector_peak']:.0f}",
                noise,
                f"{line['quiet']}/{line['rounds']}",
            ]
        )
    head = (
        "program, file",
        "flags",
        f"{row.task.unit}: median (range)",
        "bits",
        "MB a token",
        "KL",
        "share of the limit",
    )
    text = [f"## {row.name}\n", common.table((*head, "GB/s beside", "GOP/s beside", "others", "quiet"), lines)]
    text += [f"\n{name} gave no figure: {why}" for name, why in found["failed"].items()]
    tried = [(line["name"], t) for line in found["lines"] for t in line["tried"]]
    if tried:
        said = "; ".join(f"{n} [{t['flags']}] {max(t['values']):.4g}" for n, t in tried)
        text.append(f"\nFlags tried, the best of {len(tried[0][1]['values'])} short looks: {said}.")
    if found.get("profile"):
        text.append(f"\n{profile_text(found['profile'])}.")
    return "\n".join(text) + "\n"


def missed_rows(rows: Sequence[Row], done: Mapping[str, Any], quality: Mapping[str, float], tiles: bool) -> str:
    """Where the time (or the memory) of each missed row goes."""
    lines = []
    for row in rows:
        if row.name in done and judge(row, done, quality, tiles).missed:
            counted = done[row.name].get("profile")
            lines.append(f"- {row.name}: {profile_text(counted) if counted else 'no profile was taken'}.")
    return "\n".join(["Missed, and where it goes:\n", *lines, ""]) if lines else ""


def profile_text(counted: Mapping[str, Any]) -> str:
    of = f" ({counted['of']})" if "of" in counted else ""
    if "stages" in counted:
        stages = (f"{s['stage']} until {s['seconds']:.2f} s, {s['megabytes']:.0f} MB" for s in counted["stages"])
        return f"our process{of}: {', '.join(stages)}"
    return f"our engine's first thread{of}: {parts_text({k: v for k, v in counted.items() if k != 'of'})}"


def median_profile(readings: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
    """The one of all whose parts took the middle of times: one reading may lie in another program's turn."""
    return sorted(readings, key=lambda counted: sum(parts_of(counted).values()))[len(readings) // 2]


def parts_of(counted: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in counted.items() if name not in ("steps", "barrier_count")}


def parts_text(counted: Mapping[str, int]) -> str:
    """Shares of the time by part; barriers are waiting, and counted beside the parts that they end."""
    parts = parts_of(counted)
    total = sum(parts.values()) or 1
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in sorted(parts.items(), key=lambda p: -p[1]))
    return f"{shares}; {total / 1e6 / max(counted['steps'], 1):.2f} ms a step"


def on_tiles(data: Mapping[str, Any]) -> bool:
    return "amx_int8" in data["machine"]["instruction set"] and not data.get("without_amx")


def page(title: str, rows: Sequence[Row], data: Mapping[str, Any], quality: Mapping[str, float]) -> str:
    tiles = on_tiles(data)
    head = ("what", "must reach", "ours", "deciding peer", "ratio", "share of the limit", "verdict")
    parts = [
        f"# {title}\n",
        f"{data['threads']} threads. Rounds interleaved; median and range. At 4 bit only those of our recipes count against a peer "
        "whose KL on the reference model is no worse than that of the peer's file (peers_quality.md). Limits (bandwidth, "
        "integer peak of the registers) were read before each reading; 'others' is the most of a core that other processes "
        f"took during one, and readings above {NOISE:.0%} are left out while three quiet ones remain.\n",
        common.table(head, goal_rows(rows, data["rows"], quality, tiles)),
        "",
        missed_rows(rows, data["rows"], quality, tiles),
        *(detail(row, data["rows"][row.name], quality, tiles) for row in rows if row.name in data["rows"]),
    ]
    return "\n".join(parts)
