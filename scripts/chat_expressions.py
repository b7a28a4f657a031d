"""Jinja sources and what transformers renders of them: writes tests/golden/chat_expressions.json.

    python scripts/chat_expressions.py        (transformers 5.24, jinja2 3.1.6)

Each source is a chat template rendered over the conversation and the tools below; `null` where transformers raises. EXPRESSIONS
stand between `{{` and `}}`, STATEMENTS are whole templates.
"""

import datetime
import json
import pathlib
import warnings

from transformers.utils import chat_template_utils as utils

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATE = "2026-03-05"

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Größe?\n", "name": "Ann"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nYes, 😀.",
        "tool_calls": [
            {
                "type": "function",
                "id": "c1",
                "function": {
                    "name": "weather",
                    "arguments": {"city": "Zürich", "days": 2.0, "exact": True, "unit": None, "n": 3, "list": [1, "a'b"]},
                },
            }
        ],
    },
    {"role": "tool", "content": '{"a": 1}', "tool_call_id": "c1"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks up; \"quotes\", <tags> & ümlauts",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "items": {"type": "array", "items": {"type": "number"}}},
                "required": ["city"],
            },
        },
    }
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "eot_token": "<|eot|>"}

STRINGS = r"""
'a.b.c'.rsplit('.', 1)
'a.b.c'.rsplit('.')
' a  b '.rsplit()
' a  b  c '.rsplit(None, 1)
'a.b.c'.split('.', 1)
'a.b.c'.split('.', maxsplit=1)
'a.b.c'.split(sep='.')
' a  b\tc '.split()
' a  b  c '.split(None, 1)
''.split()
''.split(',')
',a,'.split(',')
'a--b-c'.split('--')
'abc'.split('')
'pre_x'.removeprefix('pre_')
'pre_x'.removeprefix('x')
'x_suf'.removesuffix('_suf')
'x_suf'.removesuffix('')
'a=b=c'.partition('=')
'abc'.partition('=')
'a=b=c'.rpartition('=')
'abc'.rpartition('=')
'a=b'.partition('=') | join('|')
'a=b'.partition('=')[2]
'abcb'.index('b')
'abcb'.rindex('b')
'abc'.index('z')
'abc'.rindex('z')
'äöü'.index('ü')
'abcb'.find('b', 2)
'abcb'.find('b', 2, 3)
'abcb'.find('z')
'abcb'.rfind('b')
'abcb'.rfind('b', 0, 3)
'abcb'.find('')
'%s!' % 'x'
'%s and %s' % ('x', 1)
'%(a)s' % {'a': 'x'}
'%d items' % 3
'%5d|%-5d|%05d' % (42, 42, 42)
'%.2f' % 3.14159
'%x %X %o' % (255, 255, 8)
'%r' % 'x'
'%s' % none
'%s' % true
'%s' % 2.0
'%s' % [1, 'a']
'%%' % ()
'%s' % ()
'%s' % ('a', 'b')
'%d' % 'x'
'%c' % 65
'%e' % 12345.678
'%+d' % 3
'%s%s' % ('a', 'b') ~ 'c'
'%s' % 'a' + 'b'
messages[0].role % 'x'
('%s' ~ '%s') % ('a', 'b')
7 % 3
-7 % 3
7.5 % 2
10 - 7 % 4
2 * 7 % 4
'%s' % messages[0].role
'%s' % messages[0].role | upper
'%s' % (messages | length)
'{} {}'.format(1, 'x')
'{0} {1} {0}'.format('a', 'b')
'{a} {b}'.format(a=1, b='y')
'{:>5}|{:<5}|{:^5}'.format('a', 'b', 'c')
'{:05.1f}'.format(3.14159)
'{:,}'.format(1234567)
'{0[a]}'.format({'a': 1})
'{!r}'.format('x')
'{{}}'.format()
'{}'.format()
'{}'.format(none)
'{}'.format(2.0)
'{}'.format([1, 'a'])
'%s'|format('x')
'%s %s'|format('x', 2)
'abc'.startswith('a')
'abc'.startswith(('x', 'a'))
'abc'.startswith(['a'])
'abc'.startswith('b', 1)
'abc'.startswith('c', 1, 2)
'abc'.endswith('c')
'abc'.endswith(('x', 'c'))
'abc'.endswith('b', 0, 2)
'  a '.strip()
'xxaxx'.strip('x')
'xyaxy'.lstrip('yx')
'xyaxy'.rstrip('yx')
'\x1ca\x1f'.strip()
'\u00a0a\u3000'.strip()
'a\u200bb'.strip('\u200b')
'aXbX'.replace('X', 'y', 1)
'aXbX'.replace('X', 'y')
'abc'.replace('', '-')
'aXbX'.replace('X', '', -1)
'abc'.upper()
'ABC'.lower()
'straße'.upper()
'İ'.lower()
'ΑΣ'.lower()
'hello world'.title()
"they're bill's".title()
'hELLO wORLD'.capitalize()
'ßa'.capitalize()
'aBc'.swapcase()
'Straße'.casefold()
'abc'.center(9, '*')
'abc'.center(8, '*')
'abc'.ljust(6, '.')
'abc'.rjust(6, '.')
'abc'.ljust(2)
'42'.zfill(5)
'-42'.zfill(5)
'a\tb'.expandtabs(4)
'abcabc'.count('b')
'abcabc'.count('b', 2)
'aaa'.count('aa')
'abc'.count('')
'a\nb\r\nc'.splitlines()
'a\nb\n'.splitlines(true)
'a\nb\n'.splitlines(keepends=true)
'a\x0bb\x0cc\u2028d'.splitlines()
''.splitlines()
','.join(['a', 'b'])
','.join('abc')
','.join([1, 2])
''.join([])
', '.join(messages | map(attribute='role'))
'123'.isdigit()
'²'.isdigit()
'½'.isnumeric()
'½'.isdigit()
'12'.isdecimal()
'²'.isdecimal()
'abc'.isalpha()
'ab1'.isalpha()
'ab1'.isalnum()
'ab_'.isalnum()
'abc'.islower()
'aBc'.islower()
'ABC'.isupper()
'A1'.isupper()
'  '.isspace()
''.isspace()
'Hello World'.istitle()
'Hello world'.istitle()
'abc'.isascii()
'ä'.isascii()
''.isascii()
'abc'.isidentifier()
'1a'.isidentifier()
'a\x01'.isprintable()
'abc'.isprintable()
'abc'.translate({97: 'x'})
'äb'.encode()
'abc'.nope()
'abc'[1]
'abc'[-1]
'abc'[5]
'abc'[1:]
'abc'[:-1]
'abc'[::-1]
'abc'[::2]
'abc'[-2:]
'äöü😀'[1:3]
'abc'[5:]
'abc'[2:1]
'abc' * 3
3 * 'ab'
'abc' * 0
'ab' * -1
'a' + 'b'
'a' + 1
'a' ~ 1 ~ none ~ true
'a' 'b'
'a' ~ 2.0 ~ [1, 'x'] ~ {'k': none}
'b' in 'abc'
'' in 'abc'
'x' not in 'abc'
1 in 'abc'
'abc' < 'abd'
'a' == 'a'
'\x41\u00e9\101'
'\d\/'
'\U0001F600'
'\a\v\0' | length
'a\
b'
"it's"
'say "hi"'
'tab\tnew\n'
'é😀'
'\N{BULLET}'
'\'' ~ "\""
'\\n'
'abc' is string
'abc' | length
'abc' | first
'abc' | last
'abc' | list
'abc' | reverse
'cab' | sort
'abc' | upper
'ABC' | lower
'hello world' | title
"they're bill's" | title
'hello-world foo_bar' | title
'hELLO' | capitalize
'  a  ' | trim
'xxaxx' | trim('x')
'abc' | replace('b', 'X')
'abab' | replace('b', 'X', 1)
'a b c' | wordcount
'the quick brown fox' | truncate(9)
'the quick brown fox' | truncate(9, true)
'the quick brown fox' | truncate(9, true, '')
'a\nb\n\nc' | indent(2)
'a\nb' | indent(2, true)
'a\n\nb' | indent(2, blank=true)
'a\nb' | indent('> ')
'a\nb' | indent(width=4, first=True)
'abc' | center(9)
'<a href="x">&\'' | escape
'<b>' | e
'<b>' | safe
'<p>Hi <b>you</b></p>' | striptags
'a b&c/d' | urlencode
'42' | int
'x' | int
'x' | int(7)
'0x1f' | int(0, 16)
'3.7' | int
'3.7' | float
'x' | float
'x' | float(1.5)
3.99 | int
'abc' | string
42 | string
none | string
true | string
2.50 | string
'12' | int + 1
'abc' | default('d')
'' | default('d')
'' | default('d', true)
'' | d('e', boolean=true)
none | default('d')
none | default('d', true)
'a,b' | split(',')
'abc' | nope
'abc' | wordwrap(2)
'abc' | format
"a" | pprint
'abc' | hash
"""

