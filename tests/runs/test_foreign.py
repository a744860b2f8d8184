"""Code of others in a process of its own. Oracles: transformers' apply_chat_template, the harness's own
templates and filters, re, and the clock.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hostile import LOOPS, within
from transformers import AutoConfig

from codyra_llm.core import foreign, foreign_worker
from codyra_llm.models.families.config_file import read_config
from codyra_llm.models.tokenizer import DATE, UNDATED, load_tokenizer, render_chats

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m.content | trim + '<|im_end|>\\n' }}"
    "{% if m.name is defined %}{{ m.name }}{% endif %}{% endfor %}{{ bos_token }}{{ date_string }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
CHATS = [
    [{"role": "user", "content": f"  Größe {number}? 态度\n" * number, "name": None}] for number in range(50)
]
DIALOGUE = [*CHATS[1], {"role": "assistant", "content": "ja"}]


def shared(template):
    return {"chat_template": template, "add_generation_prompt": True}


@pytest.mark.parametrize("ask", [True, False])
def test_chats_are_written_as_transformers_writes_them(ask, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = CHATML
    given = {"chat_template": UNDATED + CHATML, "tokenize": False, "date_string": DATE}
    chats = [*CHATS, DIALOGUE]
    theirs = [tokenizer.apply_chat_template(chat, add_generation_prompt=ask, **given) for chat in chats]
    assert render_chats(tokenizer, chats, ask) == theirs
    theirs = tokenizer.apply_chat_template(DIALOGUE, continue_final_message=True, **given)
    assert render_chats(tokenizer, [DIALOGUE], False, go_on=True) == [theirs] and theirs.endswith("ja")


def test_documents_filters_and_patterns_are_the_harnesss():
    from lm_eval.filters import get_filter
    from lm_eval.utils import apply_template

    fields = {"text": "Größe 4.5 <b>\n", "options": ["a", "b"], "n": 3, "none": None}
    for template in (
        "{{text}}\n",
        "{{options[1:]}}",
        "{{n + 1}} {{none}}",
        "{{text | regex_replace('4', '5')}}",
    ):
        assert foreign.write_document(template, fields) == apply_template(template, fields)
    given = {"regex_pattern": r"(\d+)|(x)", "group_select": -1}
    responses = [["1 x 22"], ["none"], ["x"]]
    theirs = get_filter("regex")(**given).apply(responses, [{}] * 3)
    found = foreign.filtered("regex", given, [(response, {}) for response in responses])
    assert [json.loads(one) for one in found] == theirs
    assert [json.loads(one) for one in foreign.without([r"\d", "a+"], ["a1b", "aa"])] == ["b", ""]
    assert foreign.matches("a.*", ["ab", "ba", "a"]) == 2


def test_from_a_thread_and_from_processes_that_are_forked():
    """Each forked process has a worker of its own, and the parent's goes on."""
    foreign.write_chats(shared("{{ messages[0].content }}"), CHATS[:1])
    found = []
    thread = threading.Thread(
        target=lambda: found.append(foreign.write_chats(shared("{{ messages[0].role }}"), CHATS[:1]))
    )
    thread.start()
    thread.join(60)
    assert found == [["user"]]
    children = []
    for number in range(2):
        if not (child := os.fork()):
            own = foreign.write_chats(shared(f"{{{{ {number} }}}}"), CHATS)
            os._exit(0 if own == [str(number)] * len(CHATS) else 1)
        children.append(child)
    assert foreign.write_chats(shared("p"), CHATS) == ["p"] * len(CHATS)
    with within(60):
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_many_that_are_each_just_fast_enough_come_to_an_end():
    """A tenth of a second for each of a thousand would be minutes; 2 s and 20 ms for each are granted."""
    slow = "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}{{ messages[0].role }}"
    foreign.write_chats(shared(slow), CHATS[:1])
    with within(120), pytest.raises(foreign.Failed, match="more than 2 s of computing") as caught:
        foreign.write_chats(shared(slow), CHATS * 20)
    assert caught.value.stopped and caught.value.number > 3


def test_what_was_ended_is_not_tried_again_and_others_go_on():
    with pytest.raises(foreign.Failed, match="more than 2 s"):
        foreign.write_chats(shared(LOOPS), CHATS)
    began = time.monotonic()
    with pytest.raises(foreign.Failed, match="more than 2 s"):
        foreign.write_chats(shared(LOOPS), CHATS)
    assert time.monotonic() - began < 2  # of computing it would take
    assert foreign.write_chats(shared("x"), CHATS[:2]) == ["x", "x"]


def test_a_refusal_names_its_item_and_is_no_end():
    picky = "{% if '3' in messages[0].content %}{{ raise_exception('three') }}{% endif %}y"
    for _ in range(2):
        with pytest.raises(foreign.Failed, match="three") as caught:
            foreign.write_chats(shared(picky), CHATS)
        assert caught.value.number == 3 and not caught.value.stopped
    assert foreign.write_chats(shared(picky), CHATS[:2]) == ["y", "y"]


def test_a_worker_that_is_killed_is_told_and_started_anew():
    foreign.write_chats(shared("z"), CHATS[:1])
    os.kill(foreign._worker.process.pid, signal.SIGKILL)
    foreign._worker.process.wait()
    assert foreign.write_chats(shared("z"), CHATS[:1]) == ["z"]


def test_it_ends_with_the_process_that_asked():
    """Even where that one is killed, and the worker is inside of a loop."""
    program = (
        "from codyra_llm.core import foreign\n"
        "foreign.write_chats({'chat_template': 'a'}, [[{'role': 'user', 'content': 'a'}]])\n"
        "print(foreign._worker.process.pid, flush=True)\n"
        f"foreign.write_chats({{'chat_template': {LOOPS!r}}}, [[{{'role': 'user', 'content': 'a'}}]])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120  # its two seconds of computing take longer on a busy machine
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma2", "tiny_gemma3"])
def test_a_config_is_read_as_transformers_reads_it(model, request):
    folder = request.getfixturevalue(model)
    ours, theirs = read_config(folder), AutoConfig.from_pretrained(folder)
    assert type(ours) is type(theirs) and vars(ours) == vars(theirs)


def test_the_bounds_are_those_that_are_documented():
    assert (foreign_worker.SECONDS, foreign_worker.EACH, foreign_worker.MEMORY) == (2, 0.02, 1 << 29)
