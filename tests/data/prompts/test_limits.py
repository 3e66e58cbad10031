"""What a template may cost is bounded."""

import resource
import time

import pytest

from metro.data.prompts.templates import PromptTemplate


def template(jinja: str, choices: str | None = None) -> PromptTemplate:
    return PromptTemplate("toy", None, "made", jinja, choices)


GROW = "{% set a = ['x'] %}{% set b = ['x'] %}" + "{% set a = [a, a] %}{% set b = [b, b] %}" * 45
FILL = (
    "{% set b = [] %}{% for i in range(99999) %}{% if items.append(b) %}{% endif %}{% endfor %}"
    "{% for i in range(19) %}{% if b.append('a' * 900000) %}{% endif %}{% endfor %}"
)
HOSTILE = {
    "class": "{{ ''.__class__ }}",
    "class through item": "{{ ''['__class__'] }}",
    "class through made name": "{{ text['__cl' ~ 'ass__'] }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ range.__globals__ }}",
    "attribute filter": "{{ text | attr('__class__') }}",
    "map with attribute": "{{ [text] | map(attribute='__class__') | list }}",
    "map to a forbidden filter": "{{ [text] | map('pprint') | list }}",
    "filter format of width": "{{ '%1000000000d' | format(1) }}",
    "filter format of precision": "{{ '%.999999999f' | format(1) }}",
    "filter format of a width in the row": "{{ '%*d' | format(1000000000, 1) }}",
    "filter format of many": "{{ ('%100d' * 99999) | format(*range(99999)) }}",
    "filter format of a name": "{{ '%(a)1000000000d' | format(a=1) }}",
    "format": "{{ '{0.__class__}'.format(text) }}",
    "format of width": "{{ '{:1000000000}'.format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "undefined function": "{{ open('x') }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "self": "{{ self.__init__ }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "endless growth": "{% for x in items %}{% if items.append(1) %}{% endif %}{% endfor %}",
    "endless growth of a dict": "{% for x in range(99999) %}{% if d.update({x: text * 999}) %}"
    "{% endif %}{% endfor %}",
    "other mutation": "{{ items.clear() }}",
    "list in itself": "{% if items.append(items) %}{% endif %}{{ items }}",
    "repeat a text": "{{ ('a' * 10**9) }}",
    "repeat twice": "{{ ('a' * 900000 * 900000) }}",
    "repeat a list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ (10 ** (10 ** 10)) }}",
    "power of numbers": "{{ (9 ** 99999999) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'a' | indent(1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "range": "{{ range(10**9) | list }}",
    "loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "quiet nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set x = i == j %}{% endfor %}{% endfor %}",
    "doubling": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    "doubling by plus": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    "doubling a list": "{% set a = [1] %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
    "shared lists": "{% set a = ['aaaaaaaaaa'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | join('a' * 99999) }}",
    "concatenate": "{% set a = 'a' * 900000 %}{{ " + " ~ ".join(["a"] * 2000) + " }}",
    "print in a loop": "{% for i in range(99999) %}{{ ('a' * 9999) }}{% endfor %}",
    "block set": "{% set a %}" + "{{ text }}" * 9000 + "{% endset %}" + "{% set a = a ~ a %}" * 60,
    "sort": "{{ range(99999) | map('string') | sort | join | length }}" * 500,
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 150 + "]" * 150 + " }}",
    "long source": "x" * 200_000,
    "not closed": "{% if a %}",
    "shared lists compared": GROW + "{% if a == b %}x{% endif %}",
    "shared lists tested": GROW + "{% if a is eq(b) %}x{% endif %}",
    "shared tuples as a key": "{% set a = ('x', 'y') %}"
    + "{% set a = (a, a) %}" * 45
    + "{{ {a: 1} | length }}",
    "tuples of zip as a key": "{% set n = namespace(a=('x', 'y')) %}{% for i in range(45) %}"
    "{% for t in zip([n.a], [n.a]) %}{% set n.a = t %}{% endfor %}{% endfor %}"
    "{{ {n.a: 1} | length }}",
    "many slices": "{% set a = 'a' * 900000 %}{% for i in range(99999) %}"
    "{% if items.append(a[i:]) %}{% endif %}{% endfor %}",
    "slices at once": "{% set a = 'a' * 900000 %}{{ " + " ~ ".join(["a[1:]"] * 5000) + " }}",
    "plain text in a loop": "{% for i in range(99999) %}" + "x" * 90_000 + "{% endfor %}",
    "strip": "{{ ('a' * 900000).strip('b' * 900000 ~ 'a') }}",
    "trim": "{{ ('a' * 900000) | trim('b' * 900000 ~ 'a') }}",
    "search from the right": "{{ ('a' * 900000).rfind('ab' ~ 'a' * 450000) }}",
    "split from the right": "{{ ('a' * 900000).rsplit(sep='ab' ~ 'a' * 450000) | length }}",
    "numbers of one hash": "{% for i in range(99999) %}"
    "{% if items.append(i * 2305843009213693951) %}{% endif %}{% endfor %}"
    "{{ items | unique | list | length }}",
    "complex numbers": "{% for i in range(99999) %}{% if items.append((-4) ** 0.5) %}{% endif %}"
    "{% endfor %}",
    "views of a dict": FILL + "{% set c = {1: items} %}{{ [c.values()] }}",
    "namespace": FILL + "{% set n = namespace(a=items) %}{{ [n] }}",
    "raw": "{% raw %}" + "{{" * 40_000 + "{% endraw %}",
    "failed assertion": "{{ 'abcdefgh' | truncate(1, end='.....') }}",
    "dict changed while read": "{% for k in {'a': 1} %}{% endfor %}{% for k in e %}"
    "{% if e.update({k ~ 'x': 1}) %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_within_time_and_memory(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(ValueError, match="template 'made' of toy") as caught:
        template(HOSTILE[name]).render({"text": "some text", "items": [1], "d": {}, "e": {"a": 1}})
    assert "TypeError" not in str(caught.value)  # refused, not written wrongly
    assert time.process_time() - start < 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.mark.parametrize(
    "choices", ["{{ 'a' * 10**9 }}", "{% set a = 'a' * 900000 %}" + "{{ a }}" * 2000]
)
def test_hostile_answer_choices_are_refused_too(choices):
    """They are not cut at 2048 characters."""
    with pytest.raises(ValueError, match="template 'made' of toy"):
        template("{{text}} ||| x", choices).render({"text": "t"})


def test_bounds_leave_room_for_large_rows():
    """A row like wiki_hop's largest: hundreds of kilobytes of passages."""
    passages = ["many words of a passage. " * 200] * 60
    jinja = "{% for s in supports %}{{ s }}\n{% endfor %}{{ supports | join(' ') }} ||| {{ a }}"
    made = template(jinja).render({"supports": passages, "a": "answer"})
    assert made.target == "answer" and made.input.count("many words") > 60 * 70
