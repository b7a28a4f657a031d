"""Golden renders of chat templates, by transformers' own code: writes tests/golden/chat_templates.json.

    python scripts/chat_templates.py [ASSETS]        (transformers 5.23, jinja2 3.1.6)

`own`: small templates written here, with their full renders and, where they have {% generation %} tags, the character spans
transformers would learn. `published`: templates of real models found under ASSETS (default ../shared/assets); of those only the
length and the sha256 of each render are kept.
"""

import hashlib
import json
import pathlib
import sys

from transformers.utils.chat_template_utils import render_jinja_template

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "assets"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks up the weather; \"quotes\", <tags> & ümlauts",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2.0, "exact": True, "unit": None}}}
CHATS = {
    "plain": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Spaces around  \n"},
        {"role": "assistant", "content": "Line one\n\nline 'two' \"three\" <b> 😀"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "No."},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"degrees": 21}'},
        {"role": "assistant", "content": "21 degrees."},
    ],
    "reasoning": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."}],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

OWN = {
    "blocks on their own lines": """\
{% for message in messages %}
    {% if message['role'] == 'user' %}
U: {{ message['content'] | trim }}
    {%- elif message.role == 'assistant' %}
 A: {{ message.content.strip() + eos_token }}
    {% else %}
  {{ message.role | upper }}: {{ message.content }}
    {% endif %}
{% endfor %}
{{ 'A:' if add_generation_prompt }}
""",
    "namespace, slices, loop controls": """\
{%- set ns = namespace(count=0, last='') -%}
{%- for m in messages[::-1] -%}
{%- if m.role == 'tool' %}{% continue %}{% endif -%}
{%- set ns.count = ns.count + 1 -%}
{%- set ns.last = m.role -%}
{%- if ns.count > 3 %}{% break %}{% endif -%}
[{{ loop.index0 }}:{{ m.role[:4] }}:{{ m.content.split(' ')[0] if m.content else none }}]
{%- endfor -%}
{{ ns.count }}{{ ns.last }}{{ messages | length }}{{ messages[0].absent is defined }}""",
    "python's methods and values": """\
{% for m in messages %}{{ m.content.startswith('What') }} {{ m.content.replace('i', 'I').upper().capitalize() }} {{ m.content.lstrip().rstrip('\\n') }}
{{ m.get('name', 'nobody') }} {{ 'role' in m }} {{ m.content is string }} {{ m.keys() | list }} {{ m.content.find('is') }}
{% for k, v in m.items() %}{{ k }}={{ v | string | length }};{% endfor %}

{% endfor %}""",
    "tojson": """\
{{ tools | tojson }}
{{ tools | tojson(indent=4) }}
{{ messages | tojson(indent=2, ensure_ascii=true) }}
{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}""",
    "macros and defaults": """\
{%- macro turn(role, text, end=eos_token) -%}<{{ role }}>{{ text }}{{ end }}{%- endmacro -%}
{{ bos_token }}{% for m in messages %}{{ turn(m.role, m.content | default('', true)) }}{% endfor %}{{ turn('x', tools is none, end='!') }}
{%- set joined = messages | map(attribute='role') | join('|') %}{{ joined }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}""",
    "generation": """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
<a>
        {%- generation %}
{{ message.content }}</a>
        {% endgeneration %}
    {% else %}
<{{ message.role }}>{{ message.content }}</{{ message.role }}>
    {% endif %}
{% endfor %}""",
    "generation in one line": "{% for m in messages %}{% if m.role == 'assistant' %}A {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %} "
    "{%- else %}U {{ m.content }}\n{% endif %}{% endfor %}",
    "refuses a system message": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}",
}


def render(template, chat, tools, prompt, special, mask=False):
    """The text, the spans inside {% generation %} tags; or the exception's message."""
    try:
        texts, spans = render_jinja_template(
            [CHATS[chat]], tools=tools, chat_template=template, add_generation_prompt=prompt, return_assistant_tokens_mask=mask, **special
        )
    except Exception as error:  # whatever the template raises
        return {"error": str(error)}
    return {"text": texts[0], "spans": [list(span) for span in spans[0]] if mask else []}


def cases():
    for chat in CHATS:
        for prompt in (False, True):
            yield chat, TOOLS if chat == "tools" else None, prompt


def token(value):
    return value["content"] if isinstance(value, dict) else value


def published():
    for path in sorted((ASSETS / "tokenizers").glob("*/tokenizer_config.json")):
        config = json.loads(path.read_text())
        template = config.get("chat_template")
        if not isinstance(template, str):
            continue
        names = ["bos_token", "eos_token", "unk_token", "pad_token"]
        special = {name: token(config[name]) for name in names if config.get(name) is not None}
        for chat, tools, prompt in cases():
            out = render(template, chat, tools, prompt, special)
            entry = {"tokenizer": path.parent.name, "chat": chat, "add_generation_prompt": prompt}
            if "error" in out:
                yield entry | {"refused": True}
            else:
                data = out["text"].encode()
                yield entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def main():
    own = []
    for name, template in OWN.items():
        for chat, tools, prompt in cases():
            out = render(template, chat, tools, prompt, SPECIAL, mask="generation" in name)
            own.append({"template": name, "chat": chat, "add_generation_prompt": prompt} | out)
    golden = {"chats": CHATS, "tools": TOOLS, "special": SPECIAL, "templates": OWN, "own": own, "published": list(published())}
    path = ROOT / "tests" / "golden" / "chat_templates.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


main()