COLLECTIONS = r"""
[1, 2, 3]
[1, 'a', none, true, 2.0, [], {}]
['it\'s', "say \"hi\"", 'both \' "', 'ä😀', '\n\t\\', '\x01', '\u200b']
{'a': 1, 'b': [none, false]}
{'a': {'b': 'c'}}
{1: 'a', none: 2, true: 3}
(1, 2)
(1,)
()
[] | string
{} | string
[1, 2, 3] | length
[1, 2, 3] | count
[1, 2, 3] | first
[] | first
[1, 2, 3] | last
[1, 2, 3][-1]
[1, 2, 3][7]
[1, 2, 3][1:]
[1, 2, 3][::-1]
[1, 2, 3][:-1]
[1, 2, 3][0:2]
(1, 2, 3)[1:]
messages[1:] | length
messages[::-1][0].role
messages[-1].role
messages[9]
messages[9].role
messages[:1] + messages[3:] | length
(messages[:1] + messages[3:]) | map(attribute='role') | list
[3, 1, 2] | sort
[3, 1, 2] | sort(reverse=true)
['b', 'A', 'a'] | sort
['b', 'A', 'a'] | sort(case_sensitive=true)
messages | sort(attribute='role') | map(attribute='role') | join(',')
[1, 2, 3] | sum
[1, 2, 3] | sum(start=10)
[{'a': 1}, {'a': 2}] | sum(attribute='a')
[1, 2, 3] | max
[1, 2, 3] | min
[] | max
['b', 'a'] | min
[1, 1, 2] | unique | list
['a', 'A'] | unique | list
[1, 2, 3] | reverse | list
[1, 2, 3, 4, 5] | batch(2) | list
[1, 2, 3, 4, 5] | batch(2, 'x') | list
[1, 2, 3, 4, 5] | slice(2) | list
[1, 2, 3] | join
[1, 2, 3] | join(', ')
[1, none, true] | join('|')
messages | join(', ', attribute='role')
messages | map(attribute='role') | list
messages | map(attribute='name') | list
messages | map(attribute='name', default='-') | list
messages | map(attribute='content.x') | list
['a', 'b'] | map('upper') | list
['a', 'b'] | map('replace', 'a', 'x') | list
messages | selectattr('role', 'equalto', 'user') | list | length
messages | selectattr('role', 'eq', 'user') | map(attribute='role') | list
messages | selectattr('role', '==', 'user') | map(attribute='role') | list
messages | selectattr('name') | map(attribute='role') | list
messages | selectattr('name', 'defined') | map(attribute='role') | list
messages | selectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | list
messages | rejectattr('role', 'equalto', 'system') | map(attribute='role') | list
messages | rejectattr('name', 'undefined') | map(attribute='role') | list
[1, 2, 3, 4] | select('odd') | list
[1, 2, 3, 4] | select('even') | list
[1, 2, 3, 4] | select('gt', 2) | list
[0, 1, '', 'a', none] | select | list
[0, 1, '', 'a', none] | reject | list
[1, 2, 3] | select('in', [1, 3]) | list
[1, 2, 3] | map('string') | join
messages | groupby('role') | map('first') | list
messages | groupby('role') | length
{'b': 1, 'a': 2} | dictsort
{'b': 1, 'a': 2} | dictsort(by='value')
{'b': 1, 'a': 2} | dictsort(reverse=true)
{'b': 1, 'a': 2} | items | list
{'b': 1, 'a': 2} | list
{'b': 1, 'a': 2} | length
{'b': 1, 'a': 2}.items() | list
{'b': 1, 'a': 2}.keys() | list
{'b': 1, 'a': 2}.values() | list
{'b': 1, 'a': 2}.get('a')
{'b': 1, 'a': 2}.get('z')
{'b': 1, 'a': 2}.get('z', 'd')
{'b': 1}.get('b', default='d')
{'b': 1, 'a': 2}['a']
{'b': 1, 'a': 2}.a
{'b': 1}['z']
{'b': 1}.z
{'b': 1}.z.y
{'b': 1}.copy()
{'b': 1}.update({'c': 2})
{'b': 1}.pop('b')
[1].append(2)
[1, 2].pop()
[1, 2].index(2)
[1, 2].index(7)
[1, 2, 2].count(2)
[1].copy()
(1, 2, 2).count(2)
(1, 2).index(2)
'a' in {'a': 1}
1 in [1, 2]
1 not in [1, 2]
'role' in messages[0]
'name' in messages[0]
[1] + [2]
[1] * 2
(1,) + (2,)
[1] == [1]
{'a': 1} == {'a': 1}
[1, 2] < [1, 3]
(1, 2) == [1, 2]
dict(a=1, b='x')
dict({'a': 1}, b=2)
dict([('a', 1)])
range(3) | list
range(1, 7, 2) | list
range(3, 0, -1) | list
range(3)
range(0) | list
messages[0].items() | list
messages[0].keys() | list
messages[0].values() | list
messages[0] | list
messages[0]
messages[0] | items | list
messages[2].tool_calls[0].function.arguments
messages[2].tool_calls[0].function.arguments.items() | list
messages[2].tool_calls[0]['function']['name']
messages[2]['tool_calls'] | length
tools[0].function.parameters.properties.items() | list | length
tools[0].function.parameters.properties['items'].type
tools[0].function.parameters.properties['items']['items'].type
tools[0].function.parameters.get('required')
tools[0].function.parameters.properties.city.get('enum', [])
tools | length
tools[0]
tools is defined and tools
tools is not none
documents is none
documents is defined
namespace(a=1).a
namespace({'a': 1}).a
namespace(a=1).b
[[1, 2], [3]] | sum(start=[])
[[1, 2], [3, 4]] | map('first') | list
[{'a': {'b': 1}}] | map(attribute='a.b') | list
['a', 'b'] | random | length
cycler('a', 'b').next()
"""

