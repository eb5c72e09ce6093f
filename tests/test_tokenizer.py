import functools
import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, InvalidRequest, ModelError, PromptTooLong
from pagetier.handler.messages import RequestOutput, TokenLogprobs
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.tokenizer import OutputAssembler, StopChecker, Tokenizer

MAKERS = {"byte_level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}
SAMPLES = [
    "the quick brown fox",
    "  two  spaces, then a newline\n\n\tand a tab ",
    "Größe naïve 日本語 русский 🙂👩‍🚀 mixed 中文 the end",
    "🙂",
    "e\N{COMBINING ACUTE ACCENT} combined",
]


@functools.cache
def shared_tokenizer(kind):
    return Tokenizer(MAKERS[kind]())


@pytest.fixture(params=list(MAKERS))
def tokenizer(request):
    return shared_tokenizer(request.param)


@pytest.fixture
def byte_level():
    return shared_tokenizer("byte_level")


def pieces(tokenizer, ids, prompt=()):
    decoder = tokenizer.decoder(prompt)
    return [decoder.add([t]) for t in ids] + [decoder.finish()]


def generated(text, token_ids=(), *, stop=(), tokenizer=None):
    """The assembled deltas of an output that comes a token a step and never ends by itself."""
    ids = list(token_ids) or tokenizer.encode(text, add_special_tokens=False)
    assembler = OutputAssembler(tokenizer, [7], SamplingParams(stop=stop, max_tokens=None))
    return assembler, [assembler.add(RequestOutput("r", [t])) for t in ids]


@pytest.mark.parametrize("text", SAMPLES)
def test_encoding_equals_transformers(tokenizer, text):
    hf = tokenizer._hf
    assert tokenizer.encode(text) == hf(text)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == hf.encode(
        text, add_special_tokens=False
    )


def test_encoding_ignores_truncation_set_elsewhere():
    hf = byte_level_tokenizer()
    hf("some text", truncation=True, max_length=3)
    assert len(Tokenizer(hf).encode("abc " * 50)) > 3


def test_text_with_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_huge_text_is_refused_without_encoding_all_of_it(byte_level):
    begun = time.monotonic()
    with pytest.raises(PromptTooLong, match=r"about \d{7} tokens, but .* at most 100;"):
        byte_level.encode("word " * 1_000_000, max_tokens=100)
    assert time.monotonic() - begun < 1.0


def test_text_of_few_long_tokens_is_not_taken_for_too_long(byte_level):
    text = "<|assistant|>" * 3000
    assert len(byte_level.encode(text, max_tokens=3000)) == 3000


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text):
    # A prompt goes before, so that the text's own first space is kept.
    prompt = tokenizer.encode("the")
    ids = tokenizer.encode(text, add_special_tokens=False)
    got = pieces(tokenizer, ids, prompt)
    assert "".join(got) == tokenizer.decode([*prompt, *ids])[len("the") :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)


@settings(deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(1, 7), max_size=40))
def test_byte_level_text_survives_any_division_into_steps(text, cuts):
    tokenizer = shared_tokenizer("byte_level")
    ids = iter(tokenizer.encode(text, add_special_tokens=False))
    decoder = tokenizer.decoder()
    got = ""
    for cut in itertools.chain(cuts, itertools.repeat(5)):
        step = list(itertools.islice(ids, cut))
        if not step:
            break
        got += decoder.add(step)
    assert got + decoder.finish() == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(5, 339), max_size=30))
def test_byte_level_pieces_of_any_tokens_join_to_the_whole(ids):
    """Also of bytes that are no UTF-8 at all."""
    tokenizer = shared_tokenizer("byte_level")
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="the quick fox é日🙂", max_size=30))
def test_sentencepiece_pieces_join_to_the_whole(text):
    tokenizer = shared_tokenizer("sentencepiece")
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer.encode("the")
    whole = tokenizer.decode([*prompt, *ids])
    assert "".join(pieces(tokenizer, ids, prompt)) == whole[len("the") :]


def test_sentencepiece_bytes_without_meaning_are_not_held_forever():
    tokenizer = Tokenizer(sentencepiece_tokenizer())
    stray = tokenizer._backend.token_to_id("<0xFF>")
    got = pieces(tokenizer, [stray] * 12)
    assert "".join(got[:8]) != ""
    assert "".join(got) == "\N{REPLACEMENT CHARACTER}" * 12


def test_half_a_character_is_held_back_until_it_is_whole(tokenizer):
    prompt = tokenizer.encode("the")
    ids = tokenizer.encode("🙂", add_special_tokens=False)[-4:]
    got = pieces(tokenizer, ids, prompt)
    assert got[-2:] == ["🙂", ""]
    assert set(got[:-2]) <= {""}


def test_half_a_character_at_the_end_becomes_a_replacement(byte_level):
    ids = byte_level.encode("é", add_special_tokens=False)
    first_byte = [byte_level._backend.token_to_id("Ã")]
    assert len(ids) <= 2
    assert pieces(byte_level, first_byte) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_have_no_text_when_streamed(tokenizer):
    eos = tokenizer.eos_token_id
    ids = [*tokenizer.encode("the", add_special_tokens=False), eos]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, [eos, eos])) == ""


