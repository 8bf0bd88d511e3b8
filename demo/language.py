"""Pretrain the demo's language model on dialogs about scenes that are described in words. It never sees an image.

The description takes the positions of the image features: each of the SLOTS vectors is the sum of the embeddings of the
words, in both languages, for the object at that place ("red", "star", "top left"), or of "nothing". Held-out scenes and
unseen pairs are not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from demo import world

SLOTS = 16  # feature vectors of an image, row by row
WORDS = 7  # largest number of word tokens in one slot
PLACE_OF_SLOT = [2 * (i // 8) + (i % 4) // 2 for i in range(SLOTS)]
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
DESCRIBE = {"en": ("Describe the picture.",), "zh": ("描述一下这张图片。", "图片里有什么？")}
WHERE = 0.3  # fraction of the dialogs with only questions about places, which are learned last
MUON_RATE, ADAM_RATE = 0.01, 1e-3


def corpus() -> list[str]:
    """The texts for training the tokenizer: all English sentences, and the pieces of the Chinese ones.

    The pieces make each colour, shape, place and number a token of its own in every context.
    """
    texts: list[str] = []
    for sentences in world.SENTENCES.values():
        for colour, shape in world.SEEN_PAIRS:
            for place in world.PLACES:
                words = {"number": "one", "colour": colour, "shape": shape, "place": place}
                texts += [text.format(**words) for text in sentences["en"]]
        for text in sentences["zh"]:
            pieces = text.format(number="|", colour="|", shape="|", place="|").replace("？", "|").replace("。", "|")
            texts += 30 * [piece for piece in pieces.split("|") if piece]
    texts += 30 * [*world.CHINESE.values(), *world.NUMBERS["zh"], *world.HOW_MANY["zh"], "？", "。", "，"]
    texts += 30 * [f"digit {number} of {number}" for number in world.NUMBERS["en"]]
    texts += 30 * [*world.CAPTION_OPENINGS["en"], *world.CAPTION_OPENINGS["zh"], *DESCRIBE["en"], *DESCRIBE["zh"]]
    return texts + 30 * ["Yes, No, no a the nothing", "user", "assistant"]


def new_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of about 600 tokens with Qwen2's pre-tokenizer; the special tokens come last."""
    trainer = BpeTrainer(
        vocab_size=640, min_frequency=20, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet())
    )
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(corpus(), trainer)
    bpe = json.loads(backend.to_str())["model"]
    words = sorted(set(bpe["vocab"]) - set(SPECIALS), key=bpe["vocab"].get)
    settings: dict[str, Any] = {  # a dict, because the annotations of transformers allow no merges as pairs
        "vocab": {word: i for i, word in enumerate(words)},
        "merges": [tuple(pair) for pair in bpe["merges"]],
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": list(SPECIALS),
    }
    return Qwen2Tokenizer(**settings)


def _token_ids(tokenizer: Qwen2Tokenizer, tokens: list[str]) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert isinstance(ids, list)
    return ids