VALUES = r"""
1
1.0
1e3
1e16
1e22
1e-5
0.1 + 0.2
1_000
0x1f
7 / 2
6 / 2
7 // 2
-7 // 2
2 ** 10
2 ** -1
2 ** 0.5
-2 ** 2
1 / 0
10 ** 20
9223372036854775807 + 1
- 3
+ 3
not true
true and false
true or false
'' or 'x'
'a' and 'b'
0 and 'b'
none or 0
not 'a' or 'b'
1 < 2 < 3
1 < 3 > 2
3 < 2 < 1
1 == 1.0
1 == true
1 != 2
'1' == 1
none == none
1 < 'a'
true + 1
true
True
TRUE
false
False
none
None
null
nil
'x' if true else 'y'
'x' if false
'x' if false else none
('a' if true) ~ 'b'
1 if 0 else 2 if 0 else 3
3.7 | round
3.14159 | round(2)
3.5 | round(method='floor')
2.5 | round
3 | round
-3 | abs
1 is odd
2 is even
4 is divisibleby 2
1 is number
1.5 is float
1 is integer
true is integer
true is boolean
true is number
'a' is string
'a' is sequence
[1] is sequence
{} is mapping
{} is sequence
[1] is iterable
'a' is iterable
1 is iterable
none is none
x is none
x is undefined
x is not defined
messages is defined
messages[0].foo is defined
messages[0].content is string
messages[0].content is mapping
messages[0] is mapping
messages is iterable and messages is not string
'a' is lower
'A' is upper
1 is eq 1
1 is ne 2
2 is gt 1
2 is ge 2
1 is lt 2
1 is le 1
1 is equalto 1
1 is greaterthan 0
'a' is in ['a']
1 is sameas 1
true is sameas true
true is true
false is false
1 is true
none is false
range is callable
'a' is callable
'upper' is filter
'nope' is filter
'odd' is test
1 is nope
x
x.y
x['y']
x[0]
x ~ 'a'
x + 'a'
x == none
x == ''
x | length
x | upper
x | default('d')
x | list
x | join
x | tojson
x | string
x | int
x | trim
x | first
x and 1
not x
x in [1]
'a' in x
x is string
x is iterable
x()
x.y is defined
x < 1
messages[0].foo
messages[0].foo.bar
messages[0]['foo']
messages[0].foo ~ 'a'
messages.foo
(1).foo
'a'.foo
none.foo
none ~ 'a'
none + 'a'
none | length
none | upper
none[0]
loop
bos_token ~ eos_token ~ eot_token
unk_token
add_generation_prompt
caller
_
'abc'.__class__
''.__add__('a')
"""

