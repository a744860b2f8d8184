"""Chat templates, configs and adapters that others made to hang or to crash: each is refused within seconds,
in a sentence that names the key and what to do. Oracle: the table's words.
"""

import shutil

import pytest
from hostile import LOOPS, Place, Table, adder, refused, told

CASES: Table = {}
pytestmark = pytest.mark.usefixtures("impatient")
case = adder(CASES)
SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATE = ("model has a chat template that fails", "turn chat_template off, or use the model's own")
for name, text, said in (
    ("loops", LOOPS, "more than 0.5 s of computing"),
    ("a product of texts", "{{ 'a' * 10**10 }}", "more than 512 MB"),
    ("a product of numbers", "{{ (2 ** (10 ** 9)) % 7 }}", "it takes more than 0.5 s|more than 512 MB"),
    ("a long range", "{% for a in range(10**9) %}a{% endfor %}", "Range too big"),
    ("a long join", "{{ (range(99999)|list * 1000)|join('a' * 99999) }}", "more than 512 MB"),
    ("a wide format", "{{ '%1000000000d' % 1 }}", "more than 512 MB"),
    ("a call of itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("nesting", "{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}", "calls itself without end"),
    (
        "long text",
        "{% for a in range(99999) %}" + "a" * 99 + "{% endfor %}",
        "it writes 9,899,901 characters",
    ),
    ("a division by zero", "{{ 1 / 0 }}", "division by zero"),
    ("a sum of kinds", "{{ 1 + 'a' }}", "unsupported operand"),
    ("a float that overflows", "{{ 2.0 ** 99999 }}", "out of range"),
    ("a key that is not there", "{{ messages[9].content }}", "has no element 9"),
    ("no syntax", "{% for %}", "Expected an expression"),
    ("half of a surrogate pair", "{{ '\\ud800' }}", "half of a surrogate pair"),
    ("what is private", "{{ ''.__class__.__mro__ }}", "is unsafe"),
    ("a refusal", "{{ raise_exception('not today') }}", "not today"),
    ("the date", "{{ strftime_now('%Y') }}", "today's date"),
):
    case(f"a template with {name}", lambda p, text=text: p.template(text), *TEMPLATE, said)
case(
    "a template that loops at one prompt alone",
    lambda p: p.template(SAID + "{% if 'Say C' in messages[0].content %}" + LOOPS + "{% endif %}"),
    *TEMPLATE,
    "at the prompt 'Say C",
    "more than 0.5 s of computing",
)
case(
    "a template that fails at one prompt alone",
    lambda p: p.template(SAID + "{% if 'Say C' in messages[0].content %}{{ 1 / 0 }}{% endif %}"),
    *TEMPLATE,
    "division by zero",
)
case(
    "a template that is a number",
    lambda p: (
        p.config("tokenizer_config.json", chat_template=5),
        p.recipe(data={"chat_template": True}),
    )[-1],
    "has the chat template 5: expected text; turn chat_template off",
)

OWN = "expected the model's own config; download it again"
for name, values, said in (
    ("a position of 2^62", {"max_position_embeddings": 1 << 62}, "max_position_embeddings is 4611686018427"),
    ("1e300 positions", {"max_position_embeddings": 1e300}, "max_position_embeddings is 1e[+]300"),
    ("no positions", {"max_position_embeddings": 0}, "max_position_embeddings is 0, expected 1 to 1,073"),
    ("positions that are null", {"max_position_embeddings": None}, "max_position_embeddings.* expected int"),
    ("a norm of NaN", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected 0 to 1"),
    (
        "RoPE by zero",
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "rope_parameters.factor is 0",
    ),
    ("RoPE in a list", {"rope_parameters": [1]}, "rope_parameters"),
    ("an end token 99,999 times", {"eos_token_id": [2] * 99_999}, "eos_token_id has 99,999 entries"),
    ("padding outside", {"pad_token_id": 10**9}, "Padding_idx"),
    ("no activation", {"hidden_act": "boom"}, "boom"),
    ("code", {"auto_map": 5}, "int"),
):
    words = ("config.json describes no model", said, OWN)
    case(f"a config with {name}", lambda p, values=values: p.config(**values), *words)
case(
    "a config with two million labels",
    lambda p: p.config(id2label={str(i): f"label {i}" for i in range(2_000_000)}),
    "config.json has .* bytes, expected at most 1,048,576; take out what doesn't belong there .*id2label",
)
case(
    "a generation config of five megabytes",
    lambda p: p.config("generation_config.json", name="x" * 5_000_000),
    "generation_config.json has 5,000,.* bytes, expected at most 1,048,576; take out",
)
case(
    "generate with a position of 2^62",
    lambda p: (p.config(max_position_embeddings=1 << 62), ["generate", p.model, "Say"])[-1],
    "max_position_embeddings is 4611686018427387904, expected 1 to 1,073,741,824",
    OWN,
)
case(
    "an adapter next to a base",
    lambda p: (
        p.adapter(),
        shutil.copytree(p.folder / "adapter", p.model, dirs_exist_ok=True),
        p.recipe(),
    )[-1],
    "holds a whole model and an adapter",
    "move adapter_config.json",
)
case(
    "an adapter without weights", lambda p: p.adapter(False), "has no adapter_model.safetensors", "copy them"
)
ENDLESS = r"(([a-z._0-9]+)+)+X"
for key, value in (
    ("r", 1 << 62),
    ("r", 0),
    ("r", "x"),
    ("lora_alpha", float("inf")),
    ("target_modules", ENDLESS),
    ("exclude_modules", ENDLESS),
    ("rank_pattern", {ENDLESS: 2}),
    ("rank_pattern", [1]),
    ("alpha_pattern", {"q_proj": "x"}),
    ("layers_pattern", ENDLESS),
    ("target_modules", "(q_proj"),
):
    case(
        f"an adapter whose {key} is {value}",
        lambda p, key=key, value=value: p.adapter(**{key: value}),
        rf"adapter_config.json: {key}.* (is|has the pattern) .*correct it",
    )
case(
    "an adapter of repeated layers",
    lambda p: p.adapter(layer_replication=[[0, 10**6]]),
    "layer_replication is set, which is not merged here; merge the adapter where it was made",
)
case(
    "an adapter of no module",
    lambda p: p.adapter(target_modules=["nothing"]),
    "can't be merged into .*: give the base that it was trained on with --base",
)
case(
    "an adapter whose base is a number",
    lambda p: p.adapter(base_model_name_or_path=5),
    "base_model_name_or_path is 5, expected text; correct it, or give the base with --base",
)


@pytest.fixture
def place(tiny_llama, toy_stream, tmp_path):
    return Place(tmp_path, tiny_llama, toy_stream)


@pytest.mark.parametrize("name", CASES)
def test_refused_in_a_sentence(name, place, capsys):
    refused(CASES[name], place, capsys)


def test_what_is_not_needed_is_not_done(place, capsys):
    """A billion labels are not made, and a chat template that nobody asked for holds nothing up."""
    place.config(num_labels=10**9)
    (place.model / "chat_template.jinja").write_text(LOOPS)
    assert told(capsys, ["generate", place.model, "Say", "--max-new-tokens", "2"])[0] == 0
    assert told(capsys, place.recipe())[0] == 0


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn", "llama3"])
def test_every_kind_of_rope_is_planned(kind, place, capsys):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    assert told(capsys, place.config(rope_parameters=rope)) == (0, "")
