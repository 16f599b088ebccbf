"""``components.data.chat``: chats are the text that transformers makes of them, cut where the assistant speaks."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from components.data import ChatTemplate, load_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] "
    "+ '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}"
)
# Marks what the assistant says, as templates for assistant masks do, and uses what only transformers' environment has.
CHATML = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set "
    "content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Mistral's: no prompt for the reply, which begins with a space, and roles that must alternate.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}{{ bos_token }}{% for message in "
    "loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') "
    "}}{% endif %}{% if message['role'] == 'user' %}{% if loop.first and system_message is defined %}{{ ' [INST] ' + "
    "system_message + '\\n\\n' + message['content'] + ' [/INST]' }}{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' "
    "}}{% endif %}{% else %}{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
# No special tokens, the reply's header only on request.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m | tojson if m.role == 'system' else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "plain": PLAIN}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request, tmp_path_factory):
    """A tokenizer of bytes that, like Llama's, puts a BOS before every text, with one of the templates."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + len(alphabet), special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp(request.param)
    inner.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
        "chat_template": TEMPLATES[request.param],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


words = st.text("ab <&ü\n", min_size=1, max_size=9).filter(str.strip)


@st.composite
def chats(draw):
    """System text or not, then one to three questions with answers."""
    chat = [{"role": "system", "content": draw(words)}] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 3))):
        chat += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return chat


@settings(max_examples=30)
@given(chat=chats())
def test_text_and_tokens_are_those_of_transformers(both, chat):
    ours, theirs = both
    for messages, prompted in ((chat, False), (chat[:-1], True)):
        text = ours.chat_template.render(messages, add_generation_prompt=prompted)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompted, tokenize=False)
        assert ours.encode(text) == theirs.apply_chat_template(messages, add_generation_prompt=prompted)


@settings(max_examples=30)
@given(chat=chats())
def test_every_reply_stands_behind_the_prompt_that_it_is_generated_from(both, chat):
    ours, theirs = both
    replies = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    [last] = ours.chat_template.turns(chat)
    assert ours.encode(last.prompt) == theirs.apply_chat_template(chat[:-1], add_generation_prompt=True)
    turns = ours.chat_template.turns(chat, learn_from="all")
    assert len(turns) == len(replies)
    text = ""
    for number, turn in zip(replies, turns, strict=True):
        text += turn.prompt
        assert text == theirs.apply_chat_template(chat[:number], add_generation_prompt=True, tokenize=False)
        text += turn.reply
        assert chat[number]["content"].strip() in turn.reply
    assert text == last.prompt + last.reply


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "end "},
]


@pytest.mark.parametrize(
    ("source", "first", "second"),
    [
        (
            CHATML,
            ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>"),
            ("\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n", "end <|im_end|>"),
        ),
        (
            LLAMA3,
            (
                "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "yo<|eot_id|>",
            ),
            (
                "<|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "end<|eot_id|>",
            ),
        ),
        (MISTRAL, ("<s> [INST] hi [/INST]", " yo</s>"), (" [INST] so [/INST]", " end </s>")),
        # What has no end token of its own is ended by EOS, where the chat ends.
        (PLAIN, ("user: hi\nassistant: ", "yo"), ("\nuser: so\nassistant: ", "end</s>")),
    ],
    ids=["chatml", "llama3", "mistral", "plain"],
)
def test_a_reply_ends_with_the_end_token_of_its_turn(source, first, second):
    template = ChatTemplate(source, variables={"bos_token": "<s>", "eos_token": "</s>"}, special_tokens=SPECIAL)
    assert template.turns(TALK, learn_from="all") == [first, second]
    assert template.turns(TALK) == [(first[0] + first[1] + second[0], second[1])]


def test_a_special_token_that_the_reply_quotes_does_not_end_it():
    template = ChatTemplate(CHATML, variables={}, special_tokens=SPECIAL)
    [turn] = template.turns([TALK[0], {"role": "assistant", "content": "a<|im_end|>b"}])
    assert turn.reply == "a<|im_end|>b<|im_end|>"


def test_the_date_of_today_is_not_offered():
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}fixed{% endif %}"
    assert ChatTemplate(dated, variables={}, special_tokens=[]).render([]) == "fixed"


def test_the_template_is_found_where_transformers_finds_it(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert load_tokenizer(tmp_path).chat_template.render([]) == "from its own file"
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, tokenize=False) == "from its own file"
    (tmp_path / "chat_template.jinja").unlink()
    several = [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "the default"}]
    for template, text in ((several, "the default"), (several[:1], None), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        found = load_tokenizer(tmp_path).chat_template
        assert (found and found.render([])) == text


THINKING = (  # forgets the thoughts of all replies but the last, as Qwen3's
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content.split('/')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("source", "chat", "message"),
    [
        (CHATML, [], "there are no messages; a chat is a list of"),
        (CHATML, TALK[:1], "the last message is the user's; a chat ends with what the assistant says"),
        (CHATML, [*TALK[:2], {"role": "assistant", "content": None}], "message 2 has no role or no text"),
        (CHATML, ["hi"], "message 0 has no role or no text"),
        (MISTRAL, [TALK[0], *TALK[2:]], r"refuses this chat \(roles must alternate\)"),
        ("{{ strftime_now('%Y') }}", TALK, r"refuses this chat \('strftime_now' is undefined\)"),
        (
            THINKING,
            [TALK[0], {"role": "assistant", "content": "hm/yo"}, *TALK[2:]],
            "before message 3; set learn_from: last",
        ),
        ("{{ messages | length }}", TALK, "does not put message 1 behind its own prompt"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", TALK, "changes the reply 'yo'"),
    ],
)
def test_what_cannot_be_cut_into_turns_is_refused(source, chat, message):
    template = ChatTemplate(source, variables={"bos_token": "<s>"}, special_tokens=SPECIAL)
    with pytest.raises(ValueError, match=message):
        template.turns(chat, learn_from="all")


def test_a_template_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"the chat template cannot be read \(unexpected 'end of template'"):
        ChatTemplate("{% if", variables={}, special_tokens=[])
