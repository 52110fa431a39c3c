"""How the tokens of one request are chosen. Shared words of router and engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from core.errors import InvalidRequestError

MAX_LOGPROBS = 20

StructureKind: TypeAlias = Literal["json_object", "json_schema", "regex", "ebnf", "choice"]
MAX_DEFINITION_BYTES = 256 * 1024
"""Longest definition of a structure, in UTF-8."""
MAX_GRAMMAR_BYTES = 16 * 1024
"""The same of `ebnf`. A grammar converted from GBNF, or one with a mistake at the end of a chain of
rules, takes time with the square of its length or worse: seconds at this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What the whole text of an output must be. Hashable, so that what is compiled can be kept."""

    kind: StructureKind
    definition: str = ""
    """Text of the JSON schema, the regular expression or the grammar; for `choice` a JSON list of
    strings; empty for `json_object`. Whoever compiles it checks it."""

    def __post_init__(self) -> None:
        kinds = get_args(StructureKind)
        _require("structured", self.kind in kinds, f"one of {', '.join(kinds)}", self.kind)
        size = len(self.definition.encode("utf-8", "surrogatepass"))
        limit = MAX_GRAMMAR_BYTES if self.kind == "ebnf" else MAX_DEFINITION_BYTES
        if size > limit:
            raise InvalidRequestError(
                f"The {self.kind} of the structured output is {size} bytes long; at most {limit} "
                "are taken.",
                param="structured",
            )
        if bool(self.definition) == (self.kind == "json_object"):
            wants = "no definition" if self.definition else f"a definition: the {self.kind}"
            raise InvalidRequestError(
                f"Structured output of kind {self.kind} takes {wants}.", param="structured"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one sequence; ranges as in the OpenAI and vLLM APIs.

    The random draw for output token i is a function of (seed, i) alone, so a continuation on
    another worker is the one that would have been.
    """

    max_tokens: int = 16
    """Most tokens to generate, counted over all attempts."""
    min_tokens: int = 0
    """End-of-sequence and stop ids can't be sampled before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: smallest set of most likely tokens whose probabilities reach this, in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one, in [0, 1]."""
    seed: int = 0
    """In [0, 2**64)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token already in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; above 0."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to bias added to its logit, each in [-100, 100]."""
    logprobs: int | None = None
    """None: none. n: of the sampled token and the n most likely, from the unmodified logits."""
    prompt_logprobs: int | None = None
    """None: none. n: of each prompt token but the first, its rank, and of the n most likely."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the output besides the model's end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids."""
    structured: StructuredOutput | None = None
    """What the output must be; None: anything."""

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens >= 1, "at least 1", self.max_tokens)
        _require("min_tokens", self.min_tokens >= 0, "at least 0", self.min_tokens)
        _require("temperature", 0 <= self.temperature <= 100, "in [0, 100]", self.temperature)
        _require("top_p", 0 < self.top_p <= 1, "in (0, 1]", self.top_p)
        _require("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)", self.top_k)
        _require("min_p", 0 <= self.min_p <= 1, "in [0, 1]", self.min_p)
        _require("seed", 0 <= self.seed < 2**64, "in [0, 2**64)", self.seed)
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, -2 <= getattr(self, name) <= 2, "in [-2, 2]", getattr(self, name))
        _require(
            "repetition_penalty",
            0 < self.repetition_penalty <= 100,
            "in (0, 100]",
            self.repetition_penalty,
        )
        for token_id, bias in self.logit_bias.items():
            _require("logit_bias", -100 <= bias <= 100, "in [-100, 100]", f"{token_id}: {bias}")
        if self.structured is not None and self.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos goes on past the end of the output, and a structured output ends with "
                "its structure; send one of them.",
                param="ignore_eos",
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None:
                _require(name, 0 <= count <= MAX_LOGPROBS, "in [0, 20]", count)

    @property
    def greedy(self) -> bool:
        """True if the most likely token is taken, whatever the seed."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """True if earlier tokens change the logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


def _require(param: str, holds: bool, allowed: str, value: object) -> None:
    if not holds:
        raise InvalidRequestError(f"{param} must be {allowed}, got {value}.", param=param)
