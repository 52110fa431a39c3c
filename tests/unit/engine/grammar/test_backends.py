"""Both libraries, over a small tokenizer: what they allow, and what they refuse."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput, StructureKind
from engine.grammar.backend import (
    MAX_WHITESPACE,
    GrammarBackend,
    GrammarFailure,
    Matcher,
    Words,
    num_words,
)
from tests.support.grammar import allowed_by
from tests.support.models import EOS_ID, make_tokenizer

SIZES = {"exact": 384, "padded": 390}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", 'b\n"c"']},
        "n": {"type": "integer", "minimum": -5, "maximum": 70},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "deep": {
            "type": "object",
            "properties": {"x": {"const": None}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    "required": ["kind", "n", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    pytest.importorskip(chosen)
    return chosen


def make_backend(name: str, tokenizer: Tokenizer, size: int) -> GrammarBackend:
    if name == "xgrammar":
        from engine.grammar.xgrammar_backend import XgrammarBackend

        return XgrammarBackend(tokenizer.to_str(), size, [EOS_ID])
    from engine.grammar.llguidance_backend import LlguidanceBackend

    return LlguidanceBackend(tokenizer.to_str(), size, [EOS_ID])


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    return SIZES[request.param]


@pytest.fixture(scope="module")
def backend(name: str, tokenizer: Tokenizer, size: int) -> GrammarBackend:
    return make_backend(name, tokenizer, size)


def start(backend: GrammarBackend, kind: StructureKind, definition: str = "") -> Matcher:
    return backend.compile(StructuredOutput(kind=kind, definition=definition)).start()


def allowed(matcher: Matcher, size: int) -> set[int]:
    words: Words = np.zeros(num_words(size), np.int32)
    matcher.fill(words)
    return allowed_by(words)


def walk(matcher: Matcher, tokenizer: Tokenizer, size: int, seed: int) -> str:
    """A text of random tokens, each of them allowed, up to the end."""
    rng = random.Random(seed)
    ids: list[int] = []
    while not ids or ids[-1] != EOS_ID:
        choices = allowed(matcher, size)
        assert choices and max(choices) < size
        assert not choices & {0, 1}, "special tokens are no text"
        # A walk that took every end or blank with the same odds would come to no end.
        solid = [token_id for token_id in choices if tokenizer.decode([token_id]).strip()]
        ids.append(EOS_ID if EOS_ID in choices else rng.choice(sorted(solid or choices)))
        matcher.accept(ids[-1:])
        assert len(ids) < 600
    return str(tokenizer.decode(ids[:-1]))


@pytest.mark.parametrize(
    ("kind", "definition", "pattern"),
    [
        ("regex", r"\d{2,4}-[a-f]+(é|ß)", r"[0-9]{2,4}-[a-f]+(é|ß)"),
        ("regex", "a/b\\.c\n", "a/b\\.c\n"),
        ("choice", '["red", "gr\\u00fcn", "\\"\\n|"]', 'red|grün|"\n\\|'),
        ("ebnf", 'root ::= "x" item+ "y"\nitem ::= [0-9] | "é"', "x([0-9]|é)+y"),
    ],
)
def test_every_walk_ends_in_what_was_asked_for(
    backend: GrammarBackend,
    tokenizer: Tokenizer,
    size: int,
    kind: StructureKind,
    definition: str,
    pattern: str,
) -> None:
    for seed in range(3):
        text = walk(start(backend, kind, definition), tokenizer, size, seed)
        assert re.fullmatch(pattern, text), text


def test_every_walk_through_a_schema_is_an_instance_of_it(
    backend: GrammarBackend, tokenizer: Tokenizer, size: int
) -> None:
    for seed in range(4):
        text = walk(start(backend, "json_schema", json.dumps(SCHEMA)), tokenizer, size, seed)
        found = json.loads(text)
        assert set(found) - {"deep"} == {"kind", "n", "tags"}
        assert found["kind"] in ("a", 'b\n"c"') and -5 <= found["n"] <= 70
        assert all(isinstance(tag, bool) for tag in found["tags"]) and len(found["tags"]) <= 2


def test_white_space_between_parts_of_json_has_an_end(
    backend: GrammarBackend, tokenizer: Tokenizer, size: int
) -> None:
    space = tokenizer.encode(" ").ids
    for kind, definition in (("json_object", ""), ("json_schema", json.dumps(SCHEMA))):
        matcher = start(backend, kind, definition)  # type: ignore[arg-type]
        matcher.accept(tokenizer.encode("{").ids)
        matcher.accept(space * MAX_WHITESPACE)
        assert space[0] not in allowed(matcher, size)


def test_once_complete_only_the_end_is_allowed_even_after_it(
    backend: GrammarBackend, tokenizer: Tokenizer, size: int
) -> None:
    matcher = start(backend, "json_object")
    matcher.accept(tokenizer.encode('{"a": [1, {}]}').ids)
    assert allowed(matcher, size) == {EOS_ID}
    matcher.accept([EOS_ID])
    assert EOS_ID in allowed(matcher, size)


def test_added_tokens_that_the_model_does_not_know_do_no_harm(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([f"<image{i}>" for i in range(40)])
    backend = make_backend(name, tokenizer, SIZES["exact"])
    text = walk(start(backend, "regex", "[a-z]{4}"), tokenizer, SIZES["exact"], 0)
    assert re.fullmatch("[a-z]{4}", text)


def test_a_token_that_is_not_allowed_is_noticed(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    matcher = start(backend, "regex", "ab")
    matcher.accept(tokenizer.encode("a").ids)
    with pytest.raises(GrammarFailure):
        matcher.accept(tokenizer.encode("c").ids)


def test_a_limit_that_is_met_on_the_way_ends_the_matcher(tokenizer: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    backend = make_backend("llguidance", tokenizer, SIZES["exact"])
    matcher = start(backend, "regex", "(a{1000}){1000}")
    with pytest.raises(GrammarFailure, match="too many expressions") as caught:
        matcher.accept(tokenizer.encode("a" * 9).ids)
    assert len(str(caught.value)) < 100, "the whole state of the parser is not for the client"


def test_an_object_of_too_many_properties_is_refused(tokenizer: Tokenizer) -> None:
    limits = pytest.importorskip("engine.grammar.llguidance_backend")
    backend = make_backend("llguidance", tokenizer, SIZES["exact"])
    for count in (limits.MAX_PROPERTIES, limits.MAX_PROPERTIES + 1):
        wide = {"properties": {f"p{i}": {"type": "null"} for i in range(count)}}
        definition = json.dumps({"anyOf": [{"type": "null"}, wide]})
        structured = StructuredOutput(kind="json_schema", definition=definition)
        if count == limits.MAX_PROPERTIES:
            backend.compile(structured)
            continue
        with pytest.raises(InvalidRequestError, match="1001 properties"):
            backend.compile(structured)


def test_a_chain_of_rules_as_long_as_can_be_does_not_end_the_process() -> None:
    pytest.importorskip("llguidance")
    program = """