def test_ids_outside_the_vocabulary_have_no_text(byte_level):
    assert pieces(byte_level, [10_000, 10_001]) == ["", "", ""]
    assert byte_level.token_bytes(10_000) == b""


def test_decoding_costs_the_same_for_each_token_however_long(tokenizer):
    ids = tokenizer.encode("the quick brown fox " * 3000, add_special_tokens=False)

    def seconds(ids):
        decoder = tokenizer.decoder()
        begun = time.perf_counter()
        for token in ids:
            decoder.add([token])
        return time.perf_counter() - begun

    short = min(seconds(ids[:2000]) for _ in range(3))
    long = min(seconds(ids[:20000]) for _ in range(2))
    assert long < 40 * short  # ten times as many tokens; quadratic would be a hundredfold


def test_token_bytes_join_to_the_text(tokenizer):
    text = "the quick 🙂 fox"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(t) for t in ids).decode().strip() == text


# --- chat and loading ------------------------------------------------------------------------


def test_chat_is_rendered_up_to_the_answer(byte_level):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert byte_level.render_chat(messages) == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    )


def test_chat_template_from_the_settings_wins():
    tokenizer = Tokenizer(byte_level_tokenizer(), chat_template="{{ messages[0].content }}!")
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_chat_that_the_template_refuses_is_an_invalid_request(byte_level):
    with pytest.raises(InvalidRequest, match="unknown role wizard") as caught:
        byte_level.render_chat([{"role": "wizard", "content": "Hi"}])
    assert caught.value.param == "messages"


def test_chat_without_a_template_is_an_invalid_request():
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(sentencepiece_tokenizer()).render_chat([{"role": "user", "content": "Hi"}])


def test_tokenizer_and_chat_template_are_loaded_from_files(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("[{{ messages[0].content }}]")
    config = EngineConfig(model="m", tokenizer=str(tmp_path), chat_template=str(template))
    tokenizer = Tokenizer.load(config)
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "[Hi]"
    assert tokenizer.decode(tokenizer.encode("日本 fox")) == "日本 fox"


def test_missing_files_are_told_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.load(EngineConfig(model=str(tmp_path / "nothing")))
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="chat template") as caught:
        Tokenizer.load(EngineConfig(model=str(tmp_path), chat_template=str(tmp_path / "no.jinja")))
    assert caught.value.param == "chat_template"


def test_folder_without_a_tokenizer_is_named_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(EngineConfig(model=str(tmp_path)))
    assert caught.value.message == (
        f"The folder {str(tmp_path)!r} holds no tokenizer; put its tokenizer.json there, or name "
        "another folder or hub id with the setting 'tokenizer'."
    )


def test_broken_tokenizer_is_told_in_a_whole_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(EngineConfig(model=str(tmp_path)))
    message = caught.value.message
    assert re.fullmatch(r"The tokenizer of '.*' cannot be read: [^\n]*[^:.]\.", message), message


def test_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="no fast version"):
        Tokenizer(object())


# --- stop strings ----------------------------------------------------------------------------


