"""The files of published benchmarks become questions. Run: python -m pytest tests/dataprocess/test_benchmarks.py

Layouts are those of the downloads; every row is made up."""

import base64
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from config import InputError
from dataprocess.benchmarks import find_benchmark, write_questions
from dataprocess.questions import open_questions
from dataset.qa_file import QAFile
from evaluation.score import questions_of
from visual.images import read_image


def draw(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path, "PNG")


def png(colour) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(data, "PNG")
    return data.getvalue()


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def asked(path, tmp_path, **options):
    """The name of the benchmark, the questions of the QA file that is made of it, and the natives of its questions."""
    found = find_benchmark(path)
    made = write_questions(found, tmp_path / "out" / "qa.jsonl", **options)
    qa = QAFile(tmp_path / "out" / "qa.jsonl")
    questions = questions_of(qa, range(len(qa)))
    assert [question.id for question in questions] == [f"{found.name}:{one.id}" for one in made]
    assert all(read_image(image).size == (8, 6) for question in questions for image in question.images)
    return found.name, questions, [one.native for one in made]


TEN = ["two"] * 4 + ["2"] * 3 + ["3"] * 3


@pytest.mark.parametrize("given", ["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"])
def test_vqav2(tmp_path, given):
    questions = [
        {"image_id": 9, "question": "How <many>?", "question_id": 9001},
        {"image_id": 10, "question": "Is it?"},
    ]
    questions[1]["question_id"] = 10000
    answers = [
        {"question_id": number, "answers": [{"answer": one, "answer_id": i} for i, one in enumerate(some)]}
        for number, some in ((10000, ["yes"] * 10), (9001, TEN))
    ]
    answers[0] |= {"answer_type": "yes/no", "multiple_choice_answer": "yes"}
    answers[1] |= {"answer_type": "number", "multiple_choice_answer": "two"}
    save(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions})
    save(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    draw(tmp_path / "val2014" / "COCO_val2014_000000000009.jpg")
    draw(tmp_path / "val2014" / "COCO_val2014_000000000010.jpg")
    name, (first, second), natives = asked(tmp_path / given, tmp_path)
    assert (name, first.text, first.reference, first.references) == ("vqav2", "How <many>?", "two", tuple(TEN))
    assert first.images[0].name == "COCO_val2014_000000000009.jpg"
    assert (first.type, second.type, second.source) == ("vqa/number", "vqa/yes/no", "vqav2")
    assert natives == [{"question_id": 9001}, {"question_id": 10000}]


def test_a_test_split_without_answers_is_asked_and_not_scored(tmp_path):
    questions = [{"image_id": 1, "question": "What?", "question_id": 11}]
    path = save(tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": questions})
    draw(tmp_path / "images" / "COCO_test2015_000000000001.jpg")
    name, (question,), _ = asked(path, tmp_path, images=tmp_path / "images")
    assert question.references == () and question.type == "vqa"
    (note,) = find_benchmark(path).notes
    assert "no v2_mscoco_test2015_annotations.json beside it" in note


def test_answers_without_their_questions_name_the_missing_file(tmp_path):
    path = save(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": []}]})
    with pytest.raises(InputError, match="put v2_OpenEnded_mscoco_val2014_questions.json beside it"):
        find_benchmark(path)


def test_gqa(tmp_path):
    obj = {
        "201": {"question": "Is it red?", "imageId": "n17", "answer": "yes", "types": {"structural": "verify"}},
        "202": {"question": "What is it?", "imageId": "n17"},
    }
    draw(tmp_path / "images" / "n17.jpg")
    name, (first, second), natives = asked(save(tmp_path / "testdev.json", obj), tmp_path)
    assert (name, first.type, first.references, second.references) == ("gqa", "vqa/verify", ("yes",), ())
    assert natives == [{"questionId": "201"}, {"questionId": "202"}]


def test_textvqa(tmp_path):
    row = {"question_id": 34, "image_id": "0f1", "question": "What brand?", "answers": TEN, "image_classes": ["Bottle"]}
    draw(tmp_path / "train_images" / "0f1.jpg")
    path = save(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    name, (question,), natives = asked(path, tmp_path)
    assert (name, question.type, question.references, natives) == ("textvqa", "vqa", tuple(TEN), [{"question_id": 34}])


def test_coco_captions(tmp_path):
    images = [{"id": 7, "file_name": "000000000007.jpg", "license": 1}, {"id": 8, "file_name": "000000000008.jpg"}]
    notes = [{"id": i, "image_id": 7, "caption": f"A cat {i}."} for i in range(5)]
    path = save(tmp_path / "captions_val2017.json", {"images": images, "annotations": notes})
    for number in (7, 8):
        draw(tmp_path / "val2017" / f"00000000000{number}.jpg")
    name, (first, second), natives = asked(path, tmp_path)
    assert (name, first.type, first.references) == ("coco", "caption", tuple(f"A cat {i}." for i in range(5)))
    assert second.references == () and natives == [{"image_id": 7}, {"image_id": 8}]
    save(tmp_path / "instances.json", {"images": images, "annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1]}]})
    assert find_benchmark(tmp_path / "instances.json") is None


def test_pope(tmp_path):
    rows = [
        {"question_id": i, "image": "COCO_val2014_000000000001.jpg", "text": f"Is there a {thing}?", "label": label}
        for i, (thing, label) in enumerate([("cat", "yes"), ("dog", "no")], start=1)
    ]
    path = tmp_path / "coco_pope_adversarial.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(tmp_path / "val2014" / "COCO_val2014_000000000001.jpg")
    name, (first, second), natives = asked(path, tmp_path)
    assert (name, first.type, first.reference, second.reference) == ("pope", "yes_no/adversarial", "yes", "no")
    assert natives == [{"question": "Is there a cat?"}, {"question": "Is there a dog?"}]


def test_mme(tmp_path):
    lines = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    for texts, images in (("color", "color"), ("scene/questions_answers_YN", "scene/images")):
        draw(tmp_path / images / "0001.jpg")
        (tmp_path / texts).mkdir(parents=True, exist_ok=True)
        (tmp_path / texts / "0001.txt").write_text(lines)
    name, questions, natives = asked(tmp_path, tmp_path)
    assert name == "mme" and [q.reference for q in questions] == ["Yes", "No"] * 2
    assert [q.type for q in questions] == ["yes_no/color"] * 2 + ["yes_no/scene"] * 2
    assert natives[3] == {
        "task": "scene", "image": "0001.jpg", "question": "Is it blue? Please answer yes or no.", "answer": "No"
    }  # fmt: skip


COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]


def table(path, rows):
    text = "\n".join("\t".join(str(cell) for cell in row) for row in [COLUMNS, *rows])
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_mmbench_with_its_rotated_questions(tmp_path):
    red, blue = (base64.b64encode(png(colour)).decode() for colour in ("red", "blue"))
    rows = [
        [241, "What colour?", "Look.", "red", "blue", "nan", "", "A", "colour", red, "dev"],
        [1000241, "What colour?", "Look.", "blue", "red", "nan", "", "B", "colour", 241, "dev"],
        [7, "颜色？", "nan", 1.0, 2, 3, 4, "", "other", blue, "dev"],
    ]
    name, (first, second, third), natives = asked(table(tmp_path / "MMBench_DEV_EN.tsv", rows), tmp_path)
    assert (name, first.text) == ("mmbench", "Look.\nWhat colour?\nA. red\nB. blue")
    assert (second.options, second.reference, second.group, first.group) == (("blue", "red"), "B", "241", "241")
    assert first.images == second.images != third.images and first.type == "choice/colour"
    assert third.references == () and third.text.startswith("颜色？\nA. 1") and third.group == "7"
    assert natives[1] == {
        "index": 1000241, "question": "What colour?", "A": "blue", "B": "red", "hint": "Look.", "category": "colour",
        "split": "dev", "answer": "B",
    }  # fmt: skip


def test_mmbench_without_rotated_questions_gets_them(tmp_path):
    image = base64.b64encode(png("red")).decode()
    rows = [[5, "What?", "", "red", "blue", "green", "", "C", "colour", image, "dev"]]
    _, questions, natives = asked(table(tmp_path / "MMBench_DEV_CN_V11.tsv", rows), tmp_path)
    assert [q.options for q in questions] == [
        ("red", "blue", "green"), ("blue", "green", "red"), ("green", "red", "blue")
    ]  # fmt: skip
    assert [q.reference for q in questions] == ["C", "B", "A"] and {q.group for q in questions} == {"5"}
    assert [native["index"] for native in natives] == [5, 1000005, 2000005]
    _, (question,), _ = asked(table(tmp_path / "MMStar.tsv", rows), tmp_path)
    assert question.group == ""


def test_mmstar_as_parquet(tmp_path):
    values = {
        "index": [0], "question": ["What? Options: A: a cat, B: a dog"], "image": [png("red")], "answer": ["B"],
        "category": ["coarse"], "l2_category": ["scene"], "meta_info": [{"source": "x"}],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(values), tmp_path / "mmstar.parquet")
    name, (question,), _ = asked(tmp_path / "mmstar.parquet", tmp_path)
    assert (name, question.type, question.reference, question.options) == ("mmbench", "choice/coarse", "B", ())
    pyarrow.parquet.write_table(pyarrow.table({"question": ["What?"], "answer": ["x"]}), tmp_path / "other.parquet")
    assert find_benchmark(tmp_path / "other.parquet") is None


def test_scienceqa(tmp_path):
    problem = {
        "question": "Which?",
        "choices": ["north", "south"],
        "answer": 1,
        "hint": "",
        "subject": "social science",
    }
    problems = {
        "1": problem | {"image": None, "split": "train"},
        "4": problem | {"image": "image.png", "split": "test"},
        "5": problem | {"image": None, "split": "test", "hint": "A map."},
    }
    save(tmp_path / "problems.json", problems)
    draw(tmp_path / "images" / "test" / "4" / "image.png")
    for path in (tmp_path, tmp_path / "problems.json"):
        name, (first, second), natives = asked(path, tmp_path)
        assert (name, first.text, second.text) == (
            "scienceqa", "Which?\nA. north\nB. south", "A map.\nWhich?\nA. north\nB. south"
        )  # fmt: skip
        assert (first.reference, first.type, second.images) == ("B", "choice/social science", ())
        assert natives == [{"id": "4"}, {"id": "5"}] and find_benchmark(path).notes == [
            "the test split: 2 of 3 questions"
        ]


def test_seed_bench(tmp_path):
    choices = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
    rows = [
        choices | {"answer": "C", "data_id": "145_2", "data_type": "image", "question": "What?", "question_id": "10"},
        choices | {"answer": "A", "data_id": "v.mp4", "data_type": "video", "question": "What?", "question_id": "11"},
    ]
    rows[0]["question_type_id"] = 1
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps({"questions": rows, "question_type": {"Scene Understanding": 1}}, indent=1))
    draw(tmp_path / "SEED-Bench-image" / "145_2")
    name, (question,), natives = asked(path, tmp_path)
    assert (name, question.reference, question.type) == ("seed", "C", "choice/Scene Understanding")
    assert question.options[2] == "option c" and natives == [{"question_id": "10"}]
    assert find_benchmark(path).notes == ["left out: 1 questions about videos"]


def test_a_missing_image_is_an_error_with_advice(tmp_path):
    obj = {str(i): {"question": "What?", "imageId": f"n{i}", "answer": "x"} for i in range(5)}
    path = save(tmp_path / "gqa.json", obj)
    draw(tmp_path / "n0.jpg")
    with pytest.raises(InputError) as caught:
        asked(path, tmp_path)
    message = str(caught.value)
    assert "4 of 5 questions cannot be asked" in message and "--images DIR" in message
    assert "question 1: " in message and "n1.jpg" in message and message.endswith("and 1 more")
    assert not (tmp_path / "out" / "qa.jsonl").exists()
    _, (question,), _ = asked(path, tmp_path, limit=1)
    assert question.id == "gqa:0"


def test_a_damaged_benchmark_is_named(tmp_path):
    path = save(tmp_path / "gqa.json", {"1": {"question": "What?", "imageId": 1}, "2": {"question": "What?"}})
    with pytest.raises(InputError, match="looks like a file of gqa, but cannot be read"):
        find_benchmark(path)


# --- what --qa takes


def test_a_qa_file_is_used_as_it_is(tmp_path):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]
    record = {"id": "a", "conversations": turns}
    for name, text in (("a.jsonl", json.dumps(record)), ("a.json", json.dumps([record], indent=1))):
        (tmp_path / name).write_text(text)
        assert open_questions(tmp_path / name, tmp_path / "out").qa_file == tmp_path / name
    found = open_questions(tmp_path / "a.jsonl", tmp_path / "out", settings=["data.max_refused=0.1"])
    assert found.qa_file == tmp_path / "a.jsonl"
    (tmp_path / "broken.jsonl").write_text('{"id": "a", "conver\n')
    for name in ("broken.jsonl", "gone.jsonl"):  # QAFile says what is wrong
        assert open_questions(tmp_path / name, tmp_path / "out").qa_file == tmp_path / name
    assert not (tmp_path / "out").exists()


def test_a_raw_source_needs_no_config(tmp_path, capsys):
    draw(tmp_path / "pictures" / "a.png")
    (tmp_path / "t.csv").write_text("文件,问,答\na.png,什么?,猫\n", encoding="utf-8")
    settings = ["columns.image=文件", "columns.question=问", "columns.answer=答"]
    found = open_questions(tmp_path / "t.csv", tmp_path / "out", images=tmp_path / "pictures", settings=settings)
    assert found.qa_file == tmp_path / "out" / "questions" / "t.jsonl" and found.benchmark == ""
    qa = QAFile(found.qa_file)
    (question,) = questions_of(qa, [0])
    assert (question.reference, question.images[0].resolve()) == ("猫", (tmp_path / "pictures" / "a.png").resolve())
    assert "1" in capsys.readouterr().out

    llava = [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}]
    llava[0]["conversations"].append({"from": "gpt", "value": "A cat."})
    path = save(tmp_path / "pictures" / "llava.json", llava)
    qa = QAFile(open_questions(path, tmp_path / "out").qa_file)
    assert questions_of(qa, [0])[0].reference == "A cat."
    draw(tmp_path / "folder" / "b.png")
    (tmp_path / "folder" / "b.txt").write_text("A red square.")
    qa = QAFile(open_questions(tmp_path / "folder", tmp_path / "out").qa_file)
    assert questions_of(qa, [0])[0].reference == "A red square."


def test_a_setting_that_means_nothing_is_refused(tmp_path, capsys):
    path = save(tmp_path / "gqa.json", {"1": {"question": "What?", "imageId": "n", "answer": "x"}})
    draw(tmp_path / "n.jpg")
    with pytest.raises(InputError, match="a file of gqa takes limit=N"):
        open_questions(path, tmp_path / "out", settings=["format=csv"])
    found = open_questions(path, tmp_path / "out", settings=["limit=1"])
    assert (found.benchmark, len(found.asked)) == ("gqa", 1)
    assert "1 questions in the form of gqa, the first 1 of 1" in capsys.readouterr().out
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="the source is --qa"):
        open_questions(tmp_path / "x.csv", tmp_path / "out")
