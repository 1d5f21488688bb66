import json
import math

import torch
from safetensors import safe_open

from eagle3.conversations import load_conversations
from eagle3.embedded import write_embedded_conversations, write_embedded_target
from eagle3.target import FrozenTarget
from eagle3.tokens import encode


def write_tiny_target(folder, *, num_steps=12):
    folder.mkdir()
    write_embedded_conversations(folder / "chats.jsonl", num_conversations=60, seed=0)
    write_embedded_target(
        folder / "target", folder / "chats.jsonl", seed=0, num_steps=num_steps, vocab_size=512, max_length=96
    )


def test_conversations_load_and_their_answers_have_twenty_to_a_hundred_and_twenty_words(tmp_path):
    write_embedded_conversations(tmp_path / "chats.jsonl", num_conversations=300, seed=0)
    conversations = load_conversations(tmp_path / "chats.jsonl")
    answers = [m.content for chat in conversations for m in chat.messages if m.role == "assistant"]
    words = sorted(len(answer.split()) for answer in answers)
    assert len(conversations) == 300
    assert 20 <= words[0] <= words[-1] <= 120
    assert {2, 3, 4, 5, 6, 7} == {len(chat.messages) for chat in conversations}


def test_a_seed_decides_the_conversations(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write_embedded_conversations(tmp_path / name, num_conversations=20, seed=seed)
    one, again, other = ((tmp_path / name).read_bytes() for name in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_a_taught_target_is_tied_in_config_and_file(tmp_path):
    write_tiny_target(tmp_path / "world", num_steps=1)
    folder = tmp_path / "world" / "target"
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["num_hidden_layers"] == 8
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert 512 == config["vocab_size"]


def test_a_taught_target_is_surprised_less_by_its_answers_than_one_that_knows_nothing(tmp_path):
    write_tiny_target(tmp_path / "world")
    target = FrozenTarget.load(tmp_path / "world" / "target", dtype=torch.float32, device="cpu")
    examples = encode(load_conversations(tmp_path / "world" / "chats.jsonl"), target.tokenizer, max_length=96).examples
    losses = []
    for example in examples:
        logits = target.model(input_ids=example.input_ids[None, :-1]).logits[0, example.loss_mask[1:]]
        losses.append(torch.nn.functional.cross_entropy(logits, example.input_ids[1:][example.loss_mask[1:]]))
    assert math.log(512) - 1 > torch.stack(losses).mean()


def test_a_taught_target_loads_as_target_and_encode_marks_exactly_its_answers(tmp_path):
    write_tiny_target(tmp_path / "world", num_steps=1)
    target = FrozenTarget.load(tmp_path / "world" / "target", dtype=torch.float32, device="cpu")
    assert target.head_VE is target.embedding_VE
    assert target.layer_ids == (2, 4, 5)
    conversations = load_conversations(tmp_path / "world" / "chats.jsonl")
    data = encode(conversations, target.tokenizer, max_length=2048)
    assert data.num_dropped == data.num_truncated == 0
    for conversation, example in zip(conversations, data.examples, strict=True):
        answers = [message.content + "<|im_end|>" for message in conversation.messages if message.role == "assistant"]
        assert "".join(answers) == target.tokenizer.decode(example.input_ids[example.loss_mask])


def test_the_tokenizer_gives_every_text_back(tmp_path):
    write_tiny_target(tmp_path / "world", num_steps=1)
    tokenizer = FrozenTarget.load(tmp_path / "world" / "target", dtype=torch.float32, device="cpu").tokenizer
    texts = ["Plain words.", "  spaces  and\n\nlines\t", "| a | b |", "h\u00e9llo \u4f60\u597d \U0001f600"]
    assert texts == [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts]


def test_equal_seeds_teach_equal_targets(tmp_path):
    one, again = write_tiny_target(tmp_path / "one", num_steps=2), write_tiny_target(tmp_path / "again", num_steps=2)
    assert one == again
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        files = [tmp_path / world / "target" / name for world in ("one", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_teaching_leaves_the_global_random_numbers_alone(tmp_path):
    state = torch.random.get_rng_state()
    write_tiny_target(tmp_path / "world", num_steps=1)
    assert torch.equal(state, torch.random.get_rng_state())
