"""Whether a request can be served at all, before a worker is looked for."""

from core.errors import ErrorCode, InvalidRequestError
from router.generation import GenerationRequest, ServedModel


def check_fits(request: GenerationRequest, model: ServedModel) -> None:
    """Refuse what the model's context can't hold.

    Raises:
        InvalidRequestError: no prompt, or prompt and max_tokens exceed the context; the message
            says all lengths.
    """
    prompt_len, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    limit = model.max_model_len
    if prompt_len == 0:
        raise InvalidRequestError("The prompt holds no tokens.", param="prompt")
    if prompt_len + max_tokens > limit:
        raise InvalidRequestError(
            f"The prompt has {prompt_len} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_len + max_tokens}; the model's context holds {limit}. Shorten the prompt or "
            "lower max_tokens.",
            param="prompt" if prompt_len >= limit else "max_tokens",
            code=ErrorCode.CONTEXT_LENGTH,
        )
