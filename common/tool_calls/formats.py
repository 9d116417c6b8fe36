"""How families of models write tool calls, as their chat templates show it to them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCallFormat:
    """A way to write tool calls.

    Attributes:
        name: as `GetServerInfo` says it.
        begin: what comes before calls.
        end: what comes after each; empty where calls go on to the end of the answer.
        arguments: the key of the arguments in a call's JSON object; "name" is that of the function.
        bare: the first character of calls that come at the start of an answer without `begin`; empty where there are
            none. Tokenizers that have `begin` as a special token leave it out of the text.
    """

    name: str
    begin: str
    end: str
    arguments: str
    bare: str


FORMATS = {
    one.name: one
    for one in (
        # Hermes and Qwen: <tool_call>\n{"name": …, "arguments": …}\n</tool_call>, one or more.
        ToolCallFormat("hermes", "<tool_call>", "</tool_call>", "arguments", ""),
        # Llama 3.1 and later: {"name": …, "parameters": …} as the whole answer.
        ToolCallFormat("llama3_json", "<|python_tag|>", "", "parameters", "{"),
        # Mistral up to version 7 of its tokenizer: [TOOL_CALLS][{"name": …, "arguments": …}, …].
        ToolCallFormat("mistral", "[TOOL_CALLS]", "", "arguments", "["),
    )
}


def format_of_template(chat_template: str) -> ToolCallFormat:
    """Return the format that a model's chat template shows to the model.

    A template that says nothing of tools gets the format of Hermes, in which prefill then describes the tools.

    Args:
        chat_template: the template's text.
    """
    if FORMATS["mistral"].begin in chat_template:
        return FORMATS["mistral"]
    if (
        FORMATS["hermes"].begin not in chat_template
        and '"parameters": ' in chat_template
        and "tools" in chat_template
    ):
        return FORMATS["llama3_json"]
    return FORMATS["hermes"]
