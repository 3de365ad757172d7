"""Rows of data become examples, of which the completion or the assistant's text is learned."""

from pathlib import Path

import pytest
import trl
from finetuning_runs import ROWS, options, read
from row_files import write_lines
from tiny_models import chat_tokenizer
from transformers import AutoTokenizer

from healthslm.errors import UserError
from healthslm.finetuning.examples import IGNORED, read_examples


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def test_the_mask_of_a_chat_is_the_assistants_text(tokenizer, tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "α-synuclein?\n🧠"},
        {"role": "assistant", "content": " A protein é.\nYes"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "🧠"},
    ]
    (example,) = read([{"messages": chat}], tokenizer, tmp_path, context=200)
    learned = [token for token in example.labels if token != IGNORED]
    assert tokenizer.decode(learned) == " A protein é.\nYes<|end|>🧠<|end|><|endoftext|>"
    assert example.completion == " A protein é.\nYes🧠" and example.answer == "🧠" and example.prompt == "And?"
    assert tokenizer.decode(example.input_ids) == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>α-synuclein?\n🧠<|end|><|assistant|> A protein é.\nYes<|end|>"
        "<|user|>And?<|end|><|assistant|>🧠<|end|><|endoftext|>"
    )
    assert example.input_ids[: example.prompt_tokens] == tokenizer.apply_chat_template(
        chat[:-1], add_generation_prompt=True, return_dict=False
    )


def test_the_completion_of_a_cut_chat_is_the_text_that_is_left(tokenizer, tmp_path):
    rows = [{"messages": [*CHAT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "def"}]}]
    (whole,) = read(rows, tokenizer, tmp_path)
    length = len(whole.input_ids)
    for context, completion in ((length, "bdef"), (length - 1, "bdef"), (length - 3, "bde"), (length - 6, "b")):
        (example,) = read(rows, tokenizer, tmp_path, context=context, truncate=True)
        assert (len(example.input_ids), example.completion) == (context, completion)


def test_the_released_tokenizer_has_the_chat_template_and_no_new_tokens(repository):
    released = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
    assert len(released) == 32_000
    chat = [{"role": "user", "content": "What is <asthma>?"}, {"role": "assistant", "content": "A disease."}]
    found = released.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert released.decode(learned) == "A disease.<|end|><|endoftext|>"
    assert [token for token in found["input_ids"] if token < 6] == [0, 3, 5, 4, 5, 0]
    assert trl.chat_template_utils.is_chat_template_stop_token_trained(released)


def test_fields_and_templates_make_the_same_examples(tokenizer, tmp_path):
    rows = [{"abstract": "Mice.", "title": "On mice", "whole": "Mice.\nTitle: On mice"}]
    (by_template,) = read(rows, tokenizer, tmp_path, prompt="{abstract}\nTitle:", completion=" {title}")
    (by_mark,) = read(rows, tokenizer, tmp_path, text="whole", completion_after="\nTitle:")
    assert by_template == by_mark
    assert tokenizer.decode(by_template.input_ids) == "<|endoftext|>Mice.\nTitle: On mice<|endoftext|>"
    assert by_template.labels.count(IGNORED) == by_template.prompt_tokens == 13
    (plain,) = read(rows, tokenizer, tmp_path, text="whole")
    assert plain.labels[1:] == plain.input_ids[1:] and plain.labels[0] == IGNORED
    (spelled,) = read([{"prompt": "a", "completion": "<|end|>"}], tokenizer, tmp_path)
    assert 5 not in spelled.input_ids


def test_cut_examples_are_counted_and_what_is_left_without_a_completion_is_dropped(tokenizer, tmp_path):
    rows = [{"prompt": "abc", "completion": "d" * 20}, {"prompt": "a" * 30, "completion": "b"}, ROWS[0]]
    asked = options(Path("none"), tmp_path, data=[str(write_lines(tmp_path / "rows.jsonl", rows))])
    with pytest.raises(UserError, match=r"2 of 3 examples are longer than the context of 20 tokens \(.* 33\)"):
        read_examples(asked.data, asked, tokenizer, 20, None)
    asked.truncate = True
    found = read_examples(asked.data, asked, tokenizer, 20, None)
    assert (len(found), found.truncated, found.dropped) == (2, 1, 1)
    assert {example.completion for example in found.examples} == {"d" * 16, " even."}


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "rows, more, message",
    [
        ([], {}, "no examples: there are no rows"),
        ([{"a": "b"}], {}, "no fields prompt and completion, messages, or text; the fields are a"),
        (ROWS, {"prompt": "question", "completion": "completion"}, "row 1: no field 'question'; the fields are prompt"),
        (ROWS, {"prompt": "{prompt", "completion": "completion"}, "not a template"),
        (ROWS, {"prompt": "prompt"}, "--prompt and --completion belong together"),
        (ROWS, {"text": "prompt", "messages": "x"}, "exclude each other"),
        (ROWS, {"completion_after": "x"}, "name its field with --text"),
        (ROWS, {"text": "prompt", "completion_after": "nowhere"}, "in all 8 rows, prompt or completion is empty"),
        ([{"prompt": "a", "completion": " "}], {}, "no examples"),
        ([{"messages": "hello"}], {}, "not a list of messages with role and content"),
        ([{"messages": [*CHAT, {"role": "tool", "content": "x"}]}], {}, "unknown role tool"),
        ([{"messages": [{"role": "user", "content": "<|end|>"}, CHAT[1]]}], {}, r"special token <\|end\|>"),
        ([{"messages": CHAT}, {"messages": CHAT[1:]}], {}, "row 2: the assistant's message answers nothing: put"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(tokenizer, tmp_path, rows, more, message):
    with pytest.raises(UserError, match=message) as error:
        read(rows, tokenizer, tmp_path, **more)
    assert "\n" not in str(error.value)


def test_chats_need_a_template_that_marks_the_assistants_text(tmp_path):
    plain = chat_tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        read([{"messages": CHAT}], plain, tmp_path)
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="does not mark the assistant's text"):
        read([{"messages": CHAT}], plain, tmp_path)
