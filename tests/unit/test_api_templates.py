import json

import msgspec
import pytest

from pd.api.chat_messages import template_messages
from pd.api.chat_template import ChatTemplate
from pd.api.sse import ChunkTemplate, error_event, event
from pd.api.tokenizer import Tokenizer
from pd.errors import ModelError, RequestError
from pd.testing import tiny_tokenizer

TEMPLATES = {
    "llama3": "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start|>assistant<|end|>\\n\\n' }}\n{%- endif %}\n",
    "controls": "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ message | tojson }}{% endfor %}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}\n  {% if tools is not none %}T{% endif %}\n  {{ m.content }}{% endif %}{% endfor %}",
}
MESSAGES = [
    {"role": "user", "content": ' Grüße <b>"& 你好 '},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "More"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_transformers_renders_them(name, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, bos_token="<s>"
    )
    rendered = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=prompt)
    assert [rendered] == expected


def test_a_template_sees_the_requests_own_variables():
    template = ChatTemplate("{% if enable_thinking %}think {% endif %}{{ messages[0].content }}", {})
    assert template.render(MESSAGES[1:], kwargs={"enable_thinking": True, "messages": []}) == "think Hi"


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}", "{{ messages[9].content }}"]
)
def test_what_a_template_refuses_is_the_clients_error(source):
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages" and caught.value.status == 400


def test_a_template_cannot_reach_the_interpreter():
    with pytest.raises(RequestError, match=r"unsafe|access"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).render(MESSAGES)


def test_tool_call_history_becomes_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    [message] = template_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    call["function"]["arguments"] = "{"
    with pytest.raises(RequestError, match="JSON"):
        template_messages([{"role": "assistant", "tool_calls": [call]}])


# --- the tokenizer's directory ---------------------------------------------------------------------------------------


def test_a_template_file_goes_before_the_configurations_and_a_list_has_a_default(tmp_path):
    tiny_tokenizer.write(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    found = json.loads(config.read_text())
    found["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps(found))
    assert Tokenizer(tmp_path).chat_template.render(MESSAGES) == "D"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}F{{ eos_token }}")
    assert Tokenizer(tmp_path).chat_template.render(MESSAGES) == "<|bos|>F<|eos|>"


def test_a_model_without_template_has_none(tmp_path):
    assert Tokenizer(tiny_tokenizer.write(tmp_path, chat_template=None)).chat_template is None


def test_a_directory_without_usable_tokenizer_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer(tmp_path)
    tiny_tokenizer.write(tmp_path, chat_template="{% if %}")
    with pytest.raises(ModelError, match="does not compile"):
        Tokenizer(tmp_path)


def test_long_texts_are_encoded_as_short_ones_are(run_async, tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer.write(tmp_path))
    short, long = "Hello 你好", "Hello 你好 " * 1000

    async def main():
        return await tokenizer.encode([short]) + await tokenizer.encode([long], add_special_tokens=False)

    library = tiny_tokenizer.byte_level()
    assert run_async(main()) == [library.encode(short).ids, library.encode(long, add_special_tokens=False).ids]
    tokenizer.close()


def test_a_stored_truncation_does_not_cut_prompts(run_async, tmp_path):
    from tokenizers import Tokenizer as Library

    library = Library.from_str(tiny_tokenizer.byte_level().to_str())
    library.enable_truncation(4)
    library.enable_padding(length=100)
    tiny_tokenizer.write(tmp_path)
    library.save(str(tmp_path / "tokenizer.json"))
    [ids] = run_async(Tokenizer(tmp_path).encode(["Hello world, how are you today?"]))
    assert 4 < len(ids) < 100


# --- server-sent events ----------------------------------------------------------------------------------------------

CHAT = (b'"delta":{"content":', b"}")


def template(**options):
    given = {"text_form": CHAT, "empty": b'"delta":{}', "null_usage": False} | options
    return ChunkTemplate(id="i", object="chat.completion.chunk", created=5, model='m"\n', **given)


def parse(data):
    assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
    return msgspec.json.decode(data[6:-2])


@pytest.mark.parametrize("text", ["plain", 'quotes "\\ and\nnewlines\r\n\u2028', "你好 😀", "\x00\x1f"])
def test_a_preformatted_chunk_is_the_same_as_an_encoded_one(text):
    expected = {
        "id": "i",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": 'm"\n',
        "choices": [{"index": 3, "delta": {"content": text}, "logprobs": None, "finish_reason": None}],
    }
    assert parse(template().text(3, text)) == expected == parse(template().chunk(3, text=text))
    assert parse(template(null_usage=True).text(3, text)) == {**expected, "usage": None}


def test_the_last_chunks_say_why_and_how_much():
    last = parse(template().chunk(0, finish="stop", matched="END"))["choices"][0]
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "matched_stop": "END"}
    assert parse(template().usage({"total_tokens": 3})) == {
        "id": "i",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": 'm"\n',
        "choices": [],
        "usage": {"total_tokens": 3},
    }


def test_events_never_contain_a_line_break():
    assert parse(event({"text": "a\n\nb"})) == {"text": "a\n\nb"}
    assert parse(error_event(RequestError("bad\nthing", status=502)))["error"]["code"] == 502
