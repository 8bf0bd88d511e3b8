"""Checkpoints from strangers are refused with one message; no code in them runs and nothing is written.
`sh tests/run.sh tests/runs/test_hostile.py`

Every folder here has a manifest with correct hashes, because an attacker would write one too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import test as script
from config import InputError, run_script
from model.checkpoint import load_adapter, load_trained
from model.checkpoint_folder import MANIFEST, verify_folder
from model.trainable import WeightOrigins
from tests.spy import spy
from tests.toy_project import run_training, write_project

ROOT = Path(__file__).parents[2]
QUICK = ("train.eval_steps=null", "train.max_steps=1", "train.save_steps=1", "train.score_samples=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    path = write_project(tmp_path_factory.mktemp("project"))
    run_training(path, *QUICK)
    return path


@pytest.fixture
def final(project, tmp_path):
    """A copy of a trained model's folder, which a test makes hostile."""
    shutil.copytree(project.parent / "run" / "final", tmp_path / "run" / "final")
    for name in ("tower", "lm"):  # the config names them relative to the folder
        (tmp_path / name).symlink_to(project.parent / name)
    return tmp_path / "run" / "final"


def sign(folder: Path, **extra) -> None:
    """Write a manifest with the hashes of the folder's files. extra: further entries."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files | extra}))


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refused(folder: Path, capsys, *words: str) -> None:
    """Assert that test.py ends with exit code 2 and one message with these words, and changes nothing in the folder."""
    before = tree(folder)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: script.main(["--checkpoint", str(folder), "--no-image", "--question", "What is it?"]))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("error:") == 1
    assert "Traceback" not in error and len(error) < 2000
    assert all(word in error for word in words), error
    assert tree(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


@pytest.mark.parametrize(
    "name", ["{outside}", "../outside.txt", "tokenizer/../../outside.txt", "./config.yaml", "a\0b", "", ".", "x" * 5000]
)
def test_a_manifest_cannot_point_outside_of_its_folder(tmp_path, name, monkeypatch):
    """Only files found in the folder are opened."""
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.yaml").write_text("a")
    listed = name.format(outside=outside)
    sign(folder, **{listed: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}})
    opened = spy(monkeypatch, hashlib, "file_digest", lambda file, kind: file.name)
    with pytest.raises(InputError, match="manifest.json: lists .*not a plain file inside the folder"):
        verify_folder(folder)
    assert opened == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"format": 1, "files": ' + '{"a":' * 50_000, "null", "[]", "7", '"x"', "{}", '{"format": 1}',
        '{"format": [1], "files": {}}', '{"format": 1, "files": []}', '{"format": 1, "files": {"config.yaml": 3}}',
        '{"format": 1, "files": {"config.yaml": {"bytes": "1", "sha256": "a"}}}',
        '{"format": 1, "files": {"config.yaml": {"bytes": true, "sha256": "a"}}}',
        '{"format": 1, "files": {"config.yaml": {"bytes": 1, "sha256": null}}}',
        '{"format": 1, "files": {"config.yaml": {"bytes": 1e999, "sha256": "a"}}}',
        '{"format": 1, "files": {"config.yaml": {"bytes": ' + "9" * 9000 + ', "sha256": "a"}}}', "\ufeff{}", "\0",
    ],
    ids=lambda text: ascii(text[:60]),
)  # fmt: skip
def test_a_malformed_manifest_is_one_message(tmp_path, text):
    (tmp_path / "config.yaml").write_text("a")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest.json") as caught:
        verify_folder(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", [MANIFEST, "config.yaml", "state.json", "run.json", "tokenizer/tokenizer.json"])
def test_a_text_file_of_gigabytes_is_refused_before_it_is_read(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / MANIFEST).touch()
    with open(path, "wb") as file:
        file.truncate(1 << 30)  # sparse: it takes no disk space
    monkeypatch.setattr("builtins.open", pytest.fail)
    with pytest.raises(InputError, match=f"{name}: 1,074 MB, larger than the limit for this file"):
        verify_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["language_model.safetensors", "vision_tower.safetensors", "tokenizer/evil.py", "a\x1b[2J"]
)
def test_an_unlisted_file_is_refused(final, name):
    """A language_model.safetensors would be loaded if it were accepted."""
    shutil.copy(final / "projector.safetensors", final / name)
    with pytest.raises(InputError) as caught:
        verify_folder(final)
    assert repr(Path(name).name)[1:-1] in str(caught.value) and "\x1b" not in str(caught.value)


def link_file(final: Path, outside: Path) -> None:
    (final / "config.yaml").unlink()
    (final / "config.yaml").symlink_to(outside / "final" / "config.yaml")


def link_folder(final: Path, outside: Path) -> None:
    shutil.rmtree(final / "tokenizer")
    (final / "tokenizer").symlink_to(outside / "final" / "tokenizer")


def link_in_a_circle(final: Path, outside: Path) -> None:
    (final / "tokenizer" / "again").symlink_to(final)


def make_pipe(final: Path, outside: Path) -> None:
    (final / "config.yaml").unlink()
    os.mkfifo(final / "config.yaml")


@pytest.mark.parametrize("change", [link_file, link_folder, link_in_a_circle, make_pipe])
def test_a_link_or_a_pipe_in_the_folder_is_refused(final, project, change, capsys):
    change(final, project.parent / "run")  # the manifest still fits: the linked files have the same content
    refused(final, capsys, "a link or special file")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def header(entries: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80\x04.", header({}, length=2**63), header({}, length=99_000_000), header(b"[" * 50_000),
        header({"linear_1.bias": entry([2], 0, 8), "linear_2.bias": entry([2], 4, 12)}, bytes(12)),
        header({"linear_1.bias": entry([2], 0, 8), "linear_2.bias": entry([2], 0, 8)}, bytes(8)),
        header({"linear_1.bias": entry([2**62, 4], 0, 8)}, bytes(8)),
        header({"linear_1.bias": entry([-1], 0, 4)}, bytes(4)),
        header({"linear_1.bias": entry([1], 8, 12)}, bytes(12)),
        header({"linear_1.bias": entry([1], 0, 8, "OBJ")}, bytes(8)),
        header({"linear_1.bias": entry([1], 0, 8, "C64")}, bytes(8)),
        header({"linear_1.bias": entry([4], 0, 2, "F4")}, bytes(2)),
        header({}),
    ],
    ids=lambda content: ascii(content[8:60]),
)  # fmt: skip
def test_a_malformed_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "projector.safetensors").write_bytes(content)
    model = type("", (), {"projector": torch.nn.Module()})()
    model.projector.linear_1 = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="projector.safetensors: ") as caught:
        load_trained(model, WeightOrigins(frozenset(), {}), tmp_path)
    assert len(str(caught.value)) < 600


def change_tensors(path: Path, change) -> None:
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def set_one(value: float):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("name", ["projector.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "change, words",
    [
        (set_one(float("nan")), "not finite"),
        (set_one(float("-inf")), "not finite"),
        (lambda tensor: tensor.to(torch.int64), "torch.int64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda tensor: tensor[..., None].clone(), "another shape"),
    ],
    ids=["nan", "inf", "int64", "float8", "shape"],
)
def test_unusable_weights_are_named(final, capsys, name, change, words):
    change_tensors(final / name, change)
    sign(final)
    refused(final, capsys, name, words, "feature_mean" if name.startswith("proj") else "lora_")


def test_the_adapters_config_is_only_compared(final, capsys):
    """PEFT's file is for other tools; the model is built from config.yaml, and values that contradict it are refused."""
    (final / "adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}')
    sign(final)
    assert script.main(["--checkpoint", str(final), "--no-image", "--question", "What is it?"]) == 0
    for text in (
        '{"peft_type": "evil"}',
        '{"use_dora": "evil"}',
        '{"rank_pattern": {"evil": 1}}',
        "[]",
        '{"r": [{}]}',
        "7",
    ):
        (final / "adapter_config.json").write_text(text)
        sign(final)
        with pytest.raises(InputError, match=r"adapter_config\.json: (another LoRA than the config's|not an object)"):
            script.main(["--checkpoint", str(final), "--no-image", "--question", "What is it?"])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged or absurd files with correct hashes, given to the scripts


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rename_vocabulary(values: dict) -> None:
    values["model"]["vocab"] = {word: number + 2**30 for word, number in values["model"]["vocab"].items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("[]"),
        lambda path: path.write_bytes(path.read_bytes()[:3000]),
        lambda path: path.write_text("[" * 100_000),
        lambda path: change_json(path, rename_vocabulary),
        lambda path: change_json(path, lambda values: values["model"].update(merges=[["no", "such"]])),
        lambda path: change_json(path, lambda values: values["model"].update(type="WordPiece")),
        lambda path: change_json(path.with_name("tokenizer_config.json"), lambda v: v.update(pad_token=5)),
    ],
    ids=["empty", "list", "cut", "deep", "ids", "merges", "model", "token"],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_message(final, capsys, change):
    change(final / "tokenizer" / "tokenizer.json")
    sign(final)
    refused(final, capsys, "tokenizer")


@pytest.mark.parametrize(
    "values",
    [
        {"crop_size": {"height": 10_000, "width": 10_000}, "size": {"shortest_edge": 10_000}},
        {"crop_size": {"height": 2**62, "width": 2**62}}, {"crop_size": {"height": "28", "width": "28"}},
        {"size": {"shortest_edge": 10_000}}, {"size": {"shortest_edge": 10**9}}, {"size": {"shortest_edge": 0}},
        {"size": {"shortest_edge": -5}}, {"size": {"shortest_edge": "28"}}, {"size": "big"},
        {"size": {"height": 10**6, "width": 10**6}}, {"do_pad": True, "pad_size": {"height": 10**5, "width": 10**5}},
        {"image_std": [0, 1, 1]}, {"image_std": ["a", "b", "c"]}, {"image_std": None}, {"image_std": [1e-320] * 3},
        {"image_std": [float("nan")] * 3}, {"image_mean": "abc"}, {"image_mean": [[1], [2], [3]]},
        {"image_mean": [float("inf")] * 3}, {"rescale_factor": "x"}, {"rescale_factor": float("nan")}, {"resample": 99},
        {"rescale_factor": 0}, {"to_dict": 1}, {"save_pretrained": "x"}, {"size": 0}, {"crop_size": 0}, {"image_mean": [1]},
    ],
    ids=lambda values: json.dumps(values)[:60],
)  # fmt: skip
def test_an_absurd_image_processor_is_one_message(final, capsys, values):
    change_json(final / "image_processor" / "preprocessor_config.json", lambda found: found.update(values))
    sign(final)
    refused(final, capsys, "image_processor")


BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i},' * 8}]\n" for i in range(9))
ABSURD = {
    "lora.r": 10**9,
    "model.projector_hidden_size": 10**12,
    "model.image_size": 10**6,
    "model.vision_feature_layer": 10**9,
    "train.num_threads": 10**9,
    "test.num_beams": 10**9,
    "test.batch_size": 10**12,
    "test.max_new_tokens": 10**12,
}


