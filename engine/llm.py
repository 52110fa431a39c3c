"""One model in a plain loop, with no network: for scripts and notebooks, and the oracle of tests.

    with LLM("demo") as llm:
        (answer,) = llm.generate("The capital of France is", SamplingParams(max_tokens=16))

The workers drive the same `Engine` themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Self

from core.errors import ConfigError, DiptychError, InvalidRequestError
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs, join_prompt_logprobs
from engine.build import build_executor
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Executor
from engine.grammar.build import build_grammars
from engine.progress import BatchProgress, on_terminal
from engine.prompts import Prompt, PromptReader
from engine.request import EngineRequest, SequenceOutput

_GRAMMAR_WAIT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated for one prompt."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    """One per token if asked for, else empty."""
    finish_reason: FinishReason
    num_cached_tokens: int
    """Prompt tokens that the prefix cache spared."""
    text: str | None = None
    """What `token_ids` say, where the prompt was text; None where it was token ids."""
    prompt_logprobs: PromptLogprobs | None = None
    """None unless asked for, and of a prompt of one token."""


class LLM:
    """Generates for lists of prompts. `engine` is open to whoever wants to look.

    A context manager: the model and the KV pool are freed at its end.
    """

    def __init__(
        self, model: str | EngineConfig, *, executor: Executor | None = None, **settings: Any
    ) -> None:
        """Load a model.

        Args:
            model: a folder in Hugging Face form, a .gguf file or `demo`; or all settings at once.
            executor: runs the steps; None: the one that the settings ask for.
            settings: further fields of EngineConfig. The device is a GPU if there is one, unless
                `device` says otherwise.

        Raises:
            ConfigError: the model can't be found or is not supported, or a setting is unknown or
                does not fit.
        """
        config = _config(model, settings)
        self._prompts = PromptReader(config.model)
        self._closed = False
        self._executor = executor or build_executor(config)
        self._max_waiting = config.max_waiting
        self._num_requests = 0
        self.engine = Engine(
            config,
            self._executor,
            model_digest=self._executor.model_digest,
            grammars=build_grammars(config, self._executor.model_config),
        )

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Generate for all prompts at once and wait for the last.

        Args:
            prompts: one text, or a list of texts and of lists of token ids, [B].
            sampling: for all prompts, or one for each; None: that of SamplingParams().
            progress: show a bar on standard error; None: if that is a terminal.

        Returns:
            One Completion per prompt, in order.

        Raises:
            InvalidRequestError: a prompt can't be served; nothing was generated then.
            ConfigError: a prompt is text, and the model has no tokenizer.
            DiptychError: a step failed, or this LLM is closed.
        """
        if self._closed:
            raise DiptychError("This LLM is closed: its model is no longer loaded. Make a new one.")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        sampling = SamplingParams() if sampling is None else sampling
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts came with {len(each)} sampling settings; send one for "
                "all, or as many as prompts.",
                param="sampling",
            )
        requests = []
        for position, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            request_id = f"llm-{self._num_requests}"
            self._num_requests += 1
            requests.append(
                EngineRequest(
                    request_id=request_id,
                    prompt_ids=self._prompts.token_ids(prompt, position),
                    sampling=params,
                )
            )
            self.engine.check(requests[-1])
        shown = on_terminal() if progress is None else progress
        try:
            with BatchProgress(len(requests), shown=shown) as bar:
                steps = self._run(requests, bar)
        except BaseException:
            for request in requests:
                self.engine.abort(request.request_id)
            self.engine.settle()
            self.engine.reap()
            raise
        return [
            self._completion(outputs, as_text=isinstance(prompt, str))
            for prompt, outputs in zip(prompts, steps, strict=True)
        ]

    def close(self) -> None:
        """Free the model and the KV pool. Once is enough, again does nothing."""
        if not self._closed:
            self._closed = True
            self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Any:
        """The model's `tokenizers.Tokenizer`.

        Raises:
            ConfigError: it has none in the form of a tokenizer.json.
        """
        return self._prompts.tokenizer

    def _run(
        self, requests: Sequence[EngineRequest], bar: BatchProgress
    ) -> list[list[SequenceOutput]]:
        steps: dict[str, list[SequenceOutput]] = {request.request_id: [] for request in requests}
        queue = iter(requests)
        left = len(requests)
        while left or self.engine.has_work:
            while left and self.engine.num_waiting < self._max_waiting:
                request = next(queue, None)
                if request is None:
                    break
                self.engine.add(request)
            if not self.engine.has_work and self.engine.waits_for_grammar:
                self.engine.await_grammar(_GRAMMAR_WAIT_S)
            for output in self.engine.step().outputs:
                if output.error is not None:
                    raise output.error
                steps[output.request_id].append(output)
                ended = output.finish_reason is not None
                left -= ended
                bar.advance(tokens=len(output.token_ids), ended=ended)
        return list(steps.values())

    def _completion(self, outputs: Sequence[SequenceOutput], *, as_text: bool) -> Completion:
        last = outputs[-1]
        if last.finish_reason is None:
            raise DiptychError(f"Request {last.request_id} never ended.")
        token_ids = [token_id for output in outputs for token_id in output.token_ids]
        scores = [each.prompt_logprobs for each in outputs if each.prompt_logprobs is not None]
        return Completion(
            token_ids=token_ids,
            logprobs=[logprobs for output in outputs for logprobs in output.logprobs],
            finish_reason=last.finish_reason,
            num_cached_tokens=last.num_cached_tokens,
            text=self._prompts.text(token_ids) if as_text else None,
            prompt_logprobs=join_prompt_logprobs(scores) if scores else None,
        )


def _config(model: str | EngineConfig, settings: dict[str, Any]) -> EngineConfig:
    if isinstance(model, EngineConfig):
        if settings:
            raise ConfigError(
                f"{', '.join(settings)} came beside an EngineConfig; set it in there instead."
            )
        return model
    known = [field.name for field in fields(EngineConfig)]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"LLM has no setting {name}.{hint}")
    return EngineConfig(model=model, **{"device": "auto"} | settings)
