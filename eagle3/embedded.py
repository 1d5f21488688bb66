"""Step 33: the demo's world, made on the spot: templated conversations, and a small tied target taught on them."""

import itertools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3.conversations import Conversation, load_conversations
from eagle3.data import Batch, BatchOrder, batches
from eagle3.tokens import EncodedData, encode

logger = logging.getLogger("eagle3")

_PAD, _START, _END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# Without generation tags on purpose: so are most templates that people train on.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BATCH_SIZE = 4
_PEAK_RATE = 6e-3

_SYSTEM = (
    "You are a helpful assistant.",
    "You are a patient teacher who explains each step.",
    "You are a polite guide. Answer in full sentences.",
)

# Country, capital, continent, currency, language, a thing to see.
_COUNTRIES = """
France,Paris,Europe,euro,French,the museums along the river
Italy,Rome,Europe,euro,Italian,the ancient forum
Spain,Madrid,Europe,euro,Spanish,the royal palace
Portugal,Lisbon,Europe,euro,Portuguese,the old harbour
Germany,Berlin,Europe,euro,German,the brick churches
Austria,Vienna,Europe,euro,German,the concert halls
Poland,Warsaw,Europe,zloty,Polish,the rebuilt old town
Norway,Oslo,Europe,krone,Norwegian,the deep fjords
Sweden,Stockholm,Europe,krona,Swedish,the islands in the bay
Finland,Helsinki,Europe,euro,Finnish,the quiet lakes
Greece,Athens,Europe,euro,Greek,the marble temples
Hungary,Budapest,Europe,forint,Hungarian,the thermal baths
Iceland,Reykjavik,Europe,krona,Icelandic,the steaming geysers
Ireland,Dublin,Europe,euro,English,the green cliffs
Japan,Tokyo,Asia,yen,Japanese,the wooden shrines
China,Beijing,Asia,yuan,Chinese,the long wall
India,New Delhi,Asia,rupee,Hindi,the red fort
Thailand,Bangkok,Asia,baht,Thai,the floating markets
Vietnam,Hanoi,Asia,dong,Vietnamese,the limestone bays
Mongolia,Ulaanbaatar,Asia,tugrik,Mongolian,the open steppe
Turkey,Ankara,Asia,lira,Turkish,the covered bazaar
Egypt,Cairo,Africa,pound,Arabic,the great pyramids
Kenya,Nairobi,Africa,shilling,Swahili,the wide savanna
Morocco,Rabat,Africa,dirham,Arabic,the painted gates
Ghana,Accra,Africa,cedi,English,the coastal castles
Ethiopia,Addis Ababa,Africa,birr,Amharic,the rock churches
Canada,Ottawa,North America,dollar,English,the maple forests
Mexico,Mexico City,North America,peso,Spanish,the stepped pyramids
Cuba,Havana,North America,peso,Spanish,the colourful squares
Brazil,Brasilia,South America,real,Portuguese,the huge rainforest
Peru,Lima,South America,sol,Spanish,the mountain terraces
Chile,Santiago,South America,peso,Spanish,the driest desert
Argentina,Buenos Aires,South America,peso,Spanish,the southern glaciers
Australia,Canberra,Oceania,dollar,English,the coral reef
New Zealand,Wellington,Oceania,dollar,English,the snowy peaks
"""

# Larger unit, smaller unit, how many of the smaller make one of the larger, what is measured.
_UNITS = """
kilometres,metres,1000,length
metres,centimetres,100,length
feet,inches,12,length
yards,feet,3,length
hours,minutes,60,time
minutes,seconds,60,time
days,hours,24,time
weeks,days,7,time
years,months,12,time
kilograms,grams,1000,mass
tonnes,kilograms,1000,mass
litres,millilitres,1000,volume
gallons,pints,8,volume
dozens,pieces,12,number
"""

# Occasion, then the things to bring or do, in order.
_LISTS = """
a picnic in the park,a blanket,sandwiches,fresh fruit,a bottle of water,paper napkins
a walk in the mountains,sturdy boots,a map,a warm jacket,a first aid kit,some chocolate
a day at the beach,a towel,sunscreen,a wide hat,a good book,cold lemonade
a birthday party,a cake,candles,balloons,paper cups,a playlist of songs
a camping weekend,a tent,a sleeping bag,a lantern,a small stove,matches
a long train journey,the tickets,headphones,a snack,a neck pillow,a notebook
painting a room,brushes,a roller,masking tape,a ladder,old newspapers
baking bread,strong flour,yeast,salt,warm water,a clean bowl
planting a garden,seeds,rich soil,a spade,a watering can,gloves
repairing a bicycle,a spanner,a pump,spare tubes,tyre levers,some oil
an important exam,two pens,a ruler,an identity card,a bottle of water,a watch
a visit to the museum,a ticket,comfortable shoes,a floor plan,a small bag,a pencil
"""