def naive_stop(text, stops):
    """The text before the stop string that ends first (of those, the longest), and it."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("cut", range(1, 12))
def test_stop_string_is_found_wherever_it_is_cut(cut):
    text = "one STOP two"
    checker = StopChecker(["STOP"])
    shown = checker.add(text[:cut])
    assert "S" not in shown
    if checker.found is None:
        shown += checker.add(text[cut:])
    assert (shown, checker.found) == ("one ", "STOP")


def test_text_that_only_began_like_a_stop_string_is_shown():
    checker = StopChecker(["</end>"])
    assert checker.add("a</en") == "a"
    assert checker.add("try") == "</entry"
    assert checker.add("</e") == ""
    assert checker.finish() == "</e"
    assert checker.found is None


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab ", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_stop_strings_do_not_depend_on_the_pieces(parts, stops):
    checker = StopChecker(stops)
    shown = ""
    for part in parts:
        shown += checker.add(part)
        if checker.found is not None:
            break
        assert naive_stop(shown, stops)[1] is None
    else:
        shown += checker.finish()
    assert (shown, checker.found) == naive_stop("".join(parts), stops)


# --- assembling ------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["quick", "ick br", "k", " brown fox", "日本", "本語"])
def test_stop_string_ends_the_output_at_the_token_that_completes_it(tokenizer, stop):
    text = "the quick brown fox 日本語 end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    completed_at = next(
        n for n in range(1, len(ids) + 1) if stop in "".join(pieces(tokenizer, ids[:n])[:-1])
    )
    assembler, deltas = generated(text, stop=[stop], tokenizer=tokenizer)
    shown = "".join(d.text for d in deltas)
    assert shown.strip() == text[: text.index(stop)].strip()
    last = deltas[completed_at - 1]
    assert (last.finish_reason, last.stop_reason, last.abort) == ("stop", stop, True)
    assert assembler.num_output_tokens == completed_at
    assert sum(len(d.token_ids) for d in deltas) == completed_at
    assert [d.finish_reason for d in deltas[: completed_at - 1]] == [None] * (completed_at - 1)


def test_tokens_after_a_stop_string_in_the_same_report_do_not_count(byte_level):
    ids = byte_level.encode("the quick brown fox", add_special_tokens=False)
    logprobs = [TokenLogprobs(t, -1.0, [], []) for t in ids]
    assembler = OutputAssembler(byte_level, [7], SamplingParams(stop="quick"))
    delta = assembler.add(RequestOutput("r", ids, logprobs=logprobs, finish_reason="length"))
    assert delta.text == "the "
    assert (delta.finish_reason, delta.stop_reason, delta.abort) == ("stop", "quick", False)
    assert len(delta.token_ids) == len(delta.logprobs) == assembler.num_output_tokens < len(ids)


def test_stop_token_is_counted_but_has_no_text(byte_level):
    ids = byte_level.encode("the fox", add_special_tokens=False)
    assembler = OutputAssembler(byte_level, [7], SamplingParams(stop_token_ids=[ids[-1]]))
    output = RequestOutput("r", ids, finish_reason="stop", stop_reason=ids[-1])
    delta = assembler.add(output)
    assert delta.text == byte_level.decode(ids[:-1])
    assert (delta.finish_reason, delta.stop_reason, delta.abort) == ("stop", ids[-1], False)
    assert assembler.num_output_tokens == len(ids)


def test_stop_text_and_stop_token_are_shown_if_asked_for(tokenizer):
    ids = tokenizer.encode("one two. three", add_special_tokens=False)
    params = SamplingParams(stop="two.", include_stop_str_in_output=True, max_tokens=None)
    assembler = OutputAssembler(tokenizer, [7], params)
    deltas = [assembler.add(RequestOutput("r", [t])) for t in ids]
    assert "".join(d.text for d in deltas).strip() == "one two."
    assert assembler.finish_reason == "stop"
    params = SamplingParams(include_stop_str_in_output=True)
    assembler = OutputAssembler(tokenizer, [7], params)
    delta = assembler.add(RequestOutput("r", ids, finish_reason="stop", stop_reason=ids[-1]))
    assert delta.text.strip() == "one two. three"


def test_stop_texts_before_min_tokens_are_passed_over(byte_level):
    ids = byte_level.encode("abababab", add_special_tokens=False)
    texts = list(map(byte_level.decode, ([t] for t in ids)))
    for min_tokens in range(len(ids)):
        params = SamplingParams(stop=["ab"], min_tokens=min_tokens, max_tokens=None)
        assembler = OutputAssembler(byte_level, [7], params)
        deltas = [assembler.add(RequestOutput("r", [t])) for t in ids]
        # The first token after so many in whose text a stop string is complete.
        ends = [sum(map(len, texts[: i + 1])) for i in range(len(ids))]
        begins = [0, *ends]
        last = next(
            i
            for i in range(min_tokens, len(ids))
            if any(begins[i] < end <= ends[i] for end in (2, 4, 6, 8))
        )
        shown = next(end for end in (2, 4, 6, 8) if begins[last] < end <= ends[last]) - 2
        assert "".join(d.text for d in deltas) == "abababab"[:shown]
        assert assembler.num_output_tokens == last + 1


def test_special_tokens_have_text_if_asked_for(tokenizer):
    special = tokenizer.eos_token_id
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    ids = [*ids[:1], special, *ids[1:]]
    name = tokenizer.token_bytes(special).decode()
    for skip in (True, False):
        params = SamplingParams(skip_special_tokens=skip)
        assembler = OutputAssembler(tokenizer, [7], params)
        text = "".join(assembler.add(RequestOutput("r", [t])).text for t in ids)
        assert text.count(name) == (not skip)


def test_bad_words_stand_for_their_tokens_with_a_space_and_without(tokenizer):
    params = SamplingParams(bad_words=["fox", "  brown", [5, 6]], seed=4)
    changed = tokenizer.with_bad_word_tokens(params)
    assert changed.bad_words[-1] == (5, 6)
    assert changed.seed == 4
    for text in ("fox", " fox", "brown", " brown"):
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) in changed.bad_words
    assert len(set(changed.bad_words)) == len(changed.bad_words)


def test_held_text_is_shown_at_the_end(byte_level):
    ids = byte_level.encode("the fox </e", add_special_tokens=False)
    assembler = OutputAssembler(byte_level, [7], SamplingParams(stop="</end>"))
    assert assembler.add(RequestOutput("r", ids)).text == "the fox "
    delta = assembler.add(RequestOutput("r", [], finish_reason="length", num_preemptions=2))
    assert (delta.text, delta.finish_reason) == ("</e", "length")
    assert assembler.num_preemptions == 2


def test_reports_after_the_end_change_nothing(byte_level):
    ids = byte_level.encode("the fox", add_special_tokens=False)
    assembler = OutputAssembler(byte_level, [7], SamplingParams(stop="the"))
    assert assembler.add(RequestOutput("r", ids)).finish_reason == "stop"
    late = assembler.add(RequestOutput("r", ids, finish_reason="length"))
    assert (late.text, late.token_ids) == ("", [])
    assert assembler.num_output_tokens == 1
