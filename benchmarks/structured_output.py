"""What structured output costs the host: reading the vocabulary, compiling, a mask per token.

    python -m benchmarks.structured_output --save

Both libraries over the demo model's vocabulary of 49,152 tokens, along texts that fit each
definition. A mask is computed for every token of every sequence that has a structure: on a GPU
while the device computes the logits that it is for, on a CPU in turn with them. Its peer is
choosing a token from a plain row of logits, measured in the same run.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import quantiles

import numpy as np
import torch

from benchmarks.report import Report, median
from core.modelfile.description import read_eos_token_ids, read_tokenizer
from core.modelfile.resolve import resolve_model
from core.sampling import SamplingParams, StructuredOutput
from engine.grammar.backend import GrammarBackend, Matcher, mask_of, num_words
from engine.plan import SampleSpec
from engine.sampler.sampler import sample
from tests.support.grammar import ReadMask

COMPILES = 15
WALKS = 8
ROWS = 300
BATCH = 64
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_LARGE = {
    "type": "object",
    "properties": {
        f"field_{i}": {
            "type": "object",
            "properties": {
                "kind": {"enum": [f"kind_{i}_{j}" for j in range(8)]},
                "values": {"type": "array", "items": {"type": "number"}},
                "note": {"type": "string", "maxLength": 80},
            },
            "required": ["kind", "values", "note"],
            "additionalProperties": False,
        }
        for i in range(40)
    },
    "required": [f"field_{i}" for i in range(40)],
    "additionalProperties": False,
}
_NOTE = {"kind": "kind_0_3", "values": [1, -2.5, 3e4], "note": "as they said: it works."}
CASES: dict[str, tuple[StructuredOutput, str]] = {
    "a schema of two fields": (
        StructuredOutput(kind="json_schema", definition=json.dumps(_SCHEMA)),
        '{"name": "Ada Lovelace of London", "age": 36}',
    ),
    "a schema of 160 fields": (
        StructuredOutput(kind="json_schema", definition=json.dumps(_LARGE)),
        json.dumps({f"field_{i}": _NOTE | {"kind": f"kind_{i}_3"} for i in range(40)}),
    ),
    "any JSON object": (
        StructuredOutput(kind="json_object"),
        json.dumps({"a": [1, True, {"b": "some text, and more of it"}]}),
    ),
    "a regular expression": (
        StructuredOutput(kind="regex", definition=r"[a-z]+@[a-z]+\.(com|org|net), \d{4}-\d\d-\d\d"),
        "someone@example.org, 2024-02-17",
    ),
    "one of 200 choices": (
        StructuredOutput(
            kind="choice", definition=json.dumps([f"choice number {i}" for i in range(200)])
        ),
        "choice number 137",
    ),
}


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def build(name: str, tokenizer_json: str, vocab_size: int, ends: list[int]) -> GrammarBackend:
    """The backend of that name."""
    if name == "xgrammar":
        from engine.grammar.xgrammar_backend import XgrammarBackend

        return XgrammarBackend(tokenizer_json, vocab_size, ends)
    from engine.grammar.llguidance_backend import LlguidanceBackend

    return LlguidanceBackend(tokenizer_json, vocab_size, ends)


def walk(matcher: Matcher, ids: list[int], vocab_size: int) -> tuple[list[float], list[float]]:
    """Seconds per mask and per accepted token along a text."""
    words = np.zeros(num_words(vocab_size), np.int32)
    masks, accepts = [], []
    for token_id in ids:
        masks.append(timed(partial(matcher.fill, words)))
        accepts.append(timed(partial(matcher.accept, [token_id])))
    return masks, accepts


def choose_us(specs: list[SampleSpec], vocab_size: int) -> list[float]:
    """Microseconds of the CPU's sampler per row, over steps of as many rows as there are specs."""
    logits = torch.randn(len(specs), vocab_size)
    samples = []
    for _ in range(ROWS // len(specs)):
        samples.append(timed(lambda: sample(logits.clone(), specs)) * 1e6 / len(specs))
    return samples


def measure(name: str, report: Report, tokenizer_json: str, ids: dict[str, list[int]]) -> None:
    """All figures of one library."""
    vocab_size, ends = report.settings["vocab_size"], report.settings["eos_token_ids"]
    start = time.perf_counter()
    backend = build(name, tokenizer_json, vocab_size, ends)
    report.add(f"{name}: reading the vocabulary", time.perf_counter() - start, "s")
    for case, (structured, _) in CASES.items():
        compile_it = partial(backend.compile, structured)
        compiles = [timed(compile_it) * 1e3 for _ in range(COMPILES)]
        report.add(f"{name}: {case}, compile", median(compiles), "ms", samples=compiles)
        grammar = backend.compile(structured)
        masks: list[float] = []
        accepts: list[float] = []
        for _ in range(WALKS):
            more_masks, more_accepts = walk(grammar.start(), ids[case], vocab_size)
            masks += more_masks
            accepts += more_accepts
        in_us = [seconds * 1e6 for seconds in masks]
        report.add(f"{name}: {case}, mask, mean", float(np.mean(in_us)), "us", samples=in_us)
        report.add(f"{name}: {case}, mask, 99th percentile", quantiles(in_us, n=100)[98], "us")
        report.add(f"{name}: {case}, token taken", float(np.mean(accepts)) * 1e6, "us")


def main() -> None:
    """Measure the libraries that are installed, and the CPU's sampler with and without masks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = resolve_model("demo", print)
    tokenizer = read_tokenizer(path).tokenizer
    vocab_size = tokenizer.get_vocab_size()
    settings = {"vocab_size": vocab_size, "eos_token_ids": list(read_eos_token_ids(path))}
    report = Report("structured-output", settings)
    ids = {case: tokenizer.encode(text).ids for case, (_, text) in CASES.items()}
    gc.disable()
    for name in ("llguidance", "xgrammar"):
        if find_spec(name) is not None:
            measure(name, report, tokenizer.to_str(), ids)
    mask = ReadMask(mask_of(range(0, vocab_size, 3), vocab_size))
    greedy = SamplingParams(temperature=0)
    for batch in (1, BATCH):
        plain = choose_us([SampleSpec(greedy, 0, (), ())] * batch, vocab_size)
        masked = choose_us([SampleSpec(greedy, 0, (), (), (), mask)] * batch, vocab_size)
        name = f"CPU sampler, {batch} rows: a plain row"
        report.add(name, median(plain), "us", samples=plain)
        name = f"CPU sampler, {batch} rows: a masked row"
        report.add(name, median(masked), "us", samples=masked)
        report.add(f"{name}, beside a plain one", median(masked) / median(plain), "x")
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
