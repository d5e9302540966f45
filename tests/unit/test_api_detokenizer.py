import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd.api.detokenizer import StopStrings
from pd.api.tokenizer import Tokenizer
from pd.testing import tiny_tokenizer

MAKERS = {
    "byte_level": tiny_tokenizer.byte_level,
    "byte_fallback": tiny_tokenizer.byte_fallback,
    "metaspace": tiny_tokenizer.metaspace,
}
texts = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("abc 你好世界😀👍🏽\u200d\ufe0f\n  étè")), max_size=40
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer(tiny_tokenizer.write(base / name, make)) for name, make in MAKERS.items()}


def cut(values, data):
    """The values in pieces of 1 to 3, as steps would bring them."""
    at, pieces = 0, []
    while at < len(values):
        size = data.draw(st.integers(1, 3))
        pieces.append(values[at : at + size])
        at += size
    return pieces


@given(text=texts, data=st.data())
def test_byte_level_pieces_join_to_the_text_and_no_character_is_torn(tokenizers, text, data):
    tokenizer = tokenizers["byte_level"]
    ids = tiny_tokenizer.byte_level().encode(text, add_special_tokens=False).ids
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.feed(piece) for piece in cut(ids, data)]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 450), max_size=40), data=st.data(), skip=st.booleans())
def test_any_byte_level_ids_give_what_decoding_all_at_once_gives(tokenizers, ids, data, skip):
    """Invalid UTF-8, special tokens and ids beyond the vocabulary included."""
    tokenizer = tokenizers["byte_level"]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    given = "".join(detokenizer.feed(piece) for piece in cut(ids, data)) + detokenizer.flush()
    assert given == tiny_tokenizer.byte_level().decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
@given(prompt=texts, text=texts, data=st.data())
@settings(deadline=None)
def test_window_pieces_join_to_what_follows_the_prompt(tokenizers, name, prompt, text, data):
    library = MAKERS[name]()
    before = library.encode(prompt, add_special_tokens=False).ids
    ids = library.encode(text, add_special_tokens=False).ids
    detokenizer = tokenizers[name].detokenizer(before)
    pieces = [detokenizer.feed(piece) for piece in cut(ids, data)]
    given = "".join(pieces) + detokenizer.flush()
    whole = library.decode(before + ids)
    assert library.decode(before) + given == whole
    if "\ufffd" not in text and "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", MAKERS)
def test_skipped_special_tokens_show_nothing_and_shown_ones_their_name(tokenizers, name):
    library = MAKERS[name]()
    ids = [*library.encode("Hello", add_special_tokens=False).ids, tiny_tokenizer.EOS]
    hidden, shown = (tokenizers[name].detokenizer([], skip_special_tokens=skip) for skip in (True, False))
    assert (hidden.feed(ids) + hidden.flush()).strip() == "Hello"
    assert (shown.feed(ids) + shown.flush()).replace(" ", "") == "Hello<|eos|>"


def test_a_continued_sentence_keeps_its_leading_space(tokenizers):
    library = tiny_tokenizer.byte_fallback()
    prompt = library.encode("Hello", add_special_tokens=False).ids
    following = library.encode("world", add_special_tokens=False).ids  # the normalizer prepends U+2581
    assert tokenizers["byte_fallback"].detokenizer(prompt).feed(following) == " world"


def test_a_window_does_not_grow_without_bound(tokenizers):
    """A model that emits only broken bytes still streams, and each token stays cheap."""
    library = tiny_tokenizer.byte_fallback()
    broken = library.token_to_id("<0xFF>")
    detokenizer = tokenizers["byte_fallback"].detokenizer()
    given = "".join(detokenizer.feed([broken]) for _ in range(500))
    assert len(given) > 400
    assert given + detokenizer.flush() == "\ufffd" * 500


@pytest.mark.parametrize("name", MAKERS)
def test_token_bytes_of_all_tokens_join_to_the_text(tokenizers, name):
    text = " Hello world, 你好 😀"
    library = MAKERS[name]()
    ids = library.encode(text, add_special_tokens=False).ids
    if library.token_to_id("<unk>") in ids:
        text = "Hello world"
        ids = library.encode(text, add_special_tokens=False).ids
    joined = b"".join(tokenizers[name].token_bytes(token_id) for token_id in ids)
    assert joined.decode().strip() == text.strip()


# --- stop strings --------------------------------------------------------------------------------------------------


def test_a_stop_string_across_pieces_never_leaks():
    stops = StopStrings(["<END>"])
    given = [stops.feed(piece) for piece in ["Hello <", "E", "ND", "> rest"]]
    assert given == [("Hello ", None), ("", None), ("", None), ("", "<END>")]


def test_text_held_for_a_stop_string_that_does_not_come_is_given_out():
    stops = StopStrings(["<END>"])
    assert stops.feed("a <EN") == ("a ", None)
    assert stops.feed("C") == ("<ENC", None)
    assert stops.feed("x<E") == ("x", None)
    assert stops.release() == "<E"


def test_a_self_overlapping_stop_string_is_found_at_its_first_place():
    stops = StopStrings(["aab"])
    assert stops.feed("aa") == ("", None)
    assert stops.feed("aab") == ("aa", "aab")


def test_an_included_stop_string_stays_in_the_text():
    stops = StopStrings(["##"], include=True)
    assert stops.feed("one#") == ("one", None)
    assert stops.feed("#two") == ("##", "##")


def reference(text, stops):
    """The first stop string to be completed, the longest of those; by trying every end."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stops, data):
    matcher = StopStrings(stops)
    out, matched = "", None
    for piece in cut(text, data):
        safe, matched = matcher.feed(piece)
        out += safe
        assert not any(stop in out for stop in stops)
        if matched is not None:
            break
    else:
        out += matcher.release()
    assert (out, matched) == reference(text, stops)