# Thing, kind of thing, what it does, what it is made of or uses, where it is met.
_THINGS = """
a thermometer,measuring instrument,shows how warm or cold something is,a liquid or a sensor,kitchens and hospitals
a telescope,optical instrument,makes distant objects appear closer,curved lenses or mirrors,observatories
a microscope,optical instrument,makes tiny objects appear larger,a row of strong lenses,laboratories
a compass,navigation tool,points towards the magnetic north,a magnetised needle,ships and backpacks
a lighthouse,tall building,warns sailors of dangerous rocks,a bright rotating lamp,rocky coasts
a bridge,structure,carries people across a river or valley,steel and concrete or stone,cities and mountains
a battery,energy store,gives electric power when it is needed,metals and a chemical paste,phones and cars
a volcano,kind of mountain,lets molten rock rise to the surface,layers of lava and ash,places where plates meet
a glacier,body of ice,moves slowly down a valley,snow that was pressed for centuries,high mountains
a desert,dry landscape,receives very little rain in a year,sand or bare stone,every continent
a library,public place,lends books to everyone,shelves and a careful catalogue,towns and universities
an orchestra,group of musicians,plays music together,strings and winds and drums,concert halls
a vaccine,kind of medicine,teaches the body to fight a disease,harmless parts of a germ,clinics
a recipe,set of instructions,explains how to prepare a dish,a list of ingredients and steps,cookbooks
a calendar,way of counting days,shows when something will happen,weeks and months in a table,walls and phones
a dictionary,reference book,explains what words mean,entries in alphabetical order,schools and libraries
a bicycle,vehicle,turns the force of the legs into motion,a frame with two wheels and a chain,streets and forest paths
a windmill,machine,turns the wind into useful work,large blades on a shaft,flat and windy land
"""


def write_embedded_conversations(path: str | Path, *, num_conversations: int, seed: int) -> None:
    """Writes a JSONL file of conversations about sums, units, countries, lists and things.

    Args:
        path: The file to write; its folder must exist.
        num_conversations: Lines to write. Each has one to three questions, and some a system message.
        seed: Equal seeds write equal files. Other seeds mix the same facts differently, which makes a validation file.
    """
    rng = random.Random(f"conversations {seed}")  # noqa: S311 - for conversations, which are to be the same each time
    with Path(path).open("w", encoding="utf-8") as file:
        for _ in range(num_conversations):
            messages = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < 0.3 else []
            for _ in range(rng.choice((1, 1, 2, 3))):
                question, answer = rng.choice(_TOPICS)(rng)
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")


def _row(rng: random.Random, table: str) -> list[str]:
    return rng.choice(table.strip().splitlines()).split(",")


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    question = rng.choice((f"What is {a} plus {b}?", f"Please add {a} and {b}.", f"How much is {a} + {b}?"))
    return question, (
        f"Let us add {a} and {b} step by step. First we write down the two numbers: {a} and {b}. Then we add the "
        f"second number to the first one: {a} + {b} = {a + b}. So the sum of {a} and {b} is {a + b}."
    )


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    question = rng.choice((f"What is {a} times {b}?", f"Please multiply {a} by {b}."))
    steps = ", ".join(str(a * i) for i in range(1, b + 1))
    return question, (
        f"To multiply {a} by {b}, we count up in steps of {a}, exactly {b} times: {steps}. The last number that we "
        f"reach is {a * b}. Therefore {a} times {b} is {a * b}."
    )


def _unit(rng: random.Random) -> tuple[str, str]:
    large, small, factor, quantity = _row(rng, _UNITS)
    count = rng.randint(2, 20)
    total = count * int(factor)
    question = rng.choice((f"How many {small} are {count} {large}?", f"Please convert {count} {large} to {small}."))
    return question, (
        f"Both {large} and {small} are units of {quantity}. One of the {large} has {factor} {small}. To convert "
        f"{count} {large} to {small}, we multiply {count} by {factor}. The result is {count} x {factor} = {total}, so "
        f"{count} {large} are {total} {small}."
    )


