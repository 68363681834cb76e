"""Conversations as a model was trained on them, from the chat template of its tokenizer."""

from dataclasses import dataclass
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.settings.errors import InputError

PLACE = "\N{WHITE SQUARE}THE DOCUMENT\N{WHITE SQUARE}"  # in no template


def _refused(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained to say; here it stands for what is in it."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class Chat:
    """A chat template.

    Parameters
    ----------
    template : str
        Jinja source as in `tokenizer_config.json` or `chat_template.jinja`.
    tokens : tuple of (str, str)
        Special tokens that it may name, such as `("bos_token", "<s>")`.
    """

    template: str
    tokens: tuple[tuple[str, str], ...] = ()

    def around(self, question: str) -> tuple[str, str]:
        """What stands before and after a document about which a user asks, up to the first word of the answer.

        The user's turn is the document, a blank line and the question.

        Raises
        ------
        InputError
            If the template can't be rendered, or changes what a user says.
        """
        environment = ImmutableSandboxedEnvironment(  # as transformers renders
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals |= {
            "raise_exception": _refused,
            "strftime_now": lambda form: datetime(2024, 7, 26).strftime(form),
        }
        messages = [{"role": "user", "content": f"{PLACE}\n\n{question}"}]
        try:
            text = environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=True, enable_thinking=False, **dict(self.tokens)
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"the chat template of the model can't be rendered ({error}): set document.form=plain"
            ) from None
        if text.count(PLACE) != 1:
            raise InputError("the chat template of the model drops what a user says: set document.form=plain")
        before, after = text.split(PLACE)
        return before, after
