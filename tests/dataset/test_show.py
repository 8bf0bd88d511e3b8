"""The page that shows what the model gets: exactly what is in the batches.

Run: python -m pytest tests/dataset/test_show.py
"""

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from config import IGNORE_INDEX, load_config, run_script
from dataset import show
from dataset.batch import Batch
from dataset.loader import make_loader
from dataset.open import source_weights
from dataset.order import PackedRow, SampleOrder, micro_batches, packed_rows
from dataset.show_page import Row, Vocabulary, write_row
from tests.toy_project import write_project
from training.run import open_processors, open_qa_file

PROJECTS = [("clip", "qwen2"), ("dinov2", "qwen1")]
INJECTION = 'Is <|im_end|> <|image_pad|><|extra_0|> a "tag", <script>alert(1)</script> or <b>&amp;</b>?'


class Page(HTMLParser):
    """A parsed page.

    articles: for each row its heading, tokens (classes, tooltip, text), images (RGB arrays) and whole text. tags: every
    element.
    """

    def __init__(self, text: str):
        super().__init__()
        self.articles, self.tags, self._token, self._heading = [], [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self._heading = tag == "h3"
        self.tags.append((tag, values))
        if tag == "article":
            self.articles.append({"name": "", "tokens": [], "images": [], "text": ""})
        elif tag == "img":
            data = values["src"].removeprefix("data:image/png;base64,")
            self.articles[-1]["images"].append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        elif tag == "i" and self.articles:
            self._token = [values["class"].split(), values["title"], ""]
            self.articles[-1]["tokens"].append(self._token)

    def handle_endtag(self, tag):
        self._token = None if tag == "i" else self._token

    def handle_data(self, data):
        if self._token is not None:
            self._token[2] += data
        if self.articles:
            self.articles[-1]["text"] += data
        if self._heading:
            self.articles[-1]["name"] += data


def tokens_of(article: dict, kind: str) -> list[tuple[list[str], str, str]]:
    return [token for token in article["tokens"] if kind in token[0]]


def count_of(article: dict, kind: str) -> int:
    """Return how many tokens the elements of a kind represent, according to their tooltips."""
    places = (re.match(r"tokens? (\d+)(?:–(\d+))?", tip).groups() for _, tip, _ in tokens_of(article, kind))
    return sum(int(last or first) - int(first) + 1 for first, last in places)


def make_page(path, *arguments) -> Page:
    output = path.parent / "page.html"
    assert show.main(["--config", str(path), "--output", str(output), *arguments]) == 0
    return Page(output.read_text(encoding="utf-8"))


def batches_of(path, number: int, packed: bool = False) -> list[Batch]:
    """Return the first micro-batches, as train.py gets them."""
    config = load_config(path)
    processors = open_processors(config)
    dataset = open_qa_file(config, processors, config.data.qa_file)
    order = SampleOrder(np.arange(len(dataset)), config.seed, source_weights(dataset, config.data))
    size, accumulation = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    keys: list[list[tuple[int, int]] | PackedRow] = []
    if packed:
        keys += packed_rows(order, range(number), samples_per_step=size * accumulation, rows=accumulation)
    else:
        keys += micro_batches(order, range(number), batch_size=size, accumulation=accumulation)
    return list(make_loader(dataset, keys[:number], processors.tokenizer.pad_token_id, packed=packed))


def image_token_of(path) -> int:
    return show.vocabulary(open_processors(load_config(path))).image_token_id


def padded_project(folder, *kind) -> Path:
    """Write a project whose batches are padded; `train.packing=on` on the command line packs them."""
    path = write_project(folder, *kind)
    values = yaml.safe_load(path.read_text())
    values["train"]["packing"] = "off"
    path.write_text(yaml.safe_dump(values))
    return path


def write_qa(path, records: list[dict], **data) -> None:
    """Give a project a QA file of these records and nothing else."""
    values = yaml.safe_load(path.read_text())
    values["data"] |= {"sources": [], "validation_file": None, "qa_file": "own.jsonl", "max_length": 2000, **data}
    values["train"]["eval_steps"] = None
    path.write_text(yaml.safe_dump(values))
    lines = [json.dumps({"id": f"r{i}", **record}, ensure_ascii=False) for i, record in enumerate(records)]
    (path.parent / "own.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def talk(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module", params=PROJECTS, ids="-".join)
def project(request, tmp_path_factory):
    return padded_project(tmp_path_factory.mktemp("project"), *request.param)


@pytest.fixture
def fresh(tmp_path):
    return padded_project(tmp_path / "project", *PROJECTS[0])


# --- the page shows what is in the batch


def test_the_page_counts_what_is_in_the_batches(project):
    page = make_page(project, "--count", "6")
    batches = batches_of(project, 3)
    token = image_token_of(project)
    rows = [(batch, i) for batch in batches for i in range(len(batch.ids))]
    assert len(page.articles) == len(rows) == 6
    padded = 0
    for article, (batch, i) in zip(page.articles, rows, strict=True):
        ids, mask = batch.input_ids[i], batch.attention_mask[i] == 1
        supervised = batch.labels[i] != IGNORE_INDEX
        expected = {
            "image": int((ids == token).sum()),
            "supervised": int(supervised.sum()),
            "padding": int((~mask).sum()),
            "prompt": int((mask & ~supervised & (ids != token)).sum()),
            "mislabelled": 0,
        }
        assert {kind: count_of(article, kind) for kind in expected} == expected
        assert article["name"] == batch.ids[i] and "source train" in article["text"]
        text = article["text"].replace(",", "")
        assert f"{int(mask.sum())} tokens" in text and "type colour" in text
        for kind in ("image", "prompt", "supervised"):
            assert f"{expected[kind]} {kind}" in text
        assert (f"padding × {expected['padding']}" in text) == bool(expected["padding"])
        assert f", {expected['supervised'] / int(mask.sum()):.1%} learned: " in article["text"]
        padded += expected["padding"]
    assert padded > 0


def test_a_packed_row_is_one_article_with_everything_that_training_gets(project):
    """Every row of a step is shown, in order. A sample's counts are in its part of the row, padding comes after the last."""
    page = make_page(project, "--count", "12", "train.packing=on")
    batches = batches_of(project, 6, packed=True)
    token = image_token_of(project)
    processor = open_processors(load_config(project)).image_processor
    assert len(page.articles) == len(batches) == 6 and sum(len(batch.ids) for batch in batches) == 12
    for article, batch in zip(page.articles, batches, strict=True):
        ids, labels, supervised = batch.input_ids[0], batch.labels[0], batch.labels[0] != IGNORE_INDEX
        padding = sum(batch.lengths[len(batch.ids) :])
        expected = {
            "image": int((ids == token).sum()),
            "supervised": int(supervised.sum()),
            "padding": padding,
            "prompt": len(ids) - padding - int(supervised.sum()) - int((ids == token).sum()),
            "mislabelled": 0,
        }
        assert {kind: count_of(article, kind) for kind in expected} == expected
        assert article["name"] == "".join(batch.ids) and f"padding × {padding}" in article["text"]
        for name, length, own in zip(batch.ids, batch.lengths, labels.split(batch.lengths), strict=False):
            share = f"{int((own != IGNORE_INDEX).sum()) / length:.1%}"
            assert re.search(
                rf"{name}source train · type colour · epoch \d{length} tokens, {share} learned", article["text"]
            )
        shown = processor.denormalise(batch.pixel_values).numpy()
        assert all(np.array_equal(a, b) for a, b in zip(article["images"], shown, strict=True))
    assert sum("position 0 " in tip for article in page.articles for _, tip, _ in article["tokens"]) == 12 + 6


def test_a_packed_row_is_shown_whole_and_each_sample_under_its_own_name(fresh):
    """Texts of four lengths, so that a row's samples are not neighbours in the order; the last row may add a sample."""
    write_qa(fresh, [{"type": f"kind{i}", "conversations": talk("Q", "A" * (1 + 9 * (i % 4)))} for i in range(8)])
    more = ("train.packing=on", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2")
    for count, rows in ((1, 1), (5, 2), (9, 3)):
        page = make_page(fresh, "--count", str(count), *more)
        assert len(page.articles) == rows
        for article in page.articles:
            assert re.findall(r"r(\d)type kind(\d)", article["text"]) == [
                (i, i) for i in re.findall(r"\d", article["name"])
            ]
    assert f"the first {sum(len(article['name']) // 2 for article in page.articles)} that training" in (
        fresh.parent / "page.html"
    ).read_text(encoding="utf-8")


def test_supervised_tokens_read_as_the_answers_and_their_stop_tokens(project):
    page = make_page(project, "--count", "9")
    qa = load_config(project).data.qa_file
    records = {record["id"]: record for record in map(json.loads, qa.read_text().splitlines())}
    seen = set()
    for article in page.articles:
        turns = records[article["name"]]["conversations"]
        read = "".join(text for *_, text in tokens_of(article, "supervised"))
        assert read == "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
        asked = "".join(text for *_, text in tokens_of(article, "prompt"))
        start, end = "<|im_start|>", "<|im_end|>"
        assert asked == "".join(
            f"{start}user\n{turn['content'].removeprefix('<image>')}{end}\n"
            if turn["role"] == "user"
            else f"{start}assistant\n\n"
            for turn in turns
        )
        seen.add(article["name"])
    assert seen == set(records)  # an epoch of the toy project


def test_images_are_those_that_the_encoder_gets_and_not_the_files(fresh):
    folder = fresh.parent / "images"
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    names = [["0.png", "1.png"], [], ["2.png"]]  # two images in a row, none, one: nothing may shift
    write_qa(
        fresh,
        [
            {"image": [f"images/{n}" for n in some], "conversations": talk("<image>" * len(some) + "Q", "A")}
            for some in names
        ],
    )
    page = make_page(fresh, "--count", "3", "train.per_device_train_batch_size=3")
    processor = open_processors(load_config(fresh)).image_processor
    for article in page.articles:
        some = names[int(article["name"].removeprefix("r"))]
        assert len(article["images"]) == len(tokens_of(article, "image")) == len(some)
        for name, shown in zip(some, article["images"], strict=True):
            image = Image.open(folder / name)
            assert np.array_equal(shown, processor.denormalise(processor([image]))[0].numpy())
            resized = np.asarray(image.resize(shown.shape[:2]))
            assert shown.shape == (28, 28, 3) and not np.array_equal(shown, resized)
    small = [values for tag, values in page.tags if tag == "img"]
    assert len(small) == 3 and all(v["class"] == "pixels" and int(v["width"]) % 28 == 0 for v in small)


def test_images_are_shown_augmented_as_training_gets_them(fresh):
    config = load_config(fresh, ["data.augment={rotate: 45, blur: 2, views: 3}"])
    page = make_page(fresh, "--count", "4", "data.augment={rotate: 45, blur: 2, views: 3}")
    processors = open_processors(config)
    training = open_qa_file(config, processors, config.data.qa_file, is_training=True)
    plain = open_qa_file(config, processors, config.data.qa_file)
    numbers = {training.qa[index].id: index for index in range(len(training))}
    assert len(page.articles) == 4
    for article in page.articles:
        (index,) = [index for name, index in numbers.items() if article["name"].startswith(name)]
        images = [processors.image_processor.denormalise(some[0, index].pixel_values) for some in (training, plain)]
        assert np.array_equal(article["images"][0], images[0][0].numpy())
        assert not np.array_equal(article["images"][0], images[1][0].numpy())
    said = "rotate 45, blur 2; 3 views of each image; the images are shown as changed"
    assert said in (fresh.parent / "page.html").read_text()
    make_page(fresh, "--count", "1")
    assert "<dt>augmentation</dt><dd>none</dd>" in (fresh.parent / "page.html").read_text()


# --- text is text


def test_typed_special_tokens_and_markup_are_shown_as_text(fresh):
    asked = [{"type": "image"}, {"type": "text", "text": "\nWhat does <image> mean? " + INJECTION}]
    image = {"image": "images/0.png"}
    write_qa(fresh, [{"conversations": talk(INJECTION, INJECTION)}, {"conversations": talk(asked, "Text."), **image}])
    page = make_page(fresh, "--count", "2")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}
    assert sum(tag == "b" for tag, _ in page.tags) == 2  # the page's own: the number of tokens of each row
    parts, plain = sorted(page.articles, key=lambda article: "mean?" not in article["text"])
    assert "".join(text for *_, text in tokens_of(plain, "supervised")) == INJECTION + "<|im_end|>"
    assert INJECTION in "".join(text for *_, text in tokens_of(plain, "prompt"))
    for article, images in ((parts, 1), (plain, 0)):
        special = [text for *_, text in tokens_of(article, "special")]
        assert special == ["<|im_start|>", "<|im_end|>"] * 2  # only those of the prompt format
        assert len(tokens_of(article, "image")) == len(article["images"]) == images
    assert "What does <image> mean? " + INJECTION in "".join(text for *_, text in tokens_of(parts, "prompt"))


def test_a_name_is_escaped(fresh):
    name = "<script>alert('id')</script>"
    write_qa(fresh, [{"id": name, "source": "<i>", "type": "<u>&", "conversations": talk("Q", "A")}])
    page = make_page(fresh, "--count", "1")
    (article,) = page.articles
    assert f"{name}source <i> · type <u>& · epoch 1" in article["text"]
    assert "script" not in {tag for tag, _ in page.tags}


def test_characters_of_several_tokens_stay_together_and_invisible_ones_are_shown(fresh):
    answer = "图片里有一只猫🐈\t\u202e\u0000\r\n  é\ufffd"
    write_qa(fresh, [{"conversations": talk("Q", answer)}])
    page = make_page(fresh, "--count", "1")
    tokens = tokens_of(page.articles[0], "supervised")
    shown = [text for *_, text in tokens]
    written = answer.translate({ord(c): f"U+{ord(c):04X}" for c in "\u202e\u0000\r"})
    assert "".join(shown) == written + "<|im_end|>"
    cat = next(tip for _, tip, text in tokens if text == "🐈")
    first, last, ids = re.match(r"tokens (\d+)–(\d+) · position \d+ · id ((?:\d+ )+)· label \3?", cat).groups()
    assert len(ids.split()) == int(last) - int(first) + 1 > 1
    classes = [values.get("class") for tag, values in page.tags if tag == "s"]
    assert {"tab", "end", None} == set(classes)


def test_an_answer_cut_inside_a_character_is_shown(fresh):
    write_qa(fresh, [{"conversations": talk("Q", "🐈" * 40)}], max_length=50)
    page = make_page(fresh, "--count", "1", "train.per_device_train_batch_size=1")
    (article,) = page.articles
    tokens = tokens_of(article, "supervised")
    assert count_of(article, "supervised") + count_of(article, "prompt") == 50
    assert set("".join(text for *_, text in tokens)) <= {"🐈", "\ufffd"}


# --- one row


WORDS = Vocabulary(lambda token: bytes([token]), {256: "<s>", 257: "<img>"}, image_token_id=257, num_image_tokens=2)


def row(ids, labels=None, positions=None, names=(("a", ""),), padding=0) -> Row:
    ids = torch.tensor(ids)
    mask = torch.arange(len(ids)) < len(ids) - padding
    labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else torch.tensor(labels)
    positions = torch.arange(len(ids)) if positions is None else torch.tensor(positions)
    return Row(ids, labels, mask.long(), positions, np.zeros((0, 2, 2, 3), np.uint8), names)


def test_a_row_of_several_samples_has_a_line_between_them():
    """A sample begins where positions restart, even between tokens of one kind."""
    packed = row([97, 98, 99, 100, 256, 256], positions=[0, 1, 0, 1, 2, 3], names=[("one", ""), ("two", "")], padding=2)
    before, after = write_row(packed, WORDS).split("<hr>")
    assert [[t[2] for t in Page("<article>" + half).articles[-1]["tokens"]] for half in (before, after)] == [
        ["a", "b"],
        ["c", "d", "padding × 2"],
    ]
    assert "one" in before and "two" in after and "2 tokens" in before and "2 tokens" in after
    with pytest.raises(ValueError, match="1 names .* 2 samples"):
        write_row(row([97, 98], positions=[0, 0]), WORDS)


def test_a_wrong_label_and_a_learned_image_token_are_not_shown_as_right():
    wrong = row([97, 98, 257, 257, 257, 257], [IGNORE_INDEX, 97, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 257])
    (article,) = Page(write_row(wrong, WORDS)).articles
    assert [(token[0][0], token[2]) for token in article["tokens"]] == [
        ("prompt", "a"),
        ("mislabelled", "b"),
        ("chip", "<image> × 2"),
        ("chip", "<image> × 1"),
        ("supervised", "<img>"),
    ]
    assert "id 98 · label 97" in article["tokens"][1][1]


def test_a_token_that_is_markup_is_shown_as_text():
    markup = '<script src="x">&lt;'
    words = Vocabulary(lambda token: markup.encode(), {256: markup}, image_token_id=257, num_image_tokens=2)
    page = Page(write_row(row([97, 256]), words))
    assert [text for *_, text in page.articles[0]["tokens"]] == [markup, markup]
    assert f"id 256 {markup}" in page.articles[0]["tokens"][1][1]
    assert "script" not in {tag for tag, _ in page.tags}


# --- the script


def test_count_limits_the_samples_and_their_order_is_that_of_training(fresh, capsys):
    for count, rows in ((1, 1), (3, 3), (20, 20)):  # also inside of a micro-batch, and beyond the epoch
        page = make_page(fresh, "--count", str(count))
        names = [name for batch in batches_of(fresh, 10) for name in batch.ids]
        assert [article["name"] for article in page.articles] == names[:rows]
        assert ("1 of the samples are shown" in html.unescape((fresh.parent / "page.html").read_text())) == (
            count % 2 == 1
        )
    assert capsys.readouterr().out.split()[-1] == str(fresh.parent / "page.html")


def test_a_record_that_training_leaves_out_is_not_shown(fresh):
    """The order is a permutation of the records that are used."""
    long = [{"role": "user", "content": "<image>" * 8}, *talk("Q", "A")[1:]]  # 8 x 16 tokens
    records = [{"conversations": talk("Q", "A")} for _ in range(9)]
    records[4] = {"image": ["images/0.png"] * 8, "conversations": long}
    write_qa(fresh, records, max_length=100)
    page = make_page(fresh, "--count", "8")
    kept = np.delete(np.arange(9), 4)
    order = SampleOrder(kept, 1, np.ones(8))
    assert [article["name"] for article in page.articles] == [f"r{order.at(i)[1]}" for i in range(8)]
    assert "left out as they do not fit: 1 of 9 records" in (fresh.parent / "page.html").read_text()


def test_the_page_is_in_the_runs_folder_and_needs_no_other_file(fresh, capsys):
    output = fresh.parent / "run" / "show.html"
    output.parent.mkdir()
    output.symlink_to("../mine")  # in a run's folder from a stranger
    assert show.main(["--config", str(fresh), "--count", "2"]) == 0
    assert not (fresh.parent / "mine").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    text = output.read_text(encoding="utf-8")
    for word in ("tower", "lm", "config.yaml", "128 tokens", "16 tokens an image", "28 × 28 pixels", "seed 1"):
        assert word in text
    addresses = [v for tag, values in Page(text).tags for k, v in values.items() if k in ("src", "href")]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert (
        "url(" not in text
        and "@import" not in text
        and sorted(p.name for p in output.parent.iterdir()) == ["show.html"]
    )


def test_no_weights_are_opened(fresh):
    for weights in fresh.parent.rglob("*.safetensors"):
        weights.write_bytes(b"none")
    assert len(make_page(fresh, "--count", "2").articles) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count is 0"),
        (["--count", "2", "data.qa_file=gone.jsonl", "data.sources=[]"], "gone.jsonl"),
        (["--count", "2", "--output", "."], "cannot be written"),
        (["--count", "20", "broken"], "3.png"),
        (["--count", "2", "data.max_lenght=5"], "max_length"),
        (["--count", "2", "data.max_length=20"], "no record fits"),
    ],
)
def test_a_mistake_is_one_message(fresh, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(fresh.parent)
    if "broken" in arguments:
        make_page(fresh, "--count", "1")
        write_qa(fresh, [{"image": "images/3.png", "conversations": talk("<image>Q", "A")}])
        (fresh.parent / "images/3.png").write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: show.main(["--config", str(fresh), *(a for a in arguments if a != "broken")]))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