def set_key(folder: Path, key: str, value: object) -> None:
    section, name = key.split(".")
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values[section][name] = value
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("key", ABSURD)
def test_a_number_that_would_fill_the_memory_is_named(final, capsys, key):
    set_key(final, key, ABSURD[key])
    sign(final)
    refused(final, capsys, key, str(ABSURD[key]))


def test_aliases_in_yaml_are_refused(final, capsys):
    """A few lines with aliases can expand to a billion words."""
    (final / "config.yaml").write_text(BOMB)
    sign(final)
    refused(final, capsys, "config.yaml", "alias")


def assert_script_refuses(words: list[str], *expected: str) -> None:
    """Assert that `python ...` ends with exit code 2 and one message with the expected words."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and all(word in last for word in expected), done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_the_test_command_refuses_a_hostile_checkpoint(final):
    set_key(final, "model.projector_hidden_size", 65536)  # allowed, but not the tensors' size
    sign(final)
    assert_script_refuses(
        ["test.py", "--checkpoint", str(final), "--no-image"], "projector.safetensors", "of another shape"
    )


def test_the_train_command_refuses_a_hostile_checkpoint(project, tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(project.parent / "run" / "checkpoint-1", folder)
    (folder / "tokenizer" / "tokenizer.json").write_text("[]")
    sign(folder)
    before = tree(folder)
    output = f"output_dir={tmp_path / 'run'}"
    assert_script_refuses(["train.py", "--config", str(project), *QUICK, "train.save_steps=2", output], "tokenizer")
    assert tree(folder) == before and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda f: change_json(f / "image_processor" / "preprocessor_config.json", lambda v: v.update(size=10**6)),
         "preprocessor_config.json"),
        (lambda f: change_tensors(f / "projector.safetensors", lambda tensor: tensor[..., None].clone()), "projector"),
        (lambda f: change_tensors(f / "state.safetensors", lambda tensor: tensor[..., None].clone()), "state"),
        (lambda f: (f / "config.yaml").write_text(BOMB), "alias"),
        (lambda f: set_key(f, "lora.r", 10**9), "lora.r"),
    ],
    ids=["processor", "projector", "state", "bomb", "lora.r"],
)  # fmt: skip
def test_training_does_not_resume_from_a_hostile_checkpoint(project, tmp_path, capsys, change, word):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(project.parent / "run" / "checkpoint-1", folder)
    change(folder)
    sign(folder)
    before = tree(folder)
    words = [*QUICK, "train.save_steps=2", f"output_dir={tmp_path / 'run'}", "--resume", str(folder)]
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_training(project, *words))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and word in error.splitlines()[-1] and error.count("error:") == 1
    assert "Traceback" not in error and tree(folder) == before and not (tmp_path / "run" / "metrics.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, image processor, config, state

EVIL = "import pathlib\npathlib.Path({mark!r}).write_text('run')\nclass Evil: pass\n"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_beside_the_tokenizer_is_never_run(final, tmp_path, monkeypatch, name):
    """auto_map names a class in a Python file of the folder."""
    monkeypatch.chdir(tmp_path)
    mark, folder = tmp_path / "run-it", final / "tokenizer"
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {"model_type": "evil"}
    values |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"},
    }
    path.write_text(json.dumps(values))
    for place in (folder, tmp_path):
        (place / "evil.py").write_text(EVIL.format(mark=str(mark)))
    sign(final)
    try:
        script.main(["--checkpoint", str(final), "--no-image", "--question", "What is it?"])
    except InputError as error:
        assert "tokenizer" in str(error)
    assert not mark.exists()


def test_code_beside_the_image_processor_is_never_run(final, tmp_path, capsys):
    path = final / "image_processor" / "preprocessor_config.json"
    values = json.loads(path.read_text()) | {
        "image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"},
    }  # fmt: skip
    path.write_text(json.dumps(values))
    (path.parent / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "run-it")))
    sign(final)
    refused(final, capsys, "preprocessor_config.json", "Evil")
    assert not (tmp_path / "run-it").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a: !!python/object/apply:os.system ['touch run-it']", "\0", "seed: {a: 1}", "[]"]
)
def test_a_hostile_config_is_one_message(final, tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (final / "config.yaml").write_text(text)
    sign(final)
    refused(final, capsys)
    assert not (tmp_path / "run-it").exists()


@pytest.mark.parametrize(
    "text, word",
    [
        ('{"step": -1}', "step"), ('{"step": 1e30}', "step"), ('{"step": "1"}', "step"), ("[1]", "step"),
        ('{"step": 99999999}', "training data have changed"), ("{" * 100_000, "damaged"), ("", "damaged"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_hostile_state_is_refused_before_training(project, tmp_path, capsys, text, word):
    """Exit code 2, and the run's files stay as they were."""
    folder = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(project.parent / "run" / "checkpoint-1", folder)
    (folder / "state.json").write_text(text)
    sign(folder)
    before = tree(folder)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_training(project, *QUICK, "train.save_steps=2", f"output_dir={tmp_path / 'run'}"))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and word in error and str(folder) in error
    assert "Traceback" not in error and tree(folder) == before


def test_an_adapter_with_other_tensor_names_is_refused(tmp_path, monkeypatch):
    """Names must be equal: a similar name is not enough."""
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr("model.checkpoint._refuse_other_adapter", lambda *_: None)
    monkeypatch.setattr("model.checkpoint._adapter", lambda model: {"q_proj.lora_A.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="unknown to this model"):
        load_adapter(type("", (), {"language_model": None})(), tmp_path)