import json, os
from core.sampling import MAX_DEFINITION_BYTES, StructuredOutput
from engine.grammar.compiler import GrammarCompiler
from tests.support.models import make_tokenizer
from tests.unit.engine.grammar.test_backends import SIZES, make_backend

rules = {f"r{i}": {"items": {"$ref": f"#/$defs/r{i + 1}"}} for i in range(5600)}
chain = {"$ref": "#/$defs/r0", "$defs": rules | {"r5600": {"type": "null"}}}
text = json.dumps(chain, separators=(",", ":"))
assert MAX_DEFINITION_BYTES * 0.9 < len(text) < MAX_DEFINITION_BYTES, len(text)
backend = make_backend("llguidance", make_tokenizer(), SIZES["exact"])
ticket = GrammarCompiler(backend).ticket(StructuredOutput(kind="json_schema", definition=text))
ticket.wait(10)
assert ticket.settled
os._exit(0)  # a library that still compiles would not let the interpreter end in order
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_matchers_of_one_grammar_do_not_meet(backend: GrammarBackend, size: int) -> None:
    grammar = backend.compile(StructuredOutput(kind="regex", definition="a+b"))
    first, second = grammar.start(), grammar.start()
    before = allowed(second, size)
    first.accept([min(allowed(first, size))])
    assert allowed(second, size) == before == allowed(grammar.start(), size)


@pytest.mark.parametrize(
    ("kind", "definition", "says"),
    [
        ("json_schema", "{", "json_schema"),
        ("json_schema", '{"type": "record"}', "record"),
        ("json_schema", '{"$ref": "#/$defs/none"}', "none"),
        ("regex", "(a", "paren|unclosed"),
        ("regex", "(?=a)b", "look|[aA]ssertion|not supported"),
        ("ebnf", "root ::= other", "other"),
        ("ebnf", "what is this", "ebnf"),
        ("choice", "[]", "at least one string"),
        ("choice", '["a", 5]', "list of"),
        ("choice", "red", "Expecting value"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    name: str, tokenizer: Tokenizer, kind: StructureKind, definition: str, says: str
) -> None:
    backend = make_backend(name, tokenizer, SIZES["exact"])
    with pytest.raises(InvalidRequestError, match=says) as caught:
        start(backend, kind, definition)
    assert caught.value.param == "structured"
    assert "/project/" not in caught.value.message
