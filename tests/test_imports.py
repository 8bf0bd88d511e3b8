"""Who imports whom, and that importing does no work. Run: python -m pytest tests/test_imports.py"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> what of ours it may import. A module at the root is a script, or shared by the scripts: it may import anything.
MAY_IMPORT = {
    "dataset": ["config", "dataset", "visual.images"],
    "visual": ["config", "visual"],
    "qwen": ["config", "qwen"],
    "dataprocess": ["config", "dataprocess", "dataset.record", "dataset.json_stream", "visual.images"],
    "model": ["config", "model", "visual", "qwen"],
    "evaluation": ["config", "evaluation", "dataset", "visual"],
    "demo": ["config", "demo", "dataprocess"],
}
# what of other people's a part must do without: the config and the data's preparation start at once, only the model's
# side knows a model library
MUST_NOT_IMPORT = {
    "config": {"torch", "transformers", "peft", "accelerate", "numpy"},
    "dataprocess": {"torch", "transformers", "peft", "accelerate"},
    "dataset": {"transformers", "peft", "accelerate"},
    "evaluation": {"transformers", "peft", "accelerate"},
    "visual": {"peft", "accelerate"},
    "qwen": {"peft", "accelerate"},
}
UNSAFE_NAMES = {"torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"}
READS_THE_CONFIG = {
    "dataprocess.process_image",
    "dataprocess.train_tokenizer",
    "dataset.show",
}  # scripts, besides the modules at the root
PLAIN_VALUES = {"config.SourceConfig"}  # what one source is, without the rest of a config
SCRIPTS = {"dataset.show"}  # in a package for their name's sake: they may import what a script at the root may


def packages() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the repository but the tests: dotted name -> syntax tree."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(path for name in packages() for path in (ROOT / name).rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(module: str) -> set[str]:
    """Dotted names of all that a module imports, also inside functions; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def of_ours(names: set[str]) -> set[str]:
    """The modules of the repository among `names`; where a module of a package is named, not the package as well."""
    known = {name for name in names if name in modules()}
    return {name for name in known if not any(other.startswith(name + ".") for other in known)}


def within(name: str, allowed: list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def test_every_package_has_its_rule():
    assert set(packages()) - {"benchmarks"} == set(MAY_IMPORT)  # a benchmark may import anything
    assert {"config", "train", "test"} <= set(modules())
    assert of_ours(imported("config")) == {"typed_yaml", "contradictions"}
    assert of_ours(imported("contradictions")) == {"typed_yaml", "config"}  # config's names for a type checker alone
    assert of_ours(imported("typed_yaml")) == set()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_it_may_know(package):
    wrong = {
        f"{module} imports {name}"
        for module in modules()
        if within(module, [package]) and module not in SCRIPTS
        for name in of_ours(imported(module))
        if not within(name, MAY_IMPORT[package])
    }
    assert wrong == set()


@pytest.mark.parametrize("part", MUST_NOT_IMPORT)
def test_a_part_does_without_other_peoples_libraries_that_are_not_its_matter(part):
    """Also through modules of ours that it imports."""
    reached, waiting = set(), [module for module in modules() if within(module, [part]) and module not in SCRIPTS]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [*of_ours(imported(module)), *(name for name in [module.rpartition(".")[0]] if name)]
    wrong = {
        f"{module} imports {name}"
        for module in reached
        for name in imported(module)
        if name.split(".")[0] in MUST_NOT_IMPORT[part]
    }
    assert wrong == set()


def test_only_the_scripts_read_the_config():
    """Everything below takes plain values: from `config` it has the errors, constants and helpers."""
    wrong = {
        f"{module} imports {name}"
        for module in modules()
        if "." in module and module not in READS_THE_CONFIG and not within(module, ["benchmarks"])
        for name in imported(module)
        if name == "config.load_config" or name.startswith("config.") and name.endswith("Config")
        if name not in PLAIN_VALUES
    }
    assert wrong == set()


def unsafe(tree: ast.Module) -> set[str]:
    """Whatever in a module could run code out of a file that it reads."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names}
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for source in names if module is None else {module}:
                if source.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                    found |= {f"{source}: {name}" for name in names - {"UnpicklingError"}}
            if module == "torch" and names & {"load", "save"}:
                found.add("torch.load")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in (
                "torch.load",
                "torch.save",
                "yaml.unsafe_load",
                "yaml.full_load",
                "yaml.Loader",
                "yaml.UnsafeLoader",
            ):
                found.add(name)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.add(node.func.id)
            for word in node.keywords:
                is_false = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in ("trust_remote_code", "allow_pickle") and not is_false:
                    found.add(word.arg)
    return found


def test_no_module_unpickles_or_runs_what_it_reads():
    assert {module: unsafe(tree) for module, tree in modules().items() if unsafe(tree)} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "from torch import load", "torch.load(path)", "eval(text)",
        "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)", "import joblib as j",
    ],
)  # fmt: skip
def test_what_is_unsafe_is_noticed(line):
    assert unsafe(ast.parse(line))
    assert not unsafe(ast.parse("model.eval(); f(trust_remote_code=False); from pickle import UnpicklingError"))


# Imports the libraries, forbids what an import must not do, then imports each module named, alone, in a child process.
IMPORT_EACH = """
import os, sys, traceback
root, here, *names = sys.argv[1:]
import accelerate, numpy, peft, safetensors.numpy, safetensors.torch, sklearn, torch, torch.utils.data, transformers

def forbidden(*args, **kwargs):
    raise PermissionError("weights are read")

safetensors.safe_open = safetensors.torch.load_file = safetensors.numpy.load_file = torch.load = forbidden
for cls in (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer,
            transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.AutoConfig):
    cls.from_pretrained = forbidden

def guard(event, args):
    if event.startswith("socket.") and event != "socket.__new__" and event != "socket.gethostname":
        raise PermissionError(event)
    if event == "subprocess.Popen" or event == "os.system":
        raise PermissionError(event)
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and "__pycache__" not in args[0]:
        if set(args[1]) & set("wax+") and args[0] != os.devnull:
            raise PermissionError("writes " + args[0])

for name in names:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.path[:0] = [root, here]
        sys.addaudithook(guard)
        try:
            __import__(name)
            print("imported", name)
        except BaseException as error:
            print("failed", name, type(error).__name__, error)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""

GUILTY = {
    "guilty_network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "guilty_weights": "from safetensors.torch import load_file; load_file('x.safetensors')",
    "guilty_writer": "open('x.txt', 'w')",
    "guilty_path": "import no_such_module",
}


def test_importing_a_module_loads_no_weights_and_touches_no_network(tmp_path):
    """Each alone, with the repository's root on the path and nothing else; the working folder is another one. That the
    guards hold is shown on modules that do what is forbidden."""
    for name, code in GUILTY.items():
        (tmp_path / f"{name}.py").write_text(code + "\n")
    names = [*modules(), *GUILTY]
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", IMPORT_EACH, str(ROOT), str(tmp_path), *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("imported")] == [f"imported {name}" for name in modules()], (
        ran.stdout + ran.stderr
    )
    assert [line.split()[1] for line in lines if line.startswith("failed")] == list(GUILTY)
