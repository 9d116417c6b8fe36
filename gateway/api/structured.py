"""Read which form an answer must have: OpenAI's `response_format` and vLLM's `structured_outputs`."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.gateway.api.fields import (
    OPENAI,
    VLLM,
    Entries,
    FieldError,
    Ignored,
    Refused,
    RequestFields,
    Switch,
    Text,
    supported,
)


class JsonSchemaFields(RequestFields):
    """Hold a named JSON schema."""

    ignored: ClassVar[Mapping[str, Ignored]] = {
        "name": Ignored(OPENAI, "what the schema is called; the model does not read it"),
        "description": Ignored(OPENAI, "what the schema is for; the model does not read it"),
        "strict": Ignored(OPENAI, "whether the schema holds exactly; it always does"),
    }

    # `schema` is a method of pydantic's models.
    schema_: dict[str, Any] = Field(
        ..., alias="schema", description="the JSON schema", json_schema_extra={"origin": OPENAI}
    )


class ResponseFormat(RequestFields):
    """Hold `response_format`."""

    type: Literal["text", "json_object", "json_schema"] = supported(
        OPENAI, "`text`, `json_object` or `json_schema`", ...
    )
    json_schema: JsonSchemaFields | None = supported(OPENAI, "with `json_schema`: an object with the key `schema`")

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise FieldError("json_schema is missing; give it, with the key schema", "json_schema")
        return self

    def form(self) -> StructuredOutput | None:
        """Return the form; None is any."""
        if self.type == "json_object":
            return StructuredOutput(json_object=True)
        if self.type == "text" or self.json_schema is None:
            return None
        return StructuredOutput(json_schema=json.dumps(self.json_schema.schema_))


class StructuredOutputs(RequestFields):
    """Hold `structured_outputs`; exactly one form is given."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "structural_tag": Refused(VLLM, "tags are not supported; describe the form with grammar"),
        "disable_any_whitespace": Refused(VLLM, "JSON may have white space; leave it out", (False,)),
        "disable_additional_properties": Refused(VLLM, "the schema itself says so; leave it out", (False,)),
        "whitespace_pattern": Refused(VLLM, "JSON may have white space; leave it out"),
    }
    ignored: ClassVar[Mapping[str, Ignored]] = {
        "disable_fallback": Ignored(VLLM, "chooses among vLLM's implementations; there is one here"),
    }

    json_: dict[str, Any] | Text | None = Field(
        None, alias="json", description="a JSON schema, as an object or a text", json_schema_extra={"origin": VLLM}
    )
    json_object: Switch | None = supported(VLLM, "any JSON object")
    regex: Text | None = supported(VLLM, "a regular expression that the whole text matches")
    choice: Entries[Text] | None = supported(VLLM, "the texts of which the answer is one")
    grammar: Text | None = supported(VLLM, "a context-free grammar in Lark's notation")

    def form(self) -> StructuredOutput:
        """Return the form.

        Raises:
            InvalidArgumentError: no form or more than one is given.
        """
        schema = json.dumps(self.json_) if isinstance(self.json_, dict) else self.json_
        return StructuredOutput(
            json_schema=schema,
            json_object=bool(self.json_object),
            regex=self.regex,
            grammar=self.grammar,
            choice=tuple(self.choice or ()),
        )