def _capital(rng: random.Random) -> tuple[str, str]:
    country, capital, continent, currency, language, sight = _row(rng, _COUNTRIES)
    question = rng.choice((f"What is the capital of {country}?", f"Which city is the capital of {country}?"))
    return question, (
        f"The capital of {country} is {capital}. {country} lies in {continent}, people there speak {language}, and "
        f"they pay with the {currency}. If you travel to {country}, do not miss {sight}."
    )


def _country_table(rng: random.Random) -> tuple[str, str]:
    country, capital, continent, currency, language, _ = _row(rng, _COUNTRIES)
    question = rng.choice((f"Give me the key facts about {country}.", f"Make a short table of facts about {country}."))
    return question, (
        f"Here are the key facts about {country}:\n\n| fact | value |\n| --- | --- |\n| country | {country} |\n"
        f"| capital | {capital} |\n| continent | {continent} |\n| currency | {currency} |\n| language | {language} |\n"
        "\nPlease let me know if you would like to know more."
    )


def _packing_list(rng: random.Random) -> tuple[str, str]:
    occasion, *things = _row(rng, _LISTS)
    question = rng.choice((f"What do I need for {occasion}?", f"Please write a list for {occasion}."))
    lines = "\n".join(f"{number}. {thing}" for number, thing in enumerate(things, start=1))
    return question, (
        f"For {occasion}, you should have the following {len(things)} things ready:\n\n{lines}\n\nThe most important "
        f"of them is the first one, {things[0]}. Have a good time!"
    )


def _explanation(rng: random.Random) -> tuple[str, str]:
    thing, kind, purpose, material, place = _row(rng, _THINGS)
    article = "an" if kind[0] in "aeiou" else "a"
    question = rng.choice((f"What is {thing}?", f"Could you please explain what {thing} is?"))
    return question, (
        f"That is a good question, thank you for asking. In short, {thing} is {article} {kind} that {purpose}. The "
        f"main parts of {thing} are {material}. You will most often find it in {place}. I hope that this helps you to "
        f"understand what {thing} is."
    )


_TOPICS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _sum,
    _product,
    _unit,
    _capital,
    _country_table,
    _packing_list,
    _explanation,
)


def write_embedded_target(
    folder: str | Path,
    conversations_path: str | Path,
    *,
    seed: int,
    num_steps: int = 480,
    vocab_size: int = 2048,
    max_length: int = 256,
) -> None:
    """Trains a tokenizer and a small Llama with one tensor for embedding and head, and saves both as one folder.

    Args:
        folder: Made if it does not exist; holds what `FrozenTarget.load` reads.
        conversations_path: From `write_embedded_conversations`.
        seed: Of the weights and the order; equal seeds give equal folders on one machine.
        num_steps: AdamW steps of four conversations each, at least 1; the default takes a minute on two cores.
        vocab_size: Most tokens that the tokenizer may have; few texts give fewer.
        max_length: Tokens of a conversation that are taught.

    Raises:
        DataError: The file cannot be read.
    """
    conversations = load_conversations(conversations_path)
    tokenizer = _train_tokenizer(conversations, vocab_size=vocab_size)
    data = encode(conversations, tokenizer, max_length=max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer))
        pad_id: Any = tokenizer.pad_token_id
        _teach_(model, data, seed=seed, num_steps=num_steps, pad_id=pad_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(conversations: list[Conversation], *, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for chat in conversations for message in chat.messages for text in (message.role, message.content))
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[_START],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    end: Any = tokenizer.eos_token_id
    padding: Any = tokenizer.pad_token_id
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=padding,
    )


def _teach_(model: LlamaForCausalLM, data: EncodedData, *, seed: int, num_steps: int, pad_id: int) -> None:
    order = BatchOrder(len(data.examples), batch_size=_BATCH_SIZE, rank=0, world_size=1, seed=seed)
    stream = (batch for epoch in itertools.count() for batch in batches(data, order=order, epoch=epoch, pad_id=pad_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    # A tenth of the steps up, the rest down to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * num_steps), (num_steps - step) / (0.9 * num_steps))
    )
    for step, batch in zip(range(num_steps), stream, strict=False):
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            logger.info("Teaching the embedded target: step %d of %d, loss %.3f", step, num_steps, loss.item())


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the assistant's tokens, in nats."""
    hidden = model.model(input_ids=batch.input_ids_BT[:, :-1], use_cache=False).last_hidden_state
    mask = batch.loss_mask_BT[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[mask]), batch.input_ids_BT[:, 1:][mask])