JSON = r"""
tools | tojson
tools[0] | tojson(indent=2)
tools[0] | tojson(indent=0)
tools | tojson(indent=none)
messages | tojson(ensure_ascii=true)
messages | tojson(ensure_ascii=false)
messages[0] | tojson(sort_keys=true)
messages[0] | tojson(separators=(',', ':'))
messages[0] | tojson(separators=[',', ':'])
messages[0] | tojson(indent=2, separators=(', ', ' = '))
messages[0] | tojson(false)
messages[0] | tojson(true)
messages[1] | tojson(true, 2)
messages[1] | tojson(false, 2, (',', ':'), true)
messages[2].tool_calls[0].function.arguments | tojson
messages[2].tool_calls[0].function.arguments | tojson(indent='--')
'a"b\\c\n\t\x01é😀\u2028' | tojson
'<a> & \'b\'' | tojson
1 | tojson
1.0 | tojson
1e22 | tojson
1e16 | tojson
1e-7 | tojson
123456789.125 | tojson
none | tojson
true | tojson
[] | tojson
{} | tojson
[] | tojson(indent=2)
{} | tojson(indent=2)
[[], {}, [1]] | tojson(indent=2)
(1, 2) | tojson
{'b': 1, 'a': [1, 2]} | tojson
{'b': 1, 'a': [1, 2]} | tojson(sort_keys=true)
{1: 'a', none: 'b', true: 'c', 1.5: 'd'} | tojson
{(1, 2): 'a'} | tojson
range(3) | tojson
messages | map(attribute='role') | tojson
messages | map(attribute='role') | list | tojson
namespace(a=1) | tojson
'\x7f\ud83d\ude00' | tojson(ensure_ascii=true)
10 ** 20 | tojson
messages[0] | tojson(foo=1)
messages[0] | tojson(indent=-1)
dict(a=1) | tojson
strftime_now('%Y-%m-%d')
strftime_now('%d %b %Y')
strftime_now('%A, %B %-d, %Y')
strftime_now('%j %U %y %%')
strftime_now('%H:%M:%S') | length
raise_exception('no')
raise_exception()
"""

