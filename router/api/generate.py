"""Answers a request for text: reads it, runs its sequences, streams or collects their output.

The contexts of all sequences are left before the answer ends, and at once when the client goes
away, a stop string is found or the deadline passes: leaving them is what frees the workers.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from core.errors import DeadlineError, InvalidRequestError
from router.api.answer import Answer, AnswerFacts
from router.api.choice import Choice, EndedChoice
from router.api.delivery import Delivery, Render
from router.api.errors import ClientDisconnectedError, error_answer
from router.api.exchange import Exchange
from router.api.job import Dialect, Job
from router.api.metrics import TokenTimer
from router.api.output import Piece
from router.api.parts import ApiParts
from router.api.planning import make_job
from router.api.sse import EventStream

TIMEOUT_HEADER = b"x-request-timeout"


class TextEndpoint:
    """POST endpoint that generates text, in one dialect."""

    def __init__(self, parts: ApiParts, dialect: Dialect) -> None:
        self._parts = parts
        self._dialect = dialect
        self._metrics = parts.metrics.of(dialect.name)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request and account for how it went."""
        outcome = "ok"
        self._metrics.in_flight.inc()
        try:
            with self._parts.gate:
                await self._respond(exchange)
        except ClientDisconnectedError:
            outcome = "disconnected"
            self._parts.metrics.disconnects.labels(self._dialect.name, exchange.phase).inc()
            raise
        except asyncio.CancelledError:
            outcome = "shutdown"
            raise
        except Exception as error:
            outcome = error_answer(error).code
            raise
        finally:
            self._metrics.in_flight.dec()
            self._metrics.request_duration.observe(self._parts.clock() - exchange.received_at)
            self._parts.metrics.requests.labels(self._dialect.name, outcome).inc()

    async def _respond(self, exchange: Exchange) -> None:
        settings = self._parts.settings
        body = await exchange.read_json_body(
            limit_bytes=settings.body_limit_bytes, timeout_s=settings.body_timeout_s
        )
        exchange.phase = "waiting"
        stream = EventStream(exchange, clock=self._parts.clock, keep_alive_s=settings.keep_alive_s)
        serving = self._serve(exchange, body, stream)
        del body
        try:
            await exchange.run(
                serving,
                idle=stream.keep_alive,
                idle_s=settings.keep_alive_s,
            )
        except Exception as error:
            if stream.started and not isinstance(error, ClientDisconnectedError):
                await stream.fail(error_answer(error), patience_s=settings.deadline_grace_s)
            raise

    async def _serve(self, exchange: Exchange, body: bytes, stream: EventStream) -> None:
        deadline = exchange.received_at + self._timeout_s(exchange)
        async with self._cut_off(deadline):
            read = partial(self._dialect.read, caller=exchange.caller)
            request = await self._parts.bodies.read(body, read)
            del body  # megabytes, perhaps, and the answer takes minutes
            job = await make_job(self._parts, self._dialect, request, exchange, deadline)
            prompt_tokens = job.usage().prompt_tokens
            if exchange.allowance is not None:
                exchange.allowance.take_prompt(prompt_tokens)
            names = [choice.request.request_id for choice in job.choices]
            aliases = self._dialect.aliases(request)
            known_as = {exchange.request_id: names, job.answer_id: names, **job.named(aliases)}
            for name, parts in known_as.items():
                self._parts.recent.remember(exchange.caller.tenant, name, parts)
            self._parts.metrics.prompt_tokens.inc(prompt_tokens)
            facts = AnswerFacts(
                answer_id=job.answer_id,
                created=int(time.time()),
                model=self._parts.served_name,
                token_bytes=self._parts.text.token_bytes,
                tenant=exchange.caller.tenant,
            )
            answer = self._dialect.answer(request, facts)
            if request.stream:
                await self._stream(job, answer, exchange, stream)
            else:
                await self._collect(job, answer, exchange, stream)

    async def _collect(
        self, job: Job, answer: Answer, exchange: Exchange, stream: EventStream
    ) -> None:
        pieces = {choice.index: Piece() for choice in job.choices}

        async def run(choice: Choice) -> None:
            def keep(piece: Piece) -> bytes:
                pieces[choice.index].append(piece)
                return b""

            await self._run(choice, self._delivery(choice, keep, bytes, exchange, stream))

        await _together([run(choice) for choice in job.choices])
        choices = [EndedChoice(choice, pieces[choice.index]) for choice in job.choices]
        mode = job.mode()
        headers = [(b"x-diptych-mode", mode.encode("latin-1", "replace"))] if mode else []
        exchange.phase = "answering"
        if any(choice.scores is not None for choice in job.choices):
            # There may be half a million of them; other answers go on meanwhile.
            body = await asyncio.to_thread(answer.whole, choices, job.usage())
        else:
            body = answer.whole(choices, job.usage())
        await exchange.answer(body, headers=headers)

    async def _stream(
        self, job: Job, answer: Answer, exchange: Exchange, stream: EventStream
    ) -> None:
        stream.open(answer.failure)

        async def run(choice: Choice) -> None:
            def opening() -> bytes:
                exchange.phase = "streaming"
                return answer.opening(choice)

            render = partial(answer.chunk, choice)
            delivery = self._delivery(choice, render, opening, exchange, stream)
            await self._run(choice, delivery)
            await stream.write(delivery.opening() + answer.closing(choice))

        await _together([run(choice) for choice in job.choices])
        await stream.write(answer.ending(job.usage()), last=True)

    def _delivery(
        self,
        choice: Choice,
        render: Render,
        opening: Callable[[], bytes],
        exchange: Exchange,
        stream: EventStream,
    ) -> Delivery:
        timer = TokenTimer(self._metrics, exchange.received_at)
        return Delivery(
            choice, render, opening, stream, timer, self._parts.clock, exchange.allowance
        )

    async def _run(self, choice: Choice, delivery: Delivery) -> None:
        output, timer = choice.output, delivery.timer
        scores, reports = choice.scores, choice.request.sampling.prompt_logprobs is not None
        try:
            async with self._parts.generator.generate(choice.request) as generation:
                if scores is not None:
                    await generation.begun()
                    if reports:
                        scores.tell(generation.prompt_logprobs)
                    await scores.told()
                while await generation.feed(delivery.take):
                    await delivery.catch_up()
                    if output.stopped:
                        break
                end = generation.end
        except Exception as error:
            timer.failed(error)
            raise
        finally:
            if scores is not None and reports:
                scores.tell(None)
            self._parts.metrics.generation_tokens.inc(output.num_tokens)
        timer.ended()
        self._parts.metrics.completed(
            prompt_tokens=len(choice.request.prompt_ids),
            output_tokens=output.num_tokens,
            cached_tokens=end.cached_tokens,
        )
        await delivery.close(end)

    def _timeout_s(self, exchange: Exchange) -> float:
        header = exchange.headers.get(TIMEOUT_HEADER)
        if header is None:
            return self._parts.settings.default_timeout_s
        longest = self._parts.settings.max_timeout_s
        try:
            seconds = float(header)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= longest:
            raise InvalidRequestError(
                f"The header x-request-timeout must be seconds in (0, {longest:g}], "
                f"got {header[:32].decode('latin-1')!r}.",
                param="x-request-timeout",
            )
        return seconds

    @asynccontextmanager
    async def _cut_off(self, deadline: float) -> AsyncIterator[None]:
        """End the work soon after its deadline, should the fleet or the client not let it end."""
        left_s = deadline + self._parts.settings.deadline_grace_s - self._parts.clock()
        try:
            async with asyncio.timeout(left_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineError(
                "The request did not end by its deadline; ask for fewer tokens or set the header "
                "x-request-timeout higher."
            ) from None


async def _together(runs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the others and is raised alone."""
    if len(runs) == 1:
        return await runs[0]
    try:
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(run)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
