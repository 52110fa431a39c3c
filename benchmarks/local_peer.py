"""The other side of `benchmarks.local_system`: one model in one process, asked over a pipe.

    python -m benchmarks.local_peer transformers|llm FOLDER

Reads one JSON request per line and answers one JSON line: {"decode": batch}, {"prefill": length},
{"first_token": length} or {"bandwidth": true}. `transformers` is Hugging Face's model under its own
`generate` (sdpa, KV cache); `llm` is our engine in a plain loop, with no network.
"""

import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

DECODE_TOKENS = 48
PROMPT_TOKENS = 16
BANDWIDTH_BYTES = 1 << 30


class Peer(ABC):
    """What can be asked of a model in this process. All times in seconds."""

    vocab_size: int

    @abstractmethod
    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> None:
        """Greedy, exactly `max_tokens` each."""

    @abstractmethod
    def forward(self, prompt: list[int]) -> None:
        """Compute a prompt and the logits of its last token."""

    def prompt(self, length: int) -> list[int]:
        """Fresh random ids, so that no cache can help."""
        return [random.randrange(100, self.vocab_size) for _ in range(length)]

    def decode_s(self, batch: int) -> float:
        """Seconds per decode step."""
        prompts = [self.prompt(PROMPT_TOKENS) for _ in range(batch)]
        long = _timed(lambda: self.generate(prompts, 1 + DECODE_TOKENS))
        short = _timed(lambda: self.generate(prompts, 1))
        return (long - short) / DECODE_TOKENS


class Transformers(Peer):
    """Hugging Face transformers."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.vocab_size = self._model.config.vocab_size

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> None:
        """See Peer."""
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=max_tokens,
                max_new_tokens=max_tokens,
                pad_token_id=0,
            )

    def forward(self, prompt: list[int]) -> None:
        """See Peer."""
        with self._torch.inference_mode():
            self._model(self._torch.tensor([prompt]), use_cache=True, logits_to_keep=1)


class Llm(Peer):
    """Our engine without any network."""

    def __init__(self, folder: str) -> None:
        from core.sampling import SamplingParams
        from engine.config import EngineConfig
        from engine.llm import LLM

        self._params = SamplingParams
        self._llm = LLM(EngineConfig(model=folder, prefix_caching=False, max_step_tokens=512))
        self.vocab_size = 49152

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> None:
        """See Peer."""
        sampling = self._params(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self._llm.generate([list(prompt) for prompt in prompts], sampling)

    def forward(self, prompt: list[int]) -> None:
        """See Peer."""
        self.generate([prompt], 1)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bandwidth() -> float:
    """Bytes per second at which all cores together read memory, best of five."""
    import torch

    data = torch.ones(BANDWIDTH_BYTES // 4)
    return BANDWIDTH_BYTES / min(_timed(lambda: data.sum().item() and None) for _ in range(5))


def main() -> None:
    """Serve requests until standard input ends."""
    kind, folder = sys.argv[1:3]
    peer: Peer = Transformers(folder) if kind == "transformers" else Llm(folder)
    peer.forward(peer.prompt(64))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ((what, value),) = json.loads(line).items()
        if what == "decode":
            answer = peer.decode_s(value)
        elif what == "prefill":
            prompt = peer.prompt(value)
            answer = _timed(lambda prompt=prompt: peer.forward(prompt))
        else:
            answer = bandwidth()
        print(json.dumps({what: answer}), flush=True)


if __name__ == "__main__":
    main()
