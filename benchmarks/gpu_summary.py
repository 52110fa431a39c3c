"""Figures of the GPU out of raw samples: medians, floors, ratios, goals. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_profile import KINDS
from benchmarks.gpu_shapes import SHAPES
from benchmarks.gpu_workloads import WORKLOADS, offline_floor_s
from benchmarks.report import Report, median

Rounds = Sequence[dict[str, Any]]
"""What children wrote, of the first round first."""

_DECODE_GOALS = {"1": "<= 1.15", "64": "<= 1.08"}
_DEFAULT_MODEL = {"offline": "qwen3-0.6b", "decode_step": "llama-3.1-8b", "prefill": "llama-3.1-8b"}


class Summary:
    """Adds the figures of one session to a report."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._copy = self._product = self._product_in_a_row = 0.0
        self._ours: dict[tuple[str, str, int], float] = {}
        """Seconds by (model, bench, batch); of offline work, per token."""

    def limits(self, rounds: Rounds) -> None:
        """Comes first: the rest is measured against it."""
        copies = _pooled(rounds, lambda result: result["copy_bytes_per_s"])
        single = _pooled(rounds, lambda result: result["product_flops_per_s"])
        in_a_row = _pooled(rounds, lambda result: result["product_in_a_row_flops_per_s"])
        self._copy, self._product = median(copies), median(single)
        self._product_in_a_row = median(in_a_row)
        self._add(
            "limit: device-to-device copy, 2 GiB, bytes read + written", "TB/s", copies, 1e-12
        )
        self._add("limit: bf16 product, 8192 x 8192 x 8192", "TFLOP/s", single, 1e-12)
        self._add("the same product, 200 in a row", "TFLOP/s", in_a_row, 1e-12)

    def model(self, name: str, rounds: Rounds) -> None:
        """All that was measured of one model."""
        self._offline(name, [each["offline"] for each in rounds if "offline" in each])
        self._decode(name, [each["decode"] for each in rounds if "decode" in each])
        self._prefill(name, [each["prefill_s"] for each in rounds if "prefill_s" in each])
        for each in rounds:
            for batch, steady in each.get("steady", {}).items():
                self._steady(name, batch, steady)

    def peers(self, lines: Rounds) -> None:
        """Figures of other engines, and how much faster ours is.

        Args:
            lines: as `benchmarks.children` reads them, with `model` where it is known.
        """
        groups: dict[tuple[str, str, str, int], list[float]] = {}
        for line in lines:
            bench = line["bench"]
            model = line.get("model") or _DEFAULT_MODEL[bench]
            key = model, bench, line["peer"], line.get("batch", 0)
            seconds = line["seconds"] / line.get("output_tokens", 1)
            groups.setdefault(key, []).append(seconds)
        for (model, bench, peer, batch), samples in groups.items():
            title = _title(model, bench, batch)
            if bench == "offline":
                self._add(f"{title}, {peer}", "tok/s", [1 / seconds for seconds in samples])
            else:
                self._add(f"{title}, {peer}", "ms", samples, 1e3)
            if ours := self._ours.get((model, bench, batch)):
                speed = median(samples) / ours
                goal = ">= 1.2" if bench == "offline" else ""
                self._report.add(f"{title}, speed over {peer}", speed, "x", goal=goal)

    def _add(
        self, name: str, unit: str, samples: Sequence[float], scale: float = 1.0, goal: str = ""
    ) -> None:
        scaled = [sample * scale for sample in samples]
        self._report.add(name, median(scaled), unit, samples=scaled, goal=goal)

    def _offline(self, name: str, rounds: Sequence[Sequence[dict[str, Any]]]) -> None:
        work = WORKLOADS[name].offline
        runs = [run for each in rounds for run in each]
        if work is None or not runs:
            return
        title = _title(name, "offline")
        rates = [run["tokens"] / run["seconds"] for run in runs]
        self._ours[name, "offline", 0] = 1 / median(rates)
        goal = ">= 22000" if name == _DEFAULT_MODEL["offline"] else ""
        self._add(f"{title}, {runs[0]['tokens']:,} tokens out", "tok/s", rates, goal=goal)
        prompts, outputs = work.draw()
        lengths = list(zip(map(len, prompts), outputs, strict=True))
        floor = offline_floor_s(
            SHAPES[name], lengths, bytes_per_s=self._copy, flops_per_s=self._product
        )
        self._report.add(f"{title}, limit", sum(outputs) / floor, "tok/s")
        self._report.add(f"{title}, share of the limit", median(rates) * floor / sum(outputs), "x")

    def _decode(self, name: str, rounds: Sequence[dict[str, Any]]) -> None:
        shape, work = SHAPES[name], WORKLOADS[name]
        for batch in map(str, work.decode_batches if rounds else ()):
            found = [each[batch] for each in rounds if batch in each]
            if not found:
                continue
            long = _pooled(found, lambda each: each["long_s"])
            short = _pooled(found, lambda each: each["short_s"])
            step = (median(long) - median(short)) / work.decode_steps
            self._ours[name, "decode_step", int(batch)] = step
            title = _title(name, "decode_step", int(batch))
            mean_context = work.decode_context + work.decode_steps / 2
            floor = shape.decode_bytes([mean_context] * int(batch)) / self._copy
            self._report.add(title, step * 1e3, "ms")
            self._report.add(f"{title}, floor", floor * 1e3, "ms")
            goal = _DECODE_GOALS.get(batch, "") if name == _DEFAULT_MODEL["decode_step"] else ""
            self._report.add(f"{title}, over the floor", step / floor, "x", goal=goal)
            self._add(f"{title}, run of {work.decode_steps + 1} tokens", "s", long)
            self._add(f"{title}, run of 1 token", "s", short)

    def _prefill(self, name: str, rounds: Sequence[Sequence[float]]) -> None:
        samples = [seconds for each in rounds for seconds in each]
        if not samples:
            return
        shape, tokens = SHAPES[name], WORKLOADS[name].prefill_tokens
        title = _title(name, "prefill")
        self._ours[name, "prefill", 0] = median(samples)
        rate = shape.prefill_flops(tokens) / median(samples)
        self._add(f"{title}, time to first token", "ms", samples, 1e3)
        self._report.add(f"{title}, rate", rate * 1e-12, "TFLOP/s")
        goal = ">= 0.82" if name == _DEFAULT_MODEL["prefill"] else ""
        share = rate / self._product
        self._report.add(f"{title}, share of the product's rate", share, "x", goal=goal)
        share = rate / self._product_in_a_row
        self._report.add(f"{title}, share of the rate of products in a row", share, "x")

    def _steady(self, name: str, batch: str, steady: dict[str, Any]) -> None:
        shape, profile = SHAPES[name], steady["profile"]
        title = f"{shape.title}: steady decode, batch {batch} x {steady['context']}"
        self._add(f"{title}, step", "ms", steady["step_s"], 1e3)
        self._add(f"{title}, step in the profile", "ms", profile["steps_us"], 1e-3)
        shares = [100 * share for share in profile["idle_shares"]]
        share = 100 * profile["idle_share"]
        self._report.add(f"{title}, GPU idle", share, "%", samples=shares, goal="<= 3")
        for kind in KINDS:
            if used := profile["kinds_us"].get(kind):
                self._report.add(f"{title}, {kind}", used, "us")
        self._report.details.setdefault("profiles", {})[title] = {
            key: profile[key] for key in ("steps", "kernels", "timeline", "idle_share", "step_us")
        }


def _title(model: str, bench: str, batch: int = 0) -> str:
    work, title = WORKLOADS[model], SHAPES[model].title
    if bench == "offline":
        return f"{title}: offline"
    if bench == "prefill":
        return f"{title}: prefill of {work.prefill_tokens} tokens"
    return f"{title}: decode step, batch {batch} x {work.decode_context}"


def _pooled(rounds: Rounds, samples: Callable[[dict[str, Any]], list[float]]) -> list[float]:
    return [sample for each in rounds for sample in samples(each)]
