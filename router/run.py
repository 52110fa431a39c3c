"""One generation in progress: its ledger, the tokens that its client has not taken yet, its timers.

Made and driven by dispatch; read by the API through the Generation protocol. A client that keeps up
is handed tokens where they arrive, without a task in between. For one that does not they wait in a
buffer, at most max_tokens of them, so a slow client never holds up a worker's link.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from core.block_hash import hash_blocks, root_hash
from core.sampling import SamplingParams
from core.tokens import PromptLogprobs
from router.fleet.breakers import Charge
from router.fleet.wire import submit_to_proto, with_phase
from router.fleet.worker import Phase, WorkerInfo
from router.generation import GenerationEnd, GenerationRequest, Take, Token
from router.ledger import Leg, RequestLedger, RequestState
from router.placement.cost import Prompt
from router.placement.decision import Placement
from router.timeline import RequestTimeline
from router.watchdog import Stage, Watch
from rpc.v1 import worker_pb2


class Run:
    """A Generation and what dispatch must remember about it."""

    def __init__(
        self, request: GenerationRequest, ledger: RequestLedger, timeline: RequestTimeline
    ) -> None:
        self.request = request
        self.ledger = ledger
        self.timeline = timeline
        self.model_digest: bytes | None = None
        """Of the worker that began the output."""
        self.prompt_worker: str | None = None
        """Where another worker than the one that generates computes the prompt, if one does."""
        self.retry_at = 0.0
        """From when on a worker that failed it may be tried again, monotonic seconds."""
        self.charges: list[Charge] = []
        """Failures of workers that are not proven to be theirs yet."""
        self.watch: Watch | None = None
        """The stage that it is in, until it has all that is watched behind it."""
        self.on_trial = False
        """It was taken from a worker for being stuck, and this attempt shows whether it was."""
        self.stuck_in: set[Stage] = set()
        """Stages in which a worker has lost it."""
        self.refusal = ""
        """Why no worker could take it when last tried."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tokens: list[Token] = []
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[bool] | None = None
        """Of the client's side, which is one task, while it waits for a change; see `_change`."""
        self._take: Take | None = None
        """Takes tokens that arrive; only while the client's side waits for them."""
        self._hashes: dict[tuple[bytes, int], list[bytes]] = {}

    @property
    def prompt(self) -> Prompt:
        """What placement needs to know of the next attempt."""
        done = len(self.ledger.emitted)
        return Prompt(
            num_tokens=len(self.request.prompt_ids) + done,
            max_new_tokens=self.request.sampling.max_tokens - done,
            recomputed=self._sampling.prompt_logprobs is not None,
        )

    def hashes_for(self, info: WorkerInfo) -> Sequence[bytes]:
        """Hashes of the full blocks of prompt and output so far, as `info`'s worker counts them.

        Each block is hashed once, however many attempts there are.
        """
        block_size = info.layout.block_size
        hashes = self._hashes.setdefault((info.model_digest, block_size), [])
        num_tokens = len(self.request.prompt_ids) + len(self.ledger.emitted)
        if len(hashes) < num_tokens // block_size:
            token_ids = [*self.request.prompt_ids, *self.ledger.emitted]
            parent = hashes[-1] if hashes else self._root_for(info)
            start = len(hashes) * block_size
            hashes += hash_blocks(token_ids, block_size, parent, start=start)
        return hashes

    def _root_for(self, info: WorkerInfo) -> bytes:
        return root_hash(info.model_digest, salt=self.request.cache_salt)

    def messages(
        self, placement: Placement, info: WorkerInfo, peer: WorkerInfo | None, now: float
    ) -> dict[Leg, worker_pb2.RouterMessage]:
        """What each leg of the next attempt is sent.

        Args:
            placement: where the legs go.
            info: the worker that generates.
            peer: the worker that computes the prompt, if that is another.
            now: monotonic seconds.
        """
        attempt = self.ledger.attempt + 1
        submit = submit_to_proto(
            request_id=self.request.request_id,
            attempt=attempt,
            prompt_ids=self.request.prompt_ids,
            output_ids=self.ledger.emitted,
            block_hashes=self.hashes_for(info),
            root_hash=self._root_for(info),
            sampling=self._sampling,
            remaining_s=self.request.deadline - now,
        )
        if placement.prefill is None:
            local = Leg(placement.worker, attempt, Phase.LOCAL)
            return {local: with_phase(submit, Phase.LOCAL, None)}
        export = Leg(placement.prefill, attempt, Phase.EXPORT)
        import_ = Leg(placement.worker, attempt, Phase.IMPORT)
        return {
            export: with_phase(submit, Phase.EXPORT, info),
            import_: with_phase(submit, Phase.IMPORT, peer),
        }

    @property
    def _sampling(self) -> SamplingParams:
        """For the next attempt; what was told of the prompt with the first token is not again."""
        if not self.ledger.emitted:
            return self.request.sampling
        return replace(self.request.sampling, prompt_logprobs=None)

    def push(self, tokens: Sequence[Token]) -> None:
        """Hand tokens to the client's side."""
        take = self._take
        if take is None:
            self._tokens += tokens
            self.wake()
            return
        try:
            if not take(tokens):
                self.wake(sated=True)
        except Exception as error:  # the reader's own, and no business of who brings tokens
            self._take = None
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)

    def wake(self, *, sated: bool = False) -> None:
        """Let whoever waits look at the ledger again, or know that it wants no more for now."""
        self._take = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(sated)

    async def started(self) -> None:
        """Wait until it was placed, or ended without.

        Raises:
            DiptychError: it ended without.
        """
        while self.ledger.attempt == 0 and self.ledger.state is not RequestState.ENDED:
            await self._change()
        if self.ledger.attempt == 0 and self.ledger.error is not None:
            raise self.ledger.error

    async def begun(self) -> None:
        """Wait until there is a token, or there never will be."""
        while not self._tokens and self.ledger.state is not RequestState.ENDED:
            await self._change()

    async def feed(self, take: Take) -> bool:
        """Hand tokens to `take` until it wants no more, or there are none; see Generation."""
        while True:
            if self._tokens:
                batch, self._tokens = self._tokens, []
                if not take(batch):
                    return True
            if self.ledger.state is RequestState.ENDED:
                if self.ledger.error is not None:
                    raise self.ledger.error
                return False
            self._take = take
            try:
                if await self._change():
                    return True
            finally:
                self._take = None

    def _change(self) -> "asyncio.Future[bool]":
        """Until somebody wakes it. Nothing is missed: nobody else runs before it is awaited.

        True if what took tokens wants no more for now.
        """
        self._waiter = self._loop.create_future()
        return self._waiter

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of the whole prompt; see Generation."""
        return self.ledger.prompt_logprobs

    @property
    def end(self) -> GenerationEnd:
        """How it ended, or ends if it is left now; see Generation."""
        return self.ledger.end_if_left

    def set_timer(self, name: str, delay_s: float, callback: Callable[["Run"], None]) -> None:
        """Have `callback` called with this run, unless the timer is set anew or cancelled."""
        self.cancel_timer(name)
        self._timers[name] = self._loop.call_later(delay_s, callback, self)

    def cancel_timer(self, name: str) -> None:
        """Forget a timer, set or not."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
