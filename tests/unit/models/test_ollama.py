"""Chat templates in Go's language, in which Ollama reads them. Oracle: the tokenizer's own template; what Go
writes is found by an interpreter of the few actions that are used."""

import json
import re

import pytest

from codyra_llm.formats import ollama
from codyra_llm.models.tokenizer import load_tokenizer, render_chat

SMOLLM = (  # with a system part of its own
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"{{ kind }}\" \u00a0<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (  # with the system's text in the user's turn, and another name for the assistant
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
THINKING = (  # with another beginning of an answer than past answers have
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}😀\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think></think>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
MOVING = (  # writes the system's text before the last question
    "{% for m in messages %}{% if loop.last %}{{ messages[0].content }}{% endif %}[{{ m.role }}]"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Größe 判:\n4"},
    {"role": "user", "content": "And {{ now }}?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "Sure?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def literal(action):
    """The text of a Go string."""
    return json.loads(re.sub(r"\\U(\w{8})", lambda found: chr(int(found[1], 16)), action))


def holds(condition, place, message, system):
    if condition == "and (eq $i 1) $.System":
        return place == 1 and bool(system)
    if condition == "eq $i 0":
        return place == 0
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert role, condition
    return message["role"] == role[1]


def go(template, messages):
    """What Go's text/template writes: text, strings, .Content, and if, else if, else and end within a
    range."""
    pieces = re.findall(r'\{\{ ((?:"(?:\\.|[^"\\])*"|(?!\}\}).)*?) \}\}', template)
    assert "".join(f"{{{{ {piece} }}}}" for piece in pieces) == template  # no text outside of actions
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    first, depth, last = pieces.index("range $i, $_ := .Messages"), 0, None
    for number, piece in enumerate(pieces):
        depth += piece.startswith(("range", "if")) - (piece == "end")
        last = number if piece == "end" and not depth else last
    out = []
    for place, message in enumerate(messages):
        taken = []  # by open if: whether a branch was taken, and whether this one is
        for piece in pieces[first + 1 : last]:
            if piece.startswith("if "):
                yes = holds(piece[3:], place, message, system)
                taken.append([yes, yes])
            elif piece.startswith("else if "):
                yes = not taken[-1][0] and holds(piece[8:], place, message, system)
                taken[-1] = [taken[-1][0] or yes, yes]
            elif piece == "end":
                taken.pop()
            elif all(now for _, now in taken):
                out.append(message["content"] if piece == ".Content" else literal(piece))
    return "".join(out + [literal(piece) for piece in pieces[last + 1 :]])


@pytest.mark.parametrize("template", [SMOLLM, GEMMA, THINKING, NO_SYSTEM], ids=list("SGTN"))
def test_ollama_writes_chats_as_the_model_was_trained_on(tiny_llama, template):
    """Without BOS, which llama.cpp adds; by its own versions of known templates it would leave out the system
    part of SmolLM2's, and for an unknown template write a user's text alone."""
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = template
    written = ollama.chat_template(tokenizer)
    assert '"""' not in written and written.isprintable()
    for system in ([], [SYSTEM]) if template != NO_SYSTEM else ([],):
        for count in (1, 3, 5):
            chat = [*system, *TURNS[:count]]
            assert go(written, chat) == render_chat(tokenizer, chat).removeprefix("<bos>")


def test_a_template_of_other_pieces_is_left_to_ollama(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    for template in (MOVING, "{{ raise_exception('never') }}", None):
        tokenizer.chat_template = template
        assert ollama.chat_template(tokenizer) is None
    assert "TEMPLATE" not in ollama.modelfile("x.gguf", None, 9, [])


def test_ollama_answers_as_evaluation_does():
    """Greedily, and with room for the longest prompt and answer: by default it takes 4096 tokens, and older
    versions divide the logits of repeated tokens by 1.1."""
    begins = (
        'FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n'
    )
    assert ollama.modelfile("x.gguf", ollama.PLAIN, 4096, []) == begins
    ends = 'PARAMETER num_ctx 4097\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|x|>"\n'
    assert ollama.modelfile("x.gguf", ollama.PLAIN, 4097, ["<|im_end|>", "<|x|>"]) == begins + ends
