"""What a fake worker says of one request: all follows from the sequence, on whichever worker."""

from collections.abc import Sequence
from dataclasses import dataclass

from rpc.token_batch import TokenRow
from rpc.v1 import worker_pb2

VOCAB = 400
EOS = 2


def next_token(sequence: Sequence[int], seed: int = 0) -> int:
    """The token after a sequence: never the end-of-sequence id, and sensitive to every token."""
    value = seed
    for token in sequence:
        value = (value * 31 + token + 7) % 1_000_003
    return 3 + value % 247


def expected(prompt_ids: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """The output that any number of fake workers must produce together."""
    sequence = list(prompt_ids)
    for _ in range(count):
        sequence.append(next_token(sequence, seed))
    return sequence[len(prompt_ids) :]


@dataclass(slots=True)
class Running:
    """One request on the worker."""

    submit: worker_pb2.Submit
    tokens: list[int]
    prompt_len: int
    handed_over: bool = False
    scored: int = 1
    """First prompt position whose log probability was not told yet."""

    @property
    def phase(self) -> str:
        return self.submit.WhichOneof("phase") or ""

    @property
    def key(self) -> tuple[str, int]:
        return self.submit.request_id, self.submit.attempt

    @property
    def num_done(self) -> int:
        """Tokens of the whole output."""
        return len(self.tokens) - self.prompt_len

    @property
    def end(self) -> int | None:
        """The reason for which its last token ends it, if that does."""
        if self.tokens[-1] in (EOS, *self.submit.sampling.stop_token_ids):
            return worker_pb2.FINISH_REASON_STOP
        if self.num_done >= self.submit.sampling.max_tokens:
            return worker_pb2.FINISH_REASON_LENGTH
        if self.phase == "export":
            return worker_pb2.FINISH_REASON_HANDED_OVER
        return None

    def row(self, first_index: int) -> TokenRow:
        """What is told of its tokens from that index on."""
        ids = self.tokens[self.prompt_len + first_index :]
        return TokenRow(
            self.submit.request_id,
            self.submit.attempt,
            first_index,
            ids,
            self._logprobs(first_index, ids),
            1 if first_index == len(self.submit.output_ids) else None,
        )

    def score(self, steps: int) -> worker_pb2.PromptLogprobs | None:
        """The next of `steps` parts of the prompt's log probabilities, if there is one to tell."""
        sampling, first = self.submit.sampling, self.scored
        if not sampling.HasField("prompt_logprobs") or self.phase == "import":
            return None
        if first >= self.prompt_len:
            return None
        part = -(-(self.prompt_len - 1) // max(1, steps))
        self.scored = min(first + part, self.prompt_len)
        positions, top = range(first, self.scored), range(sampling.prompt_logprobs)
        return worker_pb2.PromptLogprobs(
            request_id=self.submit.request_id,
            attempt=self.submit.attempt,
            first=first,
            logprobs=[-float(position) for position in positions],
            ranks=list(positions),
            num_top=sampling.prompt_logprobs,
            top_ids=[3 + i for _ in positions for i in top],
            top_logprobs=[-1.0 - i for _ in positions for i in top],
        )

    def _logprobs(self, first_index: int, ids: Sequence[int]) -> list[worker_pb2.TokenLogprobs]:
        """Of each token, if wanted: a function of the token and its index."""
        sampling = self.submit.sampling
        if not sampling.HasField("logprobs"):
            return []
        return [
            worker_pb2.TokenLogprobs(
                logprob=-index - token_id / 1024,
                top=[
                    worker_pb2.TokenLogprob(token_id=(token_id + i) % VOCAB, logprob=-index - i)
                    for i in range(sampling.logprobs)
                ],
            )
            for index, token_id in enumerate(ids, first_index)
        ]