def new_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.9 million parameters, random except for `_start_with_lookups`."""
    torch.manual_seed(seed)
    eos, pad = _token_ids(tokenizer, ["<|im_end|>", "<|endoftext|>"])
    config = Qwen2Config(
        vocab_size=(len(tokenizer) + 15) // 16 * 16, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, initializer_range=0.05,
        bos_token_id=None, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    _start_with_lookups(model)
    return model


@torch.no_grad()
def _start_with_lookups(model: Qwen2ForCausalLM) -> None:
    """Set initial weights for an associative lookup: "star" finds "star" and copies the words next to it.

    A model of this size otherwise needs most of its training to learn the lookup. Keys equal queries, outputs invert
    values, and the first head of the first two layers attends to the previous token (with rotary positions, a fixed
    query and key select a distance).
    """
    width = model.config.hidden_size // model.config.num_attention_heads
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[1]]))  # the rotation by one position
    key = torch.full((width,), 3.0)
    half = torch.cat([-key[width // 2 :], key[: width // 2]])
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        if i < 2:
            attention.k_proj.bias[:width] = key
            attention.q_proj.bias[:width] = key * cos[0, 0] - half * sin[0, 0]  # the key, rotated back by one position
            attention.q_proj.weight[:width] *= 0.1
            attention.k_proj.weight[:width] *= 0.1


class Talk:
    """Random dialogs about scenes and digits, as token ids in the format of the vision-language run."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.pad, self.start, self.end, self.image = _token_ids(tokenizer, list(SPECIALS))
        self.encode: Callable[[str], list[int]] = lru_cache(None)(tokenizer.encode)
        self.words: dict[str | int, list[int]] = {  # a name or a digit -> its tokens in both languages
            name: self.encode(f" {name}") + self.encode(world.CHINESE[name])
            for name in (*world.COLOURS, *world.SHAPES, *world.PLACES)
        }
        for digit, (english, chinese) in enumerate(zip(world.NUMBERS["en"], world.NUMBERS["zh"], strict=True)):
            self.words[digit] = self.encode(f" {english}") + self.encode(chinese)
        self.nothing = self.encode(" nothing")

    def slots(self, scene: world.Scene | int, rng: np.random.Generator) -> np.ndarray:
        """Word ids [16, 7] of a scene or a digit, padded with -1.

        Some words are left out at random, because a patch does not show everything either.
        """
        ids = np.full((SLOTS, WORDS), -1)
        keep = rng.random((SLOTS, WORDS)) < rng.uniform(0.8, 1.0)
        for slot, place in enumerate(PLACE_OF_SLOT):
            if isinstance(scene, int):
                found = self.words[scene]
            elif (pair := scene[place]) is None:
                found = []
            else:
                found = [token for name in (*pair, world.PLACES[place]) for token in self.words[name]]
            said = [token for token, kept in zip(found, keep[slot], strict=False) if kept] or self.nothing
            ids[slot, : len(said)] = said
        return ids

    def dialog(
        self, rng: np.random.Generator, turns: int, held_out: bool
    ) -> tuple[list[int], list[int], np.ndarray, list[tuple[str, str]]]:
        """One dialog of up to `turns` questions, or one caption if `turns` is 0.

        Returns input_ids and labels (lists), the slots' word ids [16, 7], and the (type, language) of every turn.
        """
        language = world.LANGUAGES[rng.integers(2)]
        scene = (world.held_out_scene if held_out else world.training_scene)(rng)
        subject: world.Scene | int = scene
        if turns == 0:
            prompt = DESCRIBE[language][rng.integers(len(DESCRIBE[language]))]
            questions = [world.Question("caption", prompt, world.captions(scene, language)[rng.integers(5)])]
        elif rng.random() < 0.15:
            subject = digit = int(rng.integers(10))
            questions = [world.digit_question(digit, language)]
        else:
            found = world.scene_questions(scene, language, rng)
            if rng.random() < WHERE:
                found = [question for question in found if question.type == "place"] or found
            questions = world.choose_questions(found, turns, rng)
        newline = self.encode("\n")
        ids: list[int] = []
        labels: list[int] = []
        for k, question in enumerate(questions):
            image = [self.image] * SLOTS + newline if k == 0 else []
            asked = [self.start, *self.encode("user\n"), *image, *self.encode(question.question), self.end, *newline]
            asked += [self.start, *self.encode("assistant\n")]
            answer = [*self.encode(question.answer), self.end]
            ids += asked + answer + newline
            labels += [-100] * len(asked) + answer + [-100] * len(newline)
        return ids, labels, self.slots(subject, rng), [(question.type, language) for question in questions]

    def batch(
        self, rng: np.random.Generator, size: int, turns: int, held_out: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, list[list[tuple[str, str]]]]:
        """input_ids and labels [B, L], the slots' word ids [B, 16, 7], and the (type, language) of every turn."""
        rows = [self.dialog(rng, turns, held_out) for _ in range(size)]
        length = max(len(row[0]) for row in rows)
        ids = torch.tensor([row[0] + [self.pad] * (length - len(row[0])) for row in rows])
        labels = torch.tensor([row[1] + [-100] * (length - len(row[1])) for row in rows])
        return ids, labels, torch.from_numpy(np.stack([row[2] for row in rows])), [row[3] for row in rows]


def embed(model: Qwen2ForCausalLM, ids: Tensor, slots: Tensor, *, image: int, noise: float) -> Tensor:
    """inputs_embeds [B, L, D]: token embeddings, with the sums of the slots' words at the image positions.

    ids: [B, L]; slots: [B, 16, 7]; image: the id of the image token; noise: added to the sums, relative to their
    standard deviation.
    """
    embeds = model.get_input_embeddings()(ids)
    said = (slots >= 0).to(embeds.dtype)[..., None]
    sums = (model.get_input_embeddings()(slots.clamp(min=0)) * said).sum(2) / said.sum(2).sqrt()
    sums = sums + noise * sums.detach().std() * torch.randn_like(sums)
    return embeds.masked_scatter((ids == image)[..., None], sums)


def pretrain(tokenizer: Qwen2Tokenizer, steps: int, seed: int, log: Callable[[str], None]) -> Qwen2ForCausalLM:
    """Train a language model on answers about described scenes, half of them Chinese; every tenth batch is captions."""
    rng, talk, model = np.random.default_rng(seed), Talk(tokenizer), new_model(tokenizer, seed)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr=MUON_RATE, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=0.0)
    for step in range(steps):
        ids, labels, slots, _ = talk.batch(rng, 32, turns=0 if step % 10 == 9 else 2)
        embeds = embed(model, ids, slots, image=talk.image, noise=0.1)
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])
        loss.backward()
        factor = min(1.0, (step + 1) / 30, 1.5 * (1 - step / steps))
        for optimizer, rate in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            log(f"language step {step}: loss {loss.item():.4f}")
    return model.eval()


@torch.no_grad()
def probe(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, batches: int, seed: int = 1) -> dict[str, float]:
    """Fraction of correct answers (every token, teacher forced) to one question about a held-out scene.

    Keys are "type/language".
    """
    rng, talk = np.random.default_rng(seed), Talk(tokenizer)
    right: dict[str, list[bool]] = {}
    for _ in range(batches):
        ids, labels, slots, kinds = talk.batch(rng, 128, turns=1, held_out=True)
        embeds = embed(model, ids, slots, image=talk.image, noise=0.0)
        guess = model(inputs_embeds=embeds, use_cache=False).logits.argmax(-1)
        good = ((guess[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).tolist()
        for ((type_, language),), ok in zip(kinds, good, strict=True):
            right.setdefault(f"{type_}/{language}", []).append(ok)
    return {name: float(np.mean(values)) for name, values in sorted(right.items())}


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer; generation is greedy and stops at `<|im_end|>`."""
    config = model.config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
