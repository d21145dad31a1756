"""Templates that models bring, by the shapes that they have; transformers is the oracle."""

import json
import random
import shutil
from datetime import datetime

import numpy as np
import pytest
from test_chat import HOSTILE, TOOL, metaspace_first, some_dialog
from test_tokenizer import sentencepiece_model

import prepare
import train
from plainllama.command import parse
from plainllama.settings import UserError
from plainllama.text.dialogs import Refused
from plainllama.tokens import chat, shards, templates, tokenizer, tokenizer_json, vocabulary

transformers = pytest.importorskip("transformers")

# Each in two forms: {G} and {E} become nothing, or the marks by which transformers finds answers.
IM = """{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nBe good.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{G}
        {%- if message.reasoning_content and (loop.last or KEEP) %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{E}{{- '\\n' }}
    {%- elif message.role == 'system' and tools %}
        {{- '<|im_start|>system\\n' + message.content + (tools | tojson) + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- set day = strftime_now('%Y') %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}{G}{{- message['content'] | trim + '<|eot_id|>' }}{E}
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
INST = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{G}{{- ' ' + message['content'] + eos_token}}{E}
{%- else %}{{- raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"""
STRIPPED = """{%- for message in messages %}{{- '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}{G}{{- message.content + '<|end|>' }}{E}{{- '\\n' }}
{%- else %}{{- message.content + '<|end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
SHAPES = {  # template, its special tokens
    "im": (IM.replace("KEEP", "true"), ["<|im_start|>", "<|im_end|>"]),
    "thinks": (IM.replace("KEEP", "false"), ["<|im_start|>", "<|im_end|>"]),
    "headers": (HEADERS, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "inst": (INST, []), "stripped": (STRIPPED, ["<|user|>", "<|assistant|>", "<|end|>"])}
ANSWER = {"role": "assistant", "content": "fine"}
ASKED = [{"role": "user", "content": "how?"}, ANSWER]


def template_of(shape: str, marks: bool = False) -> str:
    text = SHAPES[shape][0]
    inner = ("{%- generation %}", "{%- endgeneration %}") if marks else ("", "")
    return text.replace("{G}", inner[0]).replace("{E}", inner[1])


def words(kind: str, shape: str, folder) -> tokenizer.Tokenizer:
    """A tokenizer with the special tokens of a shape."""
    if kind == "first":
        spec = metaspace_first("first")[0] | {"decoder": metaspace_first("always")[0]["decoder"]}
    elif kind == "sp":
        path, _ = sentencepiece_model(folder, vocab_size=420, model_type="bpe", byte_fallback=True,
                                      normalization_rule_name="identity",
                                      remove_extra_whitespaces=False)
        spec = json.loads(tokenizer.make_tokenizer(str(path)).json_bytes)
    else:
        made = tokenizer.make_tokenizer(kind, lambda: ["assistant\n\nab\n\nuser\n\n" * 99])
        spec = json.loads(made.json_bytes)
    size = max(tokenizer_json.list_entries(spec)) + 1
    spec["added_tokens"] += [vocabulary.special(name, size + i) | {"rstrip": shape == "stripped"}
                             for i, name in enumerate(SHAPES[shape][1])]
    return tokenizer.Tokenizer(*tokenizer_json.complete(spec, kind), kind)


@pytest.fixture(scope="module", params=[(kind, shape) for shape in SHAPES
                                        for kind in ("bytes", "first", "sp")],
                ids=lambda pair: "-".join(pair))
def both(request, tmp_path_factory):
    """(our ModelChat, transformers' tokenizer with the marked template, without marks)."""
    kind, shape = request.param
    folder = tmp_path_factory.mktemp("template")
    ours = words(kind, shape, folder)
    ours.save(folder)
    readers = []
    for marks in (True, False):
        (folder / tokenizer_json.TEMPLATE_FILE).write_text(template_of(shape, marks))
        (out := folder / f"hf{marks}").mkdir()
        tokenizer_json.write_hf_files(folder / "tokenizer.json", out, 4096)
        readers.append(transformers.AutoTokenizer.from_pretrained(out))
    return templates.ModelChat(ours, template_of(shape)), *readers


def for_them(dialog: dict) -> dict:
    """A dialog in OpenAI's form, as transformers wants it."""
    return {"conversation": templates.for_template(dialog["messages"]),
            "tools": [{"type": "function", "function": tool} for tool in dialog.get("tools", ())]
            or None}


def test_ids_and_masks_are_those_of_transformers(both):
    talk, marked, plain = both
    strips = any(entry["rstrip"] for entry in json.loads(talk.tokenizer.json_bytes)["added_tokens"])
    draw, same = random.Random(4), 0
    texts = [text for text in HOSTILE if len(text) < 500]
    for _ in range(150):
        dialog = some_dialog(draw, texts)
        if any(name in chat.as_json(dialog) for name in talk.tokenizer.special_ids):
            continue
        try:
            ids, learned, ends, _ = talk.rendered(dialog)
        except Refused:
            continue
        given = for_them(dialog)
        found = marked.apply_chat_template(**given, return_dict=True,
                                           return_assistant_tokens_mask=True)
        assert ids.tolist() == found["input_ids"], dialog
        answers = [i for i, message in enumerate(dialog["messages"])
                   if message["role"] == "assistant"]
        taught = [dialog["messages"][i].get("learn", True) for i in answers]
        # where a token takes the blanks behind it, transformers counts it to the answer's first
        blank = any(dialog["messages"][i]["content"][:1].isspace() for i in answers)
        if len(ends) == len(answers) and all(taught) and not (strips and blank):
            assert learned.astype(int).tolist() == found["assistant_masks"], dialog
        last = dialog["messages"][:answers[-1]]
        prompt = talk.prompt(last, dialog.get("tools"))
        assert prompt == plain.apply_chat_template(
            **for_them({"messages": last, "tools": dialog.get("tools", ())}),
            add_generation_prompt=True, return_dict=False)
        assert ids[:len(prompt)].tolist() == prompt
        if taught[-1]:
            stop = ids[len(prompt):][learned[len(prompt):]]
            assert int(stop[-1]) in talk.tokenizer.stop_ids and learned[len(prompt)]
        same += 1
    assert same > 10


def test_what_is_typed_stays_text(both):
    talk = both[0]
    names = talk.tokenizer.special_ids
    question = " and ".join(names)
    counts = [[(part == i).sum() for i in names.values()] for part in (
        talk.rendered({"messages": [{"role": "user", "content": text}, ANSWER]}).ids
        for text in ("so", question))]
    assert counts[0] == counts[1]
    ids, learned = talk.render({"messages": [ASKED[0], ANSWER | {"content": question}]})
    assert read_back(talk, ids[learned][:-1]) == ANSWER | {"content": question}


# ---- what is refused

def read_back(talk: chat.Chat, ids) -> dict:
    """Read an answer's ids, without what ends it."""
    return talk.parse(talk.tokenizer.decode_behind(ids.tolist()))


def talk_of(template: str, names: list[str] = SHAPES["im"][1], **how) -> templates.ModelChat:
    """A template over bytes with some special tokens."""
    spec = json.loads(tokenizer.make_tokenizer("bytes").json_bytes)
    spec["added_tokens"] += [vocabulary.special(name, 258 + i) for i, name in enumerate(names)]
    made = tokenizer.Tokenizer(*tokenizer_json.complete(spec, "x"), "x")
    return templates.ModelChat(made, template, **how)


TURN = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
CALLS = [ASKED[0], {"role": "assistant", "content": "",
                    "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
         {"role": "tool", "content": '{"it": "2\\n"}'}, ANSWER]


@pytest.mark.parametrize(("template", "dialog", "reason"), [
    (template_of("inst"), {"messages": [{"role": "system", "content": "x"}, *ASKED]}, "alternate"),
    (TURN, {"messages": ASKED, "tools": [TOOL]}, "leaves out tools"),
    (TURN, {"messages": CALLS}, "leaves out what an answer says"),
    (TURN, {"messages": [ASKED[0], ANSWER | {"reasoning": "hm, so"}]}, "what an answer says"),
    (TURN.replace("{{ '<|im_start|>' + m", "{% if m.role != 'system' %}{{ '<|im_start|>' + m")
     .replace("{% endfor", "{% endif %}{% endfor"),
     {"messages": [{"role": "system", "content": "be"}, *ASKED]}, "a message of role system"),
    ("{{ bos_token }}" + TURN.replace("{{ '<|im_st", "{{ bos_token + '<|im_st"),
     {"messages": ASKED}, "begins a text inside"),
    (TURN.replace("<|im_end|>' }}", "' + ('.' if m.content == 'fine' else '<|im_end|>') }}"),
     {"messages": ASKED}, "ends in no token"),
    (TURN.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif"),
     {"messages": ASKED}, None),
    (TURN.replace("m.content +", "(m.content | tojson(ensure_ascii=true)) +"),
     {"messages": [{"role": "user", "content": "<|im_end|>"}, ANSWER]}, "role user"),
    (TURN.replace("m.content", "m.content.nothing.there"), {"messages": ASKED}, None),
    ("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}", {"messages": ASKED}, None),
    ("{% for m in messages %}", {"messages": ASKED}, None)])
def test_what_a_template_cannot_say_is_refused(template, dialog, reason):
    if reason is None:
        with pytest.raises(UserError, match="use chat_template=own") as caught:
            talk_of(template)
        assert "\n" not in str(caught.value)
    else:
        with pytest.raises(Refused, match=reason):
            talk_of(template).render(dialog)


def test_an_answer_that_joins_its_prompt_is_refused(tmp_path):
    """A line break in front of it makes one token of two with the one that the prompt ends with."""
    talk = templates.ModelChat(words("bpe:300", "im", tmp_path), template_of("im"))
    talk.render({"messages": ASKED})
    with pytest.raises(Refused, match="otherwise than its prompt"):
        talk.render({"messages": [ASKED[0], ANSWER | {"content": "\nfine"}]})


def test_a_template_that_rewrites_is_learned_on_its_last_answer():
    dialog = {"messages": [ASKED[0], ANSWER | {"reasoning": "so"}, ASKED[0],
                           ANSWER | {"reasoning": "thus"}]}
    for shape, learned, ends in (("im", "sothus", 2), ("thinks", "thus", 1)):
        talk = talk_of(template_of(shape))
        found = talk.rendered(dialog)
        text = talk.tokenizer.decode(found.ids[found.learned])
        assert len(found.ends) == ends and found.rewritten == (ends == 1)
        assert text == "".join(f"<think>\n{part}\n</think>\n\nfine"
                               for part in learned.replace("so", "so,").split(","))
    assert talk.fitted(found, len(found.ids) - 1)[0] is None
    asked = talk.prompt(dialog["messages"][:3])
    assert found.ids[:len(asked)].tolist() == asked


def test_an_answer_is_read_back():
    for shape in ("im", "inst"):
        talk = talk_of(template_of(shape))
        for message in (ANSWER, CALLS[1]) if shape == "im" else (ANSWER,):
            ids, learned = talk.render({"messages": [ASKED[0], message]})
            assert read_back(talk, ids[learned][:-1]) == message


def test_calls_and_their_results_have_names_in_common():
    """What templates of others ask for: ids, of nine characters, and the function of a result."""
    messages = templates.for_template([ASKED[0], CALLS[1] | {"tool_calls": [
        {"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]},
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, *CALLS[1:]])
    assert [message["name"] for message in messages if message["role"] == "tool"] == [
        "a", "b", "add"]
    assert [call["id"] for message in messages for call in message.get("tool_calls", ())] == [
        message["tool_call_id"] for message in messages if message["role"] == "tool"]
    assert all(len(message["tool_call_id"]) == 9 for message in messages
               if message["role"] == "tool")
    assert messages[1]["tool_calls"][0]["function"] == {"name": "a", "arguments": {}}


def test_everything_is_learned_where_it_is_asked_for():
    assert talk_of(TURN).render({"messages": ASKED, "learn_all": True})[1][1:].all()


def test_the_day_that_a_template_asks_for():
    talk = talk_of("{{ strftime_now('%d %b %Y') }}" + TURN, now=datetime(2031, 5, 7))
    assert talk.tokenizer.decode(talk.prompt(ASKED[:1])).startswith("07 May 2031")


# ---- where templates are found

def folder_of(tmp_path, config: dict) -> tokenizer.Tokenizer:
    """A model's folder, with special tokens whose names are its own."""
    talk = talk_of(TURN)
    talk.tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "unk_token": None,
         "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}, **config}))
    return talk.tokenizer


ENDED = "{% if tools %}\n{% endif %}" + TURN.replace("+ '<|im_end|>'", "+ eos_token")


@pytest.mark.parametrize("config", [
    {"chat_template": ENDED}, {"chat_template": "\n" + ENDED},
    {"chat_template": [{"name": "default", "template": ENDED}]},
    {"chat_template": [{"name": "default", "template": "\n" + ENDED + "\n"},
                       {"name": "tool_use", "template": "{{ tools[0].function.name }}" + ENDED}]}])
def test_a_models_template_with_its_names_of_tokens(tmp_path, config):
    ours = folder_of(tmp_path, config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = templates.ModelChat(ours, templates.find_template(tmp_path))
    for tools in ([], [TOOL]) if len(config["chat_template"]) == 2 else ([],):
        dialog = {"messages": ASKED, "tools": tools}
        ids = talk.render(dialog)[0]
        assert ids.tolist() == theirs.apply_chat_template(**for_them(dialog), return_dict=False)
    # what we write of it is read back, here and by transformers
    (made := tmp_path / "made").mkdir()
    (tmp_path / tokenizer_json.TEMPLATE_FILE).write_text(templates.find_template(tmp_path))
    tokenizer_json.write_hf_files(tmp_path / "tokenizer.json", made, 64)
    again = transformers.AutoTokenizer.from_pretrained(made)
    assert again.apply_chat_template(**for_them(dialog), return_dict=False) == ids.tolist()
    assert templates.chat_of(tokenizer.Tokenizer.load(made)).render(dialog)[0].tolist() == (
        ids.tolist())


def test_a_folder_without_a_template(tmp_path):
    for config in ({}, {"chat_template": [{"name": "rag", "template": TURN}]}):
        ours = folder_of(tmp_path, config)
        with pytest.raises(UserError, match="brings no template"):
            templates.find_template(tmp_path)
    with pytest.raises(UserError, match="knows no dialogs"):
        templates.chat_of(ours)


def test_the_own_template_is_known(tmp_path):
    spec, data = chat.with_roles(json.loads(tokenizer.make_tokenizer("bytes").json_bytes), "x")
    (tmp_path / tokenizer_json.TEMPLATE_FILE).write_text(chat.TEMPLATE)
    tokenizer.Tokenizer(spec, data).save(tmp_path)
    assert type(templates.chat_of(tokenizer.Tokenizer.load(tmp_path))) is chat.Chat


def test_what_ends_an_answer(tmp_path, capsys):
    ours = folder_of(tmp_path, {})
    spec = json.loads(ours.json_bytes)
    assert templates.answer_ends("", spec) == set()
    for text, name in ((TURN, "<|im_end|>"), (chat.TEMPLATE, chat.END)):
        assert templates.answer_ends(text, spec) == {name}
    assert {ours.special_ids["<|im_end|>"], ours.end_id} == ours.stop_ids
    assert templates.answer_ends("{{ a", spec) == set()
    assert "not told what ends an answer: the model's template of" in capsys.readouterr().out


# ---- a data set, a run and what opens it

@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a model's tokenizer and template, dialogs, and a config for both."""
    (tmp_path / "model").mkdir()
    folder_of(tmp_path / "model", {"chat_template": ENDED})
    rows = [{"messages": [{"role": "user", "content": f"what is {n}?"},
                          ANSWER | {"content": f"it is <|im_end|> {n + 1}"}]} for n in range(40)]
    rows += [{"messages": ASKED, "tools": [TOOL]}] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "talk.py").write_text("\n".join(
        f"{name} = {value!r}" for name, value in {
            "dataset": "talk", "sources": "rows.jsonl", "documents": "chat", "tokenizer": "model",
            "chat_template": "model", "val_fraction": 0.2, "workers": 1, "n_layer": 1, "n_head": 1,
            "d_model": 8, "d_ff": 8, "block_size": 128, "global_batch_tokens": 256,
            "micro_batch": 2, "max_steps": 1, "device": "cpu", "sample_tokens": 4}.items()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_by_a_models_template(home, capsys):
    words = ["talk.py"]
    assert prepare.main(parse(words, "", prepare.Flags)) == 0
    said = capsys.readouterr().out
    assert "the template leaves out tools" in said
    made = tokenizer.Tokenizer.load(home / "data/talk")
    talk = templates.chat_of(made)
    split = shards.Split(home / "data/talk", "train", shards.read_manifest(home / "data/talk"))
    ids, learned = split.read(0, split.tokens), split.read_mask(0, split.tokens)
    ends = ids == made.special_ids["<|im_end|>"]
    assert ends.sum() == 2 * split.documents and (ends & learned).sum() == split.documents
    first = ids[learned][:np.flatnonzero(ends[learned])[0]]
    assert read_back(talk, first)["content"].startswith("it is <|im_end|> ")
    assert train.main(parse(words, "", train.Flags)) == 0
    step = home / "out/talk/checkpoints/step_1"
    assert tokenizer.Tokenizer.load(step).template == made.template
    assert json.loads((step / "generation_config.json").read_text())["eos_token_id"] == [
        made.end_id, made.special_ids["<|im_end|>"]]
    folder_of(home / "model", {"chat_template": ENDED + "{# #}"})
    with pytest.raises(UserError, match="file has changed"):
        prepare.main(parse(words, "", prepare.Flags))


@pytest.mark.parametrize("kind", ["model", "own"])
def test_a_model_of_dialogs_that_goes_on_with_text_keeps_its_template(home, kind):
    """Also resumed where what it began with is gone; a model that begins anew gets none."""
    assert prepare.main(parse(["talk.py", f"--chat_template={kind}"], "", prepare.Flags)) == 0
    assert train.main(parse(["talk.py"], "", train.Flags)) == 0
    chat_step = home / "out/talk/checkpoints/step_1"
    (home / "more.txt").write_text("\n".join(f"line {n} of a text" for n in range(300)))
    words = ["talk.py", "--dataset=more", "--sources=more.txt", "--documents=text",
             "--chat_template=own", "--tokenizer=out/talk"]
    assert prepare.main(parse(words, "", prepare.Flags)) == 0
    words = ["talk.py", "--dataset=more", "--init_from=out/talk", "--out_dir=out/more"]
    assert train.main(parse(words, "", train.Flags)) == 0
    names = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")
    kept = {name: (chat_step / name).read_text() for name in names}
    shutil.rmtree(home / "out/talk")
    assert train.main(parse([*words, "--max_steps=2", "--extend"], "", train.Flags)) == 0
    for step in (home / "out/more/checkpoints").iterdir():
        assert {name: (step / name).read_text() for name in names} == kept
    assert train.main(parse([*words[:2], "--out_dir=out/base"], "", train.Flags)) == 0
    assert not (home / "out/base/checkpoints/step_1/chat_template.jinja").exists()


def test_a_template_needs_its_folder(home):
    with pytest.raises(UserError, match="tokenizer=bytes is none"):
        prepare.main(parse(["talk.py", "--tokenizer=bytes"], "", prepare.Flags))
    (home / "model/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="brings no template"):
        prepare.main(parse(["talk.py"], "", prepare.Flags))


# ---- what a template is given and may use

def test_messages_are_written_as_templates_read_them():
    call = {"name": "f", "arguments": {"x": 1}}
    messages = [
        {"role": "tool", "content": "of no call"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning": "r", "tool_calls": [call, TOOL | call]},
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "a", "tool_calls": [call], "learn": False}]
    calls = [{"id": f"call{number:05}", "type": "function", "function": made} for number, made in
             ((1, call), (2, TOOL | call), (3, call))]
    assert templates.for_template(messages) == [
        {"role": "tool", "content": "of no call"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning": "r", "reasoning_content": "r",
         "thinking": "r", "tool_calls": calls[:2]},
        {"role": "tool", "content": "1", "tool_call_id": "call00001", "name": "f"},
        {"role": "tool", "content": "2", "tool_call_id": "call00002", "name": "f"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "a", "tool_calls": calls[2:]}]


@pytest.mark.parametrize(("text", "parts", "kept"), [
    ("a b", ["a", "b"], True), ("a b", ["a", "c"], False), ("a", [], True), ("x", [" x\n"], True),
    ('say \\"no\\"', ['say "no"'], True), ('say "no"', ['say "no"'], True),
    ("a\\nb", ["a\nb"], True), ("ab", ["a\nb"], False), ("é", ["é"], True)])
def test_what_a_template_keeps(text, parts, kept):
    assert templates.keeps(text, *parts) == kept


@pytest.mark.parametrize(("source", "text"), [
    ("{{ {'b': 'é', 'a': 1} | tojson }}", '{"b": "é", "a": 1}'),
    ("{{ {'b': 'é'} | tojson(ensure_ascii=true) }}", '{"b": "\\u00e9"}'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}", '{\n "b": 1,\n "a": 2\n}'),
    ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
    ("{% if true %}\nx\n{% endif %}\ny", "x\ny"), ("a\n   {% if true %}\nb{% endif %}", "a\nb"),
    ("{% generation %}x{% endgeneration %}y", "xy"), ("{{ strftime_now('%Y-%m') }}", "2031-05"),
    ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1")])
def test_what_a_template_may_use(source, text):
    assert templates.compiled(source, datetime(2031, 5, 4)).render() == text


def test_white_space_beside_special_tokens_is_theirs_if_they_take_it():
    spec = json.loads(tokenizer_json.complete(vocabulary.single_bytes(), "x")[1])
    spec["added_tokens"] += [
        {"id": 300, "content": "<bare>", "special": True},
        {"id": 301, "content": "<bare>left", "special": True, "lstrip": True, "rstrip": False},
        {"id": 302, "content": "<right>", "special": True, "lstrip": False, "rstrip": True},
        {"id": 303, "content": "<no>", "special": False}]
    made = templates.Template("{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}"
                              "{% if add_generation_prompt %}assistant{% endif %}", spec)
    found = [*made.written.finditer(" <bare> <bare>left <right> <no> <s>")]
    assert [one[0] for one in found] == ["<bare>", " <bare>left", "<right> ", "<s>"]
    assert [[*filter(None, one.groups())] for one in found] == [
        ["<bare>"], ["<bare>left"], ["<right>"], ["<s>"]]
    assert made.ends == {"</s>"} and made.begin == ""
    assert made.marked({"<s>": ["a</s>", 3], "b": "<no>"}, "|") == {
        "<|s>": ["a<|/s>", 3], "b": "<no>"}
