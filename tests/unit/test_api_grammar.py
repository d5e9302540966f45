"""Grammars from every client's fields: what they accept, and what is refused before anything runs."""

import json
import threading

import msgspec
import pytest
from grammar_kit import accepts

from pd.api import grammar
from pd.api.ebnf import EbnfError, ebnf_to_lark
from pd.api.grammar import Grammars, JsonLayout, constraint_of
from pd.api.native import NativeSampling
from pd.api.openai import OpenAIRequest
from pd.api.params import ModelLimits, SamplingFields, resolve
from pd.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def made(kind=OpenAIRequest, prefix="", **fields):
    constraint = constraint_of(msgspec.convert(fields, kind), prefix)
    return None if constraint is None else constraint.make()


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1]}', "[1]"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
            '{"name": "Zoë", "age": 7}',
            '{"name": "Zoë"}',
        ),
        ({"json_schema": json.dumps(PERSON)}, '{"name":"","age":0}', '{"name":"","age":-1}'),
        ({"json_schema": PERSON}, '{"name":"","age":0}', '{"name":"","age":0,"x":1}'),
        ({"regex": "(Paris|London)"}, "Paris", "Rome"),
        ({"regex": "^[0-9]{3}$"}, "123", "1234"),
        ({"ebnf": 'root ::= "a" tail*\ntail ::= ", " [b-d]'}, "a, b, d", "a, e"),
        ({"ebnf": 'start: "a" | "b"'}, "b", "c"),
        ({"structured_outputs": {"json": PERSON}}, '{ "name": "x", "age": 1 }', "{}"),
        ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}}, '{"name":"x","age":1}', "{ }"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"structured_outputs": {"regex": "a+"}}, "aaa", ""),
        ({"structured_outputs": {"choice": ["yes", "no\n", 'qu"ote']}}, 'qu"ote', "no"),
        ({"structured_outputs": {"grammar": 'root ::= "(" root ")" | "x"'}}, "((x))", "((x)"),
        ({"guided_json": PERSON, "guided_whitespace_pattern": " ?"}, '{"name": "x","age":1}', '{"name":  "x","age":1}'),
        ({"guided_regex": "a{2}"}, "aa", "a"),
        ({"guided_choice": ["a", "b"]}, "a", "ab"),
        ({"guided_grammar": 'root ::= "a"'}, "a", "b"),
    ],
)
def test_every_clients_field_constrains_the_output(fields, good, bad):
    found = made(**fields)
    assert accepts(found, good) and not accepts(found, bad)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"regex": "", "ebnf": "", "json_schema": ""},
        {"structured_outputs": {}},
        {"structured_outputs": {"choice": [], "json_object": False, "disable_fallback": True}},
        {"guided_choice": [], "guided_regex": ""},
    ],
)
def test_fields_that_ask_for_nothing_leave_the_output_free(fields):
    assert made(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format", "structural_tag"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
        ({"json_schema": '{"type":'}, "json_schema", "JSON"),
        ({"json_schema": "[1]"}, "json_schema", "object"),
        ({"json_schema": {"type": "thing"}}, "json_schema", "thing"),
        ({"json_schema": {"not": {}}}, "json_schema", "not"),
        ({"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}, "json_schema", "not"),
        ({"json_schema": False}, "json_schema", "object"),
        ({"json_schema": {"properties": {"a": {"nullable": True}}}}, "json_schema.properties.a", "null"),
        ({"json_schema": {"items": [{"divisibleBy": 2}]}}, "json_schema.items[0]", "multipleOf"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "json_schema", "minimum"),
        ({"json_schema": {"$ref": "https://example.org/schema"}}, "json_schema", "example.org"),
        ({"regex": "(a"}, "regex", "unclosed"),
        ({"regex": r"(a)\1"}, "regex", "backreferences"),
        ({"regex": 5}, "regex", "string"),
        ({"regex": "\ud800"}, "regex", "surrogate"),
        ({"regex": "a" * 300_000}, "regex", "262144"),
        ({"ebnf": "root ::= ("}, "ebnf", "line 1"),
        ({"ebnf": 'root ::= "a"\n' + "#" * 70_000}, "ebnf", "65536"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"disable_additional_properties": True}}, None, "not supported"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "list"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": 5}}, None, "string"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": "("}}, "structured_outputs.json", "unclosed"),
        ({"structured_outputs": "json"}, "structured_outputs", "object"),
        ({"guided_choice": [1, 2]}, "guided_choice", "string"),
        ({"guided_json": {"a" * 300_000: 1}}, "guided_json", "262144"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "guided_regex and resp"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "both constrain"),
        ({"regex": "a", "ebnf": "b"}, "ebnf", "regex and ebnf"),
    ],
)
def test_what_cannot_be_honoured_is_refused_naming_field_and_reason(fields, param, says):
    with pytest.raises(RequestError) as caught:
        made(**fields)
    assert caught.value.status == 400 and says in caught.value.message
    assert param is None or caught.value.param == param


def test_a_field_of_sampling_params_is_named_with_them():
    with pytest.raises(RequestError) as caught:
        made(NativeSampling, "sampling_params.", regex="(")
    assert caught.value.param == "sampling_params.regex"


def test_structural_tag_stays_refused_by_name():
    with pytest.raises(RequestError, match="structural_tag is not supported"):
        resolved(structural_tag="x")


