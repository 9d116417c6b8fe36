"""The form that an answer's text must have, as a request says it."""

from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.v1 import generation_pb2

# Of the text of a schema, an expression, a grammar, or all choices together.
MAX_FORM_BYTES = 64 << 10
MAX_CHOICES = 1024

FORMS = ("json_schema", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True)
class StructuredOutput:
    """A form; see `StructuredOutput` in generation.proto.

    Attributes:
        form: "json_schema", "json_object", "regex", "grammar" or "choice".
        text: the schema, the expression or the grammar; at most 64 KiB, empty for other forms.
        choices: the texts of form "choice", 1 to 1024 and at most 64 KiB together; none for other forms.

    Raises:
        InvalidArgumentError: the form is unknown, empty or too large.
    """

    form: str
    text: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InvalidArgumentError(
                f"structured_output has the form {quoted(self.form)}; allowed: {', '.join(FORMS)}"
            )
        if self.form == "choice":
            _check_choices(self.choices)
        elif self.form != "json_object" and not self.text.strip():
            raise InvalidArgumentError(f"structured_output.{self.form} is empty; give the text of one")
        size = len(self.text.encode()) + sum(len(choice.encode()) for choice in self.choices)
        if size > MAX_FORM_BYTES:
            raise InvalidArgumentError(
                f"structured_output.{self.form} has {size} bytes; allowed: at most {MAX_FORM_BYTES}"
            )

    @classmethod
    def from_proto(cls, message: generation_pb2.StructuredOutput) -> "StructuredOutput":
        """Read a message.

        Args:
            message: with a form.

        Returns:
            The form.

        Raises:
            InvalidArgumentError: no form is set, or one that is not allowed.
        """
        form = message.WhichOneof("form")
        if form is None:
            raise InvalidArgumentError(f"structured_output has no form; set one of {', '.join(FORMS)}")
        if form == "choice":
            # Before they are copied: a message has room for millions.
            if len(message.choice.texts) > MAX_CHOICES:
                raise InvalidArgumentError(_too_many_choices(len(message.choice.texts)))
            return cls(form, choices=tuple(message.choice.texts))
        return cls(form) if form == "json_object" else cls(form, getattr(message, form))

    def to_proto(self) -> generation_pb2.StructuredOutput:
        """Return the protobuf message."""
        if self.form == "choice":
            return generation_pb2.StructuredOutput(choice=generation_pb2.Choice(texts=self.choices))
        if self.form == "json_object":
            return generation_pb2.StructuredOutput(json_object=generation_pb2.JsonObject())
        return generation_pb2.StructuredOutput(**{self.form: self.text})  # type: ignore[arg-type]  # text forms


def _check_choices(choices: tuple[str, ...]) -> None:
    if not choices:
        raise InvalidArgumentError("structured_output.choice has no texts; give one at least")
    if len(choices) > MAX_CHOICES:
        raise InvalidArgumentError(_too_many_choices(len(choices)))
    if "" in choices:
        raise InvalidArgumentError("structured_output.choice has an empty text; each has at least one character")


def _too_many_choices(count: int) -> str:
    return f"structured_output.choice has {count} texts; allowed: at most {MAX_CHOICES}"
