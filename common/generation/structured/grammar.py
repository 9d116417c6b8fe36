"""Compiles forms into matchers, which know the tokens that may come next; llguidance does the work (ADR 0180).

A form comes from a client, so what it may take is bounded before it is compiled, meanwhile, and at each token: by
bytes (`MAX_FORM_BYTES`), by llguidance's own limits on the size of a grammar, the states of its lexer, and the work
of a step, and by a trial in another process (`trial`), since those limits leave some forms that overflow the stack.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.common.generation.structured.form import StructuredOutput

# An object, an array or a string of JSON may be as long as the answer, but not the space between its parts: small
# models otherwise go on with spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": "[ ]?"}
# Compiled forms that are kept for the next request with the same form.
COMPILED_FORMS = 32
MAX_REASON_CHARACTERS = 300
LIMITS = {
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 1_000_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_items_in_row": 3_000,
}


class GrammarCompiler:
    """Compiles forms for one model's tokenizer; threads may share it.

    Args:
        tokenizer: llguidance's view of the model's tokenizer.
        refusal: returns why a form must not be compiled in this process; empty where it may (see `trial`).
    """

    def __init__(self, tokenizer: Any, refusal: Callable[[StructuredOutput], str]) -> None:
        self._tokenizer = tokenizer
        self._refusal = refusal
        self._lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutput, Any] = OrderedDict()

    def matcher(self, form: StructuredOutput) -> Any:
        """Return a matcher at the start of an answer.

        Args:
            form: the answer's.

        Returns:
            A `llguidance.LLMatcher` of the caller's own.

        Raises:
            InvalidArgumentError: the form is not valid, or takes more than the limits allow.
            ResourceExhaustedError: other forms are being tried for too long.
            InternalError: the process that tries forms has ended.
        """
        with self._lock:
            known = self._compiled.get(form)
        if known is None:
            if refused := self._refusal(form):
                raise InvalidArgumentError(refused)
            known = compiled(self._tokenizer, form)
            with self._lock:
                self._compiled[form] = known
                while len(self._compiled) > COMPILED_FORMS:
                    self._compiled.popitem(last=False)
        return known.deep_copy()


def compiled(tokenizer: Any, form: StructuredOutput) -> Any:
    """Compile a form, whatever that takes within llguidance's own limits.

    Args:
        tokenizer: llguidance's view of a tokenizer.
        form: the form.

    Returns:
        A `llguidance.LLMatcher` at the start of an answer.

    Raises:
        InvalidArgumentError: the form is not valid, or takes more than the limits allow.
    """
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, _grammar(form), log_level=0, limits=LLParserLimits(**LIMITS))
    # Some limits show at the first token only.
    first = matcher.deep_copy()
    first.compute_bitmask()
    for one in (matcher, first):
        if one.is_error():
            raise InvalidArgumentError(f"structured_output.{form.form} cannot be used: {reason(one)}")
    return matcher


def _grammar(form: StructuredOutput) -> str:
    """Return a form as a grammar that llguidance compiles.

    Raises:
        InvalidArgumentError: a JSON schema is no JSON, or has what llguidance cannot read.
    """
    from llguidance import LLMatcher

    grammar: str
    if form.form == "regex":
        grammar = LLMatcher.grammar_from_regex(form.text)
    elif form.form == "grammar":
        grammar = LLMatcher.grammar_from_lark(form.text)
    elif form.form == "choice":
        grammar = LLMatcher.grammar_from_regex("|".join(map(_literal, form.choices)))
    else:
        schema = {"type": "object"} if form.form == "json_object" else _schema(form.text)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        except ValueError as error:
            # Numbers of more than 64 bits, and halves of characters, are JSON to Python and not to Rust.
            raise InvalidArgumentError(
                f"structured_output.json_schema cannot be used: {error}"[:MAX_REASON_CHARACTERS]
            ) from None
    return grammar


def _schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"structured_output.json_schema is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InvalidArgumentError(
            f"structured_output.json_schema is {quoted(str(schema))}; allowed: a JSON object that describes one"
        )
    return schema


def _literal(text: str) -> str:
    """Return the regular expression that matches a text and nothing else."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~/-]", r"\\\g<0>", text)


def reason(matcher: Any) -> str:
    """Return in one line why a matcher cannot go on.

    Args:
        matcher: in its error state.
    """
    # After this llguidance describes its state.
    error = str(matcher.get_error()).split("<state>")[0]
    if error.startswith("NoExtension"):
        return "no token of this model continues it"
    return " ".join(error.split())[:MAX_REASON_CHARACTERS]
