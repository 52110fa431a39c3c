"""Fields that clients of other servers send and that are not served here.

Each is refused by name unless its value asks for nothing; a field that is neither here nor in a
request's model is refused as unknown, with the nearest name.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

UNSERVED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "allowed_token_ids": (),
        "audio": (),
        "bad_words": ([],),
        "best_of": (1,),
        "bootstrap_host": (),
        "bootstrap_port": (),
        "bootstrap_room": (),
        "chat_template": (),
        "custom_logit_processor": (),
        "documents": ([],),
        "function_call": ("none",),
        "functions": ([],),
        "guided_decoding": (),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "input_ids": (),
        "kv_transfer_params": (),
        "length_penalty": (1, 1.0),
        "lora_path": (),
        "metadata": ({},),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "priority": (0,),
        "prompt_cache_retention": (),
        "return_hidden_states": (False,),
        "service_tier": ("auto", "default"),
        "session_params": (),
        "spaces_between_special_tokens": (True,),
        "stop_regex": ([],),
        "store": (False,),
        "suffix": ("",),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
)
"""Name to the values besides null that ask for nothing."""

HINTS: Mapping[str, str] = MappingProxyType(
    {
        "best_of": "send n for several choices",
        "bootstrap_host": "the router pairs workers itself",
        "bootstrap_port": "the router pairs workers itself",
        "bootstrap_room": "the router pairs workers itself",
        "chat_template": "set the model's template on the router",
        "function_call": "send tool_choice",
        "functions": "send tools",
        "guided_decoding": "send structured_outputs",
        "input_ids": "send ids as the prompt of /v1/completions, or to /generate",
        "kv_transfer_params": "the router pairs workers itself",
        "session_params": "send the whole conversation: what it shares with an earlier request is "
        "cached",
        "stop_regex": "send stop",
        "use_beam_search": "send n for several choices",
    }
)
"""What to do instead, where there is something."""