STATEMENTS = [
    # White space control, comments, raw blocks, line ends.
    "{% if true %}\na\n{% endif %}\n",
    "  {% if true %}\n  a\n  {% endif %}\nb\n",
    "a {% if true %} b {% endif %} c",
    "a {%- if true -%} b {%- endif -%} c",
    "  {%+ if true %}a{% endif %}",
    "{% if true +%}\na{% endif %}",
    "{% if true %}   \na{% endif %}",
    "{{ 'a' }}\n{{ 'b' }}\n",
    "{{ 'a' }}\n\n{{- 'b' }}\n\n",
    "a\n{# c #}\nb",
    "a\n  {#- c -#}  \nb",
    "a {# {{ nope }} #} b",
    "a{# c #}\n",
    "{% raw %}{{ a }}{% endraw %}",
    "  {% raw %}\n {% if %}\n  {% endraw %}\nb",
    "{%- raw -%} a {%- endraw -%} b",
    "a\n\n",
    "a\n\n\n",
    "\n",
    "",
    "a\r\nb\r\n",
    "a\rb\r",
    "{% for m in messages %}\r\n<{{ m.role }}>\r\n{% endfor %}\r\n",
    "{{ 'a\r\nb' }}|{{ 'a\\r\\nb' }}",
    "{# a\r\n b #}\r\nc",
    "{% set x %}\r\na\r\n{% endset %}{{ x }}",
    "a\u2028b\x85c\x0bd",
    "\ufeffa",
    "  \t{% if true %}a{% endif %}",
    "{{ x }}  {% if true %}a{% endif %}",
    "a\n    {%- if true %}\n    b\n    {%- endif %}\nc",
    "{% if true %}{% if true %}\n\na{% endif %}\n\n{% endif %}\n\n",
    "a\xa0{%- if true %}b{% endif %}",
    "{{- ' a ' -}}  b",
    "#{{ 1 }}# {1} {{ '{{' }} }} %}",
    # Loops.
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }};{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if loop.nextitem }};{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "{% for m in [] %}a{% else %}b{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in messages[0] | dictsort %}{{ k }};{% endfor %}",
    "{% for k in messages[0] %}{{ k }};{% endfor %}",
    "{% for c in 'äb' %}{{ c }};{% endfor %}",
    "{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }};{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in range(3) %}{% for j in range(3) %}{% if j == 1 %}{% break %}{% endif %}{{ i }}{{ j }} {% endfor %}{% endfor %}",
    "{% for i in [1, [2, [3]]] recursive %}{% if i is iterable %}[{{ loop(i) }}]{% else %}{{ i }}{% endif %}{% endfor %}",
    "{% for i in x %}a{% endfor %}b",
    "{% for i in none %}a{% endfor %}",
    "{% for i in 3 %}a{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role }}{{ ',' if not loop.last }}{% endfor %}",
    "{% set x = 1 %}{% for i in range(3) %}{% set x = i %}{% endfor %}{{ x }}",
    "{% for i in range(2) %}{% set x = i %}{% endfor %}{{ x is defined }}",
    "{% for m in messages %}{% set loop_role = m.role %}{{ loop_role }}{% endfor %}{{ loop is defined }}",
    "{% for m in messages %}{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'x' %}{{ loop.index0 }}{% endif %}{% endfor %}",
    "{% for i in range(3) %}{{ loop.index }}{% for j in range(2) %}{{ loop.index }}{% endfor %}{% endfor %}",
    # Variables, namespaces, macros.
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}",
    "{% set ns = namespace() %}{% set ns.a = [] %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}{% endfor %}{{ ns.a }}{{ ns.b is defined }}",
    "{% set ns = namespace(a='') %}{% set ns.a %}x{{ 1 }}{% endset %}{{ ns.a }}",
    "{% set ns = namespace(m=messages) %}{% set ns.m = ns.m[1:] %}{{ ns.m | length }}{{ ns.m[0].role }}",
    "{% set ns = namespace(d={}) %}{% set ns.d = dict(ns.d, a=1) %}{{ ns.d }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}",
    "{% set a = b = 1 %}",
    "{% set x | upper %}abc{% endset %}{{ x }}",
    "{% set x %}a\n{% endset %}[{{ x }}]",
    "{% set messages = messages[1:] %}{{ messages | length }}",
    "{% set d = {'a': 1} %}{% set d.a = 2 %}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}",
    "{% with %}{% set a = 1 %}{{ a }}{% endwith %}{{ a is defined }}",
    "{% macro f(a, b='y') %}{{ a }}{{ b }}{% endmacro %}{{ f('x') }}{{ f('x', 'z') }}{{ f(b='1', a='2') }}",
    "{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, k=3) }}",
    "{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}x{% endcall %}",
    "{% macro f() %}{{ caller('y') }}{% endmacro %}{% call(a) f() %}x{{ a }}{% endcall %}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% macro f(m) %}\n  {{- m.role }}\n{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f.name }}{{ f.arguments }}",
    "{% set x = 1 %}{% macro f() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ f() }}",
    "{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f({'a': 1}) | trim }}",
    "{% macro f() %}a{% endmacro %}{{ f() ~ 'b' }}{{ f() + 'c' }}{{ f() == 'a' }}{{ 'a' in f() }}{{ f() | length }}",
    "{% filter upper %}abc{{ 'd' }}{% endfilter %}",
    "{% if x %}a{% elif messages %}b{% else %}c{% endif %}",
    "{% if messages[0].role == 'system' and not x %}a{% endif %}",
    "{% if not messages[0].tool_calls %}a{% endif %}{% if messages[2].tool_calls %}b{% endif %}",
    "{% if messages[0]['tool_calls'] is defined and messages[0]['tool_calls'] is not none %}a{% else %}b{% endif %}",
    "{% if tools is not none and tools | length > 0 %}a{% endif %}",
    "{% if 'a' in 'abc' and 'x' not in 'abc' %}a{% endif %}",
    "{% set content = messages[2].content %}{% if '</think>' in content %}{{ content.split('</think>')[-1].lstrip('\\n') }}|{{ content.split('</think>')[0].split('<think>')[-1].strip('\\n') }}{% endif %}",
    "{{ messages | map(attribute='content') | select('string') | join('|') }}",
    "{% do messages %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% block a %}x{% endblock %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% if %}",
    "{% endif %}",
    "{{ 1",
    "{% if true %}",
    "{{ }}",
    "{{ 1 2 }}",
    "{% nope %}",
    "{# open",
    "{% trans %}a{% endtrans %}",
    "{% debug %}",
    # Generation tags.
    "{% generation %}a{% endgeneration %}",
    "a\n  {% generation %}\n  b\n  {% endgeneration %}\nc",
    "a {%- generation -%} b {%- endgeneration -%} c",
    "{% generation %}{% set q = 1 %}{% endgeneration %}{{ q is defined }}",
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}",
    "{# {% generation %} #}a",
    "{% raw %}{% generation %}{% endraw %}",
    "{{ '{% generation %}' }}",
    "{%generation%}a{%endgeneration%}",
    # Realistic pieces.
    "{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ (m.content | trim) ~ '<|end|>\\n' }}{%- endfor %}",
    "{%- set ns = namespace(is_first=true, system='') -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{%- if ns.is_first -%}{%- set ns.system = ns.system + m['content'] -%}{%- set ns.is_first = false -%}{%- else -%}{%- set ns.system = ns.system + '\\n\\n' + m['content'] -%}{%- endif -%}{%- endif -%}{%- endfor -%}{{ bos_token }}{{ ns.system }}",
    "{%- for tool in tools %}{%- set f = tool.function %}{{ '- ' ~ f.name ~ ': ' ~ f.description }}{% for n, p in f.parameters.properties.items() %}\n  {{ n }} ({{ p.type }}{{ ', required' if n in f.parameters.required }}){% endfor %}{%- endfor %}",
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{{ date_string }}",
    "{%- set loop_messages = messages -%}{%- if messages[0]['role'] == 'system' -%}{%- set system_message = messages[0]['content'] | trim + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}{%- endif -%}{{ system_message }}{{ loop_messages | length }}",
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ loop.index0 }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
    "{%- for key, val in messages[2].tool_calls[0].function.arguments | items %}{{ key }}={{ val | tojson if val is mapping or (val is sequence and val is not string) else val | string }};{% endfor %}",
    "{%- for c in messages[2].tool_calls %}{{ c.function.name ~ '(' }}{%- for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ (v | string) }}{{ ', ' if not loop.last }}{%- endfor %}{{ ')' }}{%- endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'tool') | map(attribute='content') | first }}",
    "{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content | trim }}",
    "{% set t = tools | map(attribute='function') | list %}{{ t | tojson }}",
    "{{ '%s' % messages[0].role }}{% if loop is not defined %}{{ 7 % 4 }}{% endif %}",
    "{% set fmt = '%s: %s' %}{% for m in messages %}{{ fmt % (m.role, m.content | length) }};{% endfor %}",
    "{% set x = {'a': '%'} %}{{ x['a'] ~ '%' }}{{ '%d%%' % 5 }}",
    "{{ messages[2].content.split('</think>') | last | trim }}",
    "{{ {'a': messages[0].role, 'b': [1, 2,],} | tojson }}",
    "{%- set f = tools[0].function -%}{{ f['parameters']['properties'] | length }}{{ f.parameters.properties.items is defined }}",
    "{{ messages[0].items is defined }}{{ messages[0].keys is defined }}{{ messages[0].nope is defined }}",
    "{% for p in tools[0].function.parameters.properties.values() %}{% if p['items'] is defined %}y{% else %}n{% endif %}{% endfor %}",
    "{% for p in tools[0].function.parameters.properties.values() %}{% if p.items %}y{% else %}n{% endif %}{% endfor %}",
    "{% set sep = '\\n' if messages | length > 1 else '' %}{{ sep | tojson }}",
    "{{ ('a' if messages[0].role == 'user' else 'b') + 'c' }}",
    "{{ messages[0].content[0] | upper + messages[0].content[1:] }}",
    "{% if messages is string %}a{% elif messages is sequence %}b{% endif %}",
    "{% set x = messages | length - 1 %}{{ x }}",
    "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + loop.index0 * 2 %}{% endfor %}{{ ns.i }}",
]


def render(source):
    """transformers' text of `source`, or None where it raises."""
    try:
        texts, _ = utils.render_jinja_template([MESSAGES], tools=TOOLS, chat_template=source, add_generation_prompt=False, **SPECIAL)
    except Exception:
        return None
    return texts[0]


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


def main():
    warnings.simplefilter("ignore")
    utils.datetime = Clock
    lines = [STRINGS, COLLECTIONS, VALUES, JSON]
    expressions = [line for block in lines for line in block.replace("'a\\\nb'\n", "").strip("\n").split("\n")]
    sources = [f"{{{{ {line} }}}}" for line in expressions] + STATEMENTS
    cases = [[source, render(source)] for source in sources]
    golden = {"date": DATE, "messages": MESSAGES, "tools": TOOLS, "special": SPECIAL, "cases": cases}
    path = ROOT / "tests" / "golden" / "chat_expressions.json"
    head = json.dumps(golden | {"cases": []}, ensure_ascii=False)
    body = ",\n".join(json.dumps(case) for case in cases)
    path.write_text(head.removesuffix("[]}") + "[\n" + body + "\n]}\n")
    print(len(cases), "cases,", sum(text is None for _, text in cases), "raise")


main()
