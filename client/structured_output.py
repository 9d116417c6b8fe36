"""Describe the form that an answer's text must have."""

from dataclasses import dataclass, fields

from spectrumkv.client.argument_types import check_fields
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import generation_pb2


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """Say what form the text of every answer has; exactly one field is set. `generation.proto` documents the forms.

    Args:
        json_schema: a JSON schema, as JSON text.
        json_object: any JSON object.
        regex: a regular expression that the whole text matches.
        grammar: a context-free grammar in Lark's notation.
        choice: the texts of which the answer is one.

    Raises:
        InvalidArgumentError: no form or more than one is set, or a value has another type. The server checks the
            form.
    """

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (None, False, ())]
        if len(given) != 1:
            allowed = ", ".join(one.name for one in fields(self))
            raise InvalidArgumentError(
                f"structured output has {', '.join(given) or 'no form'}; allowed: exactly one of {allowed}"
            )

    def to_proto(self) -> generation_pb2.StructuredOutput:
        """Return the protobuf message."""
        return generation_pb2.StructuredOutput(
            json_schema=self.json_schema,
            json_object=generation_pb2.JsonObject() if self.json_object else None,
            regex=self.regex,
            grammar=self.grammar,
            choice=generation_pb2.Choice(texts=self.choice) if self.choice else None,
        )
