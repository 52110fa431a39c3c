"""One model in a plain loop, with no network: the oracle of tests, the baseline of benchmarks.

Called by tests, benchmarks and notebooks; the workers drive the same `Engine` themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import DiptychError, InvalidRequestError
from core.finish import FinishReason
from core.sampling import SamplingParams
from core.tokens import TokenLogprobs
from engine.build import build_executor
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Executor
from engine.grammar.build import build_grammars
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


class LLM:
    """Generates for lists of prompts. `engine` is open to whoever wants to look."""

    def __init__(self, config: EngineConfig, *, executor: Executor | None = None) -> None:
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
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Generate for all prompts at once and wait for the last.

        Args:
            prompts: token ids, [B][T].
            sampling: for all prompts, or one for each.

        Returns:
            One Completion per prompt, in order.

        Raises:
            InvalidRequestError: a prompt can't be served; nothing was generated then.
            DiptychError: a step failed.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts came with {len(each)} sampling settings; send one for "
                "all, or as many as prompts.",
                param="sampling",
            )
        requests = []
        for prompt, params in zip(prompts, each, strict=True):
            request_id = f"llm-{self._num_requests}"
            self._num_requests += 1
            requests.append(
                EngineRequest(request_id=request_id, prompt_ids=prompt, sampling=params)
            )
            self.engine.check(requests[-1])
        try:
            return self._run(requests)
        except BaseException:
            for request in requests:
                self.engine.abort(request.request_id)
            self.engine.settle()
            self.engine.reap()
            raise

    def close(self) -> None:
        """Free the model and the KV pool."""
        self._executor.close()

    def _run(self, requests: Sequence[EngineRequest]) -> list[Completion]:
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
                left -= output.finish_reason is not None
        return [_completion(outputs) for outputs in steps.values()]


def _completion(outputs: Sequence[SequenceOutput]) -> Completion:
    last = outputs[-1]
    if last.finish_reason is None:
        raise DiptychError(f"Request {last.request_id} never ended.")
    return Completion(
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=[logprobs for output in outputs for logprobs in output.logprobs],
        finish_reason=last.finish_reason,
        num_cached_tokens=last.num_cached_tokens,
    )