# --- the makers -----------------------------------------------------------------------------------------------------


def test_a_property_may_have_the_name_of_a_keyword_that_is_refused():
    assert grammar.from_json_schema({"properties": {"nullable": {}}, "enum": [{"extends": 1}]}, "p")


def test_json_is_laid_out_as_asked():
    tight = grammar.json_object(JsonLayout(whitespace=False))
    assert accepts(tight, '{"a":1}') and not accepts(tight, '{"a": 1}')
    assert accepts(grammar.json_object(), '{\n "a" : 1}')


def test_schemas_that_refer_to_each_other_in_a_long_chain_do_not_end_the_process():
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "type": "array"} for i in range(4000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, "d4000": {"type": "string"}}}
    assert grammar.from_json_schema(schema, "p")


def test_rules_in_a_long_chain_are_refused():
    rules = "".join(f'T{i}: T{i + 1} "x"\n' for i in range(3000))
    with pytest.raises(RequestError, match="2000 lines"):
        grammar.from_lark(f'start: T0\n{rules}T3000: "y"', "p")
    with pytest.raises(RequestError, match="must be rules"):
        grammar.from_lark('{"grammars": [{"json_schema": {}}]}', "p")
    assert grammar.from_lark('start: <|some_special_token|> "a" <[5]>', "p")
    with pytest.raises(RequestError, match="Unimplemented keys"):  # only a warning of the library's
        grammar.from_lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}', "p")


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('root ::= a | b # or\na ::= "x"\n\n  | "y"\nb::="z"', ["x", "y", "z"], ["", "xy"]),
        ('root ::= expr\nexpr ::= [0-9]{1,3} (("+" | "-") expr)* | "(" expr ")"', ["1+22", "(1-2)"], ["1+", "1234"]),
        ('root ::= "" | ( | "a") "b"?', ["", "a", "b", "ab"], ["ba"]),
        (r'root ::= "\"\\\n\u00e9\x41" [^\]\n] .', ['"\\\néAxy', '"\\\néAx\n'], ['"\\\néA]y']),
        (r"root ::= [-a^\-0-9é]{2,}", ["-^", "aé5"], ["a", "ab"]),
        ('root ::= x{2} y{0, 1} z*\nx ::= "(" x ")" | "x"\ny ::= "y"\nz ::= "z"+', ["x(x)", "xxyzz"], ["x", "xxyy"]),
    ],
)
def test_ebnf_describes_the_same_language_in_lark(text, good, bad):
    found = grammar.from_ebnf(text, "ebnf")
    assert all(accepts(found, one) for one in good)
    assert not any(accepts(found, one) for one in bad)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rule named root"),
        ('other ::= "a"', "no rule named root"),
        ("root ::= missing", "line 1: there is no rule named missing"),
        ('root ::= "a"\nroot ::= "b"', "line 2: the rule root is defined twice"),
        ('root ::= ("a"', "line 1: ) is expected, got the end"),
        ('root ::= "a"\n"b" ::= "c"', "NAME ::="),
        ('root ::= * "a"', "got *"),
        ('root ::= "a', "line 1: not understood"),
        ("root ::= [z-a]", "z-a ends below"),
        ("root ::= []", "no character"),
        ('root ::= "a"{3,1}', "ends below"),
        (r'root ::= "\q"', r"escape \q"),
        (r'root ::= "\uD800"', "D800 is not a character"),
        ('root ::= (= "a") "a"', "lookahead"),
        ('root ::= TagDispatch("a")', "TagDispatch is not supported"),
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "100 parentheses"),
    ],
)
def test_what_is_no_ebnf_is_refused_with_its_line(text, says):
    with pytest.raises(EbnfError) as caught:
        ebnf_to_lark(text)
    assert says in str(caught.value)


# --- resolution -----------------------------------------------------------------------------------------------------


def resolved(model=None, **fields):
    constraint = fields.pop("grammar", "")
    limits = model or ModelLimits(100, 64, (1, 2))
    request = msgspec.convert(fields, SamplingFields)
    return resolve(
        request, limits, max_tokens=("max_tokens", None), min_tokens=("min_tokens", None), grammar=constraint
    )


def test_constrained_output_can_always_end():
    assert resolved(grammar='start: "a"').sampling.grammar == 'start: "a"'
    assert resolved(grammar='start: "a"', ignore_eos=True).sampling.stop_token_ids == (1, 2)
    assert resolved(ignore_eos=True).sampling.stop_token_ids == ()
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        resolved(ModelLimits(100, 64), grammar='start: "a"')


def test_a_grammar_is_checked_once_in_a_thread_and_remembered(run_async):
    threads = []

    def make():
        threads.append(threading.current_thread())
        return "start: x"

    async def main():
        grammars = Grammars()
        same = [grammar.Constraint("p", "key", make) for _ in range(3)]
        assert [await grammars.make(one) for one in same] == ["start: x"] * 3
        assert len(threads) == 1 and threads[0] is not threading.main_thread()
        for number in range(grammar.REMEMBERED):
            await grammars.make(grammar.Constraint("p", str(number), lambda: "y"))
        await grammars.make(same[0])
        assert len(threads) == 2  # it was the oldest

    run_async(main())
